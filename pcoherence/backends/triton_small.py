"""Launches of Triton's two kernels for small batches: grids and buffers only."""

from __future__ import annotations

import torch
from torch import Tensor
from triton import cdiv

from ..inputs import candidates
from ..kernels import small as kernels
from ..kernels import tuning
from ..kernels.statistics import STATISTICS, bits_of
from ..kernels.tables import SERIES_DEGREE, series
from ..objectives import HUBER_DELTA, RESOLUTION, SPEARMAN_FLOOR
from ..spec import LossSpec
from .pipeline import Batch, Results, wants_double
from .points import TRAITS


def takes(method: str, batch: Batch) -> bool:
    """Whether the batch is small; method: resolved for its size.

    Every other option is served: tests/test_triton_small.py asks that each is read.
    """
    return method == "pairs" and batch.n <= tuning.FUSED_MOST and batch.reads_few


def small(spec: LossSpec, batch: Batch, *flags: bool) -> tuple[Tensor | None, Results]:
    """See FusedKernels."""
    x, others = batch.student, candidates(batch.student, batch.student_candidates)
    v, losses, lengths = _rows(spec, batch, any(flags))
    if not any(flags):
        return None, Results(losses, None, None)
    m, width = x.shape
    n = others.shape[0]
    t = tuning.tiles(x.dtype, x.is_cuda)
    directions = TRAITS[str(spec.metric)].directions
    gradients = [
        torch.empty_like(points) if wanted and points is not None else None
        for points, wanted in zip((x, batch.student_candidates), flags, strict=True)
    ]
    programs = sum(cdiv(g.shape[0], t.pulled_points) for g in gradients if g is not None)
    features = width if directions else t.pulled_features
    total = x.new_empty(())
    kernels.small_gradient[programs, max(1, cdiv(width, max(1, features)))](
        v,
        x,
        lengths[0],
        others,
        lengths[1],
        losses,
        batch.coefficients,
        *gradients,
        total,
        m,
        n,
        width,
        features,
        SAME=batch.student_candidates is None,
        DIRECTIONS=directions,
        BP=t.pulled_points,
        BJ=t.pulled_others,
        BF=t.pulled_features,
        num_warps=t.pulled_warps,
    )
    return total, Results(losses, *gradients)


def _rows(
    spec: LossSpec, batch: Batch, gradient: bool
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None]]:
    """V [m, n], losses float64 [m], and lengths of anchors and candidates for the gradient."""
    x, m, n = batch.student, batch.student.shape[0], batch.n
    dtype = torch.float64 if wants_double(spec, x.dtype) else x.dtype
    traits = TRAITS[str(spec.metric)]
    theirs = TRAITS[str(spec.resolved_teacher_metric)]
    hard = spec.teacher_temperature is None
    cross_entropy = spec.objective == "cross_entropy"
    t = tuning.tiles(dtype, x.is_cuda)
    tiles = cdiv(n, t.fused_j)

    distances, others = x.new_empty(2, m, n, dtype=dtype)
    teacher_ranks = x.new_empty(m, n, dtype=torch.float64 if cross_entropy else dtype)
    near = None if spec.neighbourhood is None else torch.empty_like(distances)
    stats = x.new_empty(2, STATISTICS.value, m, dtype=torch.float64)
    totals = x.new_empty(2, m, tiles, dtype=torch.float64) if cross_entropy else stats
    losses = stats.new_empty(m)
    lengths: tuple[Tensor | None, Tensor | None] = (None, None)
    kept = lengths  # what this kernel writes of them
    if gradient and traits.directions:
        if batch.student_candidates is None:
            own = stats.new_empty(m)
            lengths, kept = (own, own), (own, None)
        else:
            kept = lengths = stats.new_empty(m), stats.new_empty(n)
    weights = batch.candidate_weights
    terms = series(dtype, x.device)
    kernels.small_rows[cdiv(m, t.fused_rows),](
        distances,
        others,
        teacher_ranks,
        near,
        stats,
        totals,
        losses,
        x,
        candidates(x, batch.student_candidates),
        *kept,
        batch.teacher,
        candidates(batch.teacher, batch.teacher_candidates),
        weights,
        n if weights is not None and weights.ndim == 2 else 0,
        batch.self_index,
        batch.coefficients,
        terms,
        bits_of(1 / spec.temperature),
        bits_of(1.0 if hard else 1 / spec.temperatures[1]),
        bits_of(1.0 if spec.neighbourhood is None else spec.neighbourhood),
        m,
        n,
        tiles,
        x.shape[1],
        batch.teacher.shape[1],
        DIRECTIONS=traits.directions,
        ROOT=traits.root,
        FACTOR=traits.factor,
        CHAIN=traits.chain,
        TEACHER_DIRECTIONS=theirs.directions,
        TEACHER_ROOT=theirs.root and not hard,  # of hard ranks the order is all that counts
        TEACHER_FACTOR=theirs.factor,
        HARD=hard,
        SCALE=spec.scale,
        OBJECTIVE=spec.objective,
        GRADIENT=gradient,
        DELTA=HUBER_DELTA,
        RESOLUTION=RESOLUTION[dtype],
        FLOOR=(SPEARMAN_FLOOR * torch.finfo(dtype).eps) ** 2,
        DEGREE=SERIES_DEGREE[dtype],
        M=terms.shape[1],
        BR=t.fused_rows,
        BJ=t.fused_j,
        BK=t.fused_k,
        BN=t.row_columns,
        BC=t.fused_candidates,
        BF=t.fused_features,
        num_warps=t.fused_warps,
        maxnreg=tuning.REGISTERS[dtype],  # or the assembler takes fewer, and spills some
    )
    return distances, losses, lengths
