"""Settings of images: Fashion-MNIST, and its classes that the teacher has never seen."""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _images import Images
from _packages import debian_folder
from _training import embed, make_teacher, train_teacher
from torch import Tensor, nn

from .settings import Setting, Split, kept, teacher_logits

PACKAGE = "dataset-fashion-mnist"  # Debian's, 31 MB, MIT licence
INSIDE = "usr/share/datasets/fashion-mnist"
FILES = tuple(
    f"{part}-{kind}-ubyte.gz"
    for part in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)
PARTS = ("teacher", "labelled", "gallery", "transfer", "validation")
"""Of what is not tested."""
TESTED = 10_000
"""Images that the full study tests, and no smoke run."""
READ = 5_000
"""Training images, the last by seed 0: an earlier round's validation, and leads, came of them."""
CLASSES = 10
KNOWN = (0, 2, 4, 6, 8)  # T-shirt, pullover, coat, shirt, bag
NEW = (1, 3, 5, 7, 9)  # trouser, dress, sandal, sneaker, ankle boot

# Channels and width of the embedding; the teacher has 32 channels and 220,000 parameters.
STUDENTS = {"tiny": (2, 8), "small": (6, 16)}
TEACHER_WIDTH = 64


class Sizes(NamedTuple):
    """Images in each split, and how long the teacher learns."""

    teacher: int = 25_000
    labelled: int = 5_000
    gallery: int = 5_000
    transfer: int = 20_000
    validation: int = 5_000
    test: int = 10_000
    teacher_epochs: int = 10


@dataclass(frozen=True)
class Pixels:
    """Images that a student takes by their rows."""

    pixels: Tensor  # [n, 1, 28, 28], float32 in [0, 1]

    def __len__(self) -> int:
        """How many images."""
        return len(self.pixels)

    def rows(self, rows: Tensor) -> tuple[Tensor]:
        """The student's argument."""
        return (self.pixels[rows],)


def make_student(channels: int, width: int) -> nn.Module:
    """The shape of the teacher with fewer channels."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * 7 * 7, width),
    )


def all_classes(sizes: Sizes, folder: Path) -> Setting:
    """The teacher knows all classes by many labels; of few, and of other images, students learn."""
    parts = _splits(sizes, folder)
    splits = _seen_by_teacher(parts, CLASSES, sizes, folder)
    students = {name: _student(*shape) for name, shape in STUDENTS.items()}
    return Setting(**splits, students=students, classes=CLASSES, judgements=())


def teachers_index(sizes: Sizes, folder: Path) -> Setting:
    """The same with students as wide as the teacher."""
    students = {name: _student(channels, TEACHER_WIDTH) for name, (channels, _) in STUDENTS.items()}
    return dataclasses.replace(all_classes(sizes, folder), students=students)


def new_classes(sizes: Sizes, folder: Path) -> Setting:
    """Teacher and students see the classes KNOWN alone, and are judged on the others."""
    parts = _splits(sizes, folder)
    known = {name: _only(parts[name], KNOWN) for name in ("teacher", "labelled", "transfer")}
    new = {name: _only(parts[name], NEW) for name in ("gallery", "validation", "test")}
    splits = _seen_by_teacher(known | new, len(KNOWN), sizes, folder)
    students = {name: _student(*shape) for name, shape in STUDENTS.items()}
    return Setting(**splits, students=students, classes=len(KNOWN), judgements=())


def load(folder: Path) -> tuple[Images, Images]:
    """The data set's own two parts: 60,000 and 10,000."""
    source = debian_folder(folder, PACKAGE, INSIDE, FILES)
    found = [_idx(source / name) for name in FILES]
    return Images(_floats(found[0]), found[1].long()), Images(_floats(found[2]), found[3].long())


def _idx(path: Path) -> Tensor:
    """An array in the format of MNIST: magic number with the rank, sizes, bytes."""
    content = gzip.decompress(path.read_bytes())
    rank = content[3]
    shape = np.frombuffer(content, ">i4", rank, 4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    return torch.from_numpy(values.reshape(shape).copy())


def _floats(pixels: Tensor) -> Tensor:
    return pixels[:, None].float() / 255


def _splits(sizes: Sizes, folder: Path) -> dict[str, Images]:
    """Parts at random; none of the test part was validation or test of the last full study.

    That one tested the data set's own test images: here they are among the other parts.
    """
    train, others = load(folder)
    images = Images(*map(torch.cat, zip(train, others, strict=True)))
    order = _shuffled(torch.arange(len(train.labels)), seed=0)
    fresh = _shuffled(order[:-READ], seed=1)
    known = torch.arange(len(train.labels), len(images.labels))
    rest = _shuffled(torch.cat([fresh[TESTED:], order[-READ:], known]), seed=2)
    counts = [getattr(sizes, name) for name in PARTS]
    *rows, left = torch.split(rest, [*counts, len(rest) - sum(counts)])
    parts = {name: _rows(images, own) for name, own in zip(PARTS, rows, strict=True)}
    tested = fresh[:TESTED] if sizes.test == TESTED else left[: sizes.test]
    return parts | {"test": _rows(images, tested)}


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]


def _rows(images: Images, rows: Tensor) -> Images:
    return Images(images.pixels[rows], images.labels[rows])


def _only(images: Images, classes: tuple[int, ...]) -> Images:
    """Images of these classes, which become 0, 1, ..."""
    chosen = torch.tensor(classes)
    kept = _rows(images, torch.isin(images.labels, chosen).nonzero().squeeze(1))
    return Images(kept.pixels, torch.searchsorted(chosen, kept.labels))


def _seen_by_teacher(
    parts: dict[str, Images], classes: int, sizes: Sizes, folder: Path
) -> dict[str, Split]:
    """The parts with a teacher's outputs; it learns the part "teacher" once, and is kept."""

    def make() -> dict[str, Tensor]:
        torch.manual_seed(0)
        teacher = make_teacher()
        for _ in train_teacher(teacher, parts["teacher"], sizes.teacher_epochs):
            pass
        found = {name: embed(teacher, images.pixels) for name, images in parts.items()}
        probe = found["teacher"], parts["teacher"].labels
        return found | {
            _logits(name): teacher_logits(probe, own, classes) for name, own in found.items()
        }

    outputs = kept(folder, "images", (classes, sizes), make)
    return {
        name: Split(Pixels(images.pixels), outputs[name], outputs[_logits(name)], images.labels)
        for name, images in parts.items()
        if name != "teacher"
    }


def _logits(name: str) -> str:
    return f"{name} logits"


def _student(channels: int, width: int) -> tuple[Callable[[], nn.Module], int]:
    return functools.partial(make_student, channels, width), width
