"""A training loop that records losses, step times and evaluations, and can be stopped and resumed at any step.

Nothing in it knows of sparsity: a swapped model trains like any other one.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsparseprop.training.processes import Processes, distribute, processes, undistributed

from ._settings import check_settings
from .batches import arguments_of, at_least_float32, in_groups, parts_of, split_batch
from .checkpoint import random_state, read_checkpoint, write_checkpoint
from .fit import FitLoop, FitResult
from .gradients import StepFigures, add_gradients
from .history import Evaluation, History
from .measuring import measure
from .optimizer_state import describe_parameters
from .schedules import describe_schedule
from .shared_memory import watched
from .state import load_state

__all__ = ["Finetuner"]


class Finetuner:
    """Trains and evaluates a model.

    A batch is ``(inputs, targets)``, or a mapping whose ``"labels"`` are the targets. Inputs are a tensor, a tuple or
    list of arguments, or a mapping of keyword arguments of the model.

    Parameters
    ----------
    model : nn.Module
        Put into the right mode (train or eval) by each call. It is converted to `memory_format` in place. It returns
        a tensor, or an object that has one as ``logits``. A ``DistributedDataParallel`` is one of several processes
        that train together, on batches of equal size: losses, accuracies and evaluations are those of all of them, and
        the first one writes the files. See `distribute`.
    optimizer : torch.optim.Optimizer
        Over the model's parameters.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Stepped after every training step; a ``ReduceLROnPlateau`` after every evaluation, with its loss.
    loss_function : callable
        Called as ``loss_function(outputs, targets)`` with float32 outputs (float64 of such a model); returns a scalar
        tensor, the mean of the samples.
    autocast_dtype : torch.dtype, optional
        Run forward passes under ``torch.autocast("cpu", dtype=...)``; ``None`` leaves them in float32.
    memory_format : torch.memory_format
        Layout of the 4-D inputs and of the model's 4-D weights: contiguous or channels_last.
    after_step : callable, optional
        Called without arguments after each update of the weights, and timed as a part of the step: the place for
        masks.
    scheduler_per_epoch : bool
        Step the scheduler at the end of each epoch of `fit` instead of after every training step.
    max_grad_norm : float, optional
        Scale gradients down to this norm, taken over all parameters.
    forward_context : callable, optional
        Returns a context manager in which the forward passes of training run, for instance
        `qsparseprop.utils.saved_tensors.compress_saved_tensors`.
    stateful : mapping of str to object, optional
        Further objects with ``state_dict`` and ``load_state_dict`` that are saved and restored with the training, such
        as a pruning schedule. They are restored before the model.
    accumulate : int
        Batches that `fit` and `train` make one step of: the loss is the mean of all their samples, and the schedule and
        the history go by steps. They are fetched together and computed one after the other, so that activations take
        the memory of one. Those that are left at the end of an epoch make a smaller step.

    Attributes
    ----------
    history : History
        Everything recorded so far.
    epoch, batch : int
        Position of `fit`: epochs completed, and steps of the present epoch.
    about : dict of str to object
        Plain data that every checkpoint carries, ``best.pt`` too, such as the names of classes. Loading leaves it.
    """

    def __init__(  # noqa: PLR0913 - settings, by keyword
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        loss_function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
        autocast_dtype: torch.dtype | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        after_step: Callable[[], object] | None = None,
        scheduler_per_epoch: bool = False,
        max_grad_norm: float | None = None,
        forward_context: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        stateful: Mapping[str, Any] | None = None,
        accumulate: int = 1,
    ) -> None:
        check_settings(
            model, optimizer, scheduler, autocast_dtype, memory_format, scheduler_per_epoch, max_grad_norm, stateful,
            accumulate, {"loss_function": loss_function, "after_step": after_step, "forward_context": forward_context},
        )  # fmt: skip
        self.parallel = model if isinstance(model, DistributedDataParallel) else None
        self.model = undistributed(model)
        self.model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch types it without
        self.optimizer, self.scheduler = optimizer, scheduler
        self.loss_function = loss_function
        self.autocast_dtype = autocast_dtype
        self.memory_format = memory_format
        self.after_step = after_step
        self.scheduler_per_epoch = scheduler_per_epoch
        self.max_grad_norm = max_grad_norm
        self.forward_context = forward_context or contextlib.nullcontext
        self.stateful = dict(stateful or {})
        self.accumulate = int(accumulate)  # NumPy's numbers cannot be written into a checkpoint
        self.history, self.about = History(), dict[str, Any]()
        self.epoch = self.batch = 0
        self.learning_rate = float("nan")  # of the first group, in the last step
        # States of random number generators at the start of the present epoch, which decide the order of its batches,
        # and those that a loaded training goes on with.
        self.epoch_start: dict[str, Any] | None = None
        self.resume_random: dict[str, Any] | None = None
        # LBFGS and the like evaluate the loss several times a step.
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        self._needs_closure = closure is not None and closure.default is inspect.Parameter.empty

    # ---- single steps ----

    def distribute(self) -> None:
        """Train together with the other processes of the default group of ``torch.distributed``, if there are any."""
        if self.parallel is None and processes().count > 1:
            self.parallel = distribute(self.model)

    @property
    def together(self) -> Processes:
        """The processes that train this model; only this one, unless it was distributed."""
        return Processes() if self.parallel is None else processes()

    def logits(self, inputs: Any) -> torch.Tensor:
        """Run the model on inputs in this object's precision and layout; the output's dtype is the model's.

        Parameters
        ----------
        inputs
            Of a batch: a tensor, a tuple or list of arguments, or a mapping.

        Returns
        -------
        Tensor
            What the model gives, or its ``logits``.
        """
        return self._logits(self.model, inputs)

    def _logits(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        given, named = arguments_of(inputs)
        arguments = [self._laid_out(value) for value in given]
        keywords = {key: self._laid_out(value) for key, value in named.items()}
        with torch.autocast("cpu", dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = model(*arguments, **keywords)
        return output if isinstance(output, torch.Tensor) else output.logits

    def _laid_out(self, value: Any) -> Any:
        four_d = isinstance(value, torch.Tensor) and value.ndim == 4
        return value.to(memory_format=self.memory_format) if four_d else value

    def loss(self, inputs: Any, targets: torch.Tensor) -> torch.Tensor:
        """Return the scalar loss of a batch, in float32 or more and with its graph.

        Parameters
        ----------
        inputs
            As for `logits`.
        targets : Tensor

        Returns
        -------
        Tensor
        """
        return self._forward(self.model, inputs, targets)[0]

    def _forward(self, model: nn.Module, inputs: Any, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self.forward_context():
            outputs = at_least_float32(self._logits(model, inputs))
            return self.loss_function(outputs, targets), outputs.detach()

    def train_step(self, inputs: Any, targets: torch.Tensor) -> float:
        """Do one step on one batch and record it; the model is left in training mode.

        Parameters
        ----------
        inputs : Tensor, tuple, list or mapping
            See the class; images are (batch, channels, height, width).
        targets : torch.Tensor
            What the loss function compares with; class numbers (batch,) by default.

        Returns
        -------
        float
            The loss before the update.

        Raises
        ------
        NonFiniteLossError
            (a FloatingPointError) If the loss is not finite. Parameters are unchanged and the step is not recorded.
        """
        self.model.train()
        parts = parts_of(inputs, targets)
        first: list[StepFigures] = []

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            step = len(self.history.losses) + 1
            figures = add_gradients(self.model, self._forward, parts, step, self.parallel)
            if self.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            first.append(figures)
            return figures.loss

        start = time.perf_counter()
        if self._needs_closure:
            self.optimizer.step(closure)  # type: ignore[arg-type]  # optimizers give what the closure gives
        else:
            closure()
            self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        seconds = time.perf_counter() - start
        value = first[0].loss.item()
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if self.scheduler is not None and not self.scheduler_per_epoch and not self.on_plateau:
            self.scheduler.step()
        self.history.losses.append(value)
        self.history.step_seconds.append(seconds)
        self.history.samples.append(first[0].samples)
        self.history.correct.append(first[0].correct)
        return value

    @property
    def on_plateau(self) -> bool:
        """Whether the scheduler waits for evaluations."""
        return isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)

    def train(
        self,
        batches: Iterable[Any],
        *,
        warmup: int = 0,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        """Do one step on each of the batches.

        Parameters
        ----------
        batches : iterable
            For instance a ``DataLoader``: one epoch.
        warmup : int
            So many steps of this call are marked as warm-up.
        on_step : callable, optional
            Called with the loss after each step, outside the timed part.
        """
        for index, batch in enumerate(in_groups(watched(batches), self.accumulate)):
            if index < warmup:
                self.history.warmup_steps.add(len(self.history.losses))
            loss = self.train_step(*split_batch(batch))
            if on_step is not None:
                on_step(loss)

    def evaluate(self, batches: Iterable[Any]) -> float:
        """Measure top-1 accuracy and loss without gradients and record them; the model is left in evaluation mode.

        Random number generators are left as they were, so that a training does not depend on its evaluations.

        Parameters
        ----------
        batches : iterable
            As for training. Accuracy is measured where targets are class numbers (batch,).

        Returns
        -------
        float
            Percent of correct predictions; where nothing is classified, the mean loss.

        Raises
        ------
        ValueError
            If there is not a single sample.
        """
        result = self.measure(batches)
        self.history.evaluations.append(result)
        return result.loss if result.top1 is None else result.top1

    def measure(self, batches: Iterable[Any]) -> Evaluation:
        """Do what `evaluate` does, but return everything that was measured, and do not record it.

        Parameters
        ----------
        batches : iterable

        Returns
        -------
        Evaluation
        """
        return measure(self, batches)

    # ---- whole trainings ----

    def fit(
        self,
        train_batches: Iterable[Any],
        epochs: int,
        *,
        evaluation_batches: Iterable[Any] | None = None,
        folder: str | os.PathLike[str] | None = None,
        resume: bool = False,
        checkpoint_every: int | None = None,
        progress: bool | None = None,
        time_layers: int = 0,
        report: Callable[[str], None] | None = None,
        evaluate_every: int = 1,
    ) -> FitResult:
        """Train until `epochs` epochs are done, those before a `load` or `resume` included.

        Ctrl-C, SIGTERM and SIGHUP end it after the step in progress, with a checkpoint where there is a folder; a
        second signal acts at once.

        Parameters
        ----------
        train_batches : iterable
            Of batches, an epoch each time it is iterated over; for instance a ``DataLoader``. It and its
            samplers are told the epoch where they have ``set_epoch``.
        epochs : int
            At least 1; those that are done already count.
        evaluation_batches : iterable, optional
            What to evaluate on after every epoch, or every `evaluate_every` of them and the last.
        folder : path-like, optional
            Made if need be. It gets ``log.jsonl``, a line a step; ``last.pt``, the checkpoint, after every epoch; and
            ``best.pt``, the model of the best evaluation.
        resume : bool
            Continue from ``last.pt`` of the folder, if it is there: bit for bit as if nothing had happened, with the
            same number of threads, and batches that depend only on generators known to the loader or torch, numpy
            and Python (not those of ``persistent_workers``).
        checkpoint_every : int, optional
            Steps after which a checkpoint is written, too.
        progress : bool, optional
            Show tqdm's progress bar; None shows it in a terminal, where tqdm is installed.
        time_layers : int
            Time every module in so many of the first steps of this call, which are marked as warm-up.
        report : callable, optional
            Called with a line for people - loss, accuracy, seconds - at the end of every epoch.
        evaluate_every : int
            Epochs from one evaluation to the next.

        Returns
        -------
        FitResult

        Raises
        ------
        NonFiniteLossError
            If the loss is not finite. The last checkpoint stays.
        FileExistsError
            If the folder has a checkpoint and `resume` is off.
        CheckpointError
            If the checkpoint does not go with this training; nothing has changed then.
        TypeError, ValueError
            For batches that can be iterated over only once, numbers that make no sense, or a folder that another
            training is writing to.
        OSError
            If a file cannot be written, naming it; the last checkpoint stays.
        ImportError
            If tqdm is asked for and missing.
        """
        batches = in_groups(train_batches, self.accumulate)
        loop = FitLoop(self, batches, epochs, evaluation_batches, folder, checkpoint_every, time_layers,
                       report, evaluate_every)  # fmt: skip
        loop.check(resume)
        return loop.run(resume, progress)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training depends on; tensors are the live ones, not copies.

        Where several processes train together, all of them have to call it.
        """
        own = {"random": random_state(), "epoch_start": self.epoch_start}
        return {
            **own,
            "others": self.together.of_all(own)[1:],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "parameters": describe_parameters(self.model, self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "stateful": {name: item.state_dict() for name, item in self.stateful.items()},
            "accumulate": self.accumulate,
            "about": self.about,
            "schedule": None if self.scheduler is None else describe_schedule(self.scheduler),
            "epoch": self.epoch,
            "batch": self.batch,
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` returned.

        Parameters
        ----------
        state : mapping

        Raises
        ------
        CheckpointError
            If it belongs to another model, optimizer or schedule; nothing has changed then.
        """
        load_state(self, state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint, see `write_checkpoint`.

        Where several processes train together, all of them have to call it; the first one writes.

        Parameters
        ----------
        path : path-like
        """
        state = self.state_dict()
        self.together.from_first(lambda: write_checkpoint(state, path))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read a checkpoint that `save` has written.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        CheckpointError
            If it is none, or one of another training; nothing has changed then.
        OSError
            If it cannot be read.
        """
        self.load_state_dict(self.together.from_first(lambda: read_checkpoint(path)))

