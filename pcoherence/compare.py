"""`python -m pcoherence compare TEACHER STUDENT`: what a search by another model still finds.

Two files of embeddings of the same rows. The teacher is the model that is trusted: the old one, the
large one, all dimensions, full precision. The student is the one that is to take its place: the new
one, a small one, fewer dimensions, quantised. Nothing is trained; the measures are those of
`pcoherence.coherence`, and their spaces need not have anything in common.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import ops
from .backends import available_backends
from .metrics import (
    BLOCK_ELEMENTS,
    Coherence,
    evenly_spaced,
    ordered_distances,
    rank_agreement,
)
from .spec import METRICS

PROGRAM = "python -m pcoherence compare"

SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")
PICTURES = (".png", ".pdf", ".svg")

SECONDS = 60
"""Of one core that anchors are drawn for by default, by the three that follow."""

RANKING = 450.0
PRODUCT = 0.1
DIFFERENCE = 4.0
"""Nanoseconds of ranking a candidate by both sides, and of a feature of it, by products or, for
cityblock, by differences: as measured on an Intel Xeon of 2.5 GHz."""

FEWEST_ANCHORS = 100
"""Drawn whatever they take: a mean over fewer says little."""

DRAWN_ROWS = 512
"""Rows in the picture, whose 3,600 cells then hold 70 ranks each."""

EPSILONS = 2**12
"""Products err by far less than as many roundings; distances that are nearer to each other tie,
so that equal rows do, as they do by differences."""

BLOCKS = 50
"""Steps of the progress bar, at least, where there are as many anchors."""

PLAIN_ROWS = 2048
"""Rows at most without the extension, whose place is taken by comparisons of all pairs: n^2 memory
for each anchor."""

WORST = 5
"""Rows listed."""

UNRELATED = 0.02
"""Kendall's tau below which two files look like different rows: noise alone gives less."""


class BadInputError(Exception):
    """A file or an option that cannot be used; the message names it, and is one line."""


class Embeddings(NamedTuple):
    """A file, read."""

    path: str
    points: Tensor  # [n, d], float64
    stored: str  # the dtype in the file


# --- files -------------------------------------------------------------------------------------


def read(path: str) -> Embeddings:
    """The embeddings of a file, checked: at least 3 rows and 1 feature, all finite.

    Args:
        path: of an .npy file; of a .pt or .pth file that holds a tensor, or a dict with one; or of
            a .safetensors file with one tensor.

    Raises:
        BadInputError: naming the file, what was expected and what came.
    """
    file = Path(path)
    if file.suffix.lower() not in SUFFIXES:
        raise BadInputError(
            f"{path}: expected a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; "
            f"got {file.suffix or 'no ending'}"
        )
    if not file.is_file():
        raise BadInputError(
            f"{path}: expected a file; got {'a folder' if file.is_dir() else 'nothing there'}"
        )
    if not file.stat().st_size:
        raise BadInputError(f"{path}: expected embeddings; got an empty file")
    readers = {".npy": _of_numpy, ".safetensors": _of_safetensors}
    try:
        stored = readers.get(file.suffix.lower(), _of_torch)(path)
    except OSError as error:
        raise BadInputError(
            f"{path}: expected a readable file; got {_first_line(error)}"
        ) from error
    return Embeddings(path, _checked(path, stored), str(stored.dtype).removeprefix("torch."))


def _of_numpy(path: str) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        objects = "Object arrays" in str(error)
        raise BadInputError(
            f"{path}: expected an .npy file of numbers; "
            f"got {'an array of objects' if objects else _first_line(error)}"
        ) from error
    if not isinstance(array, np.ndarray):
        raise BadInputError(f"{path}: expected an .npy file; got an archive of arrays (.npz)")
    if array.dtype.kind not in "biuf":
        raise BadInputError(f"{path}: expected numbers; got dtype {array.dtype}")
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)  # long double, which torch does not have
    # In the byte order of this machine.
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _of_torch(path: str) -> Tensor:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many classes: a broken archive, a pickle of something else
        raise BadInputError(
            f"{path}: expected a tensor, or a dict with one, that torch.load reads with "
            f"weights_only=True; got {type(error).__name__}: {_first_line(error)}"
        ) from error
    if isinstance(found, Tensor):
        return found.detach()
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise BadInputError(f"{path}: expected a tensor, or a dict with one; got a {kind}")
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    _check_single(path, list(tensors))
    return next(iter(tensors.values())).detach()


