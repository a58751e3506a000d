"""The tensors of one call: checked before any work, then brought to one dtype."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class LossInputs(NamedTuple):
    """Checked tensors; floats share one dtype (float32 or float64), all share one device.

    Candidates of None are the anchors themselves; weights of None are ones; a `self_index` of
    None, or an entry of -1, excludes no candidate. Everything but the student is a constant.
    """

    student: Tensor  # [m, ds]
    student_candidates: Tensor | None  # [n, ds]
    teacher: Tensor  # [m, dt]
    teacher_candidates: Tensor | None  # [n, dt]
    anchor_weights: Tensor | None  # [m]
    candidate_weights: Tensor | None  # [n] or [m, n]
    self_index: Tensor | None  # int64 [m]


def candidates(points: Tensor, given: Tensor | None) -> Tensor:
    """The candidates [n, d]: those given, or the anchors themselves."""
    return points if given is None else given


def rows_of(candidate_weights: Tensor | None, anchors: Tensor | slice) -> Tensor | None:
    """The weights [n] or [m, n] as some of the anchors see them."""
    by_anchor = candidate_weights is not None and candidate_weights.ndim == 2
    return candidate_weights[anchors] if by_anchor else candidate_weights  # type: ignore[index]


def check_common_weights(candidate_weights: object, what: str) -> None:
    """Raise ValueError where weights differ by anchor, and `what` adds candidates to theirs."""
    if isinstance(candidate_weights, Tensor) and candidate_weights.ndim == 2:
        raise ValueError(
            "candidate_weights: expected shape [n], a weight for each candidate of this batch, "
            f"with {what}, which adds candidates; got {tuple(candidate_weights.shape)}"
        )


def prepare_inputs(
    student: Tensor,
    teacher: Tensor,
    *,
    student_candidates: Tensor | None = None,
    teacher_candidates: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    candidate_weights: Tensor | None = None,
    self_index: Tensor | str | None = "auto",
) -> LossInputs:
    """Check the tensors of a call and return them as `LossInputs`.

    Half precision is raised to float32, the teacher detached, weights (any real dtype) converted.
    Weights' signs and the range of `self_index` are not checked where there are no values to see:
    while torch.compile traces, under torch.func's transforms, of fake and meta tensors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_points("student", student)
    check_points("teacher", teacher, like=student)
    check_same_length("teacher", teacher, "student", student)
    _check_candidate_pair(student, teacher, student_candidates, teacher_candidates)
    m = student.shape[0]
    n = candidates(student, student_candidates).shape[0]
    check_weights("anchor_weights", anchor_weights, (m,), student)
    by_anchor = isinstance(candidate_weights, Tensor) and candidate_weights.ndim == 2
    shape = (m, n) if by_anchor else (n,)
    check_weights("candidate_weights", candidate_weights, shape, student)
    index = _resolve_self_index(self_index, student, n, square=student_candidates is None)
    return inputs_outside_inference(
        LossInputs(
            at_least_float32(student),
            _optional(student_candidates),
            at_least_float32(teacher.detach()),
            None if teacher_candidates is None else at_least_float32(teacher_candidates.detach()),
            _converted(anchor_weights, student),
            _converted(candidate_weights, student),
            index,
        )
    )


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor; a copy where it was made in inference mode, which autograd cannot save."""
    return tensor.clone() if _from_inference(tensor) else tensor


def _from_inference(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return tensor.is_inference()


def inputs_outside_inference(inputs: LossInputs) -> LossInputs:
    """The tensors, each as `outside_inference` gives it."""
    copies = {
        name: tensor.clone()
        for name, tensor in zip(LossInputs._fields, inputs, strict=True)
        if tensor is not None and _from_inference(tensor)
    }
    # Hardly ever is there one, and a call for a few points is as long as its Python.
    return inputs._replace(**copies) if copies else inputs


def check_enough_candidates(inputs: LossInputs, gathered: bool = False) -> None:
    """Raise ValueError unless there are 2 candidates, or nothing at all.

    `gathered`: the candidates are the rows of all processes, which a process may have none of.
    """
    m, n = inputs.student.shape[0], candidates(inputs.student, inputs.student_candidates).shape[0]
    square = inputs.student_candidates is None
    if n >= 2 or (m == 0 and (square or (gathered and n == 0))):
        return
    hint = "; a DataLoader's drop_last=True avoids last batches of one"
    argument = "student" if square or gathered else "student_candidates"
    where = " in all processes together" if gathered else ""
    raise ValueError(
        f"{argument}: expected at least 2 candidates (rows){where}; got {n}"
        + (hint if square or gathered else "")
    )


def prepare_values(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Check the tensors of `soft_rank`: values [..., n] and weights broadcastable to them.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_float("values", values)
    if values.ndim < 1:
        raise ValueError("values: expected at least 1 dimension; got a 0-d tensor")
    check_weights("weights", weights, tuple(values.shape), values, broadcast=True)
    converted = _converted(weights, values)
    return (
        outside_inference(at_least_float32(values)),
        None if converted is None else outside_inference(converted),
    )


def computing_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of `dtype` are computed in: float32 for half precision, otherwise their own."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; other dtypes as they are. Gradients flow through."""
    dtype = computing_dtype(tensor.dtype)
    # Itself where nothing changes: inside of torch.func even that .to() would be a transform.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def converted_weights(weights: Tensor | None, points: Tensor) -> Tensor:
    """Weights [n] of `points` [n, d] in the dtype that the loss is computed in; None: ones."""
    converted = _converted(weights, points)
    if converted is not None:
        return converted
    return points.detach().new_ones(points.shape[0], dtype=computing_dtype(points.dtype))


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else at_least_float32(tensor)


