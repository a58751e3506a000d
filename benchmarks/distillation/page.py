"""The page of the study: tables, pictures and a conclusion, all made from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import effects, images, plots, protocol, results, sentences
from .evaluation import NEIGHBOURS, QUERIES
from .methods import ANGLE_GROUP, AWARE, BASELINES, DEFAULT, INDEX_BASELINES, INDEX_OURS, OURS
from .plans import PLANS, Plan
from .protocol import Choice
from .results import Result
from .summary import (
    HEADINGS,
    VERDICTS,
    Cell,
    Duel,
    Outcomes,
    by_default,
    by_search,
    counted,
    differs,
    duels,
    in_index,
    score,
)
from .tables import markdown, percent, short, signed

HEAD = """\
# Does it transfer representations?

Written by `python -m benchmarks.distillation page` from `{file}` beside it; do not edit. `make
study` trains all students, and goes on where it was stopped. Here are {count:,} results, of
students, untrained ones and teachers, in {minutes:,.0f} minutes of one core.

A small student learns from a teacher's embeddings of points without labels; then its own embedding
is used. Beside the coherence loss, with each of its objectives (`near`: with a neighbourhood),
stand {others} other ways to learn from the same points (`labels`: from other, labelled ones), from
the same initial student, with Adam and one cycle of the rate, seeing as many points. `labels` and
`logits` are for orientation: they look at classes, which the others never see. `fitnet` is a
regression through a projector (FitNets); `rkd distance` compares scaled distances, `rkd angle`
angles of triples (in groups of {group} points: they cost n^3), `rkd both` is distances + 2 angles;
`sp` compares rows of inner products (similarity preserving), `cka` is linear centred kernel
alignment; `contrastive` is CRD with the batch as its negatives; `row relations` softmaxes rows of
cosines; `rop` compares near candidates by a sigmoid, in the manner of ROP; `transport` matches
neurons by optimal transport. Formulas and sources: benchmarks/distillation/criteria.py.

- **images**: Fashion-MNIST, 10 classes. A convolutional teacher (220,000 parameters, 64 numbers an
  image) learnt {images.teacher:,} labels. Students with {students} see {images.transfer:,} other
  images without labels; `labels` learns from {images.labelled:,} labelled ones. `logits` are of a
  linear classifier on the teacher's embeddings.
- **sentences**: definitions of WordNet of up to 12 words, {classes} categories, of which the
  teacher (MiniLM in int8, 23 million parameters, 384 numbers) knows nothing. The student averages
  hashed words (0.6 million parameters, 64 numbers of norm 1) and sees {sentences.transfer:,}
  definitions; `labels` learns from {sentences.labelled:,} labelled ones, and so did the linear
  classifier behind `logits`.
- **new classes**: Fashion-MNIST again; teacher and student see images of five classes alone and are
  judged on the five others. All splits are about half as large. Nothing is tuned here: every method
  keeps what was chosen for images.
- **index of images, of sentences**: the same data; but the student, now as wide as its teacher,
  embeds queries alone, which are searched in the teacher's index.

What is measured, of test points ({images.test:,} images, {sentences.test:,} definitions) and a
gallery of other labelled points: **5-NN**, accuracy of nearest neighbours in the gallery;
**probe**, accuracy of a linear classifier trained on it; **mAP**, mean average precision of
retrieving it by class; **order**, the mean Spearman correlation of the Euclidean distances from
each point with the teacher's; **overlap**, the share of its {near} nearest points that the teacher
finds too (the last three on {queries:,} points). WordSim-353, SimLex-999 and Lee are Spearman
correlations with people's judgements of words and articles. In an index: **recall@k**, the share of
queries with a point of their class among the first k; mAP; **overlap** with the {near} that the
teacher's own query finds.

**Choices** ({trials} trials for each method: {rates} rates with {batches} batches; then, at the
best of them, a rate beyond the grid if the best is at its end, the method's other options, and
rates between) were made by 5-NN, in an index by mAP, on a validation split, with one seed and one
student. Euclidean or cosine distance is chosen, too: by what does better in the chosen trial, for
5-NN and mAP each; in an index, by mAP for all. (The teacher and untrained students are shown by the
better one on the test split.) `{default}` was chosen by a rule on the validation split: {setting},
for all data. Only its rate and batch are those that the search chose, for `{searched}`, and the
distance by which it is read is the one that was better for it on the validation split. Then the
test split was measured, once, with other seeds. None of its points was in a test or validation
split of the last full study; the pairs of WordSim, SimLex and Lee are the same.

**What the intervals mean**: 95 % confidence by Student's t over {seeds} seeds ({few} for methods
that look at classes and untrained students), that is, over initial students and orders of the
batches: not over test points, nor over teachers. Differences are paired by seed; verdicts are of
unrounded numbers (-0.5 ± 0.5 may be -0.54 ± 0.46). A student that
diverged would count as 0. Nothing corrects for the number of comparisons, and those within a
student are not independent. With one seed the search itself chooses within its noise.

**Known to favour one side**: where the best form of the coherence loss is shown, it has {forms}
times the trials of the others, in an index {index_forms} times; `{default}` was chosen among
{tried} options against these very baselines, by five measures and {effect_seeds} seeds. That a
neighbourhood helps was found in a study of 268 students, that the cosine does by a pilot of 24,
those for the index by one of about 85, most of them of the coherence loss, all on validation
splits. The baseline is in each comparison the one that *tested* best, which favours the baselines,
and so does a search that ends at an end of the grid of batches. Order and overlap are by Euclidean
distances for all, also for `contrastive`, `row relations` and `rop`, which leave the norms free.
`transport`, also of this library, counts as a baseline. The initial scale of the student of
sentences was once chosen with the coherence loss, on texts of the same source.
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
    shown = {name: f"![{title}]({name})" for name, title in pictures.items()}
    lines = [_head(plan, found, outcomes), "## Conclusion", ""]
    lines += [shown[plots.SUMMARY], "", *_conclusion(outcomes)]
    lines += ["", "## In the teacher's index", "", *_index(outcomes), ""]
    lines += ["## Test results", "", *_reading()]
    for name in dict.fromkeys(cell.setting for cell in outcomes.cells):
        lines += [f"### {name}", "", shown[plots.picture(name)], ""]
        for cell in outcomes.cells:
            if cell.setting == name:
                lines += [f"{cell.student} student:", "", *_results_table(outcomes, cell), ""]
    lines += ["## Effects, on the validation split", "", *effects.lines(plan, found, shown)]
    return "\n".join(lines).rstrip() + "\n"


def _head(plan: Plan, found: Sequence[Result], outcomes: Outcomes) -> str:
    sizes = [
        f"{sum(own.numel() for own in images.make_student(*shape).parameters()):,}"
        for name, shape in images.STUDENTS.items()
        if name in plan.students["images"]
    ]
    widths = [str(images.STUDENTS[name][1]) for name in plan.students["images"]]
    option = outcomes.default
    near = "no neighbourhood"
    if option.neighbourhood is not None:
        near = f"a neighbourhood of {option.neighbourhood:g}"
    return HEAD.format(
        file=f"{plan.name}.jsonl",
        count=len(found),
        minutes=sum(result.seconds for result in found) / 60,
        others=len(BASELINES) + len(AWARE),
        group=ANGLE_GROUP,
        images=plan.images,
        sentences=plan.sentences,
        students=f"{' and '.join(sizes)} parameters ({' and '.join(widths)} numbers)",
        classes=sentences.CLASSES,
        queries=QUERIES,
        near=NEIGHBOURS,
        trials=len(plan.rates) * len(plan.batches) + plan.more,
        rates=len(plan.rates),
        batches=len(plan.batches),
        default=DEFAULT.name,
        searched=option.method,
        setting=f"{option.objective} of {option.metric} distances, temperature "
        f"{option.temperature:g}, {near}",
        seeds=len(plan.seeds),
        few=len(protocol.few(plan)),
        forms=len(OURS),
        index_forms=len(INDEX_OURS),
        effect_seeds=len(plan.effect_seeds),
        tried=len(plan.options),
    )


def show(found: Sequence[Result], console: Console) -> None:
    """The conclusion, as a table that fits a terminal."""
    outcomes = Outcomes(found)
    table = Table(
        title="The coherence loss with its defaults against the baseline that tested best"
    )
    for name in ("student", "measure", "coherence", "best baseline", "difference, points"):
        table.add_column(name, justify="right" if name.startswith("diff") else "left")
    last = None
    for duel in duels(outcomes, by_default(outcomes)):
        if duel.cell != last:
            table.add_section()
        where = f"{duel.cell.setting}, {duel.cell.student}" if duel.cell != last else ""
        last = duel.cell
        table.add_row(where, *_duel(outcomes, duel))
    console.print(table)


def _duel(outcomes: Outcomes, duel: Duel) -> list[str]:
    values = (
        f"{percent(outcomes.interval(duel.cell, name, duel.measure))} {short(name)}"
        for name in (duel.ours, duel.theirs)
    )
    return [HEADINGS.get(duel.measure, duel.measure), *values, signed(duel.difference)]


