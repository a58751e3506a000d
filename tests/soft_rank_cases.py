"""Rows for `soft_rank` with values that mask others, and what each backend has to make of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pcoherence import soft_rank
from pcoherence.testing import relative_error, tolerances

MASKS = ("none", "-1e9", "1e9", "lowest of half", "lowest", "-inf", "inf", "both ends", "far group")


def masked_row(mask: str, n: int, dtype: torch.dtype) -> Tensor:
    """Gaussian values [n], a tenth of them (and one at least) masked; "far group": moved by 1,000.

    Values near 0 are coarse, so that nothing is lost where they are moved.
    """
    generator = torch.Generator().manual_seed(n)
    values = (64 * torch.randn(n, generator=generator, dtype=torch.float64)).round() / 64
    masked = torch.rand(n, generator=generator) < 0.1
    masked[n // 2] = True
    if mask == "far group":
        values[masked] += 1000
    elif mask == "both ends":
        values[masked] = math.inf
        values[0] = -math.inf
    elif mask != "none":
        values[masked] = {
            "-1e9": -1e9,
            "1e9": 1e9,
            "lowest of half": torch.finfo(torch.float16).min,
            "lowest": torch.finfo(dtype).min,
            "-inf": -math.inf,
            "inf": math.inf,
        }[mask]
    return values.to(dtype)


def check_masked(
    backend: str, method: str, mask: str, n: int, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Ranks and gradient err no more than brute force in the same dtype, or than ACCURACY."""
    row = masked_row(mask, n, dtype)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(n + 1)).to(dtype)
    weights[n - 1] = 0
    upstream = torch.linspace(-1, 1, n, dtype=dtype)

    def computed(with_backend: str, used: torch.dtype, with_method: str) -> tuple[Tensor, Tensor]:
        leaf, *constants = (t.to(device, used) for t in (row, weights, upstream))
        leaf.requires_grad_()
        ranks = soft_rank(leaf, 0.1, weights=constants[0], backend=with_backend, method=with_method)
        gradient = torch.autograd.grad(ranks, leaf, constants[1])[0]
        return ranks.detach().cpu(), gradient.cpu()

    truth = computed("reference", torch.float64, "auto")
    brute, found = computed("reference", dtype, "auto"), computed(backend, dtype, method)
    errors = [
        tuple(relative_error(ours, right, 1.0) for ours, right in zip(pair, truth, strict=True))
        for pair in (brute, found)
    ]
    allowed = tolerances(dtype, (errors[0][0], errors[0][1]))
    assert errors[1][0] <= allowed[0], (errors, allowed)
    assert errors[1][1] <= allowed[1], (errors, allowed)
    assert not found[1][row.isinf()].any()
