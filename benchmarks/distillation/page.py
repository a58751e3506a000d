"""The page of the study: tables, pictures and a conclusion, all made from its results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pcoherence.spec import LossSpec

from . import plots, results
from .protocol import CHOSEN_IN, SEARCHED_STUDENT, Choice, choices
from .results import Result
from .summary import (
    AWARE,
    MEASURES,
    OBJECTIVES,
    UNAWARE,
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

Written by `python -m benchmarks.distillation page` from `results.jsonl` beside it; do not edit.
`make study` trains all students again.

A small student learns from a teacher's embeddings of points without labels; then its own embedding
is used. Beside the coherence loss, with each of its objectives, stand seven other ways to learn
from the same points in the same order, from the same initial student, with Adam, as many steps, and
as many trials in the search. `labels` and `logits` are for orientation: they look at classes, which
the others never see.

- **images**: Fashion-MNIST, 10 classes. A convolutional teacher (220,000 parameters, 64 numbers an
  image) learnt 30,000 labels. Students of 1,700, 10,000 and 41,000 parameters (with 8, 16 and 32
  numbers) learn from 20,000 other images without labels; `labels` learns from 5,000 labelled ones.
- **sentences**: definitions of WordNet, 45 categories, of which the teacher (MiniLM, 23 million
  parameters, 384 numbers) knows nothing. The student averages hashed words (0.6 million
  parameters, 64 numbers) and learns from 16,000 definitions; `labels` learns from 4,000 labelled
  ones, and `logits` from a linear classifier of the teacher that those trained.
- **new classes**: Fashion-MNIST again; teacher and student see images of five classes alone and
  are judged on the five others. Nothing is tuned here: every method keeps what was chosen for
  the images.

What is measured, always of points that no one was trained on: **5-NN**, accuracy of nearest
neighbours among the labelled points; **probe**, accuracy of a linear classifier trained on them;
**mAP**, mean average precision of retrieving them by class; **coherence**, the mean Spearman
correlation of the distances from each point with the teacher's; **overlap**, the share of its 10
nearest points that the teacher finds too. WordSim-353, SimLex-999 and Lee are Spearman correlations
with people's judgements of words and articles.

**Choices** (rate and the method's own option, six trials each; Euclidean or cosine distance) were
made by 5-NN on a validation split with one seed. Then the test split was measured, with other
seeds. Intervals are of 95 % confidence, by Student's t over seeds. Differences are paired by seed.
Nothing corrects for the number of comparisons: of twenty without a difference, about one seems to
have one.
"""


def write(folder: Path) -> Path:
    """The page and the pictures of the results in a folder."""
    found = results.load(folder / "results.jsonl")
    pictures = plots.write(found, folder)
    outcomes = Outcomes(found)
    chosen = choices(found)
    lines = [HEAD, "## Conclusion", "", *_conclusion(outcomes, found), ""]
    lines += ["## Test results", "", *_reading()]
    for cell in outcomes.cells:
        lines += [f"### {cell.setting}, {cell.student} student", ""]
        if cell == next(own for own in outcomes.cells if own.setting == cell.setting):
            name = f"test-{cell.setting.replace(' ', '-')}.png"
            lines += [f"![{pictures[name]}]({name})", ""]
        lines += [*_results_table(outcomes, cell, chosen), ""]
    lines += ["## Effects, on the validation split", "", *_effects(found)]
    page = folder / "README.md"
    page.write_text("\n".join(lines).rstrip() + "\n")
    return page


def ours(found: Sequence[Result]) -> dict[str, str]:
    """By setting, the objective that did best in the search."""
    chosen = choices(found)
    return {
        setting: max(OBJECTIVES, key=lambda name: chosen[source, name].accuracy)
        for setting, source in CHOSEN_IN.items()
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
    chosen = ours(found)
    fought = duels(outcomes, chosen)
    counted = Counter(VERDICTS[differs(duel.difference)] for duel in fought)
    lines = [
        "The coherence loss, with the objective that did best in the search ("
        + "; ".join(f"{setting}: {_short(name)}" for setting, name in chosen.items())
        + "), against whichever of the other losses on embeddings tested best, which favours them: "
        + ", ".join(f"{verdict} in {counted[verdict]}" for verdict in VERDICTS.values())
        + f" of {len(fought)} comparisons.",
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
        "Against each baseline in turn, over the same comparisons:",
        "",
        *_markdown(("baseline", *VERDICTS.values()), _scores(outcomes, chosen)),
    ]
    return lines


def _scores(outcomes: Outcomes, chosen: Mapping[str, str]) -> list[list[str]]:
    """How often ours is better than, like or worse than each other method."""
    lines = []
    for name in (*(own for own in UNAWARE if own not in OBJECTIVES), *AWARE):
        counted = Counter(
            differs(outcomes.difference(cell, chosen[cell.setting], name, measure))
            for cell in outcomes.cells
            for measure in outcomes.measures(cell)
        )
        lines.append([name, *(str(counted[verdict]) for verdict in VERDICTS)])
    return lines


def _reading() -> list[str]:
    return [
        "All in percent. **Bold**: the best of the methods that see no classes, and those that do "
        "not differ from it.",
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
        choice = chosen.get((CHOSEN_IN[cell.setting], method))
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
    options = [f"{name} {value}" for name, value in choice.options.items()]
    return ", ".join([*options, f"rate {choice.rate:g}", choice.distance])


def _effects(found: Sequence[Result]) -> list[str]:
    lines = [
        "### Batch size",
        "",
        "![Batch size and comparisons](batch-size.png)",
        "",
        "Left: batches of different sizes; as many images are seen in all, so large batches make "
        "fewer steps. The rate is the best of three for each size. Right: the same steps on the "
        "same batches of the largest size, but points are compared within groups only: what large "
        "batches buy, and nothing else.",
        "",
    ]
    for phase, field in (("batch size", "batch"), ("comparisons", "group")):
        lines += [*_effect_table(found, phase, "images", "method", field), ""]
    lines += [
        "### Objective, temperature, and a soft teacher",
        "",
        "![Objective, temperature and teacher](options.png)",
        "",
    ]
    for setting in SEARCHED_STUDENT:
        lines += [f"{setting}:", ""]
        lines += [*_effect_table(found, "objective", setting, "method", "temperature"), ""]
        lines += ["With the teacher ranked as softly as the student:", ""]
        lines += [*_effect_table(found, "soft teacher", setting, "method", "temperature"), ""]
    lines += ["### Defaults", "", *_defaults(found), "", "### Scale", ""]
    for setting in SEARCHED_STUDENT:
        lines += [f"{setting}, coherence mse:", ""]
        lines += [*_effect_table(found, "scale", setting, "scale", "temperature"), ""]
    return lines


def _defaults(found: Sequence[Result]) -> list[str]:
    """Where the library's default stands among objectives and temperatures."""
    spec = LossSpec()
    lines = []
    for option in options(found):
        name = f"{option.objective}, temperature {option.temperature:g}"
        if (option.objective, option.temperature) == (spec.objective, spec.temperature):
            name = f"**{name}** (default)"
        means = [f"{100 * option.means[own]:.1f}" for own in ("knn", "coherence")]
        lines.append([name, *means, _signed(option.difference)])
    return [
        "Means over images and sentences, those with the most accurate neighbours first.",
        "",
        *_markdown(("option", "5-NN", "coherence", "5-NN minus the default's"), lines),
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
