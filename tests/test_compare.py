"""`python -m pcoherence compare`: known answers, bad files, sampling, the picture."""

from __future__ import annotations

import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from pcoherence import Coherence, __main__, coherence, compare, distances
from pcoherence.spec import METRICS
from pcoherence.testing import CASES, make_case

pytestmark = pytest.mark.usefixtures("cpu_backend")

Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """What the command prints, started in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> str:
        __main__.main(["compare", *map(str, arguments)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def refused(run: Run, capsys: pytest.CaptureFixture[str]) -> Run:
    """The one line on stderr of a command that ends with status 2."""

    def call(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            run(*arguments)
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        prefix = "python -m pcoherence compare: "
        assert said.startswith(prefix)
        return said.removeprefix(prefix).strip()

    return call


def embeddings(n: int = 80, d: int = 12, seed: int = 1) -> Tensor:
    """Whose first features matter most."""
    return make_case("gaussian", n, d, seed=seed).float() * torch.linspace(2, 0.3, d)


def save(name: str, points: Tensor) -> str:
    np.save(name, points.numpy())
    return name


def values(printed: str) -> dict[str, float]:
    """Of the table, by the first word of a line."""
    found = re.findall(r"^(concordance|Kendall|Spearman|overlap).*?(-?\d\.\d{4})", printed, re.M)
    assert len(found) == 4
    return {name: float(value) for name, value in found}


# --- known answers -----------------------------------------------------------------------------


def test_a_file_agrees_with_itself(run: Run) -> None:
    path = save("a.npy", embeddings())
    printed = run(path, path)
    assert set(values(printed).values()) == {1.0}
    assert "still has 10.00 among its first 10" in printed
    assert "the same nearest rows in both" in printed
    assert "all rows, each compared with all others" in printed


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "cosine"])
def test_a_rotation_agrees(run: Run, metric: str) -> None:
    points = embeddings()
    rotation = torch.linalg.qr(make_case("gaussian", 12, 12, seed=5))[0]
    turned = 3 * points.double() @ rotation
    found = values(run(save("a.npy", points), save("b.npy", turned), "--metric", metric))
    assert set(found.values()) == {1.0}


def test_other_rows_are_near_chance_and_it_asks_about_them(run: Run) -> None:
    points = embeddings(400)
    shuffled = points[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    printed = run(save("a.npy", points), save("b.npy", shuffled))
    found = values(printed)
    assert found["concordance"] == pytest.approx(0.5, abs=0.02)
    assert found["overlap"] == pytest.approx(10 / 399, abs=0.02)
    assert "are the rows of both files in the same order?" in printed
    assert re.search(r"overlap of the 10 nearest +\S+ +0\.0251$", printed, re.M)  # 10 / 399


def test_fewer_dimensions_lie_in_between(run: Run) -> None:
    points = embeddings()
    path = save("a.npy", points)
    kept = [values(run(path, save("b.npy", points[:, :d])))["overlap"] for d in (3, 6, 11)]
    assert 0.2 < kept[0] < kept[1] < kept[2] < 1


def test_the_worst_rows_are_those(run: Run) -> None:
    """Two rows that have changed places see worst: all others see the rest as before."""
    points = embeddings(60)
    changed = points.clone()
    changed[[7, 31]] = points[[31, 7]]
    printed = run(save("a.npy", points), save("b.npy", changed), "--k", 3)
    listed = printed.split("Rows that see worst")[1].splitlines()[2:]
    own = coherence(changed, points, metric="cosine", nearest=3, reduction="none")
    expected = sorted(zip(own.overlap.tolist(), own.concordance.tolist(), range(60), strict=True))
    for line, (overlap, concordance, row) in zip(listed, expected[:5], strict=False):
        assert line.split() == [str(row), f"{concordance:.4f}", f"{overlap:.4f}"]
    assert {expected[0][2], expected[1][2]} == {7, 31}


def ties(a: Tensor, b: Tensor) -> Tensor:
    """Cosine distances, in which directions that are equal but for their rounding tie."""
    return distances.cosine(a, b).round(decimals=11)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_products_give_what_coherence_gives(case: str, metric: str) -> None:
    """Ties of equal rows included."""
    student, teacher = make_case(case, 70, 5, seed=1), make_case(case, 70, 6, seed=2)
    student[[3, 9]] = student[20].clone()
    teacher[40:44] = teacher[39].clone()
    rows = torch.tensor([0, 3, 20, 41, 69])
    views = compare.View(teacher.clone(), metric), compare.View(student.clone(), metric)
    found = compare.measured(*views, rows, 4)
    by = ties if metric == "cosine" else metric
    whole = coherence(student, teacher, metric=by, nearest=4, reduction="none")
    for ours, expected in zip(found, whole, strict=True):
        torch.testing.assert_close(ours, expected[rows], rtol=0, atol=1e-12)


def test_integers_tie_exactly() -> None:
    student = torch.randint(-3, 3, (50, 8), generator=torch.Generator().manual_seed(0)).double()
    teacher = torch.randint(-3, 3, (50, 8), generator=torch.Generator().manual_seed(1)).double()
    views = compare.View(teacher.clone(), "euclidean"), compare.View(student.clone(), "euclidean")
    found = compare.measured(*views, torch.arange(50), 5)
    for ours, expected in zip(found, coherence(student, teacher, nearest=5), strict=True):
        assert ours.mean().item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("far", [1e6, 1e-6])
def test_neither_a_common_mean_nor_a_scale_takes_digits(far: float) -> None:
    """Of float32 rows around a point that is far away, and of tiny ones."""
    points = embeddings(60)
    moved = points.double() + far if far > 1 else far * points.double()
    view, other = compare.View(moved, "euclidean"), compare.View(points.double(), "euclidean")
    found = compare.measured(view, other, torch.arange(60), 10)
    assert found.kendall.min() > 1 - 1e-12


def test_zero_rows_are_seen_as_coherence_sees_them() -> None:
    student, teacher = embeddings(30).double(), embeddings(30, seed=2).double()
    student[4:7] = 0
    views = compare.View(teacher.clone(), "cosine"), compare.View(student.clone(), "cosine")
    found = compare.measured(*views, torch.arange(30), 5)
    expected = coherence(student, teacher, metric=ties, nearest=5, reduction="none")
    torch.testing.assert_close(found.kendall, expected.kendall, rtol=0, atol=1e-12)


def test_each_side_has_its_metric(run: Run) -> None:
    points, other = embeddings(), embeddings(seed=2)
    options = ["--metric", "cityblock", "--teacher-metric", "euclidean"]
    printed = run(save("a.npy", points), save("b.npy", other), *options)
    expected = coherence(other, points, metric="cityblock", teacher_metric="euclidean")
    assert values(printed)["concordance"] == pytest.approx(expected.concordance.item(), abs=1e-4)
    assert "metric   cityblock, the teacher's euclidean" in printed


# --- sampling ----------------------------------------------------------------------------------


def test_sampling_repeats_and_is_near_the_whole(run: Run) -> None:
    points = embeddings(300)
    paths = save("a.npy", points), save("b.npy", points[:, :5])
    first, again = (run(*paths, "--anchors", 100, "--seed", 3) for _ in range(2))
    assert first == again
    assert "100 of 300 rows drawn as anchors" in first
    assert "+-" in first
    assert run(*paths, "--anchors", 100, "--seed", 4) != first
    whole = run(*paths, "--anchors", 1000)
    assert "+-" not in whole
    error = float(re.search(r"^concordance.*\+- (\S+)", first, re.M)[1])
    apart = values(first)["concordance"] - values(whole)["concordance"]
    assert 0 < abs(apart) < 4 * error


def test_the_standard_error_is_that_of_the_draw() -> None:
    """Of rows that are drawn without replacement: here, two thirds of them."""
    student, teacher = embeddings(90)[:, :5].double(), embeddings(90).double()
    whole = coherence(student, teacher, reduction="none")
    means, said = [], []
    for seed in range(300):
        rows = compare.drawn(90, 60, seed)
        part = Coherence(*(values[rows] for values in whole))
        means.append(part.overlap.mean())
        said.append(float(compare.table(part, 90, 10)[4].split("+-")[1]))
    true = torch.stack(means).std().item()
    assert sum(said) / len(said) == pytest.approx(true, rel=0.2)


def test_the_default_draws_what_a_minute_takes() -> None:
    assert compare.default_anchors(2_000, 1536, ["cosine", "cosine"]) == 2_000
    drawn = compare.default_anchors(100_000, 1152, ["cosine", "cosine"])
    assert 500 <= drawn <= 2_000
    assert compare.default_anchors(100_000, 1152, ["cosine", "cityblock"]) < drawn
    assert compare.default_anchors(10_000_000, 1152, ["cosine"]) == compare.FEWEST_ANCHORS


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    points, other = embeddings().double(), embeddings(seed=2).double()
    found = []
    for size in (compare.BLOCK_ELEMENTS, 100):
        monkeypatch.setattr(compare, "BLOCK_ELEMENTS", size)
        views = (compare.View(x.clone(), "cityblock") for x in (points, other))
        found.append(compare.measured(*views, torch.arange(80), 10))
    for whole, parts in zip(*found, strict=True):
        assert torch.equal(whole, parts)


@pytest.mark.parametrize("missing", [[], ["tqdm"], ["tqdm", "rich.progress"]])
def test_a_bar_by_whichever_is_installed(
    missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    blocks = torch.arange(6).split(2)
    assert [block.tolist() for block in compare._watched(blocks)] == [[0, 1], [2, 3], [4, 5]]


def test_without_the_extension(run: Run, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    points = embeddings(20)
    paths = save("a.npy", points), save("b.npy", points[:, :5])
    expected = run(*paths)
    monkeypatch.setattr(compare, "available_backends", lambda: {"cpu": "not there"})
    assert run(*paths) == expected
    monkeypatch.setattr(compare, "PLAIN_ROWS", 19)
    assert "expected at most 19 rows without the compiled extension (not there)" in refused(*paths)


# --- files -------------------------------------------------------------------------------------


def test_every_kind_of_file(run: Run) -> None:
    from safetensors.torch import save_file

    points = embeddings()
    path = save("a.npy", points)
    torch.save(points, "b.pt")
    torch.save({"name": "a model", "embeddings": points.bfloat16()}, "b.pth")
    save_file({"embeddings": points.half()}, "b.safetensors")
    np.save("big.npy", points.numpy().astype(">f8"))
    assert values(run(path, "b.pt"))["overlap"] == 1
    assert values(run(path, "big.npy"))["overlap"] == 1
    for name, dtype in (("b.pth", "bfloat16"), ("b.safetensors", "float16")):
        printed = run(path, name)
        assert f"80 rows of 12, {dtype}, converted to float64" in printed
        assert 0.9 < values(printed)["concordance"] < 1


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_quantised_embeddings(run: Run, dtype: torch.dtype) -> None:
    points = embeddings()
    if dtype == torch.bool:
        quantised = points > 0
    else:
        shift = 128 if dtype == torch.uint8 else 0
        quantised = (points / points.abs().max() * 127 + shift).round().to(dtype)
    options = ["--metric", "euclidean"]
    printed = run(save("a.npy", points), save("b.npy", quantised), *options)
    assert f"{str(dtype)[6:]}, converted to float64" in printed
    assert values(printed)["overlap"] > (0.2 if dtype == torch.bool else 0.9)


def bad_file(name: str) -> None:
    """One that cannot be used, in the working folder."""
    points = embeddings().numpy()
    archive = Path(name)
    match archive.stem:
        case "empty":
            archive.touch()
        case "folder":
            archive.mkdir()
        case "text":
            archive.write_text("no embeddings")
        case "flat":
            np.save(archive, points[:, 0])
        case "deep":
            np.save(archive, points[None])
        case "thin":
            np.save(archive, points[:, :0])
        case "short":
            np.save(archive, points[:2])
        case "fewer":
            np.save(archive, points[:-1])
        case "nan" | "inf":
            points[3, 2] = points[5, 1] = float(archive.stem)
            np.save(archive, points)
        case "objects":
            np.save(archive, np.array([[{}, 1], [2, 3]], dtype=object), allow_pickle=True)
        case "complex":
            np.save(archive, points.astype(complex))
        case "words":
            np.save(archive, np.array([["a", "b"]] * 80))
        case "zipped":
            np.savez("zipped.npz", points)
            Path("zipped.npz").rename(archive)
        case "cut":
            np.save(archive, points)
            archive.write_bytes(archive.read_bytes()[:-100])
        case "several":
            torch.save({"a": torch.ones(80, 3), "b": torch.ones(80, 3)}, archive)
        case "none":
            torch.save({"a": 1}, archive)
        case "list":
            torch.save([torch.ones(80, 3)], archive)
        case "pickled":
            torch.save(types.SimpleNamespace(a=1), archive)
        case "sparse":
            torch.save(torch.ones(80, 3).to_sparse(), archive)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.npy", "expected a file; got nothing there"),
        ("folder.npy", "expected a file; got a folder"),
        ("table.csv", "expected a file that ends in .npy, .pt, .pth or .safetensors; got .csv"),
        ("nothing", "expected a file that ends in .* got no ending"),
        ("empty.npy", "expected embeddings; got an empty file"),
        ("empty.pt", "expected embeddings; got an empty file"),
        ("text.npy", "expected an .npy file of numbers; got .*"),
        ("text.pt", "expected a tensor, or a dict with one, .* got .*"),
        ("text.safetensors", "expected a .safetensors file; got .*"),
        ("cut.npy", "expected an .npy file of numbers; got .*"),
        ("flat.npy", r"expected 2 dimensions \[rows, features\]; got shape \(80,\)"),
        ("deep.npy", r"expected 2 dimensions \[rows, features\]; got shape \(1, 80, 12\)"),
        ("thin.npy", r"expected at least 1 feature; got shape \(80, 0\)"),
        ("short.npy", "expected at least 3 rows; got 2"),
        ("fewer.npy", "expected as many rows as a.npy, 80; got 79"),
        ("nan.npy", "expected finite numbers; got nan in row 3 and 1 more"),
        ("inf.npy", "expected finite numbers; got inf in row 3 and 1 more"),
        ("objects.npy", "expected an .npy file of numbers; got an array of objects"),
        ("complex.npy", "expected numbers; got dtype complex128"),
        ("words.npy", "expected numbers; got dtype <U1"),
        ("zipped.npy", r"expected an .npy file; got an archive of arrays \(.npz\)"),
        ("several.pt", r"expected one tensor; got 2 \(a, b\)"),
        ("none.pt", "expected one tensor; got 0"),
        ("list.pt", "expected a tensor, or a dict with one; got a list"),
        ("pickled.pt", "expected a tensor, .* with weights_only=True; got UnpicklingError: .*"),
        ("sparse.pt", "expected a plain tensor of real numbers; got torch.sparse_coo"),
    ],
)
def test_files_that_cannot_be_used(refused: Run, name: str, said: str) -> None:
    path = save("a.npy", embeddings())
    bad_file(name)
    assert re.fullmatch(f"{re.escape(name)}: {said}", refused(path, name))
    if name != "fewer.npy":
        assert refused(name, path).startswith(f"{name}: ")


def test_several_tensors_in_a_safetensors_file(refused: Run) -> None:
    from safetensors.torch import save_file

    save_file({name: torch.ones(4, 2) for name in "abcd"}, "b.safetensors")
    assert refused("b.safetensors", "b.safetensors") == (
        "b.safetensors: expected one tensor; got 4 (a, b, c, ...)"
    )


def test_without_safetensors(refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    Path("b.safetensors").write_text("something")
    assert refused("b.safetensors", "b.safetensors").startswith(
        "b.safetensors: expected the package safetensors, which reads it; got no such package"
    )


def test_numbers_too_large_for_distances(refused: Run) -> None:
    path = save("a.npy", 1e200 * embeddings().double())
    assert "expected distances that float64 can hold" in refused(path, path)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "79"], "--k: expected at most 78, since 80 rows have 79 others.*; got 79"),
        (["--k", "0"], "argument --k: expected a whole number of at least 1; got '0'"),
        (["--k", "ten"], "argument --k: expected a whole number of at least 1; got 'ten'"),
        (["--anchors", "-5"], "argument --anchors: expected a whole number .*; got '-5'"),
        (["--seed", "-1"], "argument --seed: expected a whole number, .*; got '-1'"),
        (["--metric", "dot"], "argument --metric: invalid choice: 'dot' .*euclidean.*"),
        (["--plot", "ranks.gif"], "--plot: expected a file that ends in .png, .*; got ranks.gif"),
        (["--plot", "no/ranks.png"], "--plot: expected a folder that exists; got no"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_options_that_cannot_be_used(refused: Run, options: list[str], said: str) -> None:
    path = save("a.npy", embeddings())
    assert re.fullmatch(f"(error: )?{said}", refused(path, path, *options))


def test_few_rows_have_fewer_nearest(run: Run) -> None:
    path = save("a.npy", embeddings(3))
    assert "overlap of the 1 nearest" in run(path, path)


# --- the picture, and the process --------------------------------------------------------------


def test_the_picture(run: Run, refused: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "DRAWN_ROWS", 50)
    points = embeddings()
    paths = save("a.npy", points), save("b.npy", points[:, :5])
    printed = run(*paths, "--plot", "ranks.png")
    assert "picture  ranks.png: ranks by student against ranks by teacher, of 50 rows" in printed
    image = matplotlib.image.imread("ranks.png")
    assert Path("ranks.png").read_bytes().startswith(b"\x89PNG")
    assert min(image.shape[:2]) > 600
    assert image.std() > 0.1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert refused(*paths, "--plot", "ranks.png").startswith("--plot: expected matplotlib")


def test_in_a_process_of_its_own(tmp_path: Path) -> None:
    points = embeddings()
    np.save(tmp_path / "a.npy", points.numpy())
    np.save(tmp_path / "b.npy", points[:, :5].numpy())
    program = [sys.executable, "-X", "importtime", "-m", "pcoherence", "compare"]
    arguments = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=True)
    assert set(values(done.stdout)) == {"concordance", "Kendall", "Spearman", "overlap"}
    assert "matplotlib" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "pcoherence", "compare", str(tmp_path / "no.npy"), arguments[1]],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.endswith("no.npy: expected a file; got nothing there\n")
    assert "Traceback" not in done.stderr


def test_without_a_command_it_is_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    __main__.main([])
    assert capsys.readouterr().out.startswith("pcoherence ")
    __main__.main(["--help"])
    assert "compare TEACHER STUDENT" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        __main__.main(["contrast"])
    assert ended.value.code == 2
    assert "expected compare or nothing; got contrast" in capsys.readouterr().err
