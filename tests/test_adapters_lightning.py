"""DistillationModule and CoherenceCallback in Lightning's Trainer, and the values they log."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from processes import CHECKOUT, end_group, join_group, run_in_processes
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from pcoherence import CandidateBank, coherence, perception_coherence_loss
from pcoherence.adapters.lightning import CoherenceCallback, DistillationModule
from pcoherence.metrics import Coherence

POINTS = torch.randn(41, 4, generator=torch.manual_seed(0))
LABELS = torch.arange(41)


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(1)
    teacher = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), teacher


def loader(count: int = 41, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(POINTS[:count], LABELS[:count]), batch_size=20, **options)


def trainer(**options: Any) -> Any:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"accelerator": "cpu", "devices": 1, "enable_model_summary": False}
    return Trainer(**(settings | options))


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on workers and loggers
        yield


def test_training_teaches_the_student_alone() -> None:
    student, teacher = networks()
    before = [parameter.clone() for parameter in teacher.parameters()]
    module = DistillationModule(
        student, teacher, optimizer=functools.partial(torch.optim.Adam, lr=0.02), temperature=0.05
    )
    start = perception_coherence_loss(student(POINTS), teacher(POINTS), temperature=0.05)
    run = trainer(max_epochs=20, callbacks=[CoherenceCallback()])
    run.fit(module, loader(drop_last=True, shuffle=True), loader())
    end = perception_coherence_loss(student(POINTS), teacher(POINTS), temperature=0.05)
    assert end < 0.5 * start
    assert not teacher.training
    for now, then in zip(teacher.parameters(), before, strict=True):
        assert torch.equal(now, then)
        assert now.grad is None
        assert not now.requires_grad
    expected = coherence(student(POINTS), teacher(POINTS))
    for name, value in expected._asdict().items():
        assert run.callback_metrics[f"val_{name}"].item() == pytest.approx(value.item(), abs=1e-6)
    assert {"train_loss", "val_loss"} <= run.callback_metrics.keys()


def test_steps_are_the_direct_loss() -> None:
    student, teacher = networks()
    module = DistillationModule(student, teacher, objective="huber")
    for batch in (POINTS, (POINTS, LABELS), [POINTS]):
        loss = module.training_step(batch, 0)
        expected = perception_coherence_loss(student(POINTS), teacher(POINTS), objective="huber")
        assert torch.equal(loss, expected)
    assert torch.equal(module(POINTS), student(POINTS))


def test_the_teacher_follows_but_is_not_saved(tmp_path: Path) -> None:
    student, teacher = networks()
    module = DistillationModule(student, teacher).double().train()
    assert module.teacher[0].weight.dtype == torch.float64
    assert not module.teacher.training
    assert all(key.startswith("student.") for key in module.state_dict())
    run = trainer(fast_dev_run=True)
    run.fit(module.float(), loader())
    run.save_checkpoint(tmp_path / "saved.ckpt")
    again = DistillationModule.load_from_checkpoint(
        tmp_path / "saved.ckpt", student=networks()[0], teacher=networks()[1], weights_only=False
    )
    assert torch.equal(again(POINTS), module.cpu()(POINTS))


def test_schedules_and_learned_metrics() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.ones(3))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cdist(a * self.weights, b * self.weights)

    def factory(parameters: list[nn.Parameter]) -> dict[str, Any]:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1),
        }

    metric = Scaled()
    module = DistillationModule(
        *networks(), optimizer=factory, metric=metric, teacher_metric="euclidean"
    )
    trainer(fast_dev_run=True).fit(module, loader())
    assert not torch.equal(metric.weights, torch.ones(3))


def test_the_callback_takes_the_first_points_of_each_loader() -> None:
    student, teacher = networks()
    run = trainer(callbacks=[CoherenceCallback(25, nearest=3, metric="cosine", prefix="x/")])
    run.validate(DistillationModule(student, teacher), [loader(), loader(30)], verbose=False)
    expected = coherence(student(POINTS[:25]), teacher(POINTS[:25]), nearest=3, metric="cosine")
    for index in (0, 1):
        found = run.callback_metrics[f"x/overlap/{index}"]
        assert found.item() == pytest.approx(expected.overlap.item(), abs=1e-6)


def test_too_few_points_log_nothing() -> None:
    run = trainer(callbacks=[CoherenceCallback()])
    run.validate(DistillationModule(*networks()), loader(1), verbose=False)
    assert run.callback_metrics == {}


def test_the_callback_says_what_it_expects() -> None:
    class Other(DistillationModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return {"loss": torch.zeros(())}

    message = r'^validation_step: expected a dict with "student" and "teacher".*got \[\'loss\'\]'
    with pytest.raises(TypeError, match=message):
        trainer(callbacks=[CoherenceCallback()]).validate(Other(*networks()), loader())


def test_bad_arguments() -> None:
    student, teacher = networks()
    with pytest.raises(TypeError, match=r"^teacher: expected a module; got builtin"):
        DistillationModule(student, torch.tanh)
    with pytest.raises(ValueError, match=r"^teacher: expected no parameters of the student's"):
        DistillationModule(student, nn.Sequential(student))
    with pytest.raises(TypeError, match=r"^optimizer: expected a function of the parameters.*Adam"):
        DistillationModule(student, teacher, optimizer=torch.optim.Adam(student.parameters()))
    with pytest.raises(ValueError, match=r"^objective: expected"):
        DistillationModule(student, teacher, objective="mae")
    with pytest.raises(ValueError, match=r"^reduction: expected mean or sum"):
        DistillationModule(student, teacher, reduction="none")
    with pytest.raises(ValueError, match=r"^max_points: expected an int of at least 1"):
        CoherenceCallback(0)
    with pytest.raises(ValueError, match=r"^metric: expected"):
        CoherenceCallback(metric="manhattan")


def test_a_refused_teacher_is_left_as_it_was() -> None:
    student, teacher = networks()
    with pytest.raises(ValueError, match=r"^objective: expected"):
        DistillationModule(student, teacher.train(), objective="mae")
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcoherence.adapters.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'pcoherence\[lightning\]"):
        importlib.import_module("pcoherence.adapters.lightning")


def test_emptying_leaves_the_teacher() -> None:
    student, teacher = networks()
    before = [parameter.clone() for parameter in teacher.parameters()]
    module = DistillationModule(student, teacher, bank=CandidateBank(8))
    module.criterion(*(torch.randn(4, width) for width in (3, 6)))
    module.to_empty(device="cpu")
    for now, then in zip(module.teacher.parameters(), before, strict=True):
        assert torch.equal(now, then)
    assert len(module.criterion.bank) == 0
    assert all(parameter.is_meta for parameter in module.to_empty(device="meta").parameters())


def test_a_teacher_of_lightning_knows_where_it_is() -> None:
    inner = DistillationModule(*networks())
    module = DistillationModule(nn.Linear(4, 3), inner)
    assert module.double().teacher.dtype == torch.float64
    assert module.to("meta").teacher.device.type == "meta"


def test_processes_without_points_are_left_out(tmp_path: Path) -> None:
    run_in_processes(__file__, 3, tmp_path)


def test_what_is_logged_is_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning adds up over processes what is logged with sync_dist alone."""
    logged: dict[str, bool] = {}
    module = DistillationModule(*networks())
    module.log = lambda name, loss, **options: logged.update({name: options.get("sync_dist")})  # type: ignore[method-assign]
    module.validation_step(POINTS[:10], 0)
    callback, run = CoherenceCallback(), types.SimpleNamespace(num_val_batches=[1])
    run.strategy = types.SimpleNamespace(reduce=lambda tensor, *, reduce_op: tensor)
    holder: Any = types.SimpleNamespace(
        device="cpu",
        log_dict=lambda values, **options: logged.update(
            dict.fromkeys(values, options.get("sync_dist"))
        ),
    )
    outputs = {"student": POINTS[:9, :3], "teacher": POINTS[:9]}
    callback.on_validation_batch_end(run, holder, outputs, None, 0)
    callback.on_validation_epoch_end(run, holder)
    assert len(logged) > 2
    assert all(logged.values()), logged


