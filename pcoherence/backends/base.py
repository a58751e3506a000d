"""What a backend has to say about itself."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..inputs import LossInputs
from ..spec import LossSpec


class Backend(Protocol):
    """A thin adapter from checked options and tensors to whoever computes.

    A reason is a clause that completes "backend X: ...", or None when there is nothing to say.
    """

    name: str

    def available(self) -> str | None:
        """Why this backend cannot run in this process."""
        ...

    def supports(self, spec: LossSpec, inputs: LossInputs) -> str | None:
        """Why this backend cannot compute this loss."""
        ...

    def supports_soft_rank(self, values: Tensor, method: str) -> str | None:
        """Why this backend cannot compute these ranks."""
        ...

    def loss(self, spec: LossSpec, inputs: LossInputs) -> Tensor:
        """The reduced loss: 0-d, or [m] when the reduction is "none"."""
        ...

    def soft_rank(
        self, values: Tensor, weights: Tensor | None, temperature: float, method: str
    ) -> Tensor:
        """1/2 + sum_k w_k sigmoid((v_j - v_k) / temperature), shaped as values [..., n]."""
        ...
