"""The page's part on effects: options, candidates, banks, and the rule for the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pcoherence.spec import LossSpec

from . import rule
from .plans import WITH_EFFECTS, Plan
from .plots import CANDIDATES, NEIGHBOURHOOD
from .results import BANK, BASELINE, BATCH_SIZE, COMPARISONS, OPTION, SCALE, SOFT_TEACHER, Result
from .summary import HEADINGS, Interval, gains, intervals
from .tables import markdown, percent, short, signed

MEASURED = tuple(HEADINGS[own] for own in rule.MEASURES)
"""Headings of the rule's measures, which most tables here are of."""


def lines(plan: Plan, found: Sequence[Result], shown: Mapping[str, str]) -> list[str]:
    """Of the page; shown: its pictures, by file."""
    return [
        "By the distance, Euclidean or cosine, that is better. Intervals are of 95 % over",
        f"{len(plan.effect_seeds)} seeds. Options are those that the search chose, at batches of",
        f"{' and '.join(map(str, plan.batches))}.",
        "",
        "### The defaults, by a rule",
        "",
        *_rule(found),
        "",
        "### Neighbourhood, objective and temperature",
        "",
        shown[NEIGHBOURHOOD],
        "",
        *_options(found),
        "### Batch size and candidates",
        "",
        shown[CANDIDATES],
        "",
        *_batches(plan, found),
        "### Banks",
        "",
        f"What a bank of {plan.bank} points adds to batches of {plan.bank_batch}, in points. The",
        "coherence loss has the library's `CandidateBank`; for others the bank's points, without",
        f"gradient, join the batch. Rates are those chosen for batches of {plan.bank_batch}",
        "without a bank.",
        "",
        *_gains(found, BANK, "bank", 0),
        "### A soft teacher, and scales",
        "",
        *_teachers(found),
    ]


def library() -> rule.Candidate:
    """The defaults that the library has."""
    spec = LossSpec()
    return rule.Candidate(spec.objective, spec.temperature, spec.neighbourhood, str(spec.metric))


def _rule(found: Sequence[Result]) -> list[str]:
    """Where the chosen option stands among all."""
    default = rule.choose(found)
    margins = rule.margins(found)
    used = library()
    rows = []
    for option, own in sorted(margins.items(), key=lambda item: -rule.worst(item[1])):
        place, measure = min(own, key=lambda where, own=own: own[where])  # type: ignore[misc]
        near = "none" if option.neighbourhood is None else f"{option.neighbourhood:g}"
        name = f"{option.objective}, {option.temperature:g}, {near}, {option.metric}"
        if option == default:
            name = f"**{name}** (by the rule{', the library has it' if option == used else ''})"
        means = (
            f"{100 * sum(own[setting, by] for setting in WITH_EFFECTS) / len(WITH_EFFECTS):+.1f}"
            for by in rule.MEASURES
        )
        worst = f"{100 * rule.worst(own):+.1f} ({HEADINGS[measure]}, {place})"
        rows.append([name, worst, *means])
    return [
        "Points more than the best of the other losses without classes, by means over seeds: the",
        f"worst difference, which decides, and means over {' and '.join(WITH_EFFECTS)}. Of those",
        "within a tenth of a point of the best the simplest is chosen: see docs/evidence.rst.",
        "",
        *markdown(
            (
                "objective, temperature, neighbourhood, metric",
                "worst",
                *MEASURED,
            ),
            rows,
        ),
    ]


def _options(found: Sequence[Result]) -> list[str]:
    lines = []
    for setting in WITH_EFFECTS:
        lines += [f"{setting}, each at the rate and batch of its objective:", ""]
        names = ("method", "temperature", "neighbourhood", "metric")
        tables = {own: intervals(found, OPTION, setting, names, own) for own in rule.MEASURES}
        rows = []
        for key in tables["knn"]:
            method, temperature, near, metric = key
            name = f"{short(str(method)).removesuffix(' near')}, {metric}"
            own = [
                "none" if near is None else f"{near:g}",
                *(percent(t[key]) for t in tables.values()),
            ]
            rows.append([name, f"{temperature:g}", *own])
        rows += [
            [method, "", "", *(percent(own) for own in values)]
            for method, values in _baselines(found, setting).items()
        ]
        lines += [*markdown(("loss", "temperature", "neighbourhood", *MEASURED), rows), ""]
    return lines


