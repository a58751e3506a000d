"""Train a small student to order images as its teacher does, by the coherence loss alone.

Run it with `python examples/demo.py` (`--quick` for a few epochs only). A teacher learns 4,000
handwritten digits by their labels; a far smaller student then learns from the teacher's embeddings,
without labels, at batches of 1,024. Everything is seeded: two runs print the same numbers, except
for times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from _images import Images, load_split, with_moves
from _measures import StepCost, errors, knn_accuracy, step_cost
from _plots import Epoch, plot_embeddings, plot_learning, save
from _training import (
    STUDENT_BATCH,
    embed,
    make_student,
    make_teacher,
    parameter_count,
    train_student,
    train_teacher,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

from pcoherence import coherence
from pcoherence.plots import rank_agreement
from pcoherence.testing import ACCURACY

OUTPUT = Path(__file__).resolve().parent.parent / "demo-output"
BAR_WIDTH = 80
LOSS_TOLERANCE, GRADIENT_TOLERANCE = ACCURACY[torch.float32]
CHECK_BATCH = 256


class Settings(NamedTuple):
    """How much work to do."""

    teacher_epochs: int = 15
    student_epochs: int = 30
    # The reference keeps several float32 arrays of batch^3: 0.5 GiB each at 512, 4 GiB at 1,024.
    reference_batch: int = 512
    large_batch: int = 4096
    repeats: int = 5


QUICK = Settings(
    teacher_epochs=2, student_epochs=2, reference_batch=128, large_batch=2048, repeats=1
)


def agreement(student: Tensor, teacher: Tensor) -> float:
    """The mean over images of the Spearman correlation of distances in both embeddings."""
    return coherence(student, teacher).spearman.item()


class View(NamedTuple):
    """A network's embeddings and what they are worth."""

    train: Tensor  # [4000, d]
    test: Tensor  # [1000, d]
    accuracy: float


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few epochs only, under 20 seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for the plots")
    # Networks this small gain little from a second thread, and lose much when cores are shared.
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(QUICK if options.quick else Settings(), options.output)


def run(settings: Settings, output: Path) -> None:
    """Train both networks, print the tables and write the plots."""
    start = time.perf_counter()
    console = Console()
    train, test = load_split()
    console.print(f"MNIST: {len(train.labels):,} images to train on, {len(test.labels):,} to test.")

    teacher_network = trained_teacher(train, settings.teacher_epochs)
    teacher = view(teacher_network, train, test)
    torch.manual_seed(1)
    student_network = make_student()
    untrained = view(student_network, train, test)
    history = distil(student_network, teacher_network, settings.student_epochs, train, test)
    student = view(student_network, train, test)

    sizes = parameter_count(teacher_network), parameter_count(student_network)
    console.print(result_table(teacher, untrained, student, sizes))
    report_cost(console, student.train, teacher.train, settings)
    paths = write_plots(output, history, teacher, untrained, student, test.labels)
    console.print(f"\nPlots: {', '.join(str(path) for path in paths)}", soft_wrap=True)
    console.print(reading(teacher, untrained, student, sizes), soft_wrap=True)
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


def view(network: nn.Module, train: Images, test: Images) -> View:
    """Embed both splits and classify the test images by their neighbours."""
    train_points, test_points = embed(network, train.pixels), embed(network, test.pixels)
    accuracy = knn_accuracy(train_points, train.labels, test_points, test.labels)
    return View(train_points, test_points, accuracy)


def trained_teacher(train: Images, epochs: int) -> nn.Module:
    """A teacher that has learnt the labels."""
    torch.manual_seed(0)
    teacher = make_teacher()
    losses = train_teacher(teacher, train, epochs)
    bar = tqdm(losses, "teacher (labels)", total=epochs, unit="epoch", ncols=BAR_WIDTH)
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}")
    return teacher


def distil(
    student: nn.Module, teacher: nn.Module, epochs: int, train: Images, test: Images
) -> list[Epoch]:
    """Train the student on the teacher's embeddings; what it had learnt after every epoch."""
    pixels = with_moves(train.pixels)
    targets = embed(teacher, pixels)
    test_targets = embed(teacher, test.pixels)
    losses = train_student(student, pixels, targets, epochs)
    history = []
    bar = tqdm(losses, "student (no labels)", total=epochs, unit="epoch", ncols=BAR_WIDTH)
    for loss in bar:
        now = view(student, train, test)
        history.append(Epoch(loss, agreement(now.test, test_targets), now.accuracy))
        bar.set_postfix(coherence=f"{history[-1].coherence:.3f}")
    return history


