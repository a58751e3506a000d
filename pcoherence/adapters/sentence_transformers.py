"""The loss for SentenceTransformerTrainer, teacher embeddings given as labels.

Needs sentence-transformers with what its trainer needs: pip install
pcoherence[sentence-transformers]. Nothing of it is imported here: the model is all that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pcoherence.cached import (
    CachedPass,
    check_embeddings,
    check_reduction,
    chunk_ranges,
    count_points,
    devices_of,
    take_rows,
)
from pcoherence.inputs import at_least_float32
from pcoherence.loss import PerceptionCoherenceLoss
from pcoherence.spec import check_count

from ._dtypes import same_dtype


class CoherenceDistillationLoss(nn.Module):
    """`PerceptionCoherenceLoss` of a batch of texts, as sentence-transformers calls its losses.

    The dataset has text columns and a column `label` with the teacher's embeddings of the texts,
    computed once. Every text is a point: with several columns, those of all columns are ranked
    together. Student and teacher may differ in width::

        texts, label                      inputs
        one column, [batch, dt]           the teacher's embedding of each text
        columns, [batch, columns, dt]     one for the text in each column
        columns, [batch, dt]              one for all texts of a row, translations for example

    Args:
        model: the student, a SentenceTransformer or any module that returns a dict with
            "sentence_embedding" [batch, ds].
        **options: of `PerceptionCoherenceLoss`, same names, defaults and errors.

    Raises:
        TypeError: model is not a module.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a SentenceTransformer; got {type(model).__name__}")
        super().__init__()
        self.model = model
        self.criterion = PerceptionCoherenceLoss(**options)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: a dict of the model's inputs for each text column.
            labels: [batch, dt] or [batch, columns, dt], floating point, constant. Student and
                teacher are compared in the wider of their dtypes.

        Returns:
            As `perception_coherence_loss`: a 0-d tensor, unless reduction is "none".

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        columns = _text_columns(sentence_features)
        teacher = _teacher_points(labels, len(columns))
        _refuse_cut(self.model, labels)
        student = torch.cat([self.model(column)["sentence_embedding"] for column in columns])
        loss: Tensor = self.criterion(*same_dtype(student, teacher.to(student.device)))
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {
            name: value if isinstance(value, (int, float, str, type(None))) else repr(value)
            for name, value in vars(self.criterion.spec).items()
        }

    @property
    def citation(self) -> str:
        """The paper, for the model card."""
        return """
@article{nguyen2026perception,
    title={Feature Representation Transferring to Lightweight Models via Perception Coherence},
    author={Hai-Vy Nguyen and Fabrice Gamboa and Sixin Zhang and Reda Chhaibi and Serge Gratton
        and Thierry Giaccone},
    journal={Transactions on Machine Learning Research},
    year={2026},
    eprint={2505.06595},
    archivePrefix={arXiv}
}
"""


