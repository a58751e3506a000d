"""Gradient caching: batches whose activations do not fit into memory, embedded chunk by chunk.

Source: Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup", arXiv 2101.06983. What follows from keeping buffers, and from copies of the inputs,
is this library's.
"""

from __future__ import annotations

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from .spec import check_count, check_positive

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]
"""What a network is called with: one tensor, positional arguments, or named ones."""

_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def cached_backward(
    student: Callable[..., Tensor],
    inputs: Inputs,
    criterion: Callable[[Tensor, Tensor], Tensor],
    teacher: Tensor | Callable[..., Tensor],
    chunk: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    factor: float = 1.0,
) -> Tensor:
    """The loss of a whole batch and its gradient, with the activations of one chunk at a time.

    Does what ``criterion(student(inputs), teacher).backward()`` does, in three steps: the student
    embeds every chunk without a graph; the criterion gives the gradient with respect to all
    embeddings; the student embeds every chunk again, with a graph, for its part of that gradient.
    That is one forward pass more. Memory beside a chunk's activations: all embeddings and their
    gradient, O(n d), and what the criterion takes.

    The second pass repeats the first: random numbers (dropout), autocast, and buffers of modules
    in training mode are as they were. Afterwards generators and buffers stand where one pass over
    the chunks leaves them. Random states are kept of the CPU and of the devices of the inputs and
    of the student's parameters. DistributedDataParallel averages gradients once, after the last
    chunk; processes may have different numbers of chunks.

    Batch norm in training mode normalises each chunk by the chunk's own statistics, which no cache
    can mend: a RuntimeWarning names the module, once. Its running statistics are updated once for
    each chunk.

    Source: arXiv 2101.06983.

    Args:
        student: returns the embeddings of the points it is called with, [points, ...]. A module,
            or a function around one: what it closes over is searched for modules.
        inputs: of n points along the first dimension: a tensor, called as ``student(inputs)``; a
            tuple or list, ``student(*inputs)``; a mapping, ``student(**inputs)``. Values that are
            no tensors, and tensors without dimensions, are passed on as they are. Networks see
            copies of their rows.
        criterion: called once as ``criterion(embeddings, teacher)``; returns a single number, as
            `PerceptionCoherenceLoss` does. Its own parameters get their gradients too.
        teacher: embeddings [n, ...], or a callable that returns them, evaluated without gradient
            chunk by chunk, as the student is called. A constant.
        chunk: points that are embedded at a time, at least 1; the last chunk may be smaller.
        scaler: multiplies the loss before its gradient is taken; None: nothing does.
        factor: likewise, a finite number above 0: 1 / steps where gradients are accumulated.

    Returns:
        The loss, 0-d, detached, without scale and factor. Gradients are added to ``.grad``.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: gradients are switched off around the call.
    """
    if not torch.is_grad_enabled():
        raise RuntimeError(
            "cached_backward: expected to be called where gradients are enabled; got a call "
            "inside of torch.no_grad() or torch.inference_mode()"
        )
    check_count("chunk", chunk)
    check_positive("factor", factor)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        kind = type(scaler).__name__
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None; got {kind}")
    for argument, value in (("student", student), ("criterion", criterion)):
        if not callable(value):
            raise TypeError(f"{argument}: expected a callable; got {type(value).__name__}")
    check_reduction("criterion", getattr(criterion, "reduction", None))
    n = count_points("inputs", inputs)
    _check_teacher(teacher, n)

    ranges = chunk_ranges(n, chunk)
    first_pass = CachedPass(
        "student",
        [functools.partial(_embed, "student", student, inputs, *rows) for rows in ranges],
        modules_of(student),
        devices_of(inputs),
    )
    embeddings = torch.cat(first_pass.embeddings()).requires_grad_()
    if not isinstance(teacher, Tensor):
        with torch.no_grad():
            teacher = torch.cat([_embed("teacher", teacher, inputs, *rows) for rows in ranges])
    loss = criterion(embeddings, teacher.detach())
    _check_loss(loss)
    scaled = factor * loss
    (scaled if scaler is None else scaler.scale(scaled)).backward()  # type: ignore[no-untyped-call]
    if embeddings.grad is None:
        raise ValueError("criterion: expected a loss of the embeddings; got one without them")
    first_pass.backward([embeddings.grad[begin:end] for begin, end in ranges])
    return loss.detach()


