"""The Triton kernels, compiled for GPUs that need not be there, keep to their budget."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pcoherence.backends.triton import PORTED
from pcoherence.spec import LossSpec

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

KERNELS = {
    "accumulate_differences",
    "clear_near",
    "difference_distances",
    "find_centre",
    "grid_pullback",
    "grid_ranks",
    "near_weights",
    "objective",
    "pair_pullback",
    "pair_ranks",
    "prepare_points",
    "product_distances",
    "row_stats",
    "sample_lengths",
    "sample_spread",
    "scan_pullback",
    "scan_ranks",
    "small_gradient",
    "small_rows",
    "sort_rows",
    "store_gradient",
    "symmetrise",
}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "sizes"),
    [
        ((80, 100), "float32", ["--aligned"]),
        ((90,), "float32", []),
        ((90,), "float64", []),
    ],
    ids=str,
)
def test_kernels_keep_to_their_budget(
    capabilities: tuple[int, ...], dtype: str, sizes: list[str], tmp_path: Path
) -> None:
    tuning = importlib.import_module("pcoherence.kernels.tuning")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.gpu.offline", *map(str, capabilities)]
    done = subprocess.run(
        [*command, "--dtype", dtype, *sizes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for capability in capabilities:
        assert {use["kernel"] for use in found if use["capability"] == capability} == KERNELS
    for use in found:  # float32 calls have rows in float64, too
        registers = tuning.REGISTERS[{"fp32": torch.float32, "fp64": torch.float64}[use["dtype"]]]
        assert use["spilled"] == 0, use
        assert use["registers"] <= registers, use
        assert use["shared"] <= tuning.SHARED_BYTES, use


AS_LAUNCHED = """
import json
from concurrent.futures import ProcessPoolExecutor
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from benchmarks.gpu import offline

TARGET = GPUTarget("cuda", 90, 32)

class Driver:
    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile(self, key, signature, device, constexprs, options, attrs, warmup):
    compiled.add((self.__name__, ASTSource(self, signature, constexprs, attrs).hash(),
                  options.hash()))

SMALL = (256, 512), (257, 17)
FEW = (33, 17)
LARGE = (1056, 512), (1031, 17)
PAIRS = (256, 512), (257, 17)  # as many as tiles of the pairs do not come to 1 or 16

compiled = set()

def launched(method, choices, *sizes):
    compiled.clear()
    for size in sizes:
        offline.call(size, torch.float32, method, **choices)
    return set(compiled)

def launched_by_users():
    driver.set_active(Driver())
    JITFunction._do_compile = compile
    offline.stand_in("pcoherence_as_launched")
    training, others = set(), set()
    for way in offline.WAYS:
        way.settle()
        sizes = (*SMALL, FEW) if way.small else PAIRS if way.method == "pairs" else LARGE
        training |= launched(way.method, {}, *sizes)
        others |= launched(way.method, {}, (512, 256))  # whose tiles 16 divides
        if way in offline.USUAL_WAYS:
            others |= launched(way.method, {"gradients": (False, False)}, *sizes)
        for choices in offline.calls(1) if way.small else ():
            others |= launched(way.method, choices, *SMALL)
    return training, others

def keys(differing):
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        found = alone.submit(offline.recorded, differing, ["float32"], elsewhere=0).result()
    for one in found:
        options = offline.make_backend(TARGET).parse_options(offline.options(one, TARGET))
        yield one.kernel, offline.source(one).hash(), options.hash()

if __name__ == "__main__":
    few, single = set(keys(None)), set(keys(1))
    training, others = launched_by_users()
    names = lambda launches: sorted(name for name, *_ in launches)
    print(json.dumps([names(training), names(training - few), names(others - single)]))
"""


def test_what_is_compiled_is_what_a_launch_compiles() -> None:
    """At other sizes, down to the keys of Triton's cache: of the default call in what is checked
    here, of small batches with each option in what is carried to a GPU.
    """
    done = subprocess.run(
        [sys.executable, "-c", AS_LAUNCHED],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    training, unchecked, not_carried = json.loads(done.stdout)
    assert len(set(training)) >= 10
    assert {"small_rows", "small_gradient", "near_weights", "grid_ranks", "scan_ranks"} <= {
        *training
    }
    assert unchecked == []
    assert not_carried == []


def test_choices_are_all_that_kernels_know() -> None:
    """Defaults first: the call that differs in nothing is the users' default."""
    offline = importlib.import_module("benchmarks.gpu.offline")
    choices = offline.CHOICES
    without_launches = {"temperature", "num_anchors", "backend", "method"}  # methods are ways
    for field in dataclasses.fields(LossSpec):
        if field.name not in without_launches:
            assert choices[field.name][0] == field.default
    for name, known in PORTED.items():
        assert name == "method" or {*known} <= {*choices[name]}
    assert {way.method for way in offline.WAYS} | {"grid"} == {*PORTED["method"]}
    assert {} in offline.FEW
    assert {} in offline.calls(0)


KEYS = """
import sys
from pcoherence.backends import triton_kernels
from pcoherence.kernels import distances, grid, objectives, points, small, soft_ranks, statistics
triton_kernels.row_kernels()
kernels = {}
for module in (distances, grid, objectives, points, small, soft_ranks, statistics):
    kernels |= {name: getattr(module, name) for name in sys.argv[1:] if hasattr(module, name)}
print(sorted([(name, kernels[name].cache_key) for name in sys.argv[1:]]))
"""


def test_keys_do_not_depend_on_who_is_asked_first() -> None:
    """Or a process would compile what another has compiled already."""
    found = set()
    for order in (sorted(KERNELS), sorted(KERNELS, reverse=True)):
        done = subprocess.run(
            [sys.executable, "-c", KEYS, *order],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
