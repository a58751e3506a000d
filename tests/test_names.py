"""What C++ and Python both state agrees: option names by list, constants by behaviour."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pcoherence import (
    PerceptionCoherenceLoss,
    library,
    objectives,
    ops,
    perception_coherence_loss,
    reference,
    soft_rank,
    spec,
)
from pcoherence.backends import cuda_kernels, points
from pcoherence.inputs import LossInputs
from pcoherence.kernels import tables, tuning

CSRC = Path(__file__).parent.parent / "csrc"

pytestmark = pytest.mark.usefixtures("cpu_backend")


def test_option_names() -> None:
    """C++ knows the same names in the same order; metrics may still have to be ported."""
    known = library.about()["options"]
    assert set(known) == {*spec.ROW_OPTIONS, "metric", "teacher_metric"}
    unsaid = library.about()["constants"]
    for name, own in spec.ROW_OPTIONS.items():
        if known[name]:
            assert known[name][0] == own
        else:  # a number; 0 stands for None
            assert unsaid[name] == (own or 0.0)
    assert known["teacher_metric"] == known["metric"]
    assert known["metric"] == list(spec.METRICS)[: len(known["metric"])]
    assert known["scale"] == list(spec.SCALES)
    assert known["objective"] == list(spec.OBJECTIVES)
    assert known["method"] == list(spec.METHODS)


def test_every_signature_has_the_options_and_defaults_of_the_spec() -> None:
    """Four places spell the options out for their readers; they may not drift apart."""
    expected = {field.name: field.default for field in dataclasses.fields(spec.LossSpec)}
    tensors = {"student", "teacher", "generator", *LossInputs._fields}
    extras = {"gather", "process_group", "bank"}  # of the module alone
    for function in (
        perception_coherence_loss,
        reference.perception_coherence_loss,
        PerceptionCoherenceLoss.__init__,
    ):
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: p.default for p in parameters if p.name not in tensors | extras | {"self"}}
        assert found == expected
    ranks = [inspect.signature(f).parameters.values() for f in (soft_rank, reference.soft_rank)]
    assert [(p.name, p.default) for p in ranks[0]] == [(p.name, p.default) for p in ranks[1]]


def rows(student: Tensor, teacher: Tensor, objective: str, backend: str) -> Tensor:
    """Losses [m] of given distances [m, n] that nothing scales; temperature 1."""
    if backend == "cpu":
        asked = spec.LossSpec(
            temperature=1.0, neighbourhood=None, scale="none", objective=objective, method="pairs"
        )
        options = *asked.temperatures, asked.packed(distances=True), True, False, False
        return ops.native.coherence(student, None, teacher, None, None, None, None, *options)[1]
    return objectives.FUNCTIONS[objective](student, teacher, torch.ones_like(student), 1.0, None)


def test_huber_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = torch.rand(2, 1, 33, dtype=torch.float64, generator=torch.manual_seed(0)) * 8
    ours = rows(*distances, "huber", "cpu").item()
    tolerance = 1e-9  # the accuracy of float64; a thousandth of delta shows in 1e-5 of the loss
    assert math.isclose(rows(*distances, "huber", "reference").item(), ours, rel_tol=tolerance)
    monkeypatch.setattr(objectives, "HUBER_DELTA", objectives.HUBER_DELTA * 1.001)
    other = rows(*distances, "huber", "reference").item()
    assert not math.isclose(other, ours, rel_tol=1e4 * tolerance)


@pytest.mark.parametrize("epsilons", [0.5, 1, 2, 3, 5, 6, 7, 9, 12, 16, 64])
def test_spearman_floor(epsilons: float) -> None:
    """Ranks of the same small deviation count as constant here and there, or not."""
    # F = 1/2 + (s_j - mean) / 4 + ...: half of the candidates at +x, half at -x deviate by x / 4.
    step = 4 * epsilons * torch.finfo(torch.float64).eps
    student = (2 * step * (torch.arange(32) % 2)).double()[None]
    teacher = torch.where(student > 0, 1.0, 0.0).double()
    ours, expected = (rows(student, teacher, "spearman", b).item() for b in ("cpu", "reference"))
    if epsilons in (0.5, 1, 64):
        assert math.isclose(expected, 0.0 if epsilons == 64 else 1.0, abs_tol=1e-2)
    assert math.isclose(ours, expected, abs_tol=0.1), f"{ours} here, {expected} in the reference"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_constants(dtype: torch.dtype) -> None:
    """Those that are stated again where C++ cannot be asked: in the reference and for Triton."""
    known = library.about()["constants"]
    name = str(dtype)[6:]
    assert known[f"resolution {name}"] == objectives.RESOLUTION[dtype]
    assert known["huber delta"] == objectives.HUBER_DELTA
    assert known["spearman floor"] == objectives.SPEARMAN_FLOOR
    near = known[f"nearness {name}"], known[f"gradient nearness {name}"]
    assert near == points.NEARNESS[dtype]


def stated(file: str, *patterns: str) -> list[str]:
    """What the groups of the patterns are in a source, each of which fits once."""
    text, found = (CSRC / file).read_text(), []
    for pattern in patterns:
        (match,) = re.finditer(pattern, text, re.DOTALL)
        found += match.groups()
    return found


def test_traits_of_metrics() -> None:
    """Of those that come from products: what csrc/distances.h says of them is what Python does."""
    cases = re.findall(
        r"case Metric::(\w+):[^\n]*\n\s*return {(.*?)};", (CSRC / "distances.h").read_text()
    )
    said = {name: dict(re.findall(r"\.(\w+) = ([\w.]+)", fields)) for name, fields in cases}
    assert [*said] == library.about()["options"]["metric"]
    products = {name for name, fields in said.items() if fields["products"] == "true"}
    assert products == {*points.TRAITS}
    for name, traits in points.TRAITS.items():
        expected = {key: fields for key, fields in said[name].items() if key != "products"}
        as_written = {
            key: str(value).lower() if isinstance(value, bool) else f"{value:g}"
            for key, value in traits._asdict().items()
        }
        assert as_written == expected


def test_constants_of_the_grid() -> None:
    order = r"struct GridOrder<{}> {{.*?order = (\d+);.*?reach = ([\d.]+);"
    width, shift, *orders = stated(
        "soft_ranks.h",
        r"kBinWidth = ([\d.]+);",
        r"kMaxBins = 1 << (\d+);",
        *(order.format(name) for name in ("float", "double")),
    )
    assert float(width) == tables.BIN_WIDTH
    assert 1 << int(shift) == cuda_kernels.EXPLICIT_BINS
    for dtype, terms, reach in zip(
        (torch.float32, torch.float64), orders[::2], orders[1::2], strict=True
    ):
        assert int(terms) == tables.GRID_ORDER[dtype]
        assert float(reach) / tables.BIN_WIDTH == tables.GRID_REACH[dtype]
    elements = stated("cuda/soft_ranks.h", r"elements_per_bin = sizeof\(T\) == 4 \? (\d+) : (\d+);")
    assert [*map(int, elements)] == [*tuning.ELEMENTS_PER_BIN.values()]
    assert [*tuning.ELEMENTS_PER_BIN] == [torch.float32, torch.float64]


def test_size_of_a_sample() -> None:
    (size,) = stated("cuda/prepare.h", r"kSample = (\d+);")
    assert int(size) == points.SAMPLE


def test_range_of_positions() -> None:
    pytest.importorskip("triton")
    from pcoherence.kernels import statistics

    (most,) = stated("soft_ranks.h", r"kMaxRange = (\S+);")
    assert float(most) == statistics.MAX_RANGE.value
