"""The loop over epochs behind `Finetuner.fit`: position, checkpoints, log, progress, and clean stops."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from qsparseprop import arguments
from qsparseprop.training.locks import locked
from qsparseprop.utils.files import remove_leftovers

from ._settings import check_batches, check_fit, warn_of_other_parameters
from .batches import are_classes, number_of, split_batch, ungrouped
from .checkpoint import (
    check_loader_state,
    loader_state,
    random_state,
    read_checkpoint,
    set_loader_state,
    set_random_state,
    tell_epoch,
    write_checkpoint,
)
from .history import Evaluation
from .layer_times import LayerTime, LayerTimer
from .session import JsonLines, ProgressBar, StopRequest, stop_on_signals
from .shared_memory import free_shared_memory, warn_of_shared_memory, watched

if TYPE_CHECKING:
    from .trainer import Finetuner

__all__ = ["BEST", "LAST", "LOG", "FitLoop", "FitResult"]

#: Files in the folder of a training.
LAST, BEST, LOG = "last.pt", "best.pt", "log.jsonl"


@dataclass(frozen=True)
class FitResult:
    """How a call of `Finetuner.fit` ended.

    Attributes
    ----------
    stopped_by : signal.Signals or None
        The signal that asked to stop.
    best : Evaluation or None
        The best evaluation of the whole training.
    layer_times : list of LayerTime
        Empty where none were asked for.
    """

    stopped_by: signal.Signals | None
    best: Evaluation | None
    layer_times: list[LayerTime]


class _StopNow(Exception):
    pass


class FitLoop:
    """One call of `Finetuner.fit`; parameters as there."""

    def __init__(
        self,
        tuner: Finetuner,
        batches: Iterable[Any],
        epochs: int,
        evaluation_batches: Iterable[Any] | None,
        folder: str | os.PathLike[str] | None,
        checkpoint_every: int | None,
        time_layers: int,
        report: Callable[[str], None] | None,
        evaluate_every: int,
    ) -> None:
        self.tuner, self.batches, self.epochs = tuner, batches, epochs
        self.evaluation_batches, self.evaluate_every = evaluation_batches, evaluate_every
        self.folder = None if folder is None else Path(folder)
        self.checkpoint_every = checkpoint_every
        self.time_layers = time_layers
        self.report = report
        self.layer_times: list[LayerTime] = []
        self.waited = 0.0
        self.request = StopRequest()
        self.log = JsonLines(None)

    def check(self, resume: bool) -> None:
        """Raise what `Finetuner.fit` promises, before anything is touched."""
        check_fit(self.epochs, self.evaluate_every, self.checkpoint_every, self.time_layers, self.report)
        self.epochs = int(self.epochs)  # NumPy's numbers cannot be written into a log
        arguments.flag(resume, "resume")
        check_batches(self.batches, "train_batches")
        if self.evaluation_batches is not None:
            check_batches(self.evaluation_batches, "evaluation_batches")
        if isinstance(self.batches, Iterator):
            raise TypeError("train_batches can be iterated over only once; fit needs something like a DataLoader or a "
                            "list, which starts anew every epoch")  # fmt: skip
        if self.folder is None:
            if resume or self.checkpoint_every is not None:
                raise ValueError("resume and checkpoint_every need a folder")
        elif self.tuner.together.first:
            self._check_folder(self.folder, resume)
        if self.tuner.together.first:
            warn_of_other_parameters(self.tuner.model, self.tuner.optimizer, self.tuner.loss_function)

    def _check_folder(self, folder: Path, resume: bool) -> None:
        if not resume and (folder / LAST).exists():
            raise FileExistsError(f"{folder / LAST} exists: resume it, or choose another folder")

    def run(self, resume: bool, progress: bool | None) -> FitResult:
        """Train until all epochs are done or a signal asks to stop."""
        tuner = self.tuner
        first = tuner.together.first
        if tuner.epoch >= self.epochs and first and not resume:
            warnings.warn(
                f"nothing is trained: {tuner.epoch} epochs are done, and epochs={self.epochs} counts them, too; "
                f"epochs={tuner.epoch + self.epochs} trains {self.epochs} more", stacklevel=3)  # fmt: skip
        self.bar = ProgressBar(progress if first else False)
        with contextlib.ExitStack() as stack:
            if self.folder is not None:
                folder = self.folder
                content = tuner.together.from_first(lambda: self._open_folder(folder, resume, stack))
                if content is not None:
                    # First of all, so that a loader that does not go with it leaves everything unchanged.
                    check_loader_state(self.batches, (content.get("epoch_start") or {}).get("loader"))
                    tuner.load_state_dict(content)
                self.log = JsonLines(folder / LOG if first else None)
            stack.callback(self.log.close)
            self.request = stack.enter_context(stop_on_signals())
            stack.callback(self.bar.close)
            self._write("resume" if tuner.history.losses else "start", epochs=self.epochs)
            try:
                while tuner.epoch < self.epochs and not self._asked_to_stop():
                    self._train_epoch()
                    self._end_epoch()
                    self._checkpoint()
            except _StopNow:
                self._checkpoint()
            except FloatingPointError as error:
                self.log.write("error", layer=getattr(error, "layer", None), message=str(error))
                raise
            # a signal after the last step stops what comes next, in all processes or in none
            stopped_by = self.request.signal if self._asked_to_stop() else None
            self._write("end", stopped_by=None if stopped_by is None else stopped_by.name)
        return FitResult(stopped_by, tuner.history.best, self.layer_times)

    def _open_folder(self, folder: Path, resume: bool, stack: contextlib.ExitStack) -> dict[str, Any] | None:
        """Lock the folder; the checkpoint with which the training goes on, if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locked(folder))
        # Once more, now that nobody else can write to it.
        self._check_folder(folder, resume)
        for name in (LAST, BEST):
            remove_leftovers(folder / name)
        return read_checkpoint(folder / LAST) if resume and (folder / LAST).exists() else None

    def _asked_to_stop(self) -> bool:
        """Whether a signal has reached this process or another one: all stop at the same step."""
        # one that comes while they agree counts the next time: the others do not know of it
        own = 0 if self.request.signal is None else int(self.request.signal)
        highest = self.tuner.together.highest(own)
        if highest and not own:
            self.request.signal = signal.Signals(highest)
        return highest > 0

    def _write(self, event: str, **values: Any) -> None:
        """Log something with the position."""
        tuner = self.tuner
        self.log.write(event, step=len(tuner.history.losses), epoch=tuner.epoch, batch=tuner.batch, **values)

    def _checkpoint(self) -> None:
        if self.folder is not None:
            self.tuner.save(self.folder / LAST)
            self._write("checkpoint")

    # ---- an epoch ----

    def _train_epoch(self) -> None:
        tuner, self.waited = self.tuner, 0.0
        tell_epoch(self.batches, tuner.epoch)
        total = number_of(self.batches)
        # not of steps: the last one may be made of more batches elsewhere
        everywhere = tuner.together.of_all(number_of(ungrouped(self.batches)))
        if len(set(everywhere)) > 1:
            # one of them would wait for the others for ever
            raise ValueError(f"the processes have {', '.join(map(str, everywhere))} batches an epoch, and train "
                             "together with equally many only: torch.utils.data.DistributedSampler shares them out "
                             "evenly")  # fmt: skip
        free = free_shared_memory()
        iterator = self._start_epoch()
        self.bar.start(f"epoch {tuner.epoch + 1}/{self.epochs}", total, tuner.batch)
        with contextlib.ExitStack() as timing:
            timer = LayerTimer(tuner.model) if self.time_layers and not self.layer_times else None
            if timer is not None:
                timing.enter_context(timer)
            batches = self._until_stopped(watched(iterator, ungrouped(self.batches)), self._asked_to_stop)
            for done, batch in enumerate(batches, start=1):
                if timer is not None and done <= self.time_layers:
                    tuner.history.warmup_steps.add(len(tuner.history.losses))
                if done == 1:
                    warn_of_shared_memory(ungrouped(self.batches), batch, free)
                inputs, targets = split_batch(batch)
                tuner.train_step(inputs, targets)
                tuner.history.waited(self.waited)
                self.waited = 0.0
                tuner.batch += 1
                self._report_step(targets)
                if done == self.time_layers:
                    timing.close()
                if self.checkpoint_every is not None and len(tuner.history.losses) % self.checkpoint_every == 0:
                    self._checkpoint()
        self.bar.close()
        if timer is not None:
            self.layer_times = timer.times()
            self._write("layer_times", layers=[vars(t) for t in self.layer_times])

    def _until_stopped(self, batches: Iterable[Any], stopped: Callable[[], bool]) -> Iterator[Any]:
        iterator = iter(batches)
        while True:
            if stopped():
                raise _StopNow
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except RuntimeError:
                # Ctrl-C reaches the loader's processes as well, and the loader complains that they are gone.
                if self.request.signal is None:
                    raise
                raise _StopNow from None
            self.waited += time.perf_counter() - began
            yield batch

    def _start_epoch(self) -> Iterator[Any]:
        """Iterate over an epoch, from the batch on at which the training stands."""
        tuner = self.tuner
        loaded, tuner.resume_random = tuner.resume_random, None
        if tuner.epoch_start is None or (loaded is None and tuner.batch == 0):
            self._mark_epoch_start()
            return iter(self.batches)
        # The same epoch once more up to here, so that samplers and augmentations draw what they drew before.
        now = random_state() if loaded is None else loaded
        set_random_state(tuner.epoch_start["random"])
        set_loader_state(self.batches, tuner.epoch_start["loader"])
        iterator = iter(self.batches)
        for _ in itertools.islice(iterator, tuner.batch):
            pass
        if tuner.batch:
            set_random_state(now)
        return iterator

    def _mark_epoch_start(self) -> None:
        self.tuner.epoch_start = {"random": random_state(), "loader": loader_state(self.batches)}

    def _report_step(self, targets: torch.Tensor) -> None:
        history = self.tuner.history
        samples = history.samples[-1]
        correct = history.correct[-1] if are_classes(targets) else None
        self.bar.step(history.losses[-1], correct, samples)
        self._write(
            "step", loss=history.losses[-1], samples=samples, accuracy=None if correct is None else correct / samples,
            seconds=history.step_seconds[-1], waited=history.wait_seconds[-1], learning_rate=self.tuner.learning_rate,
        )  # fmt: skip

    def _end_epoch(self) -> None:
        tuner = self.tuner
        evaluation = None
        due = (tuner.epoch + 1) % self.evaluate_every == 0 or tuner.epoch + 1 >= self.epochs
        if self.evaluation_batches is not None and due:
            # processes need not have equally many of these, and cannot agree to stop between them
            alone = tuner.together.count == 1
            evaluation = tuner.measure(self._until_stopped(
                watched(self.evaluation_batches), lambda: alone and self.request.signal is not None))  # fmt: skip
            better = evaluation.better_than(tuner.history.best)
            tuner.history.evaluations.append(evaluation)
            self.log.write("evaluation", epoch=tuner.epoch, **vars(evaluation))
            if isinstance(tuner.scheduler, ReduceLROnPlateau):
                tuner.scheduler.step(evaluation.loss)
            if better and self.folder is not None and tuner.together.first:
                content = {"model": tuner.model.state_dict(), "evaluation": vars(evaluation), "about": tuner.about}
                write_checkpoint(content, self.folder / BEST)
        if tuner.scheduler is not None and tuner.scheduler_per_epoch and not tuner.on_plateau:
            tuner.scheduler.step()
        if self.report is not None:
            figures = tuner.history.summary(tuner.batch)
            if evaluation is not None:
                figures += f"; then {evaluation}"
            self.report(f"  epoch {tuner.epoch + 1}/{self.epochs}: {figures}")
        tuner.epoch, tuner.batch = tuner.epoch + 1, 0
        self._mark_epoch_start()
