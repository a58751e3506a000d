"""The registry: who is known, who is chosen, and what is said when nobody can serve."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import pcoherence
from pcoherence import backends
from pcoherence.__main__ import report
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
    monkeypatch.setattr(backends, "_warned", False)


@pytest.mark.usefixtures("no_extension")
def test_auto_without_extension_warns_once_and_uses_the_reference() -> None:
    with pytest.warns(RuntimeWarning, match=r"it is missing.*build the extension"):
        first = pcoherence.perception_coherence_loss(X, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pcoherence.perception_coherence_loss(X, X) == first
        pcoherence.soft_rank(X)


@pytest.mark.usefixtures("no_extension")
def test_auto_does_not_drop_an_explicit_method() -> None:
    with pytest.raises(ValueError, match=r"none can serve.*it is missing.*grid"):
        pcoherence.perception_coherence_loss(X, X, method="grid")


def test_auto_prefers_the_extension(cpu_backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = backends.select("auto", X.device, lambda backend: None)
    assert chosen.name == cpu_backend


def test_import_is_light() -> None:
    code = (
        "import sys, pcoherence; "
        "print([m for m in ('triton', 'matplotlib', 'scipy', 'ot') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_report_names_every_backend() -> None:
    rows = dict(report())
    assert {f"backend {name}" for name in backends.REGISTRY} <= set(rows)
    assert rows["pcoherence"] == pcoherence.__version__