def result_table(teacher: View, untrained: View, student: View, sizes: tuple[int, int]) -> Table:
    """Teacher against student, before and after training, on the test images."""
    table = Table(
        title="\nTest images: how the student sees them, against its teacher",
        caption_justify="left",
    )
    for name in ("", "parameters", "width", "coherence", "concordance", "5-NN"):
        table.add_column(name, justify="right" if name else "left")
    for name, count, row in (
        ("teacher", sizes[0], teacher),
        ("untrained student", sizes[1], untrained),
        ("trained student", sizes[1], student),
    ):
        table.add_row(
            name,
            f"{count:,}",
            str(row.test.shape[1]),
            f"{coherence(row.test, teacher.test).spearman:.4f}",
            f"{coherence(row.test, teacher.test).concordance:.4f}",
            f"{row.accuracy:.1%}",
        )
    table.caption = (
        "coherence: mean Spearman correlation with the teacher's distances\n"
        "concordance: how often both agree which of two images is nearer; chance: 0.5\n"
        "5-NN: images whose 5 nearest training images vote for the right digit"
    )
    return table


def report_cost(console: Console, student: Tensor, teacher: Tensor, settings: Settings) -> None:
    """Time a step of the loss at several batches, and compare one with the reference."""

    def measured(batch: int, backend: str, repeats: int) -> StepCost:
        return step_cost(student[:batch], teacher[:batch], backend, repeats)

    small, large, repeats = settings.reference_batch, settings.large_batch, settings.repeats
    with console.status(f"Timing the reference at batch {small:,}: its n^3 take a while"):
        reference = measured(small, "reference", 1 + repeats // 3)  # slow, so timed fewer times
    fast = measured(small, "cpu", 4 * repeats)
    table = Table(title=f"\nOne forward + backward step, threads: {torch.get_num_threads()}")
    for name in ("batch", "backend", "milliseconds", "loss"):
        table.add_column(name, justify="right")
    for batch, backend, cost in (
        (small, "reference", reference),
        (small, "cpu", fast),
        (STUDENT_BATCH, "cpu", measured(STUDENT_BATCH, "cpu", repeats)),
        (large, "cpu", measured(large, "cpu", repeats)),
    ):
        table.add_row(f"{batch:,}", backend, f"{cost.wall:,.1f}", f"{cost.loss:.7f}")
    console.print(table)
    report_comparison(console, small, reference, fast)
    check = min(small, CHECK_BATCH)
    report_errors(console, student[:check], teacher[:check])


def report_comparison(console: Console, batch: int, reference: StepCost, fast: StepCost) -> None:
    """Say how much faster the fast one is, and whether they agree."""
    faster = reference.wall / fast.wall
    computing = max(reference.wall - reference.system, 0) / fast.wall
    difference = abs(fast.loss - reference.loss) / reference.loss
    console.print(
        f"Batch {batch:,}: the cpu backend is {faster:,.0f} times as fast as the reference\n"
        f"({computing:,.0f} times, without the time the system takes to hand out memory).\n"
        f"Their losses {verdict(difference <= LOSS_TOLERANCE)}: "
        f"relative difference {difference:.0e}."
    )


def report_errors(console: Console, student: Tensor, teacher: Tensor) -> None:
    """Compare both backends with the reference in float64."""
    fast = errors(student, teacher, "cpu")
    naive = errors(student, teacher, "reference")
    agree = fast.loss <= LOSS_TOLERANCE and fast.gradient <= GRADIENT_TOLERANCE
    console.print(
        f"Batch {len(student)}: the cpu backend and the float64 reference {verdict(agree)}:\n"
        f"relative error of the loss {fast.loss:.0e}, of the gradient {fast.gradient:.0e}\n"
        f"(the reference in float32: {naive.loss:.0e} and {naive.gradient:.0e})."
    )


def verdict(agree: bool) -> str:
    """Say it so that failure is seen."""
    return "agree" if agree else "DISAGREE"


def write_plots(
    output: Path,
    history: Sequence[Epoch],
    teacher: View,
    untrained: View,
    student: View,
    labels: Tensor,
) -> list[Path]:
    """Write the plots; returns their paths, relative where they lie below the current folder."""
    output.mkdir(parents=True, exist_ok=True)
    start = Epoch(float("nan"), agreement(untrained.test, teacher.test), untrained.accuracy)
    students = {"Untrained student": untrained, "Trained student": student}
    embeddings = {
        f"{name}: 5-NN accuracy {seen.accuracy:.1%}": seen.test
        for name, seen in {"Teacher": teacher, **students}.items()
    }
    paths = [
        save(plot_learning(history, start, teacher.accuracy), output / "learning.png"),
        save(
            rank_agreement({name: seen.test for name, seen in students.items()}, teacher.test),
            output / "ranks.png",
        ),
        save(plot_embeddings(embeddings, labels), output / "embeddings.png"),
    ]
    here = Path.cwd()
    return [path.relative_to(here) if path.is_relative_to(here) else path for path in paths]


def reading(teacher: View, untrained: View, student: View, sizes: tuple[int, int]) -> str:
    """The result in one sentence."""
    before, after = (agreement(seen.test, teacher.test) for seen in (untrained, student))
    return (
        f"In short: without a single label, a student with {sizes[0] / sizes[1]:.0f} times fewer "
        f"parameters went from coherence {before:.2f} to {after:.2f} with its teacher, and from "
        f"{untrained.accuracy:.1%} to {student.accuracy:.1%} of test images recognised by their "
        f"neighbours (teacher: {teacher.accuracy:.1%})."
    )


if __name__ == "__main__":
    main()