def _converted(weights: Tensor | None, like: Tensor) -> Tensor | None:
    return None if weights is None else weights.to(computing_dtype(like.dtype))


def _check_tensor(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: expected a torch.Tensor; got {type(value).__name__}")


def _check_float(argument: str, value: Tensor) -> None:
    _check_tensor(argument, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{argument}: expected dtype float16, bfloat16, float32 or float64; got {value.dtype}"
            + _integer_hint(argument, value)
        )
    _check_plain(argument, value)


def _integer_hint(argument: str, value: Tensor) -> str:
    if value.is_floating_point() or value.is_complex():
        return ""
    if value.ndim == 2 and value.shape[1] > 1:
        return f" (of quantised embeddings, take {argument}.float())"
    if argument in ("values", "weights"):
        return f" (take {argument}.float())"
    return " (embeddings, not class labels)"


def _check_plain(argument: str, value: Tensor) -> None:
    """Raise unless all values of a rectangle lie here: no formula knows other tensors."""
    if value.is_nested:
        raise TypeError(
            f"{argument}: expected a dense tensor; got a nested tensor (pool its sequences, or pad "
            "it and give the rows that are padding the weight 0)"
        )
    if _is_distributed(value):
        raise TypeError(
            f"{argument}: expected a plain tensor; got a DTensor (take {argument}.full_tensor() on "
            "every process of its mesh; gather=True collects the rows of other processes)"
        )
    if isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(
            f"{argument}: expected a plain tensor; got a MaskedTensor (take {argument}.to_tensor(0)"
            ", and give rows that shall not count the weight 0)"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{argument}: expected a dense tensor; got layout {value.layout}")


def _is_distributed(value: Tensor) -> bool:
    """Whether it is a DTensor; if there is any, its module has been imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def check_generator(generator: object) -> None:
    """Raise unless it is one of torch's, or None, and can be used here."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator: expected a torch.Generator or None; got {type(generator).__name__}"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "generator: expected None under torch.compile, whose graphs cannot hold one; got one. "
            "torch.manual_seed seeds the draw without it"
        )


def refuse_recomputation(changed: str) -> None:
    """Raise where activation checkpointing computes the loss again, in the backward pass.

    `changed`, the bank or the generator, is not what it was: that would be another loss.
    """
    # -1: not in a backward pass
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return
    raise RuntimeError(
        f"{changed}: expected the loss outside of torch.utils.checkpoint, whose second pass would "
        "not see what the first one saw; got a call in the backward pass. Checkpoint the networks, "
        "and compute the loss after them"
    )


def values_are_hidden(tensor: Tensor) -> bool:
    """Whether there are no values to read, or reading them would break what is being traced."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return True
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    if fake is not None and isinstance(tensor, fake.FakeTensor):
        return True
    return torch._C._functorch.maybe_get_level(tensor) != -1


def _check_device(argument: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(
            f"{argument}: expected device {like.device}, that of the first tensor; "
            f"got {value.device}"
        )


def check_points(argument: str, value: Tensor, like: Tensor | None = None) -> None:
    """Check a matrix of points; with `like`, also for that tensor's dtype and device."""
    _check_float(argument, value)
    if value.ndim != 2:
        shape = tuple(value.shape)
        hint = " (pool or flatten it first)" if value.ndim > 2 else " (embeddings, not labels)"
        raise ValueError(
            f"{argument}: expected 2 dimensions [points, features]; got shape {shape}{hint}"
        )
    if like is None:
        return
    if value.dtype != like.dtype and not _mixed_by_autocast(value, like):
        raise TypeError(
            f"{argument}: expected the student's dtype {like.dtype}; got {value.dtype} "
            f"({_dtype_hint(argument, value, like)})"
        )
    _check_device(argument, value, like)


def _dtype_hint(argument: str, value: Tensor, like: Tensor) -> str:
    """What to convert: never the teacher to half precision, which rounds its order away."""
    if like.dtype not in (torch.float16, torch.bfloat16):
        return f"convert it: {argument}.to(student.dtype)"
    if value.dtype != torch.float32:
        return f"convert both: student.float(), {argument}.float()"
    return "convert the student: student.float()"


def _mixed_by_autocast(value: Tensor, like: Tensor) -> bool:
    """Whether float32 meets half precision where autocast makes some tensors half and others not.

    Both are raised to float32 anyway.
    """
    dtypes = {value.dtype, like.dtype}
    device = like.device.type
    known = torch.amp.is_autocast_available(device)
    return torch.float64 not in dtypes and known and torch.is_autocast_enabled(device)


def check_same_length(argument: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both have as many rows."""
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"{argument}: expected as many rows as {other_name}, {other.shape[0]}; "
            f"got {value.shape[0]}"
        )


def _check_candidate_pair(
    student: Tensor,
    teacher: Tensor,
    student_candidates: Tensor | None,
    teacher_candidates: Tensor | None,
) -> None:
    if student_candidates is None and teacher_candidates is None:
        return
    if student_candidates is None or teacher_candidates is None:
        missing = "student_candidates" if student_candidates is None else "teacher_candidates"
        raise ValueError(
            f"{missing}: expected a tensor, because student_candidates and teacher_candidates "
            "come together or not at all; got None"
        )
    check_points("student_candidates", student_candidates, like=student)
    check_points("teacher_candidates", teacher_candidates, like=student)
    pairs = (
        ("student_candidates", student_candidates, "student", student),
        ("teacher_candidates", teacher_candidates, "teacher", teacher),
    )
    for argument, value, other_name, other in pairs:
        if value.shape[1] != other.shape[1]:
            raise ValueError(
                f"{argument}: expected as many columns as {other_name}, {other.shape[1]}; "
                f"got {value.shape[1]}"
            )
    check_same_length(
        "teacher_candidates", teacher_candidates, "student_candidates", student_candidates
    )


MOST_TOTAL = 2.0**110
"""Of weights. float32 holds 2^18 times that: sums of weights are multiplied on the way."""


def check_weights(
    argument: str,
    weights: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    broadcast: bool = False,
) -> None:
    """Raise unless weights are None, or constant, of this shape, and from 0 to MOST_TOTAL / n."""
    if weights is None:
        return
    _check_tensor(argument, weights)
    _check_plain(argument, weights)
    if weights.dtype.is_complex:
        raise TypeError(f"{argument}: expected a real dtype; got {weights.dtype}")
    got = tuple(weights.shape)
    if broadcast and not _broadcasts(got, shape):
        raise ValueError(f"{argument}: expected a shape that broadcasts to {shape}; got {got}")
    if not broadcast and got != shape:
        raise ValueError(f"{argument}: expected shape {shape}; got {got}")
    _check_device(argument, weights, like)
    if weights.requires_grad:
        raise ValueError(
            f"{argument}: expected a constant, because weights get no gradient; "
            "got a tensor that requires grad (detach it)"
        )
    # Once compiled, the CPU's operators check those of candidates.
    if values_are_hidden(weights):
        return
    most = MOST_TOTAL / max(1, shape[-1])
    fits = (weights >= 0) & (weights <= most)  # NaN does not
    if not bool(fits.all()):
        worst = weights[~fits][0].item()
        raise ValueError(f"{argument}: expected weights from 0 to {most:.1e}; got {worst}")


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(
        size in (1, wanted) for size, wanted in zip(shape, tail, strict=True)
    )


def _resolve_self_index(
    self_index: Tensor | str | None, student: Tensor, n: int, square: bool
) -> Tensor | None:
    """Which candidate is each anchor itself, int64 [m]; "auto" knows only the square case."""
    m = student.shape[0]
    if self_index is None:
        return None
    if isinstance(self_index, str):
        if self_index != "auto":
            raise ValueError(
                f'self_index: expected "auto", None or an int64 tensor; got {self_index!r}'
            )
        return torch.arange(m, device=student.device) if square else None
    if not isinstance(self_index, Tensor):
        kind = type(self_index).__name__
        raise TypeError(f'self_index: expected "auto", None or an int64 tensor; got {kind}')
    _check_plain("self_index", self_index)
    if self_index.dtype != torch.int64:
        raise TypeError(f"self_index: expected dtype torch.int64; got {self_index.dtype}")
    if tuple(self_index.shape) != (m,):
        raise ValueError(f"self_index: expected shape {(m,)}; got {tuple(self_index.shape)}")
    _check_device("self_index", self_index, student)
    if not values_are_hidden(self_index) and m > 0:
        low, high = self_index.min().item(), self_index.max().item()
        if low < -1 or high >= n:
            raise ValueError(
                f"self_index: expected entries from -1 (none) to {n - 1}; got {low} to {high}"
            )
    return self_index
