"""The registry: who is known, who is chosen, and what is said when nobody can serve."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import pcoherence
from pcoherence import backends, ops, spec
from pcoherence.__main__ import report
from pcoherence.backends import triton
from pcoherence.inputs import prepare_inputs
from pcoherence.spec import BACKENDS, METHODS

X = torch.randn(5, 3)


def test_registry_knows_every_name() -> None:
    assert set(backends.REGISTRY) == set(BACKENDS) - {"auto"}
    assert set(pcoherence.available_backends()) == set(backends.REGISTRY)
    assert pcoherence.available_backends()["reference"] is None


@pytest.mark.parametrize(
    "name", [name for name, reason in pcoherence.available_backends().items() if reason]
)
def test_unavailable_backend_raises_with_its_reason(name: str) -> None:
    for call in (
        lambda: pcoherence.perception_coherence_loss(X, X, backend=name),
        lambda: pcoherence.soft_rank(X, backend=name),
    ):
        with pytest.raises(RuntimeError, match=f"^backend: '{name}' is not available"):
            call()


@pytest.mark.parametrize("method", METHODS[1:])
def test_reference_refuses_a_method(method: str) -> None:
    for call in (
        lambda: pcoherence.perception_coherence_loss(X, X, backend="reference", method=method),
        lambda: pcoherence.soft_rank(X, backend="reference", method=method),
    ):
        with pytest.raises(ValueError, match=f"^backend: 'reference' .*{method}"):
            call()


def test_cpu_backend_refuses_other_devices(cpu_backend: str) -> None:
    with pytest.raises(ValueError, match=r"CPU tensors, not meta"):
        pcoherence.soft_rank(X.to("meta"), backend=cpu_backend)


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.cpu, "_LOAD_ERROR", "it is missing")
    monkeypatch.setattr(backends, "_warned", set())


@pytest.mark.usefixtures("no_extension")
def test_auto_without_extension_warns_once_and_uses_the_reference() -> None:
    with pytest.warns(RuntimeWarning, match=r"it is missing.*build the extension"):
        first = pcoherence.perception_coherence_loss(X, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pcoherence.perception_coherence_loss(X, X) == first
        pcoherence.soft_rank(X)


def test_auto_gives_each_reason_once(no_extension: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(RuntimeWarning, match="it is missing"):
        pcoherence.soft_rank(X)
    monkeypatch.setattr(backends.cpu, "_LOAD_ERROR", None)
    monkeypatch.setattr(backends.cpu.CpuBackend, "refuses", lambda self, tensor: "it is busy")
    with pytest.warns(RuntimeWarning, match="it is busy") as caught:
        pcoherence.soft_rank(X)
    assert "build the extension" not in str(caught[0].message)  # which is not what is wrong


@pytest.mark.usefixtures("no_extension")
def test_auto_does_not_drop_an_explicit_method() -> None:
    with pytest.raises(ValueError, match=r"none can serve.*it is missing.*grid"):
        pcoherence.perception_coherence_loss(X, X, method="grid")


def test_auto_prefers_the_extension(cpu_backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = backends.select("auto", X.device, lambda backend: None)
    assert chosen.name == cpu_backend


def test_report_names_every_backend() -> None:
    rows = dict(report())
    assert {f"backend {name}" for name in backends.REGISTRY} <= set(rows)
    assert rows["pcoherence"] == pcoherence.__version__


def test_too_many_bins_are_an_error_that_says_what_to_do(cpu_backend: str) -> None:
    spread = torch.tensor([[0.0], [1.0], [2.0], [5.0]])
    for call in (
        lambda: pcoherence.perception_coherence_loss(
            spread, spread, method="grid", temperature=1e-7, backend=cpu_backend
        ),
        lambda: pcoherence.soft_rank(spread.T, 1e-7, method="grid", backend=cpu_backend),
    ):
        with pytest.raises(RuntimeError, match=r"^method: 'grid' .* more than 65536 bins .*scan"):
            call()


def test_an_unknown_instruction_set_is_reported_not_used() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pcoherence"],
        env=os.environ | {"PCOHERENCE_ISA": "v9"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "PCOHERENCE_ISA: expected one of" in done.stdout


LOSS_OF_NEAR_PAIRS = """
import torch, pcoherence
torch.manual_seed(3)
centres = torch.randn(6, 40)
n = 90
teacher = torch.randn(n, 40)
student = (centres[torch.randint(6, (n,))] + 1e-4 * torch.randn(n, 40)).requires_grad_()
weights = torch.rand(n)
for dtype in (torch.float32, torch.float64):
    found = []
    for backend, like in (("cpu", dtype), ("reference", torch.float64)):
        loss = pcoherence.perception_coherence_loss(
            student.to(like), teacher.to(like), candidate_weights=weights.to(like),
            temperature=0.1, objective="mse", backend=backend)
        found.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for one, other in zip(*found, strict=True):
        print(float((one - other).norm() / other.norm()))
