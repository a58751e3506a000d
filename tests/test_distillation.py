"""The study: every loss by its formula, the protocol, and what is made of results."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("ot")
pytest.importorskip("mlxtend")
pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")
pytest.importorskip("onnxruntime")

from scipy import stats

from benchmarks.distillation import (
    criteria,
    evaluation,
    page,
    plots,
    protocol,
    results,
    runner,
    sources,
    training,
)
from benchmarks.distillation.criteria import Criterion, Grouped, Seen, Widths
from benchmarks.distillation.images import Pixels, _idx, _only
from benchmarks.distillation.methods import METHODS, NAMED
from benchmarks.distillation.results import (
    BATCH_RATES,
    BATCH_SIZE,
    COMPARISONS,
    GROUP_RATES,
    SEARCH,
    TEST,
    Job,
    Result,
)
from benchmarks.distillation.settings import Judgement, Setting, Split, kept, teacher_logits
from benchmarks.distillation.summary import (
    Cell,
    Interval,
    Outcomes,
    differs,
    duels,
    interval,
    options,
)
from pcoherence import coherence, optimal_transport_loss, perception_coherence_loss
from pcoherence.spec import OBJECTIVES, LossSpec

N, STUDENT, TEACHER, CLASSES = 7, 3, 5, 4
WIDTHS = Widths(STUDENT, TEACHER, CLASSES)


@pytest.fixture
def batch() -> tuple[Tensor, Seen]:
    """Embeddings of a student, and what is known of the batch, float64."""
    torch.manual_seed(0)
    seen = Seen(
        torch.randn(N, TEACHER, dtype=torch.float64) + 2,
        torch.randn(N, CLASSES, dtype=torch.float64),
        torch.tensor([0, 1, 2, 3, 0, 1, 2]),
    )
    return torch.randn(N, STUDENT, dtype=torch.float64) - 1, seen


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def distances(points: Tensor) -> list[float]:
    rows = points.tolist()
    return [math.dist(rows[i], rows[j]) for i, j in itertools.combinations(range(len(rows)), 2)]


def labels(criterion: nn.Module, x: Tensor, seen: Seen) -> float:
    logits = criterion.head(x).tolist()
    chosen = [softmax(own)[label] for own, label in zip(logits, seen.labels, strict=True)]
    return -sum(map(math.log, chosen)) / N


def logits(criterion: nn.Module, x: Tensor, seen: Seen) -> float:
    total = 0.0
    for own, theirs in zip(criterion.head(x).tolist(), seen.logits.tolist(), strict=True):
        q, p = (softmax([value / 2.0 for value in values]) for values in (own, theirs))
        total += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True))
    return 2.0**2 * total / N


def regression(criterion: nn.Module, x: Tensor, seen: Seen) -> float:
    projected = criterion.projector(x).flatten().tolist()
    pairs = zip(projected, seen.embeddings.flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / (N * TEACHER)


def relational_distance(_: nn.Module, x: Tensor, seen: Seen) -> float:
    ours, theirs = distances(x), distances(seen.embeddings)
    means = [sum(values) / len(values) for values in (ours, theirs)]
    pairs = zip(ours, theirs, strict=True)
    return sum(huber(a / means[0] - b / means[1]) for a, b in pairs) / len(ours)


def angle(points: list[list[float]], j: int, i: int, k: int) -> float:
    if j in (i, k):
        return 0.0
    first, second = ([a - b for a, b in zip(points[own], points[j], strict=True)] for own in (i, k))
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / (math.hypot(*first) * math.hypot(*second))


def relational_angle(_: nn.Module, x: Tensor, seen: Seen) -> float:
    ours, theirs = x.tolist(), seen.embeddings.tolist()
    triples = list(itertools.product(range(N), repeat=3))
    return sum(huber(angle(ours, *own) - angle(theirs, *own)) for own in triples) / N**3


def both_relations(_: nn.Module, x: Tensor, seen: Seen) -> float:
    return relational_distance(_, x, seen) + 2 * relational_angle(_, x, seen)


def similarity_preserving(_: nn.Module, x: Tensor, seen: Seen) -> float:
    def rows(points: Tensor) -> list[list[float]]:
        found = []
        for a in points.tolist():
            own = [sum(p * q for p, q in zip(a, b, strict=True)) for b in points.tolist()]
            found.append([value / math.hypot(*own) for value in own])
        return found

    ours, theirs = (itertools.chain(*rows(points)) for points in (x, seen.embeddings))
    return sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / N**2


def centred_kernel_alignment(_: nn.Module, x: Tensor, seen: Seen) -> float:
    """By the centred kernel matrices: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    k, m = (centre @ (points @ points.T) @ centre for points in (x, seen.embeddings))
    return 1 - ((k * m).sum() / ((k * k).sum() * (m * m).sum()).sqrt()).item()


def contrastive(criterion: nn.Module, x: Tensor, seen: Seen) -> float:
    ours, theirs = criterion.student(x).tolist(), criterion.teacher(seen.embeddings).tolist()

    def cosine(a: list[float], b: list[float]) -> float:
        product = sum(p * q for p, q in zip(a, b, strict=True))
        return product / (math.hypot(*a) * math.hypot(*b))

    total = 0.0
    for i in range(N):
        total -= math.log(softmax([cosine(ours[i], other) / 0.5 for other in theirs])[i])
        total -= math.log(softmax([cosine(other, theirs[i]) / 0.5 for other in ours])[i])
    return total / (2 * N)


FORMULAS: dict[str, tuple[Callable[[], Criterion], Callable[[nn.Module, Tensor, Seen], float]]] = {
    "labels": (lambda: criteria.Labels(WIDTHS), labels),
    "logits": (lambda: criteria.Logits(WIDTHS, temperature=2.0), logits),
    "linear": (lambda: criteria.Regression(WIDTHS, projector="linear"), regression),
    "mlp": (lambda: criteria.Regression(WIDTHS, projector="mlp"), regression),
    "rkd distance": (criteria.RelationalDistance, relational_distance),
    "rkd angle": (lambda: NAMED["rkd angle"].build(WIDTHS), relational_angle),
    "rkd both": (lambda: NAMED["rkd both"].build(WIDTHS), both_relations),
    "sp": (criteria.SimilarityPreserving, similarity_preserving),
    "cka": (criteria.CentredKernelAlignment, centred_kernel_alignment),
    "contrastive": (lambda: criteria.Contrastive(WIDTHS, temperature=0.5), contrastive),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_criteria_are_their_formulas(name: str, batch: tuple[Tensor, Seen]) -> None:
    x, seen = batch
    build, formula = FORMULAS[name]
    criterion = build().double()
    # A few hundred operations in float64.
    assert criterion(x, seen).item() == pytest.approx(formula(criterion, x, seen), rel=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_reach_student_and_parameters(name: str, batch: tuple[Tensor, Seen]) -> None:
    x, seen = batch
    criterion = FORMULAS[name][0]().double()
    assert torch.autograd.gradcheck(lambda own: criterion(own, seen), x.requires_grad_())
    criterion(x, seen).backward()
    assert all(own.grad is not None and own.grad.any() for own in criterion.parameters())


def test_a_perfect_student_costs_nothing(batch: tuple[Tensor, Seen]) -> None:
    _, seen = batch
    for name in ("rkd distance", "rkd angle", "sp", "cka"):
        assert FORMULAS[name][0]()(seen.embeddings, seen).item() == pytest.approx(0, abs=1e-14)


def test_our_losses_are_the_library(batch: tuple[Tensor, Seen]) -> None:
    x, seen = batch
    for method in METHODS:
        for trial in method.trials:
            if method.name.startswith("coherence"):
                objective = method.name.removeprefix("coherence ")
                expected = perception_coherence_loss(
                    x, seen.embeddings, objective=objective, **trial.options
                )
            elif method.name == "transport":
                expected = optimal_transport_loss(x, seen.embeddings, **trial.options)
            else:
                continue
            assert torch.equal(method.build(WIDTHS, **trial.options)(x, seen), expected)


def test_duplicates_leave_angles_finite() -> None:
    points = torch.randn(4, 3).repeat(2, 1) + 100
    x = points.clone().requires_grad_()
    seen = Seen(points, points, torch.zeros(8, dtype=torch.int64))
    loss = criteria.RelationalAngle()(x, seen)
    loss.backward()
    assert x.grad is not None
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_a_collapsed_student_has_angles() -> None:
    x = torch.ones(5, 3, requires_grad=True)
    seen = Seen(torch.randn(5, 4), torch.randn(5, 2), torch.zeros(5, dtype=torch.int64))
    loss = criteria.RelationalAngle()(x, seen)
    loss.backward()
    assert x.grad is not None
    assert loss.isfinite()
    assert x.grad.isfinite().all()


def test_groups_compare_within_themselves(batch: tuple[Tensor, Seen]) -> None:
    x, seen = batch
    criterion = criteria.RelationalDistance()
    parts = [(x[rows], Seen(*(own[rows] for own in seen))) for rows in (slice(0, 3), slice(3, 6))]
    expected = sum(criterion(*part) for part in parts) / 2  # the seventh point is left out
    assert torch.equal(Grouped(criterion, 3)(x, seen), expected)
    assert torch.equal(Grouped(criterion, N)(x, seen), criterion(x, seen))
    # A batch that the size divides has all of its groups.
    whole = x[:6], Seen(*(own[:6] for own in seen))
    assert torch.equal(Grouped(criterion, 3)(*whole), expected)


def test_every_method_has_as_many_trials() -> None:
    assert {len(method.trials) for method in METHODS} == {protocol.FULL.trials}
    for method in METHODS:
        assert len({repr(trial) for trial in method.trials}) == len(method.trials)
        assert {trial.batch for trial in method.trials} == {128, 512}


def test_no_two_trials_are_the_same_training(batch: tuple[Tensor, Seen]) -> None:
    """Adam divides a factor away: losses in proportion would be one trial, tried twice."""
    x, seen = batch
    for method in METHODS:
        gradients = []
        for own in {repr(trial.options): trial.options for trial in method.trials}.values():
            torch.manual_seed(0)
            criterion = method.build(WIDTHS, **own).double()
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(criterion(leaf, seen), leaf)
            gradients.append(gradient.flatten() / gradient.norm())
        for one, other in itertools.combinations(gradients, 2):
            assert abs(one @ other) < 1 - 1e-6, method.name


METHOD_NAMES = {method.name for method in METHODS}


def result(job: Job, value: float) -> Result:
    """All measures are this value; neighbours by cosine are a little better."""
    measures = {
        distance: dict.fromkeys(evaluation.MEASURES, value) | {"knn": value + 1e-3 * i}
        for i, distance in enumerate(job.distances)
    }
    return Result(job, measures, 1.0)


def simulated(plan: protocol.Plan, value: Callable[[Job], float]) -> list[Result]:
    """Results of all stages."""
    found: list[Result] = []
    for stages in protocol.STAGES.values():
        jobs = [job for stage in stages for job in stage(plan, found)]
        found += [result(job, value(job)) for job in jobs]
    return found


def arbitrary(job: Job) -> float:
    """The same for the same job, and no order in it."""
    return zlib.crc32(job.key.encode()) / 2**32


def by_method(job: Job) -> float:
    """Later methods are better, and seeds scatter."""
    rank = {name: i for i, name in enumerate(NAMED)}
    return 0.5 + rank.get(job.method, 30) / 100 + 1e-4 * job.seed


def test_the_test_split_comes_last_and_once() -> None:
    found = simulated(protocol.FULL, arbitrary)
    splits = [own.job.split for own in found]
    first = splits.index("test")
    assert set(splits[:first]) == {"validation"}
    assert set(splits[first:]) == {"test"}
    assert len({own.job.key for own in found}) == len(found)
    tested = [own.job for own in found if own.job.split == "test"]
    once = Counter((job.setting, job.student, job.method, job.seed) for job in tested)
    assert set(once.values()) == {1}
    assert protocol.SEARCH_SEED not in protocol.FULL.seeds
    assert len(protocol.FULL.seeds) >= 3
    assert len(protocol.FULL.effect_seeds) >= 3


def test_the_best_trial_is_tested() -> None:
    found = simulated(protocol.FULL, arbitrary)
    tested = [own.job for own in found if own.job.phase == TEST and own.job.method in METHOD_NAMES]
    for job in tested:
        searched = [
            (own.measures[distance]["knn"], own.job, distance)
            for own in found
            for distance in own.job.distances
            if own.job.phase == SEARCH
            and own.job.setting == protocol.PLACES[job.setting].chosen_in
            and own.job.method == job.method
        ]
        assert len(searched) == 2 * protocol.FULL.trials
        _, best, distance = max(searched, key=lambda own: own[0])
        assert (job.rate, job.batch, job.options) == (best.rate, best.batch, best.options)
        assert job.distances == (distance,)


def test_effects_take_the_best_rate() -> None:
    found = simulated(protocol.FULL, arbitrary)
    for phase, source in ((BATCH_SIZE, BATCH_RATES), (COMPARISONS, GROUP_RATES)):
        shown = [own.job for own in found if own.job.phase == phase]
        assert shown
        for job in shown:
            tried = [
                own
                for own in found
                if own.job.phase == source
                and (own.job.method, own.job.batch, own.job.group)
                == (job.method, job.batch, job.group)
            ]
            assert len(tried) == len(protocol.EFFECT_RATES)
            assert job.rate == max(tried, key=protocol.accuracy).job.rate


def test_defaults_are_among_the_options() -> None:
    spec = LossSpec()
    assert spec.temperature in protocol.FULL.temperatures
    assert spec.temperature in protocol.QUICK.temperatures


def test_a_divergence_is_never_chosen() -> None:
    (first, second, *_) = protocol.search(protocol.FULL)
    for order in ((0.0, 0.5), (0.5, 0.0)):
        pair = [result(job, value) for job, value in zip((first, second), order, strict=True)]
        (choice,) = protocol.choices(pair).values()
        assert choice.rate == (first, second)[order.index(0.5)].rate
        assert choice.batch == (first, second)[order.index(0.5)].batch


def test_all_batches_see_as_many_points() -> None:
    (job, *_) = protocol.search(protocol.FULL)
    for batch in protocol.FULL.batches:
        steps = protocol.steps(protocol.FULL, dataclasses.replace(job, batch=batch), 20_000)
        assert abs(steps * batch - protocol.FULL.epochs[job.setting] * 20_000) <= batch / 2


def small_setting() -> Setting:
    """Images of noise around four patterns."""
    torch.manual_seed(3)
    patterns = torch.rand(CLASSES, 1, 28, 28)

    def split(count: int) -> Split:
        labels = torch.arange(count) % CLASSES
        pixels = patterns[labels] + 0.3 * torch.rand(count, 1, 28, 28)
        embeddings = pixels.flatten(1)[:, :TEACHER]
        return Split(Pixels(pixels), embeddings, torch.rand(count, CLASSES), labels)

    return Setting(
        labelled=split(40),
        transfer=split(80),
        gallery=split(40),
        validation=split(24),
        test=split(24),
        students={
            "tiny": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, STUDENT)), STUDENT),
        },
        classes=CLASSES,
        judgements=(
            Judgement("people", Pixels(patterns), patterns.flatten(1), PAIRS, torch.rand(6)),
        ),
    )


PAIRS = torch.combinations(torch.arange(CLASSES))
JOB = Job(
    phase="test",
    setting="images",
    student="tiny",
    method="coherence mse",
    options={"temperature": 0.1},
    rate=1e-2,
    batch=20,
    seed=1,
    split="test",
    distances=("euclidean", "cosine"),
)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_setting", lambda *_: small_setting())
    monkeypatch.setattr(protocol, "steps", lambda *_: 6)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("method", NAMED)
def test_students_of_every_method(method: str, tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method=method, options=NAMED[method].trials[0].options)
    found = runner.do("quick", tmp_path, job)
    assert found == runner.do("quick", tmp_path, job)  # repeatable, bit for bit
    for measures in found.measures.values():
        assert set(measures) == {"knn", "probe", "map", "coherence", "overlap", "people"}
        assert all(math.isfinite(value) for value in measures.values())


@pytest.mark.usefixtures("settings")
def test_methods_start_alike_and_differ(tmp_path: Path) -> None:
    plan, setting = protocol.QUICK, small_setting()
    jobs = [dataclasses.replace(JOB, method=name, options={}) for name in ("sp", "rkd distance")]
    ends = [runner.trained(plan, setting, job)[1].weight for job in jobs]
    still = [dataclasses.replace(job, rate=1e-30) for job in jobs]
    start = [runner.trained(plan, setting, job)[1].weight for job in still]
    torch.testing.assert_close(*start, rtol=0, atol=1e-20)
    assert (ends[0] - ends[1]).abs().max() > 1e-4
    other = dataclasses.replace(still[0], seed=2)
    assert not torch.equal(runner.trained(plan, setting, other)[1].weight, start[0])


@pytest.mark.usefixtures("settings")
def test_batches_come_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many random numbers a criterion's own parameters take."""
    orders: list[list[int]] = []
    rows = Pixels.rows
    monkeypatch.setattr(
        Pixels,
        "rows",
        lambda own, chosen: (orders[-1].extend(chosen.tolist()), rows(own, chosen))[1],
    )
    for method in ("sp", "fitnet"):
        orders.append([])
        job = dataclasses.replace(JOB, method=method, options=NAMED[method].trials[0].options)
        runner.trained(protocol.QUICK, small_setting(), job)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 6 * JOB.batch


@pytest.mark.usefixtures("settings")
def test_the_teacher_sees_as_itself(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method=protocol.TEACHER, options={}, student="")
    for measures in runner.do("quick", tmp_path, job).measures.values():
        assert measures["coherence"] == pytest.approx(1)
        assert measures["overlap"] == 1


def test_measures_by_hand() -> None:
    gallery = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    queries = torch.tensor([[0.4], [10.4]])
    # Ranked from 0.4: 0, 0, 1, 1, 1. From 10.4: 1, 1, 1, 0, 0. The third query's label is nowhere.
    found = evaluation.retrieval((gallery, labels), (queries, torch.tensor([1, 1])))
    assert found == pytest.approx(((1 / 3 + 2 / 4 + 3 / 5) / 3 + 1) / 2)
    assert evaluation.retrieval((gallery, labels), (queries[1:], torch.tensor([1]))) == 1
    absent = torch.tensor([[5.0]]), torch.tensor([7])
    both = torch.cat([queries, absent[0]]), torch.tensor([1, 1, 7])
    assert evaluation.retrieval((gallery, labels), both) == found
    judgement = Judgement(
        "",
        Pixels(gallery),
        gallery,
        torch.tensor([[0, 1], [0, 2], [0, 3]]),
        -labels[[0, 2, 3]].float(),
    )
    near = [-1.0, -2.0, -10.0]
    expected = stats.spearmanr(near, judgement.scores).statistic
    assert evaluation.judged(gallery, judgement) == pytest.approx(expected)
    assert evaluation.judged(gallery / 0, judgement) == 0
    assert evaluation.judged(gallery * 0, judgement) == 0


def test_a_diverged_student_is_worth_nothing() -> None:
    points, labels = torch.randn(30, 3), torch.arange(30) % 3
    bad = points.clone()
    bad[4, 1] = torch.nan
    for gallery, queries in ((bad, points), (points, bad)):
        found = evaluation.measure((gallery, labels), (queries, labels), points, "cosine", True)
        assert found == dict.fromkeys(evaluation.MEASURES, 0.0)


def test_agreement_is_euclidean_whatever_neighbours_go_by() -> None:
    torch.manual_seed(0)
    points, labels = torch.randn(60, 3) + 1, torch.arange(60) % 3
    labelled = points, labels
    teacher = torch.randn(60, 5)
    found = {
        distance: evaluation.measure(labelled, labelled, teacher, distance, False)
        for distance in evaluation.DISTANCES
    }
    for name in ("coherence", "overlap"):
        assert found["euclidean"][name] == found["cosine"][name]
    assert found["euclidean"]["coherence"] == coherence(points, teacher).spearman.item()
    assert found["euclidean"]["knn"] != found["cosine"]["knn"]


def test_a_common_mean_does_not_matter_to_retrieval() -> None:
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    points = torch.randn(80, 6) + 0.7 * torch.randn(4, 6)[labels]
    found = [
        evaluation.retrieval((own[:50], labels[:50]), (own[50:], labels[50:]))
        for own in (points, (points * 2**10).round() / 2**10 + 4096)
    ]
    assert found[1] == pytest.approx(found[0], abs=2e-3)


def test_cosine_is_a_view() -> None:
    points = torch.randn(6, 3, dtype=torch.float64)
    seen = torch.pdist(evaluation.view(points, "cosine"))
    cosines = torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=2)
    upper = torch.triu_indices(6, 6, 1)
    torch.testing.assert_close(seen.square() / 2, 1 - cosines[tuple(upper)])
    assert evaluation.view(points, "euclidean") is points


def test_a_small_split_is_one_batch() -> None:
    seen = []
    setting = small_setting()
    student = setting.students["tiny"][0]()
    criterion = criteria.SimilarityPreserving()
    criterion.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    training.train(student, criterion, setting.labelled, 1e-3, 64, 3)
    assert seen == [40, 40, 40]


def test_embeddings_are_those_of_evaluation() -> None:
    """And training is training again after them."""
    split, modes = small_setting().labelled, []
    student = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(28 * 28, 8))
    student[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    found = training.embed(student, split.inputs)
    torch.testing.assert_close(found, student[2](split.inputs.pixels.flatten(1)))
    training.train(student, criteria.SimilarityPreserving(), split, 1e-3, 64, 2)
    assert modes == [False, True, True]


@pytest.mark.parametrize("learns_from", ["labels", "logits", "embeddings"])
def test_methods_see_what_they_may(learns_from: str) -> None:
    split = small_setting().transfer
    seen = training.hidden(split, learns_from)
    assert seen.inputs is split.inputs
    for name in ("labels", "logits", "embeddings"):
        found = getattr(seen, name)
        if name == learns_from:
            assert torch.equal(found, getattr(split, name))
        else:
            assert (found == -1).all() if name == "labels" else found.isnan().all()


def test_logits_of_absent_classes_are_least() -> None:
    torch.manual_seed(0)
    points, labels = torch.randn(60, 4), torch.arange(60) % 3 * 2  # 0, 2, 4
    found = teacher_logits((points, labels), points, 6)
    assert found.shape == (60, 6)
    least = found.amin(1)
    for absent in (1, 3, 5):
        assert torch.equal(found[:, absent], least)
    assert set(found.argmax(1).tolist()) <= {0, 2, 4}


def test_kept_is_made_once_for_what_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    program = tmp_path / "program.py"
    program.write_text("1")
    monkeypatch.setattr(sources, "FILES", (program,))

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"a": torch.ones(2)}

    for depends, text, times in ((1, "1", 1), (1, "1", 1), (2, "1", 2), (2, "2", 3), (1, "1", 3)):
        program.write_text(text)
        assert torch.equal(kept(tmp_path / "new", "x", depends, make)["a"], torch.ones(2))
        assert len(made) == times


def test_sources_are_all_but_what_people_read() -> None:
    names = {path.stem for path in sources.FILES}
    assert {"criteria", "methods", "training", "protocol", "_bags", "_sentences"} <= names
    assert not {"page", "plots", "summary"} & names
    assert all(path.exists() for path in sources.FILES)
    program = "".join(path.read_text() for path in sources.FILES)
    taken = set(re.findall(r"^from (_[a-z]+) import", program, re.MULTILINE))
    assert taken <= names


def test_image_files(tmp_path: Path) -> None:
    import gzip

    content = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (2, 2, 3))
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content + bytes(range(12))))
    assert torch.equal(_idx(path), torch.arange(12, dtype=torch.uint8).view(2, 2, 3))


def test_classes_become_consecutive() -> None:
    from benchmarks.distillation.images import Images

    images = Images(torch.arange(5.0).view(5, 1, 1, 1), torch.tensor([1, 0, 3, 9, 3]))
    found = _only(images, (1, 3, 9))
    assert found.labels.tolist() == [0, 1, 2, 1]
    assert found.pixels.flatten().tolist() == [0, 2, 3, 4]


def test_results_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    wanted = [result(job, 0.123456) for job in protocol.search(protocol.QUICK)[:3]]
    for own in wanted:
        results.append(path, own)
    found = results.load(path)
    assert [own.job for own in found] == [own.job for own in wanted]
    assert [own.job.key for own in found] == [own.job.key for own in wanted]
    assert found[0].measures["euclidean"]["knn"] == 0.12346
    results.save(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()
    assert results.load(tmp_path / "none.jsonl") == []
    path.write_text(path.read_text() + '{"job": {"ph')  # an interrupted run
    assert results.load(path) == found


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every result in its file, nothing is submitted, and nothing changes."""
    wanted = simulated(protocol.QUICK, by_method)
    path = tmp_path / f"quick-{sources.digest(protocol.QUICK)}.jsonl"
    results.save(path, wanted)
    before = path.read_text()
    monkeypatch.setattr(runner, "_setting", lambda *_: None)
    found = runner.run(protocol.QUICK, tmp_path, 1)
    assert [own.job.key for own in found] == [own.job.key for own in wanted]
    assert path.read_text() == before


def test_intervals() -> None:
    values = [0.3, 0.5, 0.4, 0.45]
    low, high = stats.t.interval(0.95, 3, loc=stats.tmean(values), scale=stats.sem(values))
    found = interval(values)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert math.isnan(interval([0.5]).half)
    assert [differs(Interval(mean, 1.0)) for mean in (2.0, 0.5, -2.0)] == [1, 0, -1]
    assert differs(interval([0.5])) == 0


def test_differences_are_paired_by_seed() -> None:
    values = {"sp": (0.1, 0.5, 0.9), "cka": (0.11, 0.51, 0.91)}
    found = [
        Result(dataclasses.replace(JOB, method=name, seed=seed), {"cosine": {"knn": value}}, 0.0)
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    outcomes = Outcomes(found)
    (cell,) = outcomes.cells
    assert cell == Cell("images", "tiny")
    difference = outcomes.difference(cell, "cka", "sp", "knn")
    assert difference.mean == pytest.approx(0.01)
    assert differs(difference) == 1
    assert (
        differs(interval([a - b for a, b in zip(values["cka"], (0.9, 0.1, 0.5), strict=True)])) == 0
    )


def test_duels_favour_the_baseline() -> None:
    """The best baseline is found by the test itself, separately for each measure."""
    found = simulated(protocol.QUICK, by_method)
    outcomes = Outcomes(found)
    for duel in duels(outcomes, page.ours(found)):
        assert duel.ours == "coherence spearman"
        assert duel.theirs == "transport"
        assert duel.difference.mean == pytest.approx(0.05)
        assert outcomes.leaders(duel.cell, duel.measure) == ["coherence spearman"]


def test_options_are_compared_seed_by_seed() -> None:
    def value(job: Job) -> float:
        soft = "teacher_temperature" in job.options
        return by_method(job) + float(job.options.get("temperature", 0)) / 10 - soft / 100

    found = options(simulated(protocol.QUICK, value), "mse", 0.1)
    names = [(own.objective, own.temperature, own.soft_teacher) for own in found]
    assert names[0] == ("spearman", 0.3, False)
    assert names[-1] == ("mse", 0.05, True)
    assert set(names) == {
        *itertools.product(OBJECTIVES, protocol.QUICK.temperatures, [False]),
        *(("mse", temperature, True) for temperature in protocol.QUICK.temperatures),
    }
    # Seeds scatter alike everywhere, so that nothing is left of it in paired differences.
    rank = {name: i for i, name in enumerate(NAMED)}
    first = rank["coherence spearman"] - rank["coherence mse"]
    for measure in ("knn", "overlap", "coherence"):
        assert found[0].differences[measure].mean == pytest.approx(first / 100 + 0.02)
        assert found[0].differences[measure].half == pytest.approx(0, abs=1e-12)


def test_the_page_says_what_came(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = simulated(protocol.QUICK, by_method)
    results.save(tmp_path / "quick.jsonl", found)
    text = page.write(tmp_path).read_text()
    for method in METHODS:
        assert f"| {method.name} |" in text
    for name in ("test-images.png", "test-sentences.png", "test-new-classes.png"):
        assert f"({name})" in text
        assert (tmp_path / name).stat().st_size > 10_000
    # The last objective leads everywhere; the first, the default, beats every baseline too.
    best = "images: spearman; sentences: spearman; new classes: spearman"
    assert f"| the best of the search ({best}) | of use | 9 | 0 | 0 |" in text
    usual = "mse, the default objective, alone (temperature as chosen)"
    assert f"| {usual} | agreement with the teacher | 6 | 0 | 0 |" in text
    assert "| images, tiny | 5-NN | 65.0 ± 0.1 spearman | 60.0 ± 0.1 transport | +5.0" in text
    assert "| sp | 15 | 0 | 0 | 15 | 0 | 0 |" in text
    assert "(default)" in text
    assert "nan" not in text


def test_committed_page_is_that_of_its_results(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "results" / "distillation"
    found = results.load(folder / "full.jsonl")
    pictures = plots.write(found, tmp_path)
    assert (folder / "README.md").read_text() == page.text(protocol.FULL, found, pictures)
    assert all((folder / name).exists() for name in pictures)
    wanted: list[Result] = []
    done = {own.job.key: own for own in found}
    for stages in protocol.STAGES.values():
        jobs = [job for stage in stages for job in stage(protocol.FULL, wanted)]
        wanted += [done[job.key] for job in jobs]
    assert wanted == found
