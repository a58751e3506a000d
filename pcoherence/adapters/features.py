"""Features [batch, width] of timm models, torchvision models and other modules."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Pool: TypeAlias = str | Callable[[Tensor], Tensor]
"""A name from POOLS, or a callable: a layer's output -> [batch, width]."""

POOLS = ("mean", "flatten")


class FeatureExtractor(nn.Module):
    """The features of a model, pooled: what a classifier's head would see, or a layer's output.

    Without `layer`, the model is one of timm's: forward_head(forward_features(x),
    pre_logits=True), pooled as its own head pools. With `layer`, the model runs as always, and the
    output of that submodule is taken: "avgpool" of torchvision's ResNets, "encoder.ln" of its
    vision transformers. Differentiable; parameters and training mode are the model's. An output is
    taken before a layer with inplace=True writes over it. Threads may share an extractor. Under
    torch.compile it breaks the graph (not fullgraph=True); compile the extractor, not its model.

    Args:
        model: any module.
        layer: the name of a submodule as in model.named_modules(); None: a timm model.
        pool: what becomes of a layer's output; with layer only.
            "mean": [batch, c, ...] is averaged over all that follows c; [batch, c] stays. Not for
            3 dimensions, which may be [batch, tokens, c].
            "flatten": [batch, everything else].
            A callable: output -> [batch, width]; lambda t: t[:, 0] takes a class token.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(self, model: nn.Module, layer: str | None = None, *, pool: Pool = "mean") -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module; got {type(model).__name__}")
        if layer is None:
            _check_timm(model)
        elif layer not in dict(model.named_modules()):
            known = ", ".join(name for name, _ in model.named_children())
            raise ValueError(
                f"layer: expected the name of a submodule, as in model.named_modules(), whose "
                f"first level is {known or 'empty'}; got {layer!r}"
            )
        if not callable(pool) and pool not in POOLS:
            known = ", ".join(POOLS)
            raise ValueError(f"pool: expected one of {known}, or a callable; got {pool!r}")
        super().__init__()
        self.model = model
        self.layer = layer
        self.pool = pool

    def forward(self, inputs: Any) -> Tensor:
        """Features [batch, width] of what the model is called with, in the model's dtype.

        Raises:
            RuntimeError: the model did not call the layer.
            TypeError, ValueError: the layer's output cannot be pooled, and why.
        """
        if self.layer is None:
            model: Any = self.model
            output = model.forward_head(model.forward_features(inputs), pre_logits=True)
            return _checked(output, "model")
        return _checked(self._features(inputs, self.layer), "pool")

    def _features(self, inputs: Any, layer: str) -> Any:
        """What the layer returns, pooled; the last time, where it is called several times."""
        found: list[Any] = []
        caller = _thread()

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            # Another thread may be using the same model, with a hook of its own. torch.compile
            # cannot trace which one this is.
            if torch.compiler.is_compiling() or _thread() == caller:
                found[:] = [self._apart(output)]

        handle = _register(self.model.get_submodule(layer), keep)
        try:
            self.model(inputs)
        finally:
            handle.remove()
        if not found:
            raise RuntimeError(
                f"layer: expected the model to call {layer!r}; it did not"
                + (COMPILED_BEFORE if _is_compiled(self.model) else "")
            )
        return self._pooled(found[0], layer)

    def _apart(self, output: Any) -> Any:
        """A copy, since the next layer may write over the output (inplace=True).

        A mean over pixels is one, and smaller.
        """
        if self.pool == "mean" and isinstance(output, Tensor) and output.ndim > 3:
            return output.flatten(2).mean(2)
        return tree_map_only(Tensor, torch.clone, output)

    def _pooled(self, output: Any, layer: str) -> Any:
        if not isinstance(self.pool, str):
            return self.pool(output)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"layer: expected a tensor from {layer!r}, or a callable pool that makes one; "
                f"got {type(output).__name__}"
            )
        if self.pool == "flatten":
            return output.flatten(1)
        if output.ndim == 3:
            raise ValueError(
                'pool: expected "flatten" or a callable for 3 dimensions, tokens or channels; '
                f"got {self.pool!r} and shape {tuple(output.shape)}"
            )
        return output


COMPILED_BEFORE = (
    " (a compiled model that has run before calls no hooks that are new: extract from the model "
    "before it is compiled, and compile the extractor)"
)


def _is_compiled(model: nn.Module) -> bool:
    return any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in model.modules()
    )


_REGISTERING = threading.Lock()
"""torch may give two threads' hooks one id."""


def _register(module: nn.Module, hook: Callable[[nn.Module, Any, Any], None]) -> Any:
    if torch.compiler.is_compiling():
        return module.register_forward_hook(hook)
    with _REGISTERING:
        return module.register_forward_hook(hook)


def _thread() -> int:
    """Which thread this is; a trace of torch.compile belongs to one."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _check_timm(model: nn.Module) -> None:
    if not all(hasattr(model, name) for name in ("forward_features", "forward_head")):
        raise ValueError(
            "layer: expected the name of a submodule, because the model has no forward_features "
            f"and forward_head as timm's have; got None and {type(model).__name__}"
        )


def _checked(features: Any, source: str) -> Tensor:
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        is_tensor = isinstance(features, torch.Tensor)
        got = f"shape {tuple(features.shape)}" if is_tensor else type(features).__name__
        raise ValueError(f"{source}: expected features [batch, width] from it; got {got}")
    return features
