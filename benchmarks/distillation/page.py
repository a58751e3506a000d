"""The page of the study: tables, pictures and a conclusion, all made from its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcoherence.spec import LossSpec

from . import images, plots, results, sentences
from .evaluation import QUERIES
from .methods import ANGLE_GROUP, AWARE
from .protocol import BATCHES_IN, PLACES, PLANS, SEARCHED, Choice, Plan, choices
from .protocol import OURS as PROTOCOL_OURS
from .results import BATCH_SIZE, COMPARISONS, OBJECTIVE, SCALE, SOFT_TEACHER, Result
from .summary import (
    AGREEMENT,
    BASELINES,
    MEASURES,
    OPTION_MEASURES,
    OURS,
    Cell,
    Duel,
    Interval,
    Outcomes,
    by_options,
    differs,
    duels,
    options,
    order,
)

VERDICTS = {1: "better", 0: "no difference", -1: "worse"}

HEAD = """\
# Does it transfer representations?

Written by `python -m benchmarks.distillation page` from `{file}` beside it; do not edit.
`make study` trains all students, and goes on where it was stopped.
Here are {count:,} results, of students, untrained ones and teachers, in {minutes:,.0f} minutes of
one core.

A small student learns from a teacher's embeddings of points without labels; then its own embedding
is used. Beside the coherence loss, with each of its objectives, stand {others} other ways to learn
from the same points (`labels`: from other, labelled ones), from the same initial student, with Adam
and one cycle of the rate, seeing as many points. `labels` and `logits` are for orientation: they
look at classes, which the others never see. `rkd angle` compares points in groups of {group}: its
triples cost n^3. `contrastive` is CRD with the batch as its negatives; `rkd both` is distances + 2
angles.

- **images**: Fashion-MNIST, 10 classes. A convolutional teacher (220,000 parameters, 64 numbers an
  image) learnt {images.teacher:,} labels. Students with {students} see
  {images.transfer:,} other images without labels; `labels` learns from {images.labelled:,} labelled
  ones. `logits` are of a linear classifier on the teacher's embeddings.
- **sentences**: definitions of WordNet of up to 12 words, {classes} categories, of which the
  teacher (MiniLM in int8, 23 million parameters, 384 numbers) knows nothing. The student averages
  hashed words (0.6 million parameters, 64 numbers of norm 1) and sees {sentences.transfer:,}
  definitions; `labels` learns from {sentences.labelled:,} labelled ones, and so did the linear
  classifier behind `logits`.
- **new classes**: Fashion-MNIST again; teacher and student see images of five classes alone and are
  judged on the five others. All splits are about half as large. Nothing is tuned here: every method
  keeps what was chosen for images.

What is measured, of test points ({images.test:,} images, {sentences.test:,} definitions) and a
gallery of other labelled points: **5-NN**, accuracy of nearest neighbours in the gallery;
**probe**, accuracy of a linear classifier trained on it; **mAP**, mean average precision of
retrieving it by class; **coherence**, the mean Spearman correlation of the Euclidean distances from
each point with the teacher's; **overlap**, the share of its 10 nearest points that the teacher
finds too (the last three on {queries:,} points). WordSim-353, SimLex-999 and Lee are Spearman
correlations with people's judgements of words and articles.

**Choices** ({trials} trials for each method: batch, rate, and its own option if it has one; then
Euclidean or cosine distance for 5-NN and mAP) were made by 5-NN on a validation split, with one
seed and one student. Then the test split was measured, once, with other seeds.

**What the intervals mean**: 95 % confidence by Student's t over {seeds} seeds, that is, over
initial students and orders of the batches: not over test points, nor over teachers. Differences are
paired by seed. Nothing corrects for the number of comparisons, and those within a student are not
independent. With one seed the search itself chooses within its noise.