def _fought(outcomes: Outcomes, fought: Sequence[Duel]) -> list[str]:
    return markdown(
        ("student", "measure", "coherence", "best baseline", "difference", "verdict"),
        [
            [
                f"{duel.cell.setting}, {duel.cell.student}",
                *_duel(outcomes, duel),
                VERDICTS[differs(duel.difference)],
            ]
            for duel in fought
        ],
    )


def _conclusion(outcomes: Outcomes) -> list[str]:
    """Counted, not written: who is better, and by how much."""
    default, tuned = by_default(outcomes), by_search(outcomes)
    named = "; ".join(
        f"{place}: {short(name)}"
        for place, name in {cell.setting: name for cell, name in tuned.items()}.items()
    )
    others = [*BASELINES, *AWARE]
    return [
        "Against whichever of the other losses on embeddings *tested* best the coherence loss is",
        "",
        *markdown(
            ("form", "measures", *VERDICTS.values()),
            [
                [
                    title,
                    kind,
                    *map(str, counted(d for d in duels(outcomes, own) if d.agrees is agrees)),
                ]
                for title, own in (
                    ("with its defaults", default),
                    (f"the best of the search ({named})", tuned),
                )
                for kind, agrees in (("of use", False), ("agreement with the teacher", True))
            ],
        ),
        "",
        "With its defaults:",
        "",
        *_fought(outcomes, duels(outcomes, default)),
        "",
        "Against each other method in turn, over the same comparisons, with its defaults and as",
        "the search chose:",
        "",
        *markdown(
            (
                "method",
                *(f"{verdict}, default" for verdict in VERDICTS.values()),
                *(f"{verdict}, best" for verdict in VERDICTS.values()),
            ),
            [
                [name, *map(str, score(outcomes, default, name) + score(outcomes, tuned, name))]
                for name in others
            ],
        ),
        "",
        "What one setting for all data costs: defaults minus the best of the search, in points.",
        "",
        *_cost(outcomes, default, tuned),
    ]


def _cost(outcomes: Outcomes, default: Mapping[Cell, str], tuned: Mapping[Cell, str]) -> list[str]:
    rows = []
    for cell, name in default.items():
        differences = (
            signed(outcomes.difference(cell, name, tuned[cell], measure)) for measure in HEADINGS
        )
        rows.append([f"{cell.setting}, {cell.student}", short(tuned[cell]), *differences])
    return markdown(("student", "best of the search", *HEADINGS.values()), rows)


def _index(outcomes: Outcomes) -> list[str]:
    others = ", ".join(short(name) for name in INDEX_BASELINES)
    return [
        "The objective of the coherence loss that did best in the search, in the teacher's own",
        f"space, against whichever of {others} tested best.",
        "`index own space` in the tables below is the loss as it is used elsewhere, which leaves",
        "the spaces unaligned.",
        "",
        *_fought(outcomes, duels(outcomes, in_index(outcomes, mixed=False))),
        "",
        "The cosine of student and teacher, and the coherence loss beside it:",
        "",
        *_fought(outcomes, duels(outcomes, in_index(outcomes, mixed=True))),
    ]


def _reading() -> list[str]:
    return [
        "All in percent. **Bold**: the best of the methods that see no classes, and those that do "
        "not differ from it significantly.",
        "",
    ]


def _results_table(outcomes: Outcomes, cell: Cell) -> list[str]:
    measures = outcomes.measures(cell)
    leaders = {measure: outcomes.leaders(cell, measure) for measure in measures}
    known = (f"{100 * outcomes.teacher[cell.setting, name]:.1f}" for name in measures)
    lines = [["teacher", "", *known]]
    for method in outcomes.methods(cell):
        cells = []
        for measure in measures:
            text = percent(outcomes.interval(cell, method, measure))
            cells.append(f"**{text}**" if method in leaders[measure] else text)
        chosen = _described(outcomes, cell, method)
        lines.append([method, chosen, *cells])
    headings = (HEADINGS.get(name, name) for name in measures)
    return markdown(("method", "chosen", *headings), lines)


def _described(outcomes: Outcomes, cell: Cell, method: str) -> str:
    choice: Choice | None = outcomes.choice(cell.setting, method)
    if choice is None:
        return ""
    own = [f"{name} {value}" for name, value in choice.options.items() if value is not None]
    read = {
        measure: outcomes.distance(cell.setting, method, measure) for measure in choice.distances
    }
    if len(set(read.values())) == 1:
        distances = f"read by {next(iter(read.values()))}"
    else:
        distances = "; ".join(f"{HEADINGS[measure]} by {own}" for measure, own in read.items())
    return ", ".join([*own, f"batch {choice.batch}, rate {choice.rate:.2g}", distances])
