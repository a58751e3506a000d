"""The Triton kernels, compiled for GPUs that need not be there, keep to their budget."""

from __future__ import annotations

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

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

KERNELS = {
    "accumulate_differences",
    "clear_near",
    "difference_distances",
    "find_centre",
    "objective",
    "pair_pullback",
    "pair_ranks",
    "prepare_points",
    "product_distances",
    "row_stats",
    "scan_pullback",
    "scan_ranks",
    "store_gradient",
    "symmetrise",
}


@pytest.mark.parametrize(
    ("capabilities", "dtype"), [((80, 90, 100), "float32"), ((90,), "float64")], ids=str
)
def test_kernels_keep_to_their_budget(
    capabilities: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    tuning = importlib.import_module("pcoherence.kernels.tuning")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pcoherence.kernels.offline", *map(str, capabilities)]
    done = subprocess.run(
        [*command, "--dtype", dtype],
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
    registers = tuning.REGISTERS[getattr(torch, dtype)]
    for use in found:
        assert use["spilled"] == 0, use
        assert use["registers"] <= registers, use
        assert use["shared"] <= tuning.SHARED_BYTES, use
