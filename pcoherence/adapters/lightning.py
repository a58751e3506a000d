"""Distillation as a LightningModule, and a callback that logs coherence with the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "pcoherence.adapters.lightning: expected lightning; got no such package "
        "(pip install 'pcoherence[lightning]')"
    ) from error

from pcoherence.loss import PerceptionCoherenceLoss
from pcoherence.metrics import Coherence, coherence
from pcoherence.spec import Metric, check_count, check_metrics

from ._dtypes import same_dtype


class DistillationModule(LightningModule):
    """Trains the student to order the points of a batch as the teacher does.

    A batch is the inputs, or a tuple or list that begins with them (labels are left alone);
    override `inputs` for anything else. Logs train_loss, of this process, and val_loss, the mean
    over processes.

    Args:
        student: inputs -> features [batch, ds].
        teacher: inputs -> features [batch, dt]. It is frozen here, in evaluation mode, and follows
            the module's device and dtype; the optimizer, checkpoints and
            DistributedDataParallel do not see it. Give it again to load_from_checkpoint.
        optimizer: parameters -> what `configure_optimizers` may return: an optimizer, or a dict
            with its scheduler. The parameters are the student's and the loss's own.
        **options: of `PerceptionCoherenceLoss`, same names, defaults and errors.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        optimizer: Callable[[list[nn.Parameter]], Any] = torch.optim.AdamW,
        **options: Any,
    ) -> None:
        for name, network in (("student", student), ("teacher", teacher)):
            if not isinstance(network, nn.Module):
                raise TypeError(f"{name}: expected a module; got {type(network).__name__}")
        if not callable(optimizer):
            raise TypeError(
                "optimizer: expected a function of the parameters, "
                f"functools.partial(torch.optim.AdamW, lr=1e-3) say; got {type(optimizer).__name__}"
            )
        if options.get("reduction") == "none":
            raise ValueError("reduction: expected mean or sum, a loss to minimise; got 'none'")
        if {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}:
            raise ValueError("teacher: expected no parameters of the student's, since it is frozen")
        super().__init__()
        self.criterion = PerceptionCoherenceLoss(**options)
        self.student = student
        # In a tuple, so that it is no submodule: not saved, trained, nor put in training mode.
        self._unregistered = (teacher.requires_grad_(False).eval(),)
        self.optimizer = optimizer

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._unregistered[0]

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """What .to(), .cuda(), .half() and the like are made of."""
        self.teacher._apply(*arguments, **options)  # type: ignore[no-untyped-call]
        _note_device(self.teacher)
        return super()._apply(*arguments, **options)  # type: ignore[no-untyped-call]

    def to_empty(self, *, device: Any, recurse: bool = True) -> Any:
        """Memory without values for the module's own parameters; the teacher keeps its values.

        It moves to the device. On the meta device it has none, and is emptied too.
        """
        tensors = (*self.teacher.parameters(), *self.teacher.buffers())
        if any(tensor.is_meta for tensor in tensors):
            return super().to_empty(device=device, recurse=recurse)
        # What to_empty() does, past this class's own _apply.
        super()._apply(lambda t: torch.empty_like(t, device=device), recurse=recurse)  # type: ignore[no-untyped-call]
        if device is not None:
            self.teacher.to(device)
        if self.criterion.bank is not None:
            self.criterion.bank.reset_parameters()
        return self

    def inputs(self, batch: Any) -> Any:
        """What both networks are called with: the batch, or its first element."""
        return batch[0] if isinstance(batch, (tuple, list)) else batch

    def forward(self, inputs: Any) -> Tensor:
        """The student's features."""
        features: Tensor = self.student(inputs)
        return features

    def features(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The student's [batch, ds] and the teacher's [batch, dt], in one dtype."""
        inputs = self.inputs(batch)
        with torch.no_grad():
            teacher = self.teacher(inputs)
        return same_dtype(self(inputs), teacher)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        student, teacher = self.features(batch)
        loss: Tensor = self.criterion(student, teacher)
        self.log("train_loss", loss, batch_size=len(student))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """The features of a batch, for `CoherenceCallback`."""
        student, teacher = self.features(batch)
        # The last batch may be one point, with nobody to rank; gathered, all must call the loss.
        ranked = self.criterion.gather or len(student) > 1
        # Every process must log, or the others wait; a batch that is not ranked counts 0.
        if ranked or self.trainer.world_size > 1:
            loss = self.criterion(student, teacher) if ranked else student.new_zeros(())
            count = self._weight(len(student)) if ranked else 0
            self.log("val_loss", loss, prog_bar=True, batch_size=count, sync_dist=True)
        return {"student": student, "teacher": teacher}

    def _weight(self, points: int) -> int:
        """The weight of a batch's loss in the logged mean.

        Gathered, a process's loss has its share of the anchors in it: the mean over processes
        counts for the points of all. Times the number of processes, because Lightning averages
        weights over them and rounds down.
        """
        # .trainer raises where there is none
        size = 1 if self._trainer is None else self.trainer.world_size
        if size > 1 and self.criterion.gather:
            own = torch.tensor(float(points), device=self.device)
            points = int(self.trainer.strategy.reduce(own, reduce_op="sum"))
        return size * points

    def configure_optimizers(self) -> Any:
        """The optimizer that was asked for."""
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


def _note_device(network: nn.Module) -> None:
    """Lightning's modules keep a note of where they are, which their own .to() and so on write."""
    parameter = next(network.parameters(), None)
    for module in network.modules():
        if isinstance(module, LightningModule) and parameter is not None:
            module._device, module._dtype = parameter.device, parameter.dtype


class CoherenceCallback(Callback):
    """Logs `coherence` of student and teacher over the points of a validation run.

    For every module whose validation_step returns a dict with "student" [batch, ds] and "teacher"
    [batch, dt], as `DistillationModule` does. Logs val_concordance, val_kendall, val_spearman and
    val_overlap at the end of validation; with several loaders, val_concordance/0 and so on.
    Processes measure their own points, and the mean over those that have 2 or more is logged;
    nothing where none has.

    Args:
        max_points: the first points of each loader, no more: O(max_points^2 log) time and
            O(max_points d) memory. An unshuffled, sorted loader wants more or a shuffled set.
        metric: a name or a callable, as in `coherence`.
        teacher_metric: likewise; None: the same.
        nearest: k of the overlap.
        prefix: before every name.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for a
            validation_step that returns something else, when its first batch ends.
    """

    def __init__(
        self,
        max_points: int = 2048,
        *,
        metric: Metric = "euclidean",
        teacher_metric: Metric | None = None,
        nearest: int = 10,
        prefix: str = "val_",
    ) -> None:
        super().__init__()
        check_count("max_points", max_points)
        check_metrics(metric, teacher_metric)
        check_count("nearest", nearest)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix: expected a string; got {type(prefix).__name__}")
        self.max_points = max_points
        self.options: dict[str, Any] = {
            "metric": metric,
            "teacher_metric": teacher_metric,
            "nearest": nearest,
        }
        self.prefix = prefix
        self._points: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last run."""
        self._points = {}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the features of a batch, up to max_points."""
        if not isinstance(outputs, dict) or not {"student", "teacher"} <= outputs.keys():
            got = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
            raise TypeError(
                'validation_step: expected a dict with "student" and "teacher" from it, for '
                f"CoherenceCallback; got {got}"
            )
        kept = self._points.setdefault(dataloader_idx, [])
        room = self.max_points - sum(len(student) for student, _ in kept)
        if room > 0:
            kept.append((outputs["student"][:room].detach(), outputs["teacher"][:room].detach()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        loaders = len(trainer.num_val_batches) or len(trainer.num_sanity_val_batches)
        for index in range(loaders):
            # What this process adds to the sums over processes, all of which have to call.
            found = self._measured(self._points.get(index, []))
            added = torch.zeros(len(Coherence._fields) + 1, device="cpu")
            if found is not None:
                added = torch.stack([*found, found.kendall.new_ones(())])
            # float32, because some accelerators have no float64.
            *sums, count = trainer.strategy.reduce(
                added.float().to(pl_module.device), reduce_op="sum"
            ).unbind()
            if count == 0:
                continue
            suffix = f"/{index}" if loaders > 1 else ""
            values = {
                f"{self.prefix}{name}{suffix}": total / count
                for name, total in zip(Coherence._fields, sums, strict=True)
            }
            pl_module.log_dict(values, sync_dist=True)
        self._points = {}

    def _measured(self, kept: list[tuple[Tensor, Tensor]]) -> Coherence | None:
        if sum(len(student) for student, _ in kept) < 2:
            return None
        student, teacher = (torch.cat(side) for side in zip(*kept, strict=True))
        return coherence(*same_dtype(student, teacher), **self.options)