**Known to favour one side**: the coherence loss comes with {objectives} objectives, that is with as
many times the trials of the others, wherever its best objective is shown; the initial scale of the
student of sentences was once chosen with the coherence loss, on texts of the same source.
"""


def write(folder: Path) -> Path:
    """The page and the pictures of the results in a folder, which hold those of one plan."""
    (path,) = (folder / f"{name}.jsonl" for name in PLANS if (folder / f"{name}.jsonl").exists())
    found = results.load(path)
    pictures = plots.write(found, folder)
    page = folder / "README.md"
    page.write_text(text(PLANS[path.stem], found, pictures))
    return page


def text(plan: Plan, found: Sequence[Result], pictures: Mapping[str, str]) -> str:
    """The page, in Markdown; pictures: what each file shows."""
    outcomes = Outcomes(found)
    chosen = choices(found)
    shown = [f"![{text}]({name})" for name, text in pictures.items()]
    lines = [_head(plan, found), "## Conclusion", "", *_conclusion(outcomes, found), ""]
    lines += ["## Test results", "", *_reading()]
    for name in dict.fromkeys(cell.setting for cell in outcomes.cells):
        lines += [
            f"### {name}",
            "",
            *(own for own in shown if f"({plots.picture(name)})" in own),
            "",
        ]
        for cell in outcomes.cells:
            if cell.setting == name:
                lines += [f"{cell.student} student:", ""]
                lines += [*_results_table(outcomes, cell, chosen), ""]
    lines += ["## Effects, on the validation split", "", *_effects(found, shown)]
    return "\n".join(lines).rstrip() + "\n"


def _head(plan: Plan, found: Sequence[Result]) -> str:
    sizes = [
        f"{sum(own.numel() for own in images.make_student(*shape).parameters()):,}"
        for name, shape in images.STUDENTS.items()
        if name in plan.students["images"]
    ]
    widths = [str(images.STUDENTS[name][1]) for name in plan.students["images"]]
    minutes = sum(result.seconds for result in found) / 60
    return HEAD.format(
        file=f"{plan.name}.jsonl",
        count=len(found),
        minutes=minutes,
        others=len(BASELINES) + len(AWARE),
        group=ANGLE_GROUP,
        images=plan.images,
        sentences=plan.sentences,
        students=f"{' and '.join(sizes)} parameters ({' and '.join(widths)} numbers)",
        classes=sentences.CLASSES,
        queries=QUERIES,
        trials=plan.trials,
        seeds=len(plan.seeds),
        objectives=len(OURS),
    )


def ours(found: Sequence[Result]) -> dict[str, str]:
    """By setting, the objective that did best in the search."""
    chosen = choices(found)
    return {
        name: max(OURS, key=lambda own: chosen[place.chosen_in, own].accuracy)
        for name, place in PLACES.items()
    }


def show(found: Sequence[Result], console: Console) -> None:
    """The conclusion, as a table that fits a terminal."""
    outcomes = Outcomes(found)
    table = Table(title="The coherence loss against the baseline that tested best")
    for name in ("student", "measure", "coherence", "best baseline", "difference, points"):
        table.add_column(name, justify="right" if name.startswith("diff") else "left")
    last = None
    for duel in duels(outcomes, ours(found)):
        if duel.cell != last:
            table.add_section()
        where = f"{duel.cell.setting}, {duel.cell.student}" if duel.cell != last else ""
        last = duel.cell
        table.add_row(where, *_duel(outcomes, duel))
    console.print(table)


def _duel(outcomes: Outcomes, duel: Duel) -> list[str]:
    values = (
        f"{_percent(outcomes.interval(duel.cell, name, duel.measure))} {_short(name)}"
        for name in (duel.ours, duel.theirs)
    )
    return [MEASURES.get(duel.measure, duel.measure), *values, _signed(duel.difference)]


def _conclusion(outcomes: Outcomes, found: Sequence[Result]) -> list[str]:
    """Counted, not written: who is better, and by how much."""
    default = LossSpec().objective
    best, usual = ours(found), dict.fromkeys(PLACES, f"coherence {default}")
    named = "; ".join(f"{setting}: {_short(name)}" for setting, name in best.items())
    fought = duels(outcomes, best)
    return [
        "Against whichever of the other losses on embeddings *tested* best, which favours them, "
        "the coherence loss is",
        "",
        *_markdown(
            ("objective", "measures", *VERDICTS.values()),
            [
                [title, kind, *_counted(duels(outcomes, chosen), names)]
                for title, chosen in (
                    (f"the best of the search ({named})", best),
                    (f"{default}, the default objective, alone (temperature as chosen)", usual),
                )
                for kind, names in (("of use", None), ("agreement with the teacher", AGREEMENT))
            ],
        ),
        "",
        "With the best objective of the search:",
        "",
        *_markdown(
            ("student", "measure", "coherence", "best baseline", "difference", "verdict"),
            [
                [
                    f"{duel.cell.setting}, {duel.cell.student}",
                    *_duel(outcomes, duel),
                    VERDICTS[differs(duel.difference)],
                ]
                for duel in fought
            ],
        ),
        "",
        "Against each other method in turn, over the same comparisons, with the best objective of "
        f"the search and with {default} alone:",
        "",
        *_markdown(
            (
                "method",
                *(f"{verdict}, best" for verdict in VERDICTS.values()),
                *(f"{verdict}, {default}" for verdict in VERDICTS.values()),
            ),
            [
                [name, *_score(outcomes, best, name), *_score(outcomes, usual, name)]
                for name in (*BASELINES, *AWARE)
            ],
        ),
    ]


def _counted(fought: Sequence[Duel], names: Sequence[str] | None) -> list[str]:
    """Verdicts on these measures, or on all that are not of agreement."""
    counted = Counter(
        differs(duel.difference)
        for duel in fought
        if (duel.measure in names if names else duel.measure not in AGREEMENT)
    )
    return [str(counted[verdict]) for verdict in VERDICTS]


def _score(outcomes: Outcomes, chosen: Mapping[str, str], other: str) -> list[str]:
    """How often ours is better than, like and worse than another method."""
    counted = Counter(
        differs(outcomes.difference(cell, chosen[cell.setting], other, measure))
        for cell in outcomes.cells
        for measure in outcomes.measures(cell)
    )
    return [str(counted[verdict]) for verdict in VERDICTS]


def _reading() -> list[str]:
    return [
        "All in percent. **Bold**: the best of the methods that see no classes, and those that do "
        "not differ from it significantly.",
        "",
    ]


def _results_table(
    outcomes: Outcomes, cell: Cell, chosen: Mapping[tuple[str, str], Choice]
) -> list[str]:
    measures = outcomes.measures(cell)
    leaders = {measure: outcomes.leaders(cell, measure) for measure in measures}
    lines = [
        ["teacher", "", *(f"{100 * outcomes.teacher[cell.setting, name]:.1f}" for name in measures)]
    ]
    for method in order():
        choice = chosen.get((PLACES[cell.setting].chosen_in, method))
        cells = []
        for measure in measures:
            text = _percent(outcomes.interval(cell, method, measure))
            cells.append(f"**{text}**" if method in leaders[measure] else text)
        lines.append([method, _described(choice), *cells])
    headings = (MEASURES.get(name, name) for name in measures)
    return _markdown(("method", "chosen", *headings), lines)


def _described(choice: Choice | None) -> str:
    if choice is None:
        return ""
    own = [f"{name} {value}" for name, value in choice.options.items()]
    return ", ".join([*own, f"batch {choice.batch}, rate {choice.rate:g}", choice.distance])


def _effects(found: Sequence[Result], shown: Sequence[str]) -> list[str]:
    by_batch, by_option = (
        [own for own in shown if f"({name})" in own] for name in (plots.BATCHES, plots.OPTIONS)
    )
    lines = [
        "All of the Euclidean distance, with seeds of the tests. Options at one batch size, 512.",
        "",
        f"### Batch size ({BATCHES_IN}, {SEARCHED[BATCHES_IN]} student)",
        "",
        *by_batch,
        "",
        "Batches of different sizes, each at the best of three rates, while as many images are "
        "seen in all: large batches make fewer steps.",
        "",
        *_effect_table(found, BATCH_SIZE, BATCHES_IN, "method", "batch"),
        "",
        "The same batches and steps, but points are compared within groups only, each at the best "
        "of three rates: what more comparisons buy when steps are as many.",
        "",
        *_effect_table(found, COMPARISONS, BATCHES_IN, "method", "group"),
        "",
        "### Objective and temperature",
        "",
        *by_option,
        "",
    ]
    for setting in SEARCHED:
        lines += [f"{setting}:", ""]
        lines += [*_effect_table(found, OBJECTIVE, setting, "method", "temperature"), ""]
        lines += ["With the teacher ranked as softly as the student:", ""]
        lines += [*_effect_table(found, SOFT_TEACHER, setting, "method", "temperature"), ""]
    lines += ["### Scale", ""]
    lines += ["Without one, the temperature is in units of the student's own distances.", ""]
    for setting in SEARCHED:
        lines += [f"{setting}, {PROTOCOL_OURS}:", ""]
        lines += [*_effect_table(found, SCALE, setting, "scale", "temperature"), ""]
    return [*lines, "### Defaults", "", *_defaults(found), ""]


def _defaults(found: Sequence[Result]) -> list[str]:
    """Where the library's default stands among objectives and temperatures."""
    spec = LossSpec()
    default = spec.objective, spec.temperature, spec.teacher_temperature is not None
    lines = []
    for option in options(found, spec.objective, spec.temperature):
        name = f"{option.objective}, temperature {option.temperature:g}"
        name += ", soft teacher" if option.soft_teacher else ""
        if (option.objective, option.temperature, option.soft_teacher) == default:
            name = f"**{name}** (default)"
        lines.append([name, *(_signed(option.differences[own]) for own in OPTION_MEASURES)])
    return [
        f"Points more than the default; means over {' and '.join(SEARCHED)}, paired by seed, with "
        "95 % intervals over seeds. The rate is each objective's own.",
        "",
        *_markdown(("option", *(MEASURES[own] for own in OPTION_MEASURES)), lines),
    ]


def _effect_table(
    found: Sequence[Result], phase: str, setting: str, rows: str, columns: str
) -> list[str]:
    """5-NN and coherence, of everything that `rows` takes on, by `columns`."""
    tables = {
        measure: by_options(found, phase, setting, (rows, columns), measure)
        for measure in ("knn", "coherence")
    }
    across = sorted({key[1] for key in tables["knn"]})
    names = dict.fromkeys(key[0] for key in tables["knn"])
    lines = []
    for name in names:
        line = [str(name)]
        for table in tables.values():
            line += [_percent(table[name, x]) if (name, x) in table else "" for x in across]
        lines.append(line)
    headings = [f"{MEASURES[own]}, {columns} {x:g}" for own in tables for x in across]
    return _markdown((rows, *headings), lines)


def _short(method: str) -> str:
    return method.removeprefix("coherence ")


def _percent(value: Interval) -> str:
    if math.isnan(value.half):
        return f"{100 * value.mean:.1f}"
    return f"{100 * value.mean:.1f} ± {100 * value.half:.1f}"


def _signed(value: Interval) -> str:
    if math.isnan(value.mean):
        return ""
    return f"{100 * value.mean:+.1f} ± {100 * value.half:.1f}"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] * len(columns)
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]
