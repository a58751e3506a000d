"""The setting of sentences: definitions of WordNet, as MiniLM embeds them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _bags import Student, hashed
from _packages import wheel_file
from _sentences import load_glosses, teacher_embeddings
from torch import Tensor, nn

from .settings import Judgement, Setting, Split, kept, teacher_logits

CLASSES = 45
# Of the order of texts, whose first ones were the splits of the last full study. The example draws
# by another seed; a few of its test texts, on which its settings were looked at, may be here, too.
SEED = 3
READ = 34_000
# A sixteenth of the example's table of words: training it takes most of the time.
BUCKETS, HIDDEN, WIDTH = 2**13, 64, 64
TEACHER_WIDTH = 384

# gensim's package carries tests of similarity: pairs of words (Finkelstein et al. 2002; Hill et al.
# 2015) and 50 news articles (Lee et al. 2005), all judged by people.
GENSIM = "gensim==4.4.0"
TEST_DATA = "gensim/test/test_data/"
WORDS = {"WordSim-353": "wordsim353.tsv", "SimLex-999": "simlex999.txt"}
ARTICLES = ("lee.cor", "similarities0-1.txt")


class Sizes(NamedTuple):
    """Texts in each split."""

    labelled: int = 4_000
    gallery: int = 4_000
    transfer: int = 16_000
    validation: int = 4_000
    test: int = 6_000


def glosses(sizes: Sizes, folder: Path) -> Setting:
    """The teacher has never seen the categories; a linear classifier on it has, by one split."""
    _, *parts = load_glosses(folder, (READ, *sizes), SEED)
    texts = [text for part in parts for text in part.texts]
    embeddings = torch.split(teacher_embeddings(texts, folder), list(sizes))
    names = sizes._asdict()

    def make() -> dict[str, Tensor]:
        probe = embeddings[0], parts[0].labels
        logits = (teacher_logits(probe, own, CLASSES) for own in embeddings)
        return dict(zip(names, logits, strict=True))

    logits = kept(folder, "sentences", (SEED, READ, sizes), make)
    splits = {
        name: Split(hashed(part.texts, BUCKETS), own, logits[name], part.labels)
        for name, part, own in zip(names, parts, embeddings, strict=True)
    }
    return Setting(
        **splits,
        students={"bags": _student(WIDTH)},
        classes=CLASSES,
        judgements=(*(_words(name, folder) for name in WORDS), _articles(folder)),
    )


def teachers_index(sizes: Sizes, folder: Path) -> Setting:
    """The same with students as wide as the teacher; people's judgements are of no use there."""
    students = {"bags": _student(TEACHER_WIDTH)}
    return dataclasses.replace(glosses(sizes, folder), students=students, judgements=())


def _student(width: int) -> tuple[Callable[[], nn.Module], int]:
    return functools.partial(Student, BUCKETS, HIDDEN, width), width


def _words(name: str, folder: Path) -> Judgement:
    """A file of lines: word, word, score."""
    path = wheel_file(folder, GENSIM, TEST_DATA + WORDS[name])
    lines = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    words = sorted({word for line in lines for word in line[:2]})
    index = {word: row for row, word in enumerate(words)}
    pairs = torch.tensor([[index[word] for word in line[:2]] for line in lines])
    scores = torch.tensor([float(line[2]) for line in lines])
    return _judgement(name, words, pairs, scores, folder)


def _articles(folder: Path) -> Judgement:
    """An article a line, and the matrix of their similarities."""
    texts, table = (wheel_file(folder, GENSIM, TEST_DATA + name) for name in ARTICLES)
    articles = texts.read_text("latin-1").splitlines()
    scores = torch.from_numpy(np.loadtxt(table)).float()
    pairs = torch.triu_indices(len(articles), len(articles), offset=1)
    return _judgement("Lee", articles, pairs.T, scores[tuple(pairs)], folder)


def _judgement(
    name: str, texts: list[str], pairs: Tensor, scores: Tensor, folder: Path
) -> Judgement:
    embeddings = teacher_embeddings(texts, folder)
    return Judgement(name, hashed(texts, BUCKETS), embeddings, pairs, scores)
