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
from pcoherence.adapters.sentence_transformers import (
    CachedCoherenceDistillationLoss,
    CoherenceDistillationLoss,
)
from pcoherence.testing import make_case, relative_error

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


LABELS = make_case("gaussian", 6, 5, seed=4)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("size", [1, 4, 6, 50])
@pytest.mark.parametrize("columns", [1, 2])
def test_cached_equals_the_whole_batch(model: Model, columns: int, size: int) -> None:
    alone = copy.deepcopy(model)
    features = [column(i) for i in range(columns)]
    options: dict[str, Any] = {"temperature": 0.2, "reduction": "sum"}
    loss = CachedCoherenceDistillationLoss(model, mini_batch_size=size, **options)(features, LABELS)
    expected = CoherenceDistillationLoss(alone, **options)(features, LABELS)
    torch.testing.assert_close(loss, expected)
    assert model.linear.weight.grad is None
    for one in (loss, expected):
        (0.25 * one).backward()
    torch.testing.assert_close(gradients(model), gradients(alone))


def test_cached_and_options(model: Model) -> None:
    criterion = CachedCoherenceDistillationLoss(model, bank=CandidateBank(8))
    assert criterion.mini_batch_size == 32  # that of CachedMultipleNegativesRankingLoss
    criterion([column(0)], LABELS)
    assert len(criterion.criterion.bank) == 6
    assert criterion.get_config_dict()["mini_batch_size"] == 32


def test_cached_second_pass_is_as_around_the_first() -> None:
    """Dropout's masks, autocast and what Pooling does to masks; forward passes before the first
    backward pass, which is outside of autocast."""

    class Encoder(Model):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.seen: list[Tensor] = []

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            features["values"].mul_(2)
            hidden = nn.functional.dropout(self.linear(features["values"]), 0.5)
            self.seen.append(hidden.detach())
            features["sentence_embedding"] = self.norm(hidden)
            return features

    model = Encoder()
    criterion = CachedCoherenceDistillationLoss(model, mini_batch_size=4)
    features = [{"values": column(i)["values"].float()} for i in range(2)]
    before = features[0]["values"].clone()
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(RuntimeWarning, match="^model: batch"):
        losses = [criterion([one], LABELS) for one in features]
    first = list(model.seen)
    model.seen.clear()
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    for loss in reversed(losses):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == 4
    assert first[0].dtype == torch.bfloat16
    again = model.seen[2:] + model.seen[:2]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert all(torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True))
    assert list(features[0]) == ["values"]
    assert torch.equal(features[0]["values"], before)


def test_cached_without_gradients(model: Model) -> None:
    criterion = CachedCoherenceDistillationLoss(model, mini_batch_size=4)
    with torch.no_grad():
        loss = criterion([column(0)], LABELS)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, criterion([column(0)], LABELS).detach())


def test_cached_small_gradients_survive_half_precision(model: Model) -> None:
    """The trainer's scaler multiplies the loss after its gradient was taken."""
    half = copy.deepcopy(model).half()
    features = {"values": 1e4 * column(0)["values"].half()}
    criterion = CachedCoherenceDistillationLoss(half, mini_batch_size=4, temperature=1e3)
    (2.0**16 * criterion([features], LABELS)).backward()
    found = gradients(half).float()
    half.zero_grad()
    loss = CoherenceDistillationLoss(half, temperature=1e3)([features], LABELS)
    (2.0**16 * loss).backward()
    assert relative_error(found, gradients(half).float()) < 2**-9


def test_cached_metric_with_parameters(model: Model) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(4).double())

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cdist(a * self.weights, b * self.weights)

    alone, options = copy.deepcopy(model), {"teacher_metric": "euclidean", "scale": "none"}
    metric, other = Scaled(), Scaled()
    ours = CachedCoherenceDistillationLoss(model, mini_batch_size=4, metric=metric, **options)
    theirs = CoherenceDistillationLoss(alone, metric=other, **options)
    for criterion in (ours, theirs):
        (0.25 * criterion([column(0)], LABELS)).backward()
    torch.testing.assert_close(gradients(model), gradients(alone))
    torch.testing.assert_close(gradients(metric), gradients(other))


