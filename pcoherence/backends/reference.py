"""The plain definition as a backend: any device, any option, no choice of method."""

from __future__ import annotations

from torch import Tensor

from .. import reference, soft_ranks
from ..inputs import LossInputs
from ..spec import LossSpec


class ReferenceBackend:
    """Adapter of `pcoherence.reference`."""

    name = "reference"

    def available(self) -> str | None:
        """Always."""
        return None

    def supports(self, spec: LossSpec, inputs: LossInputs) -> str | None:
        """All but a choice of method."""
        return _objection(spec.method)

    def supports_soft_rank(self, values: Tensor, method: str) -> str | None:
        """All but a choice of method."""
        return _objection(method)

    def loss(self, spec: LossSpec, inputs: LossInputs) -> Tensor:
        """The definition; memory grows as m n^2."""
        return reference.evaluate(spec, inputs)

    def soft_rank(
        self, values: Tensor, weights: Tensor | None, temperature: float, method: str
    ) -> Tensor:
        """The definition; memory grows as the values' number times n."""
        return soft_ranks.ranks(values, weights, temperature)


def _objection(method: str) -> str | None:
    return None if method == "auto" else f'it has only method "auto", not method {method!r}'
