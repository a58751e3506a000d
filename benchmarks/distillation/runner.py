"""Does the jobs, over processes, and keeps each result as it comes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import evaluation, plans, protocol, results, sources, training
from .criteria import Grouped, Widths
from .methods import NAMED
from .results import ANY, Job, Measures, Result
from .settings import Judgement, Setting, Split

BAR_WIDTH = 80


def run(plan: plans.Plan, folder: Path, processes: int) -> list[Result]:
    """All stages; jobs whose results the folder already has are not done again."""
    path = folder / f"{plan.name}-{sources.digest(plan)}.jsonl"
    found = results.load(path)
    results.save(path, found)  # without what an interrupted run left unfinished
    done = {result.job.key: result for result in found}
    context = multiprocessing.get_context("spawn")
    # A student this small gains nothing from a second thread, and gives the same numbers with one.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes
    torch.set_num_threads(1)
    for name in plans.PLACES:  # teachers, before several processes would train the same one
        _setting(plan.name, name, folder)
    with ProcessPoolExecutor(processes, context) as pool:
        wanted: list[Result] = []
        for title, stages in protocol.STAGES.items():
            jobs = [job for stage in stages for job in stage(plan, wanted)]
            missing = [job for job in jobs if job.key not in done]
            futures = [pool.submit(do, plan.name, folder, job) for job in missing]
            for result in _progress(futures, title):
                results.append(path, result)
                done[result.job.key] = result
            wanted += [done[job.key] for job in jobs]
    return wanted


def _progress(futures: Sequence[Future[Result]], title: str) -> Iterator[Result]:
    """Results as they come; the others are called off if one fails, or the user does."""
    bar = tqdm(as_completed(futures), title, total=len(futures), unit="student", ncols=BAR_WIDTH)
    try:
        for future in bar:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


@functools.cache
def _setting(plan: str, name: str, folder: Path) -> Setting:
    return plans.PLACES[name].make(plans.PLANS[plan], folder)


def do(plan: str, folder: Path, job: Job) -> Result:
    """Train and measure one student; a function of its arguments alone."""
    start = time.perf_counter()
    setting = _setting(plan, job.setting, folder)
    split = setting.test if job.split == "test" else setting.validation
    own = job.method == protocol.TEACHER
    student = None if own else trained(plans.PLANS[plan], setting, job)
    measures = _measures(job, setting, split, functools.partial(_embeddings, student))
    return Result(job, results.rounded(measures), time.perf_counter() - start)


Look = Callable[[Split | Judgement], Tensor]
"""Embeddings [n, d] of the points of a split, or of a judgement."""


def _embeddings(student: nn.Module | None, points: Split | Judgement) -> Tensor:
    """As the student sees them, or the teacher."""
    return points.embeddings if student is None else training.embed(student, points.inputs)


def _measures(job: Job, setting: Setting, split: Split, look: Look) -> Measures:
    queries = look(split), split.labels
    gallery = setting.gallery
    if plans.PLACES[job.setting].in_index:
        index = gallery.embeddings, gallery.labels
        return evaluation.measure_in_index(index, queries, split.embeddings)
    found = evaluation.measure((look(gallery), gallery.labels), queries, split.embeddings)
    judgements = setting.judgements if job.split == "test" else ()
    judged = {own.name: evaluation.judged(look(own), own) for own in judgements}
    return {**found, ANY: {**found[ANY], **judged}}


def trained(plan: plans.Plan, setting: Setting, job: Job) -> nn.Module:
    """The student of a job: all methods start from the same one, with points in the same order."""
    method = NAMED[job.method]
    make, width = setting.students[job.student]
    torch.manual_seed(job.seed)
    student = make()
    if method.learns_from == "nothing":
        return student
    split = setting.labelled if method.learns_from == "labels" else setting.transfer
    split = training.hidden(split, method.learns_from)
    widths = Widths(width, split.embeddings.shape[1], setting.classes)
    criterion = method.build(widths, **job.options)
    if job.group:
        criterion = Grouped(criterion, job.group)
    if job.bank:
        criterion = criterion.with_bank(job.bank)
    # Whatever numbers the criterion's own parameters took, batches come in the same order.
    torch.manual_seed(job.seed)
    steps = protocol.steps(plan, job, len(setting.transfer.inputs))
    training.train(student, criterion, split, job.rate, job.batch, steps)
    return student
