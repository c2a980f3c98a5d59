"""The trainings behind docs/results.md: which there are, and running them, however often they are stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "SETTINGS", "Run", "Setting", "carry_out", "plan", "read_result"]

#: Fine-tunings of one start, sparsity and seed, with the options that tell them apart.
KINDS = {
    "dense": ("--scheme", "dense", "--precision", "fp32"),
    "int8": ("--scheme", "int8"),
    "int8-without-blocks": ("--scheme", "int8", "--no-blocks"),
}

#: The seed of every start; those of fine-tunings follow.
START_SEED = 0


@dataclass(frozen=True)
class Setting:
    """What is trained in a section.

    Attributes
    ----------
    data, weights : str or None
        Files below the folders of data and of weights that the command is given.
    start : str
        What the section says of the dense network that is pruned.
    start_epochs, start_rate
        Of the dense training; 0 takes the weights as they are.
    kinds : tuple of str
        Of `KINDS`.
    note : str
        What the section says beside its figures.
    """

    data: str
    start: str
    model: str = "resnet20"
    width: int | None = None
    weights: str | None = None
    normalize: str = "data"
    image_size: int | None = None
    augment: str | None = None
    batch_size: int = 128
    start_epochs: int = 0
    start_rate: float = 4e-3
    epochs: int = 15
    rate: float = 2e-3
    sparsity: tuple[float, ...] = (0.8, 0.9, 0.95)
    kinds: tuple[str, ...] = ("dense", "int8")
    note: str = ""


_CIFAR_WEIGHTS = "resnet20-12fca82f.th"

SETTINGS = {
    "digits": Setting("digits", "trained on 1,437 images", augment="crop", start_epochs=30, epochs=10, batch_size=64),
    "mnist": Setting("mnist.npz", "trained on the 60,000 images", augment="crop", start_epochs=4, epochs=3),
    "fashion_mnist": Setting("fashion_mnist.npz", "trained on the 60,000 images", augment="flip", start_epochs=10,
                             epochs=5),
    "cifar10": Setting("cifar10.npz", "published weights, 91.7 %", weights=_CIFAR_WEIGHTS, normalize="imagenet",
                       augment="flip,crop", note="The published weights have learned from all 50,000 training images, "
                       "the fine-tuning has 8,000 of them."),
    "cifar100": Setting("cifar100.npz", "published weights for CIFAR-10, a new classifier trained on 15,000 images",
                        weights=_CIFAR_WEIGHTS, normalize="imagenet", augment="flip,crop", start_epochs=30,
                        kinds=("dense", "int8", "int8-without-blocks"), note="3,000 test images: the same weights, "
                        "rounded in six ways when they are tested, differ by up to 0.46 points, and the gradients of "
                        "blocks are as near to float32's as those of layers alone ([numerics]"
                        "(numerics.md#gradients-with-blocks-and-without))."),
    "plant_apple": Setting("plant_apple", "published weights for CIFAR-10, with a new classifier trained on leaves",
                           weights=_CIFAR_WEIGHTS, normalize="imagenet", image_size=96, augment="flip,resized-crop",
                           batch_size=32, start_epochs=10, epochs=8),
    "vit": Setting("cifar10.npz", "trained on the 8,000 images", model="vit-tiny", augment="flip,crop", start_epochs=60,
                   start_rate=1e-3, epochs=10, rate=5e-4, sparsity=(0.7, 0.8, 0.9),
                   note="There are no published weights of such a transformer on every machine; from 8,000 images it "
                   "learns less than a convolutional network that has seen 50,000."),
    "caltech101": Setting("caltech101", "published weights for CIFAR-10, with a new classifier trained on 30 images of "
                          "each class", weights=_CIFAR_WEIGHTS, normalize="imagenet", image_size=96,
                          augment="flip,resized-crop", batch_size=32, start_epochs=40, epochs=12),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training, in a process of its own that goes on where an earlier one has stopped.

    Attributes
    ----------
    folder : Path
        Where it leaves its checkpoints, and ``result.json`` at its end.
    command : tuple of str
        Arguments of Python.
    weights : tuple of str
        The option that names what it begins with.
    sparsity, kind, seed
        Of a fine-tuning.
    """

    folder: Path
    command: tuple[str, ...]
    weights: tuple[str, ...] = ()
    sparsity: float = 0.0
    kind: str = ""
    seed: int = START_SEED

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.folder.parent.name} {self.folder.name}"


