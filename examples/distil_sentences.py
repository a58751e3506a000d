"""Distil a sentence encoder into hashed words: 23 million parameters into 4, without labels.

Texts are definitions of WordNet, from the Debian package wordnet-base; the teacher is MiniLM, from
packages that carry it (`_sentences.py` says which). Both are kept in the folder --data, the
teacher's embeddings too, so that a second run trains at once. The sense categories of WordNet
("noun.animal", "verb.motion", ...) are only used at the end, to see what an embedding is worth.

    pip install --no-build-isolation -e '.[sentences]'
    python examples/distil_sentences.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from _bags import Bags, Student, hashed
from _measures import knn_accuracy
from _sentences import TEACHER_PARAMETERS, Glosses, load_glosses, teacher_embeddings
from _steps import batches, step
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from pcoherence import Coherence, PerceptionCoherenceLoss, coherence

DATA = Path(__file__).resolve().parent.parent / "demo-output" / "sentences"
BAR_WIDTH = 80
BATCH = 512
RATE = 1e-2


class Settings(NamedTuple):
    """How much work to do."""

    train: int = 12_000
    test: int = 2_000
    epochs: int = 20


QUICK = Settings(train=3_000, test=500, epochs=10)


class View(NamedTuple):
    """A network's embeddings of the test texts, and what they are worth."""

    test: Tensor  # [test, d]
    accuracy: float


def main() -> None:
    """Run the example from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="less of everything, for a first look")
    parser.add_argument("--data", type=Path, default=DATA, help="folder for texts and embeddings")
    # As in the demo: a student this small gains nothing from a second thread.
    parser.add_argument("--threads", type=int, default=1, help="threads for torch (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(QUICK if options.quick else Settings(), options.data)


def run(settings: Settings, folder: Path) -> None:
    """Embed by the teacher, train the student, print the table."""
    start = time.perf_counter()
    console = Console()
    train, test = load_glosses(folder, (settings.train, settings.test))
    console.print(
        f"WordNet: {len(train.texts):,} definitions to train on, {len(test.texts):,} to test."
    )
    targets = teacher_embeddings(train.texts + test.texts, folder)
    train_targets, test_targets = targets[: settings.train], targets[settings.train :]
    train_bags, test_bags = hashed(train.texts), hashed(test.texts)

    def view(network: Student) -> View:
        embedded = embed(network, train_bags), embed(network, test_bags)
        return View(embedded[1], knn_accuracy(embedded[0], train.labels, embedded[1], test.labels))

    torch.manual_seed(0)
    student = Student()
    untrained = view(student)
    losses = train_student(student, train_bags, train_targets, settings.epochs)
    bar = tqdm(losses, "student (no labels)", total=settings.epochs, unit="epoch", ncols=BAR_WIDTH)
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.4f}")
    trained = view(student)
    accuracy = knn_accuracy(train_targets, train.labels, test_targets, test.labels)
    teacher = View(test_targets, accuracy)

    size = sum(parameter.numel() for parameter in student.parameters())
    rows = (
        ("teacher", TEACHER_PARAMETERS, teacher),
        ("untrained", size, untrained),
        ("trained", size, trained),
    )
    console.print(result_table(rows, test_targets, most_frequent(test)))
    console.print(f"Done in {time.perf_counter() - start:.0f} s.")


@torch.no_grad()
def embed(student: Student, bags: Bags) -> Tensor:
    """Embeddings [texts, width]."""
    embedding: Tensor = student(*bags.rows(torch.arange(len(bags))))
    return embedding


def train_student(student: Student, bags: Bags, targets: Tensor, epochs: int) -> Iterator[float]:
    """Train by the teacher's embeddings [texts, d] alone; yields each epoch's loss."""
    criterion = PerceptionCoherenceLoss()
    optimizer = torch.optim.Adam(student.parameters())
    steps = len(targets) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    for _ in range(epochs):
        total = 0.0
        for rows in batches(len(targets), BATCH):
            loss = criterion(student(*bags.rows(rows)), targets[rows])
            total += step(loss, optimizer, schedule)
        yield total / steps


def most_frequent(test: Glosses) -> float:
    """The share of the most frequent category: what always guessing it would score."""
    return test.labels.bincount().max().item() / len(test.labels)


def result_table(rows: tuple[tuple[str, int, View], ...], teacher: Tensor, guess: float) -> Table:
    """Teacher against student, before and after training, on the test texts."""
    table = Table(title="\nTest definitions: how the student sees them, against its teacher")
    for name in ("", "parameters", "width", "coherence", "concordance", "overlap", "5-NN"):
        table.add_column(name, justify="right" if name else "left")
    for name, size, view in rows:
        found: Coherence = coherence(view.test, teacher)
        measures = (f"{value:.3f}" for value in (found.spearman, found.concordance, found.overlap))
        table.add_row(name, f"{size:,}", str(view.test.shape[1]), *measures, f"{view.accuracy:.1%}")
    table.caption = (
        "coherence: mean Spearman correlation with the teacher's distances\n"
        "concordance: how often both agree which of two texts is nearer; chance: 0.5\n"
        "overlap: the share of the 10 nearest texts that both have in common\n"
        "5-NN: texts whose 5 nearest training texts vote for the right category;\n"
        f"always guessing the most frequent one: {guess:.1%}"
    )
    table.caption_justify = "left"
    return table


if __name__ == "__main__":
    main()