class SumsOfProcesses:
    """What the callback asks of a Trainer and its strategy."""

    def __init__(self) -> None:
        self.num_val_batches, self.strategy = [1, 1], self

    def reduce(self, tensor: Tensor, *, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        torch.distributed.all_reduce(tensor)
        return tensor


def work(rank: int, size: int) -> None:
    """Process 0 has 9 points, process 1 has 1, the last has none; nobody has any of loader 1."""
    logged: dict[str, Tensor] = {}
    module: Any = types.SimpleNamespace(
        device="cpu", log_dict=lambda values, sync_dist: logged.update(values)
    )
    callback, run = CoherenceCallback(), SumsOfProcesses()
    student, teacher = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    count = (9, 1, 0)[rank]
    if count:
        outputs = {"student": student[:count], "teacher": teacher[:count]}
        callback.on_validation_batch_end(run, module, outputs, None, 0)
    with torch.device("meta"):  # a default device changes nothing
        callback.on_validation_epoch_end(run, module)
    expected = coherence(student, teacher)._asdict()
    assert logged.keys() == {f"val_{name}/0" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(logged[f"val_{name}/0"], value.float())
    gathered_loss(rank, size)
    trainers(rank, size)


def gathered_loss(rank: int, size: int) -> None:
    """val_loss of uneven shards, as Lightning averages it, is that of the whole batches."""
    module = DistillationModule(*networks(), gather=True)
    module._trainer = types.SimpleNamespace(world_size=size, strategy=SumsOfProcesses())
    shards = [[(0, 10), (10, 12), (12, 12)], [(0, 3), (3, 20), (20, 41)]]
    sums = torch.zeros(2)  # of the loss times its weight, of the weight
    module.log = lambda name, loss, batch_size, **_: sums.add_(  # type: ignore[method-assign]
        torch.stack([loss.detach() * batch_size, torch.tensor(float(batch_size))])
    )
    expected = torch.zeros(2)
    for batch in shards:
        module.validation_step(POINTS[slice(*batch[rank])], 0)
        points = POINTS[: batch[-1][1]]
        loss = perception_coherence_loss(*module.features(points))
        expected += torch.stack([loss.detach() * len(points), torch.tensor(float(len(points)))])
    torch.distributed.all_reduce(sums)
    torch.testing.assert_close(sums[0] / sums[1], expected[0] / expected[1])


class Started(LightningEnvironment):
    """Processes that are there, in a group that is there."""

    creates_processes_externally = True

    def world_size(self) -> int:
        """Of the group."""
        return torch.distributed.get_world_size()

    def global_rank(self) -> int:
        """In the group."""
        return torch.distributed.get_rank()

    local_rank = global_rank

    def set_world_size(self, size: int) -> None:
        """It is known."""

    def set_global_rank(self, rank: int) -> None:
        """It is known."""


def trainers(rank: int, size: int) -> None:
    """Lightning's own: every process logs what is right for the points of all."""
    shards = [(0, 9), (9, 10), (10, 41)]  # in batches of 20; one of them with nobody to rank
    points = [POINTS[begin:end] for begin, end in shards]
    student, teacher = networks()
    for gather in (False, True):
        module = DistillationModule(student, teacher, gather=gather)
        run = trainer(
            strategy="ddp", devices=size, plugins=[Started()], use_distributed_sampler=False,
            callbacks=[CoherenceCallback()],
        )  # fmt: skip
        # Gathered, every process has to have as many batches.
        validation = DataLoader(points[rank], batch_size=41 if gather else 20)
        run.validate(module, validation, verbose=False)
        if gather:
            batches = [POINTS]
        else:
            batches = [part for own in points for part in own.split(20) if len(part) > 1]
        losses = [perception_coherence_loss(*module.features(batch)).detach() for batch in batches]
        total = sum(len(batch) * loss for batch, loss in zip(batches, losses, strict=True))
        expected = {"val_loss": total / sum(map(len, batches))}
        measured = [coherence(*module.features(own)) for own in points if len(own) > 1]
        for name, *values in zip(Coherence._fields, *measured, strict=True):
            expected[f"val_{name}"] = sum(values).float() / len(values)
        found = {name: value.cpu() for name, value in run.callback_metrics.items()}
        torch.testing.assert_close(found, expected)


def whole_module(gather: bool) -> DistillationModule:
    """In float64, with a bank of two batches, so that what is remembered has to be right too."""
    optimizer = functools.partial(torch.optim.Adam, lr=0.02)
    options = {"optimizer": optimizer, "gather": gather, "bank": CandidateBank(40)}
    return DistillationModule(*networks(), **options).double()


class Dealt(Sampler):
    """The order in which Lightning deals points to two processes, batch by batch of both."""

    def __init__(self, count: int) -> None:
        self.shares = [DistributedSampler(range(count), 2, rank) for rank in range(2)]

    def set_epoch(self, epoch: int) -> None:
        """Lightning tells; each epoch has its own order."""
        for share in self.shares:
            share.set_epoch(epoch)

    def __iter__(self) -> Any:
        shares = torch.tensor([list(share) for share in self.shares])
        return iter(shares.view(2, -1, 10).transpose(0, 1).flatten().tolist())


def fit(module: DistillationModule, size: int, epochs: int, checkpoint: Any = None) -> Any:
    """As its users write it, where there are two processes."""
    points = TensorDataset(POINTS[:40].double(), LABELS[:40])
    if size > 1:
        strategy: Any = DDPStrategy(process_group_backend="gloo")
        training = DataLoader(points, batch_size=10, shuffle=True)
    else:
        strategy, training = "auto", DataLoader(points, batch_size=20, sampler=Dealt(len(points)))
    run = trainer(
        max_epochs=epochs, devices=size, strategy=strategy, callbacks=[CoherenceCallback()]
    )
    validation = DataLoader(points, batch_size=20 // size)
    run.fit(module, training, validation, ckpt_path=checkpoint, weights_only=False)
    return run


def one_of_two(folder: Path) -> None:
    """Lightning starts the second process, with this script's arguments."""
    module = whole_module(gather=True)
    run = fit(module, 2, epochs=2)
    assert torch.distributed.get_world_size() == 2
    run.save_checkpoint(folder / "two.ckpt")
    found = {"state": module.state_dict(), "logged": run.callback_metrics}
    torch.save(found, folder / f"{run.global_rank}.pt")


def test_a_fit_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    """Parameters, bank, what is logged, and a checkpoint, from which one process goes on."""
    ended = subprocess.run(
        [sys.executable, __file__, "fit", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": CHECKOUT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout
    processes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = whole_module(gather=False)
    run = fit(alone, 1, epochs=2)
    run.save_checkpoint(tmp_path / "one.ckpt")
    logged = run.callback_metrics
    points = POINTS[:40].double()
    halves = [coherence(*alone.features(points[rank::2])) for rank in range(2)]
    expected = {"val_loss": logged["val_loss"]}
    for name, *values in zip(Coherence._fields, *halves, strict=True):
        expected[f"val_{name}"] = sum(values).float() / 2
    for process in processes:
        torch.testing.assert_close(process["state"], alone.state_dict())
        for name, value in expected.items():
            torch.testing.assert_close(process["logged"][name], value, check_dtype=False)
    mean = sum(process["logged"]["train_loss"] for process in processes) / 2
    torch.testing.assert_close(mean, logged["train_loss"])
    student, teacher = networks()
    again = DistillationModule.load_from_checkpoint(
        tmp_path / "two.ckpt", student=student, teacher=teacher, bank=CandidateBank(40),
        weights_only=False,
    )  # fmt: skip
    torch.testing.assert_close(again.double().state_dict(), alone.state_dict())
    resumed, expectation = whole_module(gather=False), whole_module(gather=False)
    fit(resumed, 1, epochs=3, checkpoint=tmp_path / "two.ckpt")
    fit(expectation, 1, epochs=3, checkpoint=tmp_path / "one.ckpt")
    torch.testing.assert_close(resumed.state_dict(), expectation.state_dict())
    assert not torch.equal(resumed.student[0].weight, alone.student[0].weight)


if __name__ == "__main__":
    if sys.argv[1] == "fit":
        one_of_two(Path(sys.argv[2]))
        end_group()  # Lightning ends groups of NCCL alone
    else:
        join_group(work)
