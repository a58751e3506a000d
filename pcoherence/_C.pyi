"""The row kernels, for tests: built where the library is developed. Arrays are converted."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

def isas() -> list[str]:
    """Instruction sets this processor supports, best first."""

def hard_ranks_float32(
    values: ArrayLike, weights: ArrayLike, isa: str
) -> tuple[NDArray[np.float32], float]:
    """Mid-ranks F in (0, 1) of one row [n], and sum_jk w_j w_k [v_j = v_k].

    Some weight must be above 0 and every value finite; ranks of weight 0 mean nothing.
    """

def hard_ranks_float64(
    values: ArrayLike, weights: ArrayLike, isa: str
) -> tuple[NDArray[np.float64], float]:
    """As `hard_ranks_float32`."""

def soft_rank_float32(
    values: ArrayLike,
    weights: ArrayLike,
    upstream: ArrayLike | None,
    temperature: float,
    method: str,
    isa: str,
) -> NDArray[np.float32]:
    """Soft ranks of one row [n], or with `upstream` [n] their vector-Jacobian product.

    Raises:
        ValueError: an unknown name, arrays of different size, or too many bins for "grid".
    """

def soft_rank_float64(
    values: ArrayLike,
    weights: ArrayLike,
    upstream: ArrayLike | None,
    temperature: float,
    method: str,
    isa: str,
) -> NDArray[np.float64]:
    """As `soft_rank_float32`."""
