"""The study: what the coherence loss transfers, beside other ways to distil, on real data.

    python -m benchmarks.distillation run            # all of it; `--quick`: a smoke run
    python -m benchmarks.distillation page           # the page and its pictures, from results alone

criteria.py    the losses, each by its formula; index.py: those in the teacher's own space
methods.py     what is compared, and what the search tries for each
settings.py    what a setting is; images.py, sentences.py make them of data and teachers
training.py    one student by one method
evaluation.py  what an embedding is worth
plans.py       where methods are compared, and how much is done
protocol.py    which students are trained: search, effects, test
rule.py        which options become the library's defaults
sources.py     what kept results depend on
runner.py      does it, over processes; keeps every result, so that an interrupted study goes on
results.py     results as a file; summary.py, page.py, plots.py make of them what people read
"""

from __future__ import annotations

import sys
from pathlib import Path

# Data and teachers are the examples', which are scripts and import each other by bare names.
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))
