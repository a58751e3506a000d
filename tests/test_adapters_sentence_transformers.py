"""The loss for sentence-transformers: its values, its gradient, its trainer, its errors."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pcoherence import CandidateBank, perception_coherence_loss
from pcoherence.adapters.sentence_transformers import CoherenceDistillationLoss
from pcoherence.testing import make_case

os.environ["HF_HUB_OFFLINE"] = "1"  # before it is imported: nothing is looked up on the net


class Model(nn.Module):
    """What the loss knows of a SentenceTransformer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4).double()

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**features, "sentence_embedding": self.linear(features["values"])}


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def column(seed: int) -> dict[str, Tensor]:
    return {"values": make_case("gaussian", 6, 3, seed=seed)}


def test_value_and_gradient_of_one_column(model: Model) -> None:
    labels = make_case("gaussian", 6, 5, seed=1).requires_grad_()
    criterion = CoherenceDistillationLoss(model, temperature=0.2, objective="l1")
    loss = criterion(iter([column(0)]), labels)
    embeddings = model(column(0))["sentence_embedding"]
    expected = perception_coherence_loss(embeddings, labels, temperature=0.2, objective="l1")
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, model.linear.weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, model.linear.weight)
    torch.testing.assert_close(ours, theirs)
    torch.autograd.backward(loss)
    assert labels.grad is None


@pytest.mark.parametrize("shared", [True, False])
def test_columns_are_ranked_together(model: Model, shared: bool) -> None:
    columns = [column(0), column(1)]
    labels = [make_case("gaussian", 6, 5, seed=2 if shared else seed) for seed in (2, 3)]
    loss = CoherenceDistillationLoss(model)(
        columns, labels[0] if shared else torch.stack(labels, 1)
    )
    embeddings = [model(one)["sentence_embedding"] for one in columns]
    torch.testing.assert_close(
        loss, perception_coherence_loss(torch.cat(embeddings), torch.cat(labels))
    )


def test_dtypes_may_differ(model: Model) -> None:
    labels = make_case("gaussian", 6, 5, seed=1).float()
    assert CoherenceDistillationLoss(model)([column(0)], labels).dtype == torch.float64
    half = copy.deepcopy(model).bfloat16()
    features = {"values": column(0)["values"].bfloat16()}
    loss = CoherenceDistillationLoss(half)([features], labels)
    embeddings = half(features)["sentence_embedding"].float()
    torch.testing.assert_close(loss, perception_coherence_loss(embeddings, labels))


def test_a_teacher_is_not_rounded_to_a_student_of_half_precision(model: Model) -> None:
    """Rounded to 8 bits, its distances would tie."""
    labels = 1 + 1e-4 * make_case("gaussian", 6, 5, seed=1).float()
    half = copy.deepcopy(model).bfloat16()
    features = {"values": column(0)["values"].bfloat16()}
    embeddings = half(features)["sentence_embedding"].float()
    expected = perception_coherence_loss(embeddings, labels)
    torch.testing.assert_close(CoherenceDistillationLoss(half)([features], labels), expected)
    ties = perception_coherence_loss(embeddings, labels.bfloat16().float())
    assert not torch.isclose(expected, ties)


def test_options_of_the_module(model: Model) -> None:
    criterion = CoherenceDistillationLoss(model, bank=CandidateBank(8))
    labels = make_case("gaussian", 6, 5, seed=1)
    criterion([column(0)], labels)
    assert len(criterion.criterion.bank) == 6


def test_config_is_for_a_model_card(model: Model) -> None:
    criterion = CoherenceDistillationLoss(model, temperature=0.3, metric=torch.cdist)
    config = criterion.get_config_dict()
    assert config["temperature"] == 0.3
    assert "cdist" in json.loads(json.dumps(config))["metric"]
    assert "2505.06595" in criterion.citation


@pytest.mark.parametrize(
    ("columns", "labels", "error", "message"),
    [
        (0, torch.rand(6, 5), ValueError, "sentence_features: expected at least one text column"),
        (1, None, TypeError, "labels: expected the teacher's embeddings .*; got NoneType"),
        (1, torch.arange(6), TypeError, "labels: expected .*, floating point; got torch.int64"),
        (1, torch.rand(6), ValueError, r"labels: expected .*; got shape \(6,\)"),
        (2, torch.rand(6, 3, 5), ValueError, r"labels: .* 2 columns, dt\]; got shape \(6, 3, 5\)"),
        (1, torch.rand(5, 5), ValueError, "teacher: expected .*6"),
    ],
    ids=["no column", "no labels", "classes", "scores", "columns", "rows"],
)
def test_bad_inputs(
    model: Model, columns: int, labels: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="^" + message):
        CoherenceDistillationLoss(model)([column(i) for i in range(columns)], labels)


def test_bad_arguments(model: Model) -> None:
    with pytest.raises(TypeError, match=r"^model: expected a SentenceTransformer; got str"):
        CoherenceDistillationLoss("all-MiniLM-L6-v2")
    with pytest.raises(ValueError, match=r"^temperature: expected"):
        CoherenceDistillationLoss(model, temperature=-1.0)


WORDS = [*"abcdefghijkl"]
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS[:4]]


def static_student() -> Any:
    """A SentenceTransformer of whole words, made of nothing but this list."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[UNK]": 0} | {word: i + 1 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    module = StaticEmbedding(tokenizer, embedding_dim=8)
    return SentenceTransformer(modules=[module], device="cpu")


def test_its_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = static_student()
    import sentence_transformers
    from datasets import Dataset

    angles = torch.linspace(0, 3, len(TEXTS))
    teacher = torch.stack([angles.cos(), angles.sin()], 1)
    data = Dataset.from_dict({"text": TEXTS, "label": teacher.tolist()})
    criterion = CoherenceDistillationLoss(student, temperature=0.05)
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=10,
        per_device_train_batch_size=24,
        learning_rate=0.1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )

    def loss() -> float:
        embeddings = torch.as_tensor(student.encode(TEXTS))
        return perception_coherence_loss(embeddings, teacher, temperature=0.05).item()

    before = loss()
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=student, args=arguments, train_dataset=data, eval_dataset=data, loss=criterion
    )
    trainer.train()
    assert loss() < 0.5 * before
    assert trainer.evaluate()["eval_loss"] < before
    student.save_pretrained(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "CoherenceDistillationLoss" in card
    assert "2505.06595" in card


def test_labels_that_matryoshka_cuts_are_refused(model: Model) -> None:
    """They are as wide as the student: 4. Others pass through whole."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model.get_embedding_dimension = lambda: 4  # type: ignore[attr-defined]

    def loss(labels: Tensor) -> Tensor:
        inner = CoherenceDistillationLoss(model, metric="euclidean")
        return losses.MatryoshkaLoss(model, inner, [4, 2])([column(0)], labels)

    for labels in (
        make_case("gaussian", 6, 4, seed=1),
        make_case("gaussian", 6, 4, seed=1)[:, None],
    ):
        with pytest.raises(ValueError, match=r"^labels: .* width 4; got them cut to 2 by Matryosh"):
            loss(labels)
    labels = make_case("gaussian", 6, 4, seed=1)
    padded = nn.functional.pad(labels, (0, 1))
    full = nn.functional.normalize(model(column(0))["sentence_embedding"], dim=-1)
    cut = nn.functional.normalize(full[:, :2], dim=-1)
    expected = sum(perception_coherence_loss(points, labels) for points in (full, cut))
    torch.testing.assert_close(loss(padded), expected)
    assert loss(make_case("gaussian", 6, 2, seed=1)).isfinite()  # as wide as a cut, but whole