def _baselines(found: Sequence[Result], setting: str) -> dict[str, list[Interval]]:
    """The other losses with the same seeds."""
    values: dict[str, list[Interval]] = {}
    for measure in rule.MEASURES:
        for (method,), value in intervals(found, BASELINE, setting, ("method",), measure).items():
            values.setdefault(method, []).append(value)
    return values


def _batches(plan: Plan, found: Sequence[Result]) -> list[str]:
    lines = [
        "Batches of different sizes, each at the best of three rates, while as many points are",
        "seen in all: large batches make fewer steps. The rates, in the order of the columns, are",
        "in the last one.",
        "",
    ]
    for setting in WITH_EFFECTS:
        lines += [f"{setting}:", "", *_table(found, BATCH_SIZE, setting, "batch"), ""]
    large = [own for own in found if own.job.batch == plan.large]
    lines += [
        f"Batches of {plan.large:,} and {plan.steps} steps, but points are compared within groups",
        "only: what more candidates buy when steps are as many. The rate is the one chosen for",
        f"batches of {plan.batch}, whatever the group.",
        "",
    ]
    for setting in WITH_EFFECTS:
        lines += [f"{setting}:", "", *_table(large, COMPARISONS, setting, "group"), ""]
    ordinary = [own for own in found if own.job.batch == plan.batch]
    few, many = min(plan.batch_groups), max(plan.batch_groups)
    if few != many:
        lines += [
            f"For all losses that compare points, in batches of {plan.batch}: what comparisons",
            f"within groups of {few} give, over those of all {many}, in points (at the rate chosen",
            f"for all {many}).",
            "",
            *_gains(ordinary, COMPARISONS, "group", many),
        ]
    return lines


def _table(found: Sequence[Result], phase: str, setting: str, column: str) -> list[str]:
    """5-NN, overlap and order of every method, by a field of the job."""
    tables = {
        measure: intervals(found, phase, setting, ("method", column), measure)
        for measure in ("knn", "overlap", "coherence")
    }
    across = sorted({key[1] for key in tables["knn"]})
    rows = [
        [
            str(name),
            *(
                percent(table[name, x]) if (name, x) in table else ""
                for table in tables.values()
                for x in across
            ),
        ]
        for name in dict.fromkeys(key[0] for key in tables["knn"])
    ]
    headings = [f"{HEADINGS[own]}, {x}" for own in tables for x in across]
    if phase == BATCH_SIZE:
        headings.append("rates")
        for row, rates in zip(rows, _rates(found, setting), strict=True):
            row.append(rates)
    return markdown((f"method; {column}", *headings), rows)


def _rates(found: Sequence[Result], setting: str) -> list[str]:
    """Of every method in the effect of batches, by batch."""
    jobs = [own.job for own in found if own.job.phase == BATCH_SIZE and own.job.setting == setting]
    rates: dict[str, dict[int, float]] = {}
    for job in jobs:
        rates.setdefault(job.method, {})[job.batch] = job.rate
    return [", ".join(f"{own[batch]:g}" for batch in sorted(own)) for own in rates.values()]


def _gains(found: Sequence[Result], phase: str, field: str, base: int) -> list[str]:
    lines = []
    for setting in WITH_EFFECTS:
        tables = [gains(found, phase, setting, field, base, own) for own in rule.MEASURES]
        rows = [[str(key[0]), *(signed(table[key]) for table in tables)] for key in tables[0]]
        lines += [f"{setting}:", "", *markdown(("method", *MEASURED), rows), ""]
    return lines


def _teachers(found: Sequence[Result]) -> list[str]:
    lines = [
        "With mse; `soft`: the teacher ranked as softly as the student. Without a scale the",
        "temperature is in units of the student's own distances.",
        "",
    ]
    for setting in WITH_EFFECTS:
        rows = []
        for phase, names in ((SOFT_TEACHER, ("temperature",)), (SCALE, ("temperature", "scale"))):
            tables = [intervals(found, phase, setting, names, own) for own in rule.MEASURES]
            for key in tables[0]:
                title = "soft" if phase == SOFT_TEACHER else f"scale {key[1]}"
                rows.append([title, f"{key[0]:g}", *(percent(table[key]) for table in tables)])
        lines += [f"{setting}:", "", *markdown(("", "temperature", *MEASURED), rows), ""]
    return lines