class CachedCoherenceDistillationLoss(CoherenceDistillationLoss):
    """`CoherenceDistillationLoss` of batches whose activations do not fit into memory.

    Takes the place of `CoherenceDistillationLoss` as CachedMultipleNegativesRankingLoss does of
    MultipleNegativesRankingLoss: set a large per_device_train_batch_size, and a mini_batch_size
    that fits. The model embeds each mini-batch without a graph; loss and gradient are those of the
    whole batch; the backward pass embeds each mini-batch again, for its part of the gradient. See
    `pcoherence.cached_backward` for what the second pass finds as it was, for batch norm, and for
    several processes. MatryoshkaLoss cuts the embeddings, and leaves the labels whole.

    Args:
        model: as of `CoherenceDistillationLoss`, padded inputs only: every tensor of a column has
            a row for each text. StaticEmbedding has none, and needs no cache.
        mini_batch_size: texts of a column that are embedded at a time, at least 1.
        **options: of `PerceptionCoherenceLoss`; reduction is "mean" or "sum". Parameters of a
            callable metric get their gradients too.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    uses_gradient_cache = True
    """MatryoshkaLoss and others ask for it: the second pass runs after their forward pass."""

    def __init__(self, model: nn.Module, mini_batch_size: int = 32, **options: Any) -> None:
        super().__init__(model, **options)
        check_count("mini_batch_size", mini_batch_size)
        check_reduction("reduction", self.criterion.reduction)
        # By name, since nothing of sentence-transformers is imported here.
        if any(type(module).__name__ == "StaticEmbedding" for module in model.modules()):
            raise ValueError(
                "model: expected one whose inputs have a row for each text; got a StaticEmbedding "
                "(CoherenceDistillationLoss takes it)"
            )
        self.mini_batch_size = mini_batch_size

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch, whose backward pass runs the model again.

        Args:
            sentence_features: as of `CoherenceDistillationLoss`.
            labels: likewise.

        Returns:
            A 0-d tensor.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        columns = _text_columns(sentence_features)
        counts = [count_points(f"sentence_features[{i}]", each) for i, each in enumerate(columns)]
        _check_labels(labels, counts)
        ranges = [chunk_ranges(count, self.mini_batch_size) for count in counts]
        first_pass = CachedPass(
            "model",
            [
                partial(self._embed, column, *rows)
                for column, of_column in zip(columns, ranges, strict=True)
                for rows in of_column
            ],
            [self.model],
            {device for column in columns for device in devices_of(column)},
        )
        # In float32, or the gradient of a loss that is not yet scaled would vanish in float16.
        embeddings = [at_least_float32(part) for part in first_pass.embeddings()]
        parts = iter(embeddings)
        by_column = [[next(parts) for _ in of_column] for of_column in ranges]
        if not torch.is_grad_enabled():
            return self.calculate_loss(by_column, labels)
        for part in embeddings:
            part.requires_grad_()
        loss = self.calculate_loss(by_column, labels, with_backward=True)
        gradients = [part.grad for part in embeddings if part.grad is not None]
        for part in embeddings:
            part.grad = None
        if not loss.requires_grad:
            loss.requires_grad_()

        def second_pass(scale: Tensor) -> None:
            """Scale is d(what is differentiated) / d(loss): a GradScaler's, or 1 / steps."""
            first_pass.backward([gradient * scale for gradient in gradients])

        loss.register_hook(second_pass)  # type: ignore[no-untyped-call]
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings; MatryoshkaLoss puts its own around this method.

        Args:
            reps: for each column its mini-batches' embeddings [points, ds].
            labels: as of forward.
            with_backward: add the gradient to the `.grad` of each of reps.

        Returns:
            A 0-d tensor; with_backward leaves it a graph only where a metric may have parameters.
        """
        teacher = _teacher_points(labels, len(reps))
        parts = [part for column in reps for part in column]
        student = torch.cat(parts)
        loss: Tensor = self.criterion(*same_dtype(student, teacher.to(student.device)))
        if not with_backward:
            return loss
        learns = callable(self.criterion.metric)
        loss.backward(inputs=parts, retain_graph=learns)  # type: ignore[no-untyped-call]
        return loss if learns else loss.detach()

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {"mini_batch_size": self.mini_batch_size, **super().get_config_dict()}

    def _embed(self, column: dict[str, Tensor], begin: int, end: int) -> Tensor:
        found = self.model(take_rows(column, begin, end))["sentence_embedding"]
        return check_embeddings("model", found, end - begin)


def _text_columns(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    columns = list(sentence_features)
    if not columns:
        raise ValueError("sentence_features: expected at least one text column; got none")
    return columns


def _check_labels(labels: Tensor, counts: list[int]) -> None:
    """Raise unless there is a row for each text; `counts` are those of the columns."""
    rows = _teacher_points(labels, len(counts)).shape[0]
    if rows != sum(counts):
        raise ValueError(
            f"labels: expected as many rows as texts, {counts[0]}; got {labels.shape[0]}"
        )


def _refuse_cut(model: nn.Module, labels: Tensor) -> None:
    """Raise ValueError where MatryoshkaLoss has cut the teacher's embeddings.

    It cuts labels that are as wide as the model along with the model's embeddings, which suits a
    regression; here it would change the order that is to be learnt. It calls the model through an
    object that knows the width, and what it has cut is a view of wider rows.
    """
    width = getattr(vars(model).get("forward"), "dim", None)
    if width is None or labels.shape[-1] != width or labels.stride(-2) <= width:
        return
    raise ValueError(
        f"labels: expected the teacher's embeddings whole, width {labels.stride(-2)}; got them cut "
        f"to {width} by MatryoshkaLoss, which does so to labels as wide as the student. A column "
        "of zeros, torch.nn.functional.pad(label, (0, 1)), keeps it from that and changes no "
        "distance"
    )


def _teacher_points(labels: object, columns: int) -> Tensor:
    """The teacher's embeddings of the texts of one column after the other: [columns batch, dt]."""
    expected = (
        f"labels: expected the teacher's embeddings [batch, dt] or [batch, {columns} columns, dt]"
    )
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{expected}, floating point; got {got}")
    if labels.ndim == 2:
        return labels.detach().repeat(columns, 1)
    if labels.ndim != 3 or labels.shape[1] != columns:
        raise ValueError(f"{expected}; got shape {tuple(labels.shape)}")
    return labels.detach().transpose(0, 1).flatten(0, 1)