class CachedPass:
    """A network's pass over chunks without a graph, and the same pass again with one.

    Args:
        argument: the network's name in messages.
        calls: for each chunk, what returns its embeddings [points, ...].
        networks: the modules that the calls use.
        devices: of the inputs; those of the networks' parameters are added.

    Raises:
        ValueError: a network is DistributedDataParallel with static_graph=True.
    """

    def __init__(
        self,
        argument: str,
        calls: Sequence[Callable[[], Tensor]],
        networks: Iterable[nn.Module],
        devices: Iterable[torch.device],
    ) -> None:
        networks = list(networks)
        modules = list(dict.fromkeys(m for network in networks for m in network.modules()))
        self._parallel = [m for m in modules if isinstance(m, DistributedDataParallel)]
        if any(parallel.static_graph for parallel in self._parallel):
            raise ValueError(
                f"{argument}: expected DistributedDataParallel without static_graph=True, which "
                "wants one backward pass in each step; got it with static_graph=True"
            )
        if len(calls) > 1:
            _warn_of_batch_norm(argument, networks)
        self._argument = argument
        self._calls = calls
        self._modules = modules
        own = (p.device for m in modules for p in m.parameters(recurse=False))
        self._devices = {d for d in (*devices, *own) if d.type not in ("cpu", "meta")}
        self._autocast = _autocast_states({"cpu", *(d.type for d in self._devices)})

    def embeddings(self) -> list[Tensor]:
        """The embeddings of each chunk, without a graph; keeps what `backward` needs."""
        self._buffers = Buffers(self._modules)
        self._broadcasts = [parallel.require_forward_param_sync for parallel in self._parallel]
        self._generators: list[Generators] = []
        found = []
        with torch.no_grad():
            for call in self._calls:
                self._generators.append(Generators(self._devices))
                # A copy: the embeddings may be a view of all that their chunk was.
                found.append(call().clone())
        return found

    def backward(self, gradients: Sequence[Tensor]) -> None:
        """Embed each chunk again, and add its share of the gradient to the parameters' `.grad`.

        Generators and buffers are left as this call finds them.

        Args:
            gradients: with respect to each chunk's embeddings, shaped as these.
        """
        generators, buffers = Generators(self._devices), Buffers(self._modules)
        self._buffers.restore()
        # Buffers come from process 0 again, or those of other processes would differ from the
        # first pass.
        for parallel, broadcast in zip(self._parallel, self._broadcasts, strict=True):
            parallel.require_forward_param_sync = broadcast
        last = len(self._calls) - 1
        try:
            with torch.enable_grad(), self._as_around_the_first():
                steps = zip(self._calls, self._generators, gradients, strict=True)
                for i, (call, state, gradient) in enumerate(steps):
                    state.restore()
                    with self._synchronised(i == last):
                        embeddings = call()
                        if not embeddings.requires_grad:
                            raise ValueError(
                                f"{self._argument}: expected embeddings with a gradient; got none "
                                "(no parameter requires grad, or the embeddings are detached)"
                            )
                        embeddings.backward(gradient.to(embeddings.dtype))  # type: ignore[no-untyped-call]
                        del embeddings  # it may be a view of all that its chunk was
        finally:
            generators.restore()
            buffers.restore()

    @contextmanager
    def _as_around_the_first(self) -> Iterator[None]:
        with ExitStack() as stack:
            for options in self._autocast:
                stack.enter_context(torch.autocast(**options))
            yield

    @contextmanager
    def _synchronised(self, wanted: bool) -> Iterator[None]:
        """Gradients stay in their process unless `wanted`; a caller's own no_sync stays in force.

        Forward and backward pass are both to be inside.
        """
        with ExitStack() as stack:
            for parallel in () if wanted else self._parallel:
                stack.enter_context(parallel.no_sync())
            yield