"""


@pytest.mark.parametrize("isa", ["default", "v3", "v4"])
def test_every_instruction_set_measures_near_pairs(cpu_backend: str, isa: str) -> None:
    """A sixth of each row lies so near that nothing of it is left in the features' products."""
    from pcoherence import _C

    if isa not in _C.isas():
        pytest.skip(f"this processor has no {isa}")
    done = subprocess.run(
        [sys.executable, "-c", LOSS_OF_NEAR_PAIRS],
        env=os.environ | {"PCOHERENCE_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, gradient, loss64, gradient64 = (float(line) for line in done.stdout.split())
    assert loss < 5e-6
    assert gradient < 2e-5
    assert max(loss64, gradient64) < 1e-9


def test_a_metric_that_is_not_ported_goes_by_blocks(
    cpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs what a callable costs, not what the reference does, and takes any method."""
    known = dict(backends.cpu.CpuBackend().ported())
    monkeypatch.setattr(backends.cpu, "PORTED", known | {"metric": ["euclidean"]})
    found = pcoherence.perception_coherence_loss(
        X, X.roll(1, 0), metric="cityblock", method="scan", backend=cpu_backend
    )
    expected = pcoherence.reference.perception_coherence_loss(X, X.roll(1, 0), metric="cityblock")
    torch.testing.assert_close(found, expected)


def test_whether_cuda_is_there_can_be_compiled() -> None:
    """With a torch that has CUDA, which is not asked again while torch.compile traces."""
    code = """
import torch
torch.version.cuda = "13.0"
from pcoherence import library
library.load = lambda device, load=library.load: load(device) if device == "cpu" else None
from pcoherence.backends import REGISTRY

@torch.compile(fullgraph=True, backend="eager")
def asked(x):
    return x + (REGISTRY["cuda"].available() is None)

assert asked(torch.zeros(())) == torch.cuda.is_available()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_warning_that_is_an_error_is_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the slow reference without a word from the second call on."""
    monkeypatch.setattr(backends, "FASTEST", {})
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(RuntimeWarning, match="using the slow reference"):
                pcoherence.soft_rank(X)


@pytest.mark.parametrize("backend", [b for b in backends.REGISTRY if b != "reference"])
def test_what_is_not_ported_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and names that the definition has before the kernels have them."""
    inputs = prepare_inputs(X, X)
    adapter = backends.REGISTRY[backend]
    monkeypatch.setattr(adapter, "refuses", lambda tensor: None)
    monkeypatch.setattr(spec, "OBJECTIVES", (*spec.OBJECTIVES, "l7"))
    assert adapter.supports(spec.LossSpec(), inputs) is None
    assert "objective 'l7'" in str(adapter.supports(spec.LossSpec(objective="l7"), inputs))
    monkeypatch.setitem(spec.ROW_OPTIONS, "slant", 0.0)
    for value, expected in ((0.0, None), (0.5, "slant 0.5 is not part of its kernels yet")):
        monkeypatch.setattr(spec.LossSpec, "slant", value, raising=False)
        assert adapter.supports(spec.LossSpec(), inputs) == expected


def test_an_option_that_is_not_ported_changes_nothing_at_its_default(
    cpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are not told of it."""
    expected = pcoherence.perception_coherence_loss(X, X.roll(1, 0), backend=cpu_backend)
    monkeypatch.setitem(spec.ROW_OPTIONS, "slant", 0.0)
    monkeypatch.setattr(spec.LossSpec, "slant", 0.0, raising=False)
    assert pcoherence.perception_coherence_loss(X, X.roll(1, 0), backend=cpu_backend) == expected


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_kernels_refuse_a_name_that_they_do_not_know(backend: str, cpu_backend: str) -> None:
    """Called directly, instead of computing something else."""
    if backend == "triton" and "cpu" not in triton.DEVICES:
        pytest.skip("triton's interpreter is off")
    operators = ops.native if backend == "cpu" else triton.OPERATORS
    options = spec.LossSpec().packed() + ",objective=l7"
    with pytest.raises((ValueError, RuntimeError), match="objective"):
        operators.coherence(
            X, None, X, None, None, None, None, 0.1, 0.0, options, False, False, False
        )
