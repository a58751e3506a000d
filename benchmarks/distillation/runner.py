"""Does the jobs, over processes, and keeps each result as it comes."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from . import evaluation, protocol, results, sources, training
from .criteria import Grouped, Widths
from .methods import NAMED
from .results import Job, Result
from .settings import Setting

BAR_WIDTH = 80


def run(plan: protocol.Plan, folder: Path, processes: int) -> list[Result]:
    """All stages; jobs whose results the folder already has are not done again."""
    path = folder / f"{plan.name}-{sources.digest(plan)}.jsonl"
    found = results.load(path)
    results.save(path, found)  # without what an interrupted run left unfinished
    done = {result.job.key: result for result in found}
    context = multiprocessing.get_context("spawn")
    # A student this small gains nothing from a second thread, and gives the same numbers with one.
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes
    torch.set_num_threads(1)
    for name in protocol.PLACES:  # teachers, before several processes would train the same one
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
    return protocol.PLACES[name].make(protocol.PLANS[plan], folder)


def do(plan: str, folder: Path, job: Job) -> Result:
    """Train and measure one student; a function of its arguments alone."""
    start = time.perf_counter()
    setting = _setting(plan, job.setting, folder)
    test = job.split == "test"
    split = setting.test if test else setting.validation
    judgements = setting.judgements if test else ()
    if job.method == protocol.TEACHER:
        gallery, points = setting.gallery.embeddings, split.embeddings
        judged = [judgement.embeddings for judgement in judgements]
    else:
        student = trained(protocol.PLANS[plan], setting, job)
        inputs = [setting.gallery.inputs, split.inputs, *(own.inputs for own in judgements)]
        gallery, points, *judged = (training.embed(student, own) for own in inputs)
    measures = {
        distance: evaluation.measure(
            (gallery, setting.gallery.labels),
            (points, split.labels),
            split.embeddings,
            distance,
            thorough=test,
        )
        | {
            judgement.name: evaluation.judged(evaluation.view(own, distance), judgement)
            for judgement, own in zip(judgements, judged, strict=True)
        }
        for distance in job.distances
    }
    return Result(job, measures, time.perf_counter() - start)


def trained(plan: protocol.Plan, setting: Setting, job: Job) -> nn.Module:
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
    # Whatever numbers the criterion's own parameters took, batches come in the same order.
    torch.manual_seed(job.seed)
    steps = protocol.steps(plan, job, len(setting.transfer.inputs))
    training.train(student, criterion, split, job.rate, job.batch, steps)
    return student
