"""One run of the comparison in its own process, and the parent's handle on it. See `compare`."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from qsparseprop.training.data import ImageData
from qsparseprop.training.recipe import Recipe, make_finetuner
from qsparseprop.training.setup_run import TrainingMode, make_loaders, make_network, swap_model
from qsparseprop.utils.measurement_utils import (
    current_rss_mb,
    peak_rss_mb,
    release_free_memory,
    reset_peak_rss,
    saved_for_backward_bytes,
)

__all__ = ["RunHandle", "RunSpec", "loss_note"]


def loss_note(loss: float) -> str:
    """What a progress bar says after a training step."""
    return f"loss {loss:.3f}"


@dataclass(frozen=True)
class RunSpec:
    """What distinguishes one run from another.

    Attributes
    ----------
    mode : TrainingMode
        Precision and layout.
    swap : bool
        Train the network swapped to qsparseprop; otherwise dense, with masks.
    min_sparsity : float
        Passed on to ``swap_modules_with_sparse``.
    compress_saved : bool
        Train with `compress_saved_tensors`.
    scheme : str or None
        Of the swapped layers; ``None`` for that of the comparison.
    fuse : bool
        Make blocks of swapped convolutions and what follows them.
    """

    mode: TrainingMode
    swap: bool = False
    min_sparsity: float = 0.5
    compress_saved: bool = False
    scheme: str | None = None
    fuse: bool = True


class _Run:
    """The work of the child process; every public method answers one command of the parent."""

    def __init__(self, spec: RunSpec, start_path: str, tell: Callable[[str], None]) -> None:
        self.spec = spec
        self.tell = tell
        start = torch.load(start_path, weights_only=True)
        self.data = data = ImageData.from_state(start["data"])
        self.masks = start["masks"]
        self.config = start["config"]
        self.model = make_network(self.config["model"], self.config["width"], data.kind)
        self.model.load_state_dict(start["model"])
        torch.set_num_threads(self.config["threads"])
        torch.manual_seed(self.config["seed"])
        # The same order of batches in all runs, but not that of the dense training again.
        self.train_loader, self.test_loader = make_loaders(data, self.config["batch_size"], self.config["seed"] + 1,
                                                           self.config["augment"], self.config["workers"])  # fmt: skip
        self.batches = self._endless_batches()

    def _endless_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self.train_loader

    def prepare(self) -> dict[str, Any]:
        steps = self.config["epochs"] * len(self.train_loader)
        began = time.perf_counter()
        replaced: list[str] = []
        table = ""
        if self.spec.swap:
            replaced, table = self._swap()
        setup_seconds = time.perf_counter() - began
        self.trainer = make_finetuner(self.model, self.spec.mode, Recipe.of(self.config), self.config["epochs"],
                                      len(self.train_loader), self.masks, self.spec.compress_saved)  # fmt: skip
        release_free_memory()
        self.rss_before = current_rss_mb()
        peak_is_of_training = reset_peak_rss()
        return {
            "steps": steps,
            "setup_s": setup_seconds,
            "replaced_layers": replaced,
            "swap_table": table,
            "peak_rss_of": "training" if peak_is_of_training else "process",
        }

    def _swap(self) -> tuple[list[str], str]:
        shape = (self.config["batch_size"], *self.data.train.shape)
        return swap_model(self.model, shape, self.spec.mode, self.spec.scheme or self.config["scheme"],
                          self.spec.min_sparsity, fuse=self.spec.fuse, on_layer=self.tell)  # fmt: skip

    def train(self, steps: int) -> None:
        batches = itertools.islice(self.batches, steps)
        self.trainer.train(batches, warmup=1, on_step=lambda loss: self.tell(loss_note(loss)))

    def evaluate(self) -> float:
        return self.trainer.evaluate(self.test_loader)

    def summary(self) -> dict[str, Any]:
        # First of all: counting the saved tensors is another forward pass.
        peak = peak_rss_mb()
        history = self.trainer.history
        timed = history.timed_seconds()
        inputs, targets = next(iter(self.train_loader))
        self.model.train()
        saved = saved_for_backward_bytes(lambda: self.trainer.loss(inputs, targets), self.model)
        return {
            "top1": history.evaluations[-1].top1,
            "step_ms": 1e3 * history.median_step_seconds(),
            "saved_mb": saved / 1e6,
            "peak_rss_mb": peak,
            "rss_before_training_mb": self.rss_before,
            "train_s": history.train_seconds,
            "losses": history.losses,
            "step_s": history.step_seconds,
            "timed_steps": len(timed),
            "mean_to_median_step": statistics.fmean(timed) / statistics.median(timed),
            "evaluations": [{"step": e.step, "train_s": e.train_seconds, "top1": e.top1} for e in history.evaluations],
        }


def _serve(connection: Connection, spec: RunSpec, start_path: str) -> None:
    """Answer the parent's commands until it hangs up."""
    # Ctrl-C reaches the whole process group; the parent alone decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent is gone, or has closed its end: nobody is left to tell.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            run = _Run(spec, start_path, lambda note: connection.send(("progress", note)))
            while True:
                command, arguments = connection.recv()
                connection.send(("result", getattr(run, command)(*arguments)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except FloatingPointError as error:
            connection.send(("error", str(error)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


class RunHandle:
    """The parent's end of a run; a context manager that starts the process and ends it whatever happens.

    Parameters
    ----------
    name : str
        For error messages.
    spec : RunSpec
        What to run.
    start_path : str
        File with the common starting point.
    """

    def __init__(self, name: str, spec: RunSpec, start_path: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, self._child_end = context.Pipe()
        # Not a daemon, which could have no processes that read images. It ends with the pipe, whatever becomes of us.
        self._process = context.Process(
            target=_serve, args=(self._child_end, spec, start_path), name=f"qsparseprop {name}"
        )

    def __enter__(self) -> RunHandle:
        with _sigint_ignored():
            self._process.start()
        # Without our copy of it, the end of the child is the end of the pipe, and recv() does not wait forever.
        self._child_end.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def call(self, command: str, *arguments: Any, advance: Callable[[str], None] | None = None) -> Any:
        """Run a command in the child and return its result; `advance` is called with what it is at meanwhile.

        Raises
        ------
        RuntimeError
            If the command fails or the process ends; the message tells what the child said.
        """
        try:
            self._connection.send((command, arguments))
            while True:
                kind, value = self._connection.recv()
                if kind == "result":
                    return value
                if kind == "error":
                    raise RuntimeError(f"the run {self.name} failed: {value}")
                if advance is not None:
                    advance(value)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(timeout=5)
            code = self._process.exitcode
            raise RuntimeError(f"the process of the run {self.name} ended unexpectedly (exit code {code})") from None


@contextlib.contextmanager
def _sigint_ignored() -> Iterator[None]:
    """Let a child inherit that Ctrl-C is ignored: pressed while the child still imports, it would print a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        # None stands for a handler that was not installed from Python.
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