class Generators:
    """The states of the default generators of the CPU and of `devices`."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._states = [(device, _module_of(device)) for device in devices]
        self._kept = [module.get_rng_state(*_which(device)) for device, module in self._states]

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._cpu)
        for (device, module), state in zip(self._states, self._kept, strict=True):
            module.set_rng_state(state, *_which(device))


class Buffers:
    """Copies of the buffers of modules in training mode: running statistics, power iterations.

    Modules in evaluation mode change none, and may share large tables.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._kept = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            if module.training
            for name, buffer in module.named_buffers(recurse=False)
            if not is_lazy(buffer) and not buffer.is_inference()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the values back, and the tensors where a module has replaced them."""
        for module, name, buffer, values in self._kept:
            # .data: graphs of other passes that have saved the buffer are not to be refused.
            buffer.data.copy_(values)
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer


def count_points(argument: str, inputs: object) -> int:
    """How many points there are: the length of all tensors' first dimension.

    Raises:
        TypeError, ValueError: naming the tensor, what was expected and what came.
    """
    first: tuple[str, int] | None = None
    for name, value in _named(argument, inputs):
        if not isinstance(value, Tensor):
            _check_passed_on(name, value)
            continue
        if value.grad_fn is not None:
            raise ValueError(
                f"{name}: expected a tensor without a graph, through which each chunk would go "
                "back; got a result that requires grad (detach it, or compute it in the student)"
            )
        if value.ndim == 0:
            continue
        if first is None:
            first = name, value.shape[0]
        elif value.shape[0] != first[1]:
            raise ValueError(
                f"{name}: expected as many rows as {first[0]}, {first[1]}; got {value.shape[0]}"
            )
    if first is None:
        raise ValueError(f"{argument}: expected a tensor with a row for each point; got none")
    return first[1]


def chunk_ranges(n: int, chunk: int) -> list[tuple[int, int]]:
    """The first row of each chunk, and the one after its last. No points are one empty chunk.

    A process without points takes part in what processes do together all the same.
    """
    return [(begin, min(begin + chunk, n)) for begin in range(0, max(n, 1), chunk)]


def take_rows(inputs: Inputs, begin: int, end: int) -> Inputs:
    """Copies of the rows; what is no tensor, or has no dimension, as it is.

    Copies, because a network that changes its inputs in place must find them again.
    """
    take = functools.partial(_take, begin=begin, end=end)
    if isinstance(inputs, Tensor):
        return take(inputs)
    if isinstance(inputs, Mapping):
        return {name: take(value) for name, value in inputs.items()}
    return [take(value) for value in inputs]


def devices_of(inputs: Inputs) -> set[torch.device]:
    """Where its tensors are."""
    return {value.device for _, value in _named("", inputs) if isinstance(value, Tensor)}


def modules_of(function: object) -> list[nn.Module]:
    """The modules that a callable uses, as far as can be seen.

    Itself, its owner, its attributes, what it is partially applied to, closes over, and names of
    its globals.
    """
    if isinstance(function, nn.Module):
        return [function]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.values()]
        return [module for part in parts for module in modules_of(part)]
    if inspect.ismethod(function):
        return [*modules_of(function.__self__), *modules_of(function.__func__)]
    if inspect.isfunction(function):
        plain = inspect.unwrap(function)
        used = [plain.__globals__.get(name) for name in plain.__code__.co_names]
        used += [_content(cell) for cell in plain.__closure__ or ()]
    else:
        used = list(getattr(function, "__dict__", {}).values())
    return [value for value in used if isinstance(value, nn.Module)]


def check_reduction(argument: str, reduction: object) -> None:
    """Raise ValueError where the loss would be many numbers."""
    if reduction == "none":
        raise ValueError(
            f"{argument}: expected one whose loss is a single number, reduction 'mean' or 'sum'; "
            "got reduction 'none'"
        )


def check_embeddings(argument: str, found: object, rows: int) -> Tensor:
    """What a network returned; raise unless it is a tensor of so many rows."""
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{argument}: expected it to return a tensor of embeddings; got "
            f"{type(found).__name__} (put a function around it that picks the tensor)"
        )
    if found.ndim == 0 or found.shape[0] != rows:
        raise ValueError(
            f"{argument}: expected it to return an embedding for each of {rows} points; "
            f"got shape {tuple(found.shape)}"
        )
    return found


def _embed(
    argument: str, network: Callable[..., Tensor], inputs: Inputs, begin: int, end: int
) -> Tensor:
    part = take_rows(inputs, begin, end)
    if isinstance(part, Tensor):
        found = network(part)
    elif isinstance(part, Mapping):
        found = network(**part)
    else:
        found = network(*part)
    return check_embeddings(argument, found, end - begin)


def _take(value: Any, begin: int, end: int) -> Any:
    return value[begin:end].clone() if isinstance(value, Tensor) and value.ndim > 0 else value


def _named(argument: str, inputs: object) -> list[tuple[str, object]]:
    """The values that a network is called with, each as messages call it."""
    if isinstance(inputs, Tensor):
        return [(argument, inputs)]
    if isinstance(inputs, Mapping):
        return [(f"{argument}[{name!r}]", value) for name, value in inputs.items()]
    if isinstance(inputs, (tuple, list)):
        return [(f"{argument}[{i}]", value) for i, value in enumerate(inputs)]
    raise TypeError(
        f"{argument}: expected a tensor, a tuple or list of tensors, or a mapping with tensors; "
        f"got {type(inputs).__name__}"
    )


def _check_passed_on(name: str, value: object) -> None:
    """Raise where tensors are inside, which would not be split."""
    inside: Iterable[object] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, (tuple, list)):
        inside = value
    if any(isinstance(part, Tensor) for part in inside):
        raise TypeError(
            f"{name}: expected a tensor, or a value without tensors, which is passed on as it is; "
            f"got a {type(value).__name__} of tensors"
        )


def _check_teacher(teacher: object, n: int) -> None:
    if not isinstance(teacher, Tensor):
        if not callable(teacher):
            kind = type(teacher).__name__
            raise TypeError(f"teacher: expected a tensor of embeddings or a callable; got {kind}")
        return
    if teacher.ndim == 0 or teacher.shape[0] != n:
        got = teacher.shape[0] if teacher.ndim > 0 else "a 0-d tensor"
        raise ValueError(f"teacher: expected as many rows as inputs, {n}; got {got}")


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"criterion: expected it to return a tensor; got {type(loss).__name__}")
    if loss.ndim > 0:
        raise ValueError(
            "criterion: expected it to return a single number, a 0-d tensor; got shape "
            f"{tuple(loss.shape)} (take its mean or sum)"
        )
    if not loss.requires_grad:
        raise ValueError("criterion: expected a loss of the embeddings; got one without gradient")


def _warn_of_batch_norm(argument: str, networks: Iterable[nn.Module]) -> None:
    """Once for each module that normalises a chunk by what is in it."""
    for name, layer in (pair for network in networks for pair in network.named_modules()):
        by_chunk = isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None)
        if not by_chunk or layer in _warned:
            continue
        _warned.add(layer)
        warnings.warn(
            f"{argument}: batch norm {name!r} ({type(layer).__name__}) normalises each chunk by "
            "the statistics of that chunk, so that the loss depends on the size of chunks; after "
            ".eval() it uses its running statistics, and layer or group norm needs no batch",
            RuntimeWarning,
            stacklevel=4,
        )


def _autocast_states(kinds: Iterable[str]) -> list[dict[str, Any]]:
    """Arguments of torch.autocast that say again what holds here, for kinds of devices."""
    return [
        {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        for kind in sorted(kinds)
        if torch.amp.is_autocast_available(kind)
    ]


def _module_of(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What says whose generator is meant; MPS has but one."""
    return () if device.type == "mps" else (device,)


def _content(cell: Any) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None