def test_cached_inside_matryoshka(model: Model) -> None:
    """It decorates the loss of embeddings, and cuts no labels, though they are as wide."""
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model.get_embedding_dimension = lambda: 4  # type: ignore[attr-defined]
    labels, alone = make_case("gaussian", 6, 4, seed=1), copy.deepcopy(model)
    inner = CachedCoherenceDistillationLoss(model, mini_batch_size=4)
    loss = losses.MatryoshkaLoss(model, inner, [4, 2])([column(0)], labels)
    full = nn.functional.normalize(alone(column(0))["sentence_embedding"], dim=-1)
    cut = nn.functional.normalize(full[:, :2], dim=-1)
    expected = sum(perception_coherence_loss(points, labels) for points in (full, cut))
    torch.testing.assert_close(loss, expected)
    for one in (loss, expected):
        one.backward()
    torch.testing.assert_close(gradients(model), gradients(alone))


@pytest.mark.parametrize(
    ("features", "labels", "error", "message"),
    [
        ([], LABELS, ValueError, "sentence_features: expected at least one text column"),
        ([column(0)], None, TypeError, "labels: expected the teacher's embeddings .*; got None"),
        ([column(0)], LABELS[1:], ValueError, "labels: expected as many rows as texts, 6; got 5"),
        (
            [column(0) | {"offsets": torch.arange(5)}],
            LABELS,
            ValueError,
            r"sentence_features\[0\]\['offsets'\]: expected as many rows as .*, 6; got 5",
        ),
    ],
    ids=["no column", "no labels", "rows", "not padded"],
)
def test_cached_bad_inputs(
    model: Model, features: Any, labels: Any, error: type[Exception], message: str
) -> None:
    calls = []
    model.register_forward_pre_hook(lambda *given: calls.append(given))
    with pytest.raises(error, match="^" + message):
        CachedCoherenceDistillationLoss(model)(features, labels)
    assert not calls


def test_cached_bad_arguments(model: Model) -> None:
    with pytest.raises(ValueError, match=r"^mini_batch_size: expected an int of at least 1; got 0"):
        CachedCoherenceDistillationLoss(model, mini_batch_size=0)
    with pytest.raises(ValueError, match=r"^reduction: expected .*; got reduction 'none'"):
        CachedCoherenceDistillationLoss(model, reduction="none")
    with pytest.raises(ValueError, match=r"^model: expected .*; got a StaticEmbedding"):
        CachedCoherenceDistillationLoss(static_student())


def transformer_student(folder: Path) -> Any:
    """A small SentenceTransformer with dropout, of whole words: its inputs are padded."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    configuration = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    transformers.BertModel(configuration).save_pretrained(folder)
    module = Transformer(str(folder))
    return SentenceTransformer(modules=[module, Pooling(16)], device="cpu")


def test_cached_in_its_trainer(tmp_path: Path) -> None:
    """Texts of different lengths, accumulated gradients: the same parameters as uncached."""
    torch.manual_seed(0)
    first = transformer_student(tmp_path / "model").eval()
    import sentence_transformers
    from datasets import Dataset

    texts = [*TEXTS, *WORDS]
    angles = torch.linspace(0, 3, len(texts))
    teacher = torch.stack([angles.cos(), angles.sin()], 1)
    data = Dataset.from_dict({"text": texts, "label": teacher.tolist()})

    def trained(cached: bool) -> Any:
        student = copy.deepcopy(first)
        for module in student.modules():  # masks differ where chunks do
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        criterion = (
            CachedCoherenceDistillationLoss(student, mini_batch_size=5)
            if cached
            else CoherenceDistillationLoss(student)
        )
        arguments = sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=12,
            gradient_accumulation_steps=2,
            learning_rate=0.1,
            optim="sgd",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
        )
        trainer = sentence_transformers.SentenceTransformerTrainer(
            model=student, args=arguments, train_dataset=data, eval_dataset=data, loss=criterion
        )
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        return nn.utils.parameters_to_vector(student.parameters()).detach()

    begin = nn.utils.parameters_to_vector(first.parameters()).detach()
    expected = trained(cached=False)
    assert relative_error(trained(cached=True) - begin, expected - begin) < 1e-4