def _of_safetensors(path: str) -> Tensor:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise BadInputError(
            f"{path}: expected the package safetensors, which reads it; got no such package "
            "(pip install safetensors)"
        ) from error
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            _check_single(path, names)
            found: Tensor = file.get_tensor(names[0])
    except SafetensorError as error:
        raise BadInputError(
            f"{path}: expected a .safetensors file; got {_first_line(error)}"
        ) from error
    return found


def _check_single(path: str, names: Sequence[object]) -> None:
    if len(names) == 1:
        return
    some = ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
    raise BadInputError(
        f"{path}: expected one tensor; got {len(names)}{f' ({some})' if names else ''}"
    )


def _checked(path: str, stored: Tensor) -> Tensor:
    """The tensor in float64, in which no square of a float32 over- or underflows."""
    if stored.layout != torch.strided or stored.is_quantized or stored.is_complex():
        kind = stored.dtype if stored.layout == torch.strided else stored.layout
        raise BadInputError(f"{path}: expected a plain tensor of real numbers; got {kind}")
    if stored.ndim != 2:
        raise BadInputError(
            f"{path}: expected 2 dimensions [rows, features]; got shape {tuple(stored.shape)}"
        )
    n, d = stored.shape
    if n < 3:
        raise BadInputError(f"{path}: expected at least 3 rows; got {n}")
    if d < 1:
        raise BadInputError(f"{path}: expected at least 1 feature; got shape {(n, d)}")
    points = stored.double()
    parts = torch.split(points, max(1, BLOCK_ELEMENTS // d))
    bad = torch.cat([~part.isfinite().all(1) for part in parts]).nonzero()[:, 0]
    if len(bad):
        row = int(bad[0])
        value = points[row][~points[row].isfinite()][0].item()
        more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        raise BadInputError(f"{path}: expected finite numbers; got {value} in row {row}{more}")
    return points


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


# --- measuring ---------------------------------------------------------------------------------


def default_anchors(n: int, width: int, metrics: Sequence[str]) -> int:
    """How many of n rows are drawn: all, or as many as take a minute or so; never by a clock.

    Args:
        n: rows.
        width: features of both sides together.
        metrics: of both sides.
    """
    feature = DIFFERENCE if "cityblock" in metrics else PRODUCT
    affordable = int(SECONDS * 1e9 / (n * (RANKING + feature * width)))
    if affordable >= n:
        return n
    digits = 10 ** max(0, len(str(affordable)) - 2)
    return min(n, max(FEWEST_ANCHORS, affordable // digits * digits))


def drawn(n: int, anchors: int, seed: int) -> Tensor:
    """Rows drawn without replacement, int64 [min(n, anchors)], in order; the same for a seed."""
    if anchors >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:anchors].sort()[0]


class View:
    """What rows see: distances to all rows, by products where the metric has them.

    Products are some 50 times as fast as the differences that `coherence` takes. Squared distances
    agree with those to 12 digits of |x|^2 + |y|^2, more than float32 features have.

    Args:
        points: [n, d], float64; where the metric allows it they are centred, in place.
        metric: a name from METRICS.
    """

    def __init__(self, points: Tensor, metric: str) -> None:
        if metric in ("euclidean", "sqeuclidean"):
            points -= points.mean(0)  # or a mean far from 0 would take digits
        self.points, self.metric = points, metric
        self.squares = torch.linalg.vector_norm(points, dim=1).square()
        self.norms = torch.where(self.squares == 0, 1.0, self.squares.sqrt())

    def distances(self, rows: Tensor) -> Tensor:
        """Anything in the order of the distances, float64 [m, n], from rows [m] to all."""
        anchors = self.points[rows]
        if self.metric == "cityblock":
            parts = torch.split(self.points, max(1, BLOCK_ELEMENTS // self.points.shape[1]))
            return torch.cat([ordered_distances(anchors, x, "cityblock", "") for x in parts], 1)
        products = anchors @ self.points.T
        if self.metric == "cosine":
            products = products / self.norms[rows, None] / self.norms
            squares = (self.squares > 0).double()  # of directions; that of a zero row stays 0
        else:
            squares = self.squares
        size = squares[rows, None] + squares
        coarse = EPSILONS * size  # adding it drops the last digits
        return (size - 2 * products + coarse) - coarse


def measured(teacher: View, student: View, rows: Tensor, nearest: int) -> Coherence:
    """What `coherence` gives with reduction "none", of some rows among all, by blocks of them.

    Args:
        teacher: n rows.
        student: the same rows.
        rows: int64 [m], the anchors.
        nearest: k of the overlap.

    Memory is that of both sides and of a block, whatever the number of rows.
    """
    n = len(student.points)
    step = max(1, min(BLOCK_ELEMENTS // n, math.ceil(len(rows) / BLOCKS)))
    compiled = available_backends()["cpu"] is None
    compute = ops.rank_agreement if compiled else rank_agreement
    blocks = torch.split(rows, step)
    found = [
        compute(student.distances(block), teacher.distances(block), block, nearest)
        for block in _watched(blocks)
    ]
    kendall, spearman, overlap = torch.cat(found).unbind(1)
    return Coherence((1 + kendall) / 2, kendall, spearman, overlap)


def _watched(blocks: Sequence[Tensor]) -> Iterable[Tensor]:
    """The blocks, with a bar on a terminal by tqdm or rich, whichever is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        pass
    else:
        shown: Any = {"unit": "block", "leave": False, "delay": 1, "disable": None}
        bar: Iterable[Tensor] = tqdm(blocks, "comparing", dynamic_ncols=True, **shown)
        return bar
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return blocks
    console = Console(stderr=True)
    off = not console.is_terminal
    return track(blocks, "comparing", console=console, transient=True, disable=off)


# --- what is printed ---------------------------------------------------------------------------


def table(found: Coherence, n: int, nearest: int) -> list[str]:
    """The lines of the measures, with what chance would give, and the error of drawing anchors."""
    m = len(found.kendall)
    names = ("concordance", "Kendall", "Spearman", f"overlap of the {nearest:,} nearest")
    chances = 0.5, 0.0, 0.0, nearest / (n - 1)
    width = max(map(len, names))
    lines = [f"{'':{width}}     found  by chance"]
    for name, values, chance in zip(names, found, chances, strict=True):
        line = f"{name:{width}}  {_number(values.mean().item())}  {_number(chance, 9)}"
        if m < n:
            # Without replacement: nothing is left to chance where all rows are drawn.
            error = values.std().item() * math.sqrt((1 - m / n) / m) if m > 1 else math.nan
            line += f"   +- {error:.4f}"
        lines.append(line)
    if m < n:
        lines.append("(+-: standard error, since not all rows were drawn)")
    return lines


def meaning(found: Coherence, n: int, nearest: int) -> list[str]:
    """What the measures say, in sentences."""
    agree, kept = found.concordance.mean().item(), found.overlap.mean().item() * nearest
    by_chance = nearest * nearest / (n - 1)
    of_them = "the row" if nearest == 1 else f"the {nearest:,} rows"
    among = "first" if nearest == 1 else f"among its first {nearest:,}"
    lines = [
        f"Which of two rows is nearer to a third: both agree in {100 * agree:.1f} % of cases "
        "(50 % by chance).",
        f"Of {of_them} that a search by the teacher finds first, a search by the student still has "
        f"{kept:.2f} {among} ({by_chance:.2g} by chance).",
    ]
    if found.kendall.mean().abs().item() < UNRELATED:
        lines.append("That is near chance: are the rows of both files in the same order?")
    return lines


def worst(found: Coherence, rows: Tensor) -> list[str]:
    """The rows whose neighbours changed most, by overlap, then by concordance."""
    keys = zip(found.overlap.tolist(), found.concordance.tolist(), rows.tolist(), strict=True)
    changed = sorted(key for key in keys if key[0] < 1)[:WORST]
    if not changed:
        return ["Every row that was looked at has the same nearest rows in both."]
    lines = ["Rows that see worst (the first row is 0):", "         row  concordance  overlap"]
    lines += [
        f"{row:12,}  {_number(agree, 11)}  {_number(kept, 7)}" for kept, agree, row in changed
    ]
    return lines


def _number(value: float, width: int = 8) -> str:
    return f"{value + 0.0:{width}.4f}"


def _described(role: str, embeddings: Embeddings) -> str:
    n, d = embeddings.points.shape
    same = embeddings.stored in ("float32", "float64")
    change = "" if same else ", converted to float64"
    return f"{role}  {embeddings.path}: {n:,} rows of {d:,}, {embeddings.stored}{change}"


def _draw(asked: argparse.Namespace, teacher: Tensor, student: Tensor, spearman: float) -> int:
    """Write the picture of rank agreement; returns how many rows it shows."""
    from . import plots

    rows = evenly_spaced(len(teacher), DRAWN_ROWS, teacher.device)
    figure = plots.rank_agreement(
        student[rows], teacher[rows], metric=asked.metric, teacher_metric=asked.teacher_metric
    )
    names = (Path(name).name for name in (asked.student, asked.teacher))
    title = " against ".join(textwrap.shorten(name, 40, placeholder="...") for name in names)
    figure.axes[0].set_title(f"{title}\nSpearman {spearman:.3f}")  # of all anchors, as printed
    try:
        figure.savefig(asked.plot, dpi=150)
    except OSError as error:
        raise BadInputError(
            f"--plot: expected a file that can be written; got {_first_line(error)}"
        ) from error
    return len(rows)


# --- the command -------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1; got {text!r}")
    return value


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number, 0 to 2^63 - 1; got {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = _Parser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="How much of what a search by one embedding model finds does another one "
        "find? Row i of both files must belong to the same thing; widths may differ.",
        epilog=f"Files: {', '.join(SUFFIXES)}, with one array of shape [rows, features].",
    )
    result.add_argument(
        "teacher",
        metavar="TEACHER",
        help="embeddings of the model that you trust: the old, the large or the full one",
    )
    result.add_argument(
        "student",
        metavar="STUDENT",
        help="embeddings that shall take their place: new, small, truncated or quantised",
    )
    result.add_argument("--plot", metavar="FILE.png", help="draw ranks against ranks there")
    result.add_argument(
        "--k", type=_count, metavar="K", help="how many nearest rows a search returns; default: 10"
    )
    result.add_argument(
        "--metric", choices=METRICS, default="cosine", help="of the search; default: cosine"
    )
    result.add_argument(
        "--teacher-metric", choices=METRICS, help="of a search by the teacher; default: the same"
    )
    result.add_argument(
        "--anchors",
        type=_count,
        metavar="N",
        help="draw N rows and compare what they see, among all rows; default: all, or as many as "
        "take a minute or so",
    )
    result.add_argument(
        "--seed", type=_seed, default=0, metavar="S", help="of the draw; default: 0"
    )
    return result


def _check_plot(path: str) -> None:
    """Before the long work."""
    if Path(path).suffix.lower() not in PICTURES:
        raise BadInputError(
            f"--plot: expected a file that ends in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}; "
            f"got {path}"
        )
    if not Path(path).parent.is_dir():
        raise BadInputError(f"--plot: expected a folder that exists; got {Path(path).parent}")
    from . import plots

    try:
        plots._matplotlib()
    except ImportError as error:
        raise BadInputError(f"--plot: {str(error).removeprefix('plots: ')}") from error


def _check_together(teacher: Embeddings, student: Embeddings) -> None:
    n = len(teacher.points)
    if len(student.points) != n:
        raise BadInputError(
            f"{student.path}: expected as many rows as {teacher.path}, {n:,}; "
            f"got {len(student.points):,}"
        )
    missing = available_backends()["cpu"]
    if missing is not None and n > PLAIN_ROWS:
        raise BadInputError(
            f"{teacher.path}: expected at most {PLAIN_ROWS:,} rows without the compiled extension "
            f"({missing}); got {n:,}"
        )


def _run(asked: argparse.Namespace) -> None:
    if asked.plot is not None:
        _check_plot(asked.plot)
    teacher, student = read(asked.teacher), read(asked.student)
    _check_together(teacher, student)
    n = len(teacher.points)
    nearest = min(10, n - 2) if asked.k is None else asked.k
    if nearest > n - 2:
        raise BadInputError(
            f"--k: expected at most {n - 2:,}, since {n:,} rows have {n - 1:,} others and all of "
            f"them are found by anybody; got {nearest:,}"
        )
    theirs = asked.metric if asked.teacher_metric is None else asked.teacher_metric
    width = teacher.points.shape[1] + student.points.shape[1]
    anchors = asked.anchors or default_anchors(n, width, (asked.metric, theirs))
    rows = drawn(n, anchors, asked.seed)
    print(_described("teacher", teacher))
    print(_described("student", student))
    if len(rows) == n:
        print("anchors  all rows, each compared with all others")
    else:
        print(f"anchors  {len(rows):,} of {n:,} rows drawn as anchors, each compared with all rows")
    by = asked.metric if theirs == asked.metric else f"{asked.metric}, the teacher's {theirs}"
    print(f"metric   {by}", flush=True)
    views = View(teacher.points, theirs), View(student.points, asked.metric)
    found = measured(*views, rows, nearest)
    if any(values.isnan().any() for values in found):
        raise BadInputError(
            f"{teacher.path}, {student.path}: expected distances that float64 can hold; "
            "got larger ones"
        )
    for lines in (table(found, n, nearest), meaning(found, n, nearest), worst(found, rows)):
        print("", *lines, sep="\n")
    if asked.plot is not None:
        shown = _draw(asked, teacher.points, student.points, found.spearman.mean().item())
        some = "" if shown == n else f", of {shown:,} rows evenly spread"
        print(f"\npicture  {asked.plot}: ranks by student against ranks by teacher{some}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line says; a mistake in it ends the process with status 2."""
    command = parser()
    asked = command.parse_args(arguments)
    try:
        _run(asked)
    except BadInputError as error:
        command.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
