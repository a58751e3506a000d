"""The loss for SentenceTransformerTrainer, teacher embeddings given as labels.

Needs sentence-transformers with what its trainer needs: pip install
pcoherence[sentence-transformers]. Nothing of it is imported here: the model is all that counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pcoherence.loss import PerceptionCoherenceLoss

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
        columns = list(sentence_features)
        if not columns:
            raise ValueError("sentence_features: expected at least one text column; got none")
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