def plan(
    section: str, setting: Setting, data: Path, weights: Path, work: Path, seeds: int
) -> tuple[Run | None, list[Run]]:
    """The dense training of a section, if there is one, and the fine-tunings that begin with what it has learned.

    Parameters
    ----------
    section : str
    setting : Setting
    data, weights : Path
        Folders.
    work : Path
        Where the runs are.
    seeds : int
        Fine-tunings of each sparsity and kind.
    """
    folder = work / section
    source = setting.data if setting.data == "digits" else str(data / setting.data)
    common = ["-m", "qsparseprop", "finetune", "--data", source, "--model", setting.model, "--normalize",
              setting.normalize, "--batch-size", str(setting.batch_size), "--threads", "1", "--no-compare",
              "--quiet"]  # fmt: skip
    if setting.width is not None:
        common += ["--width", str(setting.width)]
    if setting.image_size is not None:
        common += ["--image-size", str(setting.image_size)]
    if setting.augment is not None:
        common += ["--augment", setting.augment]
    start, begin = None, [] if setting.weights is None else ["--weights", str(weights / setting.weights)]
    if setting.start_epochs:
        head = ["--new-head"] if setting.weights is not None else []
        start = Run(folder / "start", (*common, *begin, *head, "--sparsity", "0", "--scheme", "dense", "--seed",
                    str(START_SEED), "--epochs", str(setting.start_epochs), "--learning-rate", str(setting.start_rate),
                    "--out", str(folder / "start")))  # fmt: skip
        begin = ["--weights", str(folder / "start" / "last.pt")]
    common += [*begin, "--prune", "uniform", "--epochs", str(setting.epochs), "--learning-rate", str(setting.rate)]

    def run(sparsity: float, kind: str, seed: int) -> Run:
        place = folder / f"{100 * sparsity:.0f}-{kind}-{seed}"
        command = (*common, "--sparsity", str(sparsity), "--seed", str(seed), *KINDS[kind], "--out", str(place))
        return Run(place, command, tuple(begin), sparsity, kind, seed)

    return start, [run(sparsity, kind, seed) for seed in range(1, seeds + 1) for sparsity in setting.sparsity
                   for kind in setting.kinds]  # fmt: skip


def read_result(run: Run) -> dict[str, Any] | None:
    """What a run has measured; None while it has not ended."""
    try:
        result: dict[str, Any] = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return result


def carry_out(runs: Sequence[Run], jobs: int, say: Callable[[str], None]) -> None:
    """Carry out what has not been carried out, each in a process with one thread; what was stopped goes on.

    Parameters
    ----------
    runs : sequence of Run
    jobs : int
        So many at a time.
    say : callable

    Raises
    ------
    RuntimeError
        If one fails.
    """
    waiting = [run for run in runs if read_result(run) is None]
    began, ended = time.monotonic(), 0

    def one(run: Run) -> None:
        nonlocal ended
        run.folder.mkdir(parents=True, exist_ok=True)
        resume = ["--resume"] if (run.folder / "run.json").exists() else []
        # no further threads of numpy and the like beside those of other runs
        done = subprocess.run([sys.executable, *run.command, *resume], capture_output=True, text=True, check=False,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
        if done.returncode:
            said = done.stderr.strip().splitlines()
            raise RuntimeError(f"{run.name}: {said[-1] if said else f'exit code {done.returncode}'}")
        result = read_result(run)
        assert result is not None
        ended += 1
        minutes = (time.monotonic() - began) / 60
        value = f"top-1 {result['top1']:.2f} %" if "top1" in result else f"loss {result['loss']:.4f}"
        say(f"{run.name}: {value}  ({ended} of {len(waiting)} after {minutes:.0f} min, about "
            f"{minutes / ended * (len(waiting) - ended):.0f} to go)")  # fmt: skip

    with ThreadPoolExecutor(jobs) as pool:
        # the first error ends what has not begun; what is going on keeps its checkpoint
        futures = [pool.submit(one, run) for run in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise
