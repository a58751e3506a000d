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
    effects,
    evaluation,
    index,
    page,
    plans,
    plots,
    protocol,
    results,
    rule,
    runner,
    sources,
    training,
)
from benchmarks.distillation.criteria import (
    Banked,
    Criterion,
    Grouped,
    RankPreserving,
    RowRelations,
    Seen,
    Widths,
)
from benchmarks.distillation.images import Pixels, _idx, _only
from benchmarks.distillation.methods import AWARE, DEFAULT, INDEX_METHODS, METHODS, NAMED, near
from benchmarks.distillation.results import (
    ANY,
    BANK,
    BATCH_RATES,
    BATCH_SIZE,
    COMPARISONS,
    DISTANCES,
    OPTION,
    SEARCH,
    TEST,
    Job,
    Result,
)
from benchmarks.distillation.rule import Candidate
from benchmarks.distillation.settings import Judgement, Setting, Split, kept, teacher_logits
from benchmarks.distillation.summary import (
    Cell,
    Interval,
    Outcomes,
    by_default,
    by_search,
    counted,
    differs,
    duels,
    gains,
    in_index,
    interval,
)
from pcoherence import (
    CandidateBank,
    PerceptionCoherenceLoss,
    coherence,
    optimal_transport_loss,
    perception_coherence_loss,
)

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


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(p * q for p, q in zip(a, b, strict=True))
    return product / (math.hypot(*a) * math.hypot(*b))


def rows_of(points: Tensor) -> list[list[float]]:
    """Cosines of each point with all others."""
    own = points.tolist()
    return [[cosine(own[i], own[j]) for j in range(N) if j != i] for i in range(N)]


def rows_across(x: Tensor, seen: Seen) -> tuple[list[list[float]], list[list[float]]]:
    """Cosines of each point, as student and teacher see it, with all of the teacher's."""
    index = seen.embeddings.tolist()
    return tuple([[cosine(a, b) for b in index] for a in own.tolist()] for own in (x, seen[0]))


def row_relations(ours: list[list[float]], theirs: list[list[float]], divergence: str) -> float:
    total = 0.0
    for own, teacher in zip(ours, theirs, strict=True):
        q, p = (softmax([value / 0.3 for value in values]) for values in (own, teacher))
        for a, b in zip(q, p, strict=True):
            total += b * math.log(b / a) / N if divergence == "kl" else (a - b) ** 2 / (N * len(q))
    return total


def rank_preserving(ours: list[list[float]], theirs: list[list[float]]) -> float:
    """Of the three nearest by the teacher."""
    total = 0.0
    for own, teacher in zip(ours, theirs, strict=True):
        nearest = sorted(range(len(own)), key=lambda j: -teacher[j])[:3]
        for a, b in itertools.product(range(3), repeat=2):
            z = (own[nearest[b]] - own[nearest[a]]) / 0.2
            target = 1.0 if b < a else 0.5 if a == b else 0.0
            total += (target - 1 / (1 + math.exp(-z))) ** 2 / 3 / (a + 1)
    return total / N / (1 + 1 / 2 + 1 / 3)


def index_regression(_: nn.Module, x: Tensor, seen: Seen) -> float:
    teacher = seen.embeddings.tolist()
    columns = list(zip(*teacher, strict=True))
    means = [sum(column) / N for column in columns]
    spread = sum((a - m) ** 2 for column, m in zip(columns, means, strict=True) for a in column)
    pairs = zip(itertools.chain(*x.tolist()), itertools.chain(*teacher), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / spread


def index_cosine(_: nn.Module, x: Tensor, seen: Seen) -> float:
    pairs = zip(x.tolist(), seen.embeddings.tolist(), strict=True)
    return 1 - sum(cosine(a, b) for a, b in pairs) / N


def index_contrastive(_: nn.Module, x: Tensor, seen: Seen) -> float:
    ours, _theirs = rows_across(x, seen)
    both = ours, list(zip(*ours, strict=True))
    return -sum(
        math.log(softmax([value / 0.5 for value in rows[i]])[i]) for rows in both for i in range(N)
    ) / (2 * N)


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
    "row relations": (
        lambda: RowRelations(temperature=0.3, divergence="kl"),
        lambda _, x, seen: row_relations(rows_of(x), rows_of(seen.embeddings), "kl"),
    ),
    "row relations, square": (
        lambda: RowRelations(temperature=0.3, divergence="square"),
        lambda _, x, seen: row_relations(rows_of(x), rows_of(seen.embeddings), "square"),
    ),
    "rop": (
        lambda: RankPreserving(temperature=0.2, top=3),
        lambda _, x, seen: rank_preserving(rows_of(x), rows_of(seen.embeddings)),
    ),
}

INDEX_FORMULAS = {
    "regression": (index.Regression, index_regression),
    "cosine": (index.Cosine, index_cosine),
    "contrastive": (lambda: index.Contrastive(temperature=0.5), index_contrastive),
    "row relations": (
        lambda: index.Across(RowRelations(temperature=0.3, divergence="kl")),
        lambda _, x, seen: row_relations(*rows_across(x, seen), "kl"),
    ),
    "rop": (
        lambda: index.Across(RankPreserving(temperature=0.2, top=3)),
        lambda _, x, seen: rank_preserving(*rows_across(x, seen)),
    ),
}


@pytest.mark.parametrize("name", INDEX_FORMULAS)
def test_criteria_of_an_index_are_their_formulas(name: str, batch: tuple[Tensor, Seen]) -> None:
    _, seen = batch
    x = torch.randn(N, TEACHER, dtype=torch.float64).requires_grad_()
    build, formula = INDEX_FORMULAS[name]
    criterion = build()
    assert criterion(x, seen).item() == pytest.approx(formula(criterion, x, seen), rel=1e-12)
    assert torch.autograd.gradcheck(lambda own: criterion(own, seen), x)


def test_coherence_of_an_index_is_the_library(batch: tuple[Tensor, Seen]) -> None:
    _, (y, *_) = batch
    x = torch.randn(N, TEACHER, dtype=torch.float64)
    own = {"temperature": 0.2, "neighbourhood": 0.3, "metric": "cosine"}
    expected = perception_coherence_loss(
        x, y, student_candidates=y, teacher_candidates=y, self_index=None, **own
    )
    assert torch.equal(index.Coherence(**own)(x, batch[1]), expected)
    # The query that is its own teacher's point sees the index as the teacher does.
    hardly = index.Coherence(temperature=1e-4)
    assert hardly(y, batch[1]) < 1e-6 < hardly(x, batch[1])


def test_fewer_candidates_than_the_top_are_all_compared(batch: tuple[Tensor, Seen]) -> None:
    x, seen = batch
    many, all_of_them = (RankPreserving(temperature=0.2, top=top) for top in (64, N - 1))
    assert torch.equal(many(x, seen), all_of_them(x, seen))


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
        for options in method.options:
            if method.name.startswith("coherence"):
                objective = method.name.removeprefix("coherence ").removesuffix(" near")
                assert ("neighbourhood" in options) == method.name.endswith(" near")
                own = {"objective": objective, "neighbourhood": None} | options
                expected = perception_coherence_loss(x, seen.embeddings, **own)
            elif method.name == "transport":
                expected = optimal_transport_loss(x, seen.embeddings, **options)
            else:
                continue
            assert torch.equal(method.build(WIDTHS, **options)(x, seen), expected)


def test_banks_keep_the_last_points() -> None:
    """Former batches are compared, too, and get no gradient."""
    torch.manual_seed(0)
    batches = [(torch.randn(N, STUDENT), torch.randn(N, TEACHER)) for _ in range(3)]
    seen = [Seen(y, y, torch.zeros(N)) for _, y in batches]
    criterion = criteria.SimilarityPreserving().with_bank(N + 2)
    assert isinstance(criterion, Banked)
    for (x, _), own in zip(batches[:2], seen[:2], strict=True):
        criterion(x.requires_grad_(), own)
    x = batches[2][0].requires_grad_()
    points, known = (
        torch.cat([batches[2][side], batches[1][side], batches[0][side][:2]]) for side in (0, 1)
    )
    found = criterion(x, seen[2])
    expected = criteria.SimilarityPreserving()(points, Seen(known, known, torch.zeros(len(known))))
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found, [x, batches[1][0]], allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1] is None


def test_our_bank_is_the_library() -> None:
    torch.manual_seed(0)
    ours = NAMED["coherence mse"].build(WIDTHS, temperature=0.1).with_bank(N)
    plain = {"objective": "mse", "neighbourhood": None}
    library = PerceptionCoherenceLoss(temperature=0.1, bank=CandidateBank(N), **plain)
    for _ in range(3):
        x, y = torch.randn(N, STUDENT), torch.randn(N, TEACHER)
        assert torch.equal(ours(x, Seen(y, y, torch.zeros(N))), library(x, y))


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
    jobs = [own.job for own in simulated(plans.FULL, arbitrary) if own.job.phase == SEARCH]
    for setting in plans.SEARCHED:
        for method in plans.PLACES[setting].methods:
            own = [job for job in jobs if (job.setting, job.method) == (setting, method.name)]
            assert len({job.key for job in own}) == len(own) == 13
            tried = {(job.rate, job.batch) for job in own if job.options == method.options[0]}
            assert tried >= set(itertools.product((0.005, 0.01, 0.02, 0.04), (128, 512)))
            # Its own options, all of them, and a rate beyond the grid if the best is at its end.
            assert {repr(job.options) for job in own} == set(map(repr, method.options))
            first, *others = own[8:]
            best = max(own[:8], key=arbitrary)
            beyond = {0.005: 0.0025, 0.04: 0.08}.get(best.rate, best.rate * 2**-0.5)
            assert (first.rate, first.batch) == (pytest.approx(beyond), best.batch)
            assert all(own.rate == best.rate for own in others if own.options != best.options)


def test_no_two_trials_are_the_same_training() -> None:
    """Adam divides a factor away: losses in proportion would be one trial, tried twice."""
    torch.manual_seed(0)
    x, *known = (torch.randn(70, width).double() for width in (TEACHER, TEACHER, CLASSES))
    seen = Seen(known[0], known[1], torch.arange(70) % CLASSES)
    for method in (*METHODS, *INDEX_METHODS):
        gradients = []
        width = TEACHER if method in INDEX_METHODS else STUDENT
        for own in method.options:
            torch.manual_seed(0)
            criterion = method.build(WIDTHS, **own).double()
            leaf = x[:, :width].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(criterion(leaf, seen), leaf)
            gradients.append(gradient.flatten() / gradient.norm())
        for one, other in itertools.combinations(gradients, 2):
            assert abs(one @ other) < 1 - 1e-6, method.name


METHOD_NAMES = [method.name for method in METHODS]


def result(job: Job, value: float) -> Result:
    """All measures are this value; those by cosine are a little better."""
    in_index = plans.PLACES[job.setting].in_index
    names = evaluation.IN_INDEX if in_index else evaluation.BY_DISTANCE
    measures = {
        distance: dict.fromkeys(names, value + 1e-3 * i) for i, distance in enumerate(DISTANCES)
    }
    plain = () if in_index else evaluation.PLAIN
    return Result(job, measures | {ANY: dict.fromkeys(plain, value)}, 1.0)


def simulated(plan: plans.Plan, value: Callable[[Job], float]) -> list[Result]:
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
    """Later methods are better, the default is best, and seeds scatter."""
    rank = {own.name: i for i, own in enumerate((*METHODS, *INDEX_METHODS, DEFAULT))}
    return 0.5 + rank.get(job.method, 40) / 100 + 1e-4 * job.seed


def test_the_test_split_comes_last_and_once() -> None:
    found = simulated(plans.FULL, arbitrary)
    splits = [own.job.split for own in found]
    first = splits.index("test")
    assert set(splits[:first]) == {"validation"}
    assert set(splits[first:]) == {"test"}
    assert len({own.job.key for own in found}) == len(found)
    tested = [own.job for own in found if own.job.split == "test"]
    once = Counter((job.setting, job.student, job.method, job.seed) for job in tested)
    assert set(once.values()) == {1}
    seeds = Counter((job.setting, job.student, job.method) for job in tested if job.student)
    for (_, _, method), count in seeds.items():
        assert count == (4 if method in (*AWARE, "untrained") else 8)
    assert protocol.SEARCH_SEED not in plans.FULL.seeds
    assert len(plans.FULL.seeds) == 8
    assert len(plans.FULL.effect_seeds) >= 3
    for plan in plans.PLANS.values():
        assert not {protocol.SEARCH_SEED, *plan.effect_seeds} & {*plan.seeds}
    assert len(plans.FULL.effect_seeds) >= 3


def test_the_best_trial_is_tested() -> None:
    found = simulated(plans.FULL, arbitrary)
    chosen = protocol.choices(found)
    tested = [own.job for own in found if own.job.phase == TEST and own.job.method in METHOD_NAMES]
    for job in tested:
        place = plans.PLACES[job.setting]
        searched = [
            (max(own.value(place.chosen_by, distance) for distance in DISTANCES), own.job)
            for own in found
            if own.job.phase == SEARCH
            and own.job.setting == place.chosen_in
            and own.job.method == job.method
        ]
        assert len(searched) == 13
        _, best = max(searched, key=lambda own: own[0])
        assert (job.rate, job.batch, job.options) == (best.rate, best.batch, best.options)
        names = evaluation.IN_INDEX if place.in_index else evaluation.BY_DISTANCE
        distances = chosen[place.chosen_in, job.method].distances
        assert distances == dict.fromkeys(names, "cosine")


def test_choices_of_a_batch_alone() -> None:
    """Where there are trials of it; effects at that batch have its rates."""
    found = simulated(plans.FULL, arbitrary)
    for batch in (128, 512):
        for choice in protocol.choices(found, batch).values():
            assert choice.batch == batch
    assert protocol.choices(found, 77) == protocol.choices(found)
    for phase, batch in ((COMPARISONS, 512), (BANK, 128)):
        chosen = protocol.choices(found, batch)
        for job in (own.job for own in found if own.job.phase == phase):
            choice = chosen[job.setting, job.method]
            assert (job.rate, job.options) == (choice.rate, choice.options)


def test_in_an_index_one_distance_serves_all() -> None:
    outcomes = Outcomes(simulated(plans.QUICK, by_method))
    choice = outcomes.choice("index of images", "index rop")
    assert choice is not None
    outcomes.choices["index of images", "index rop"] = dataclasses.replace(
        choice, distances={"map": "euclidean", "overlap": "cosine"}
    )
    assert outcomes.distance("index of images", "index rop", "overlap") == "euclidean"
    assert outcomes.distance("images", "rop", "probe") == "euclidean"
    assert outcomes.distance("images", "teacher", "knn") is None


def test_each_measure_has_its_own_distance() -> None:
    (job, *_) = protocol.search(plans.FULL)
    measures = {
        "euclidean": {"knn": 0.8, "map": 0.5},
        "cosine": {"knn": 0.7, "map": 0.6},
        ANY: {"probe": 0.9},
    }
    found = Result(job, measures, 1.0)
    (choice,) = protocol.choices([found]).values()
    assert choice.distances == {"knn": "euclidean", "map": "cosine"}
    assert choice.value == 0.8
    assert found.value("map", "euclidean") == 0.5
    assert found.value("probe", "euclidean") == found.value("probe", "cosine") == 0.9


def test_effects_take_the_best_rate() -> None:
    found = simulated(plans.FULL, arbitrary)
    shown = [own.job for own in found if own.job.phase == BATCH_SIZE]
    assert shown
    for job in shown:
        tried = [
            own
            for own in found
            if own.job.phase == BATCH_RATES
            and (own.job.setting, own.job.method, own.job.batch)
            == (job.setting, job.method, job.batch)
        ]
        assert len(tried) == len(protocol.EFFECT_RATES)
        assert job.rate == max(tried, key=protocol.accuracy).job.rate


def test_comparisons_have_as_many_steps() -> None:
    jobs = [own.job for own in simulated(plans.FULL, arbitrary) if own.job.phase == COMPARISONS]
    for batch in (plans.FULL.large, plans.FULL.batch):
        steps = {
            (job.setting, protocol.steps(plans.FULL, job, 16_000))
            for job in jobs
            if job.batch == batch
        }
        assert len(steps) == len(plans.WITH_EFFECTS)
    assert {job.group for job in jobs if job.batch == plans.FULL.large} == {64, 512, 4096}


def judged(objective: str, near: float | None, seed: int, knn: float, overlap: float) -> Result:
    """A result of an option, or of the baseline "cka"."""
    own = Candidate(objective, 0.1, near, "euclidean")
    job = dataclasses.replace(
        JOB,
        phase="baseline" if objective == "cka" else OPTION,
        method="cka" if objective == "cka" else own.method,
        options=own.beside_objective,
        seed=seed,
        split="validation",
    )
    plain = {"probe": 0.5, "coherence": 0.5, "overlap": overlap}
    by_distance = {"euclidean": {"knn": knn, "map": 0.5}, "cosine": {"knn": 0.0, "map": 0.4}}
    return Result(job, by_distance | {ANY: plain}, 1.0)


def test_the_rule_takes_the_least_bad() -> None:
    found = [
        judged("cka", None, 1, 0.70, 0.30),
        judged("cka", None, 2, 0.72, 0.30),
        judged("mse", None, 1, 0.80, 0.25),  # +0.09 and -0.05
        judged("mse", None, 2, 0.80, 0.25),
        judged("cross_entropy", 0.4, 1, 0.70, 0.31),  # -0.01 and +0.01
        judged("cross_entropy", 0.4, 2, 0.70, 0.31),
    ]
    margins = rule.margins(found)
    wanted = Candidate("cross_entropy", 0.1, 0.4, "euclidean")
    assert margins[wanted]["images", "knn"] == pytest.approx(-0.01)
    assert margins[wanted]["images", "overlap"] == pytest.approx(0.01)
    assert rule.worst(margins[Candidate("mse", 0.1, None, "euclidean")]) == pytest.approx(-0.05)
    assert rule.choose(found) == wanted


@pytest.mark.parametrize(("gap", "simpler"), [(0.9, True), (1.1, False)])
def test_ties_go_to_the_simpler(gap: float, simpler: bool) -> None:
    less = 0.6 - gap * rule.TIE
    found = [
        judged("cka", None, 1, 0.7, 0.3),
        judged("mse", None, 1, less, 0.3),
        judged("mse", 0.4, 1, 0.6, 0.3),
        judged("mse", 0.1, 1, 0.6, 0.3),
    ]
    assert rule.choose(found).neighbourhood == (None if simpler else 0.4)


def test_defaults_are_among_the_options() -> None:
    for plan in plans.PLANS.values():
        assert effects.library() in plan.options


def test_the_default_is_read_as_it_did_better_itself() -> None:
    """Not as the trial of its objective, which may have had another metric."""
    found = simulated(plans.QUICK, by_method)
    default = rule.choose(found)
    for own in found:
        if own.job.phase == OPTION and rule.candidate(own) == default:
            own.measures["euclidean"]["map"] = 1.0
    outcomes = Outcomes(found)
    for setting in ("images", "sentences", "new classes"):
        assert outcomes.distance(setting, DEFAULT.name, "map") == "euclidean"
        assert outcomes.distance(setting, DEFAULT.name, "knn") == "cosine"
        assert outcomes.distance(setting, default.method, "map") == "cosine"


def test_the_rule_sees_validation_alone() -> None:
    found = simulated(plans.FULL, arbitrary)
    seen = [own for own in found if own.job.split == "validation"]
    assert rule.choose(seen) == rule.choose(found)
    default = rule.choose(found)
    tested = [own.job for own in found if own.job.method == DEFAULT.name]
    assert len(tested) == 4 * len(plans.FULL.seeds)
    chosen = protocol.choices(found)
    for job in tested:
        assert job.options == default._asdict()
        choice = chosen[plans.PLACES[job.setting].chosen_in, default.method]
        assert (job.rate, job.batch) == (choice.rate, choice.batch)


def test_a_divergence_is_never_chosen() -> None:
    (first, second, *_) = protocol.search(plans.FULL)
    for order in ((0.0, 0.5), (0.5, 0.0)):
        pair = [result(job, value) for job, value in zip((first, second), order, strict=True)]
        (choice,) = protocol.choices(pair).values()
        assert choice.rate == (first, second)[order.index(0.5)].rate
        assert choice.batch == (first, second)[order.index(0.5)].batch


def test_all_batches_see_as_many_points() -> None:
    (job, *_) = protocol.search(plans.FULL)
    for batch in plans.FULL.batches:
        steps = protocol.steps(plans.FULL, dataclasses.replace(job, batch=batch), 20_000)
        assert abs(steps * batch - plans.FULL.epochs[job.setting] * 20_000) <= batch / 2


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
            "wide": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, TEACHER)), TEACHER),
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
)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_setting", lambda *_: small_setting())
    monkeypatch.setattr(protocol, "steps", lambda *_: 6)


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("method", ["untrained", DEFAULT.name, *METHOD_NAMES])
def test_students_of_every_method(method: str, tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method=method, options=tried(method))
    found = runner.do("quick", tmp_path, job)
    assert found == runner.do("quick", tmp_path, job)  # repeatable, bit for bit
    assert set(found.measures[ANY]) == {"probe", "coherence", "overlap", "people"}
    for distance in DISTANCES:
        assert set(found.measures[distance]) == {"knn", "map"}
    assert all(math.isfinite(value) for own in found.measures.values() for value in own.values())


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("method", [own.name for own in INDEX_METHODS])
def test_students_of_an_index(method: str, tmp_path: Path) -> None:
    own = {"setting": "index of images", "student": "wide", "options": tried(method)}
    job = dataclasses.replace(JOB, method=method, **own)
    found = runner.do("quick", tmp_path, job)
    assert found == runner.do("quick", tmp_path, job)
    assert found.measures[ANY] == {}
    for distance in DISTANCES:
        assert set(found.measures[distance]) == set(evaluation.IN_INDEX)
        assert all(0 <= value <= 1 for value in found.measures[distance].values())


@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("changes", [{"group": 10}, {"bank": 30}, {"bank": 30, "group": 10}])
@pytest.mark.parametrize("method", ["cka", "coherence mse"])
def test_groups_and_banks_change_students(
    method: str, changes: dict[str, int], tmp_path: Path
) -> None:
    job = dataclasses.replace(JOB, method=method, options=tried(method))
    found = runner.do("quick", tmp_path, dataclasses.replace(job, **changes))
    assert found.measures != runner.do("quick", tmp_path, job).measures


def tried(method: str) -> dict[str, object]:
    """The first options of a method."""
    return dict(NAMED[method].options[0]) if NAMED[method].options else {}


@pytest.mark.usefixtures("settings")
def test_methods_start_alike_and_differ(tmp_path: Path) -> None:
    plan, setting = plans.QUICK, small_setting()
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
        job = dataclasses.replace(JOB, method=method, options=tried(method))
        runner.trained(plans.QUICK, small_setting(), job)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 6 * JOB.batch


@pytest.mark.usefixtures("settings")
def test_the_teacher_sees_as_itself(tmp_path: Path) -> None:
    job = dataclasses.replace(JOB, method=protocol.TEACHER, options={}, student="")
    found = runner.do("quick", tmp_path, job)
    assert found.measures[ANY]["coherence"] == pytest.approx(1)
    assert found.measures[ANY]["overlap"] == 1
    in_index = dataclasses.replace(job, setting="index of images")
    for distance in DISTANCES:
        assert runner.do("quick", tmp_path, in_index).measures[distance]["overlap"] == 1


def test_measures_by_hand() -> None:
    gallery = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    queries = torch.tensor([[0.4], [10.4]])
    # Ranked from 0.4: 0, 0, 1, 1, 1. From 10.4: 1, 1, 1, 0, 0. The third query's label is nowhere.
    ranked = evaluation.relevant((gallery, labels), (queries, torch.tensor([1, 1])))
    assert ranked.int().tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert evaluation.mean_precision(ranked) == pytest.approx(((1 / 3 + 2 / 4 + 3 / 5) / 3 + 1) / 2)
    assert evaluation.mean_precision(ranked[1:]) == 1
    both = torch.cat([queries, torch.tensor([[5.0]])]), torch.tensor([1, 1, 7])
    absent = evaluation.relevant((gallery, labels), both)
    assert evaluation.mean_precision(absent) == evaluation.mean_precision(ranked)
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
        found = evaluation.measure((gallery, labels), (queries, labels), points)
        assert found == {
            ANY: {"probe": 0.0, "coherence": 0.0, "overlap": 0.0},
            "euclidean": {"knn": 0.0, "map": 0.0},
            "cosine": {"knn": 0.0, "map": 0.0},
        }
    found = evaluation.measure_in_index((points, labels), (bad, labels), points)
    assert not any(value for own in found.values() for value in own.values())


def test_agreement_is_euclidean() -> None:
    torch.manual_seed(0)
    points, labels = torch.randn(60, 3) + 1, torch.arange(60) % 3
    teacher = torch.randn(60, 5)
    found = evaluation.measure((points, labels), (points, labels), teacher)
    expected = coherence(points, teacher)
    assert found[ANY]["coherence"] == expected.spearman.item()
    assert found[ANY]["overlap"] == expected.overlap.item()
    assert found["euclidean"]["knn"] != found["cosine"]["knn"]


def test_queries_in_an_index_by_hand() -> None:
    rows = torch.arange(30)
    index = torch.stack([rows.float(), torch.zeros(30)], dim=1), rows % 5
    queries = torch.tensor([[3.1, 0.0], [20.2, 0.0]]), torch.tensor([3, 1])
    teacher = torch.tensor([[3.0, 0.0], [12.3, 0.0]])
    found = evaluation.measure_in_index(index, queries, teacher)["euclidean"]
    # Nearest are 3, of label 3; and 20, of label 0, but 21, of label 1, comes second.
    assert found["recall@1"] == 0.5
    assert found["recall@10"] == 1
    # The ten nearest: 0 to 9 for student and teacher; then 16 to 25, and 8 to 17.
    assert found["overlap"] == pytest.approx((1 + 0.2) / 2)


def test_a_common_mean_does_not_matter_to_retrieval() -> None:
    torch.manual_seed(0)
    labels = torch.arange(80) % 4
    points = torch.randn(80, 6) + 0.7 * torch.randn(4, 6)[labels]
    found = [
        evaluation.mean_precision(
            evaluation.relevant((own[:50], labels[:50]), (own[50:], labels[50:]))
        )
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
    assert not {"effects", "page", "plots", "summary", "tables"} & names
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


@pytest.mark.parametrize("quick", [False, True])
def test_fresh_images_are_tested(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full study's test images were in no test or validation split of the last one.

    A smoke run tests none of them.
    """
    from benchmarks.distillation import images

    def numbered(start: int, count: int) -> images.Images:
        rows = torch.arange(start, start + count)
        return images.Images(rows.view(-1, 1, 1, 1).float(), rows % 10)

    monkeypatch.setattr(images, "load", lambda _: (numbered(0, 60_000), numbered(60_000, 10_000)))
    full, own = (
        images._splits(sizes, Path())
        for sizes in (plans.FULL.images, (plans.QUICK if quick else plans.FULL).images)
    )
    rows = {name: set(part.pixels.flatten().int().tolist()) for name, part in own.items()}
    counted_once = sum(map(len, rows.values()))
    assert len(set().union(*rows.values())) == counted_once
    read = torch.randperm(60_000, generator=torch.Generator().manual_seed(0))[55_000:]
    assert not rows["test"] & {*read.tolist(), *range(60_000, 70_000)} or quick
    tested = set(full["test"].pixels.flatten().int().tolist())
    assert len(tested) == 10_000
    assert quick == (not any(part & tested for part in rows.values()))


def test_fresh_texts_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """After those of the last study, which are the first of the same order."""
    import random

    from benchmarks.distillation import sentences

    everything = range(88_000)
    last = random.Random(sentences.SEED).sample(everything, sentences.READ)
    now = random.Random(sentences.SEED).sample(everything, 2 * sentences.READ)
    assert now[: sentences.READ] == last
    asked = []
    monkeypatch.setattr(
        sentences, "load_glosses", lambda folder, sizes, seed: asked.append((sizes, seed)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        sentences.glosses(plans.FULL.sentences, Path())
    assert asked == [((sentences.READ, *plans.FULL.sentences), sentences.SEED)]


def test_classes_become_consecutive() -> None:
    from benchmarks.distillation.images import Images

    images = Images(torch.arange(5.0).view(5, 1, 1, 1), torch.tensor([1, 0, 3, 9, 3]))
    found = _only(images, (1, 3, 9))
    assert found.labels.tolist() == [0, 1, 2, 1]
    assert found.pixels.flatten().tolist() == [0, 2, 3, 4]


def test_results_survive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    wanted = [result(job, 0.123456) for job in protocol.search(plans.QUICK)[:3]]
    for own in wanted:
        results.append(path, dataclasses.replace(own, measures=results.rounded(own.measures)))
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
    wanted = simulated(plans.QUICK, by_method)
    path = tmp_path / f"quick-{sources.digest(plans.QUICK)}.jsonl"
    results.save(path, wanted)
    before = path.read_text()
    monkeypatch.setattr(runner, "_setting", lambda *_: None)
    found = runner.run(plans.QUICK, tmp_path, 1)
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


# What the default needs to be chosen.
CHOSEN = (judged("cka", None, 1, 0.7, 0.3), judged("mse", None, 1, 0.7, 0.3))


def test_differences_are_paired_by_seed() -> None:
    values = {"sp": (0.1, 0.5, 0.9), "cka": (0.11, 0.51, 0.91)}
    found = [
        result(dataclasses.replace(JOB, method=name, seed=seed), value)
        for name, own in values.items()
        for seed, value in enumerate(own)
    ]
    outcomes = Outcomes([*found, *CHOSEN])
    (cell,) = outcomes.cells
    assert cell == Cell("images", "tiny")
    difference = outcomes.difference(cell, "cka", "sp", "knn")
    assert difference.mean == pytest.approx(0.01)
    assert differs(difference) == 1
    assert (
        differs(interval([a - b for a, b in zip(values["cka"], (0.9, 0.1, 0.5), strict=True)])) == 0
    )


def test_fewer_seeds_are_paired_with_their_own() -> None:
    """Methods that look at classes have half of the seeds."""
    found = simulated(plans.FULL, by_method)
    outcomes = Outcomes(found)
    difference = outcomes.difference(outcomes.cells[0], DEFAULT.name, "logits", "knn")
    assert difference.half == pytest.approx(0, abs=1e-12)


def test_duels_favour_the_baseline() -> None:
    """The best baseline is found by the test itself, separately for each measure."""
    outcomes = Outcomes(simulated(plans.QUICK, by_method))
    for duel in duels(outcomes, by_search(outcomes)):
        assert duel.ours == near("cross_entropy")
        assert duel.theirs == "transport"
        assert duel.difference.mean == pytest.approx(0.07)
        assert outcomes.leaders(duel.cell, duel.measure) == [DEFAULT.name]
    for duel in duels(outcomes, by_default(outcomes)):
        assert duel.ours == DEFAULT.name
    for mixed, ours in (
        (False, "index coherence cross_entropy"),
        (True, "index cosine + coherence"),
    ):
        for duel in duels(outcomes, in_index(outcomes, mixed)):
            assert duel.ours == ours
            assert duel.theirs == "index rop"


def test_gains_are_paired_by_seed() -> None:
    def job(method: str, bank: int, seed: int) -> Job:
        return dataclasses.replace(JOB, phase="bank", method=method, bank=bank, seed=seed)

    found = [
        result(job(method, bank, seed), seed / 10 + bank / 1000)
        for method in ("cka", "sp")
        for bank in (0, 10)
        for seed in (1, 2, 3)
    ]
    own = gains(found, "bank", "images", "bank", 0, "overlap")
    assert set(own) == {("cka", 10), ("sp", 10)}
    for difference in own.values():
        assert difference == pytest.approx((0.01, 0), abs=1e-12)


def test_the_page_says_what_came(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = simulated(plans.QUICK, by_method)
    results.save(tmp_path / "quick.jsonl", found)
    text = page.write(tmp_path).read_text()
    for method in (*METHODS, *INDEX_METHODS):
        assert f"| {method.name} |" in text
    names = re.findall(r"\((\S+\.png)\)", text)
    assert len(names) == len(set(names)) == 8
    for name in names:
        assert (tmp_path / name).stat().st_size > 10_000
    outcomes = Outcomes(found)
    assert counted(duels(outcomes, by_default(outcomes))) == [15, 0, 0]
    assert "| with its defaults | of use | 9 | 0 | 0 |" in text
    best = "images: cross_entropy near; sentences: cross_entropy near"
    assert f"| the best of the search ({best}; new classes: cross_entropy near) | agreement" in text
    assert "| sp | 15 | 0 | 0 | 15 | 0 | 0 |" in text
    assert "(by the rule" in text
    assert "nan" not in text


def test_committed_page_is_that_of_its_results(tmp_path: Path) -> None:
    folder = Path(__file__).parent.parent / "benchmarks" / "results" / "distillation"
    found = results.load(folder / "full.jsonl")
    assert rule.choose(found) == effects.library()
    pictures = plots.write(found, tmp_path)
    assert (folder / "README.md").read_text() == page.text(plans.FULL, found, pictures)
    assert all((folder / name).exists() for name in pictures)
    wanted: list[Result] = []
    done = {own.job.key: own for own in found}
    for stages in protocol.STAGES.values():
        jobs = [job for stage in stages for job in stage(plans.FULL, wanted)]
        wanted += [done[job.key] for job in jobs]
    assert wanted == found
