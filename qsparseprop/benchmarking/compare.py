"""The three-way comparison behind ``python -m qsparseprop finetune``.

A network is trained dense, pruned, and then fine-tuned three times from the same point on the same batches: dense in
fp32 with masks, dense with masks in the fastest precision and memory layout that torch has on this machine, and swapped
to qsparseprop. Each of the three lives in a process of its own, so that peak memory is its own; they take turns of a
few steps, so that a slow minute of the machine hits all of them alike.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from qsparseprop.training.finetuner import Finetuner
from qsparseprop.training.recipe import Recipe, make_finetuner
from qsparseprop.training.reporter import Reporter, SilentReporter
from qsparseprop.training.setup_run import (
    PRUNERS,
    TrainingMode,
    make_loaders,
    parse_augment,
    parse_scheme,
    prepare_network,
    prune_model,
)
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import save_tensors
from qsparseprop.utils.measurement_utils import environment

from .compare_worker import RunHandle, RunSpec, loss_note
from .dense_modes import DENSE_MODES, MODE_STEPS, time_dense_modes

__all__ = ["RUN_LABELS", "CompareConfig", "ConfigurationError", "Reporter", "compare"]

#: Keys of the runs in the result, in the order of the table, with their names for people.
RUN_LABELS = {
    "dense_fp32": "dense fp32",
    "dense_best": "dense best",
    "sparse_fp32": "sparse fp32",
    "qsparseprop": "qsparseprop",
    "compressed": "+ compress saved",
    "blocks": "+ packed blocks",
}

# A turn is long enough that its first step, which finds cold caches and sleeping threads and is not timed, is a small
# part of it, and short enough that the runs see the same state of the machine.
_STEPS_PER_TURN = 4

#: Shares of the whole work that are done at the end of its parts, roughly: for the progress bar.
_LOADED, _MODES_TRIED, _TRAINED, _PRUNED, _STARTED = 0.04, 0.13, 0.27, 0.3, 0.34
_SWAPPED, _FINETUNED, _MEASURED = 0.45, 0.96, 0.98


@dataclass(frozen=True)
class CompareConfig(Recipe):
    """What `compare` does, and the `Recipe` of all its trainings.

    Attributes
    ----------
    model : str
        Network, see `qsparseprop.training.models.build_model`.
    width : int or None
        Channels of its first stage; ``None`` for the network's own.
    weights : str or None
        File of trained weights to start from; they replace the dense training.
    new_head : bool
        Keep the network's own, new classifier rather than that of `weights`.
    data : str
        Images, see `qsparseprop.training.data.load_data`.
    normalize : {"data", "imagenet"}
        What the pixels are scaled by.
    sparsity : float
        Share of the pruned layers' weights that become zero, in (0, 1).
    prune : {"global", "uniform", "none"}
        One magnitude threshold for the whole network, the same sparsity in every layer, or the zeros that are in
        `weights` already.
    scheme : str
        How the swapped layers compute, see `parse_scheme`.
    min_sparsity : float or None
        Layers with a smaller share of zeros stay dense in the swapped runs; ``None`` leaves it to the stopwatch alone.
    compress_saved : bool
        Make a further run, swapped and with `compress_saved_tensors`.
    sparse_fp32 : bool
        Make a further run, with sparse layers in float32.
    blocks : {"all", "apart", "none"}
        Blocks (``swap_modules_with_sparse(fuse=True)``) in all quantised runs, in a further one alone, or in none.
    evaluations : int
        Evaluations of each run, at about equal distances.
    max_images : int or None
        Use only so many of the training and of the test images.
    epochs, pretrain_epochs : int
        Passes over the training images of each fine-tuning, and of the dense training before it.
    batch_size : int
        Images in a step.
    threads : int or None
        torch's threads; ``None`` for torch's own choice.
    seed : int
        Of the initial weights, the order of the batches and the stochastic rounding.
    image_size : int or None
        Height and width of the images, in pixels; ``None`` for the data's own.
    augment : str or None
        What is done to training images at random, see `qsparseprop.training.data.Augmentation`; names with commas.
    workers : int or None
        Processes that read images, see `qsparseprop.training.data.image_loader`.
    """

    model: str = "resnet18"
    width: int | None = None
    weights: str | None = None
    data: str = "digits"
    normalize: str = "data"
    sparsity: float = 0.9
    prune: str = "global"
    scheme: str = "int8"
    min_sparsity: float | None = None
    compress_saved: bool = False
    sparse_fp32: bool = False
    blocks: str = "all"
    evaluations: int = 2
    max_images: int | None = None
    epochs: int = 1
    pretrain_epochs: int = 1
    batch_size: int = 64
    threads: int | None = None
    seed: int = 0
    image_size: int | None = None
    new_head: bool = False
    augment: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sparsity < 1:
            raise ConfigurationError(f"sparsity must be between 0 and 1, got {self.sparsity}")
        if self.prune not in PRUNERS:
            raise ConfigurationError(f"unknown prune {self.prune!r}, choose from {', '.join(PRUNERS)}")
        if self.prune == "none" and self.weights is None:
            raise ConfigurationError("without pruning there must be weights that have zeros already")
        if self.new_head and self.weights is None:
            raise ConfigurationError("new_head (--new-head) goes with weights (--weights) only")
        if self.blocks not in ("all", "apart", "none"):
            raise ConfigurationError(f"blocks must be all, apart or none, got {self.blocks!r}")
        parse_scheme(self.scheme)
        if self.augment is not None:
            parse_augment(self.augment)
        for name in ("epochs", "pretrain_epochs", "batch_size", "evaluations"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.check_warmup(epochs=self.epochs, **({} if self.weights else {"pretrain_epochs": self.pretrain_epochs}))


@dataclass
class Shared:
    """What several comparisons of one network have in common, so that only the first one has to do it.

    Attributes
    ----------
    mode_seconds : dict of str to float
        Seconds of a dense training step in each of the four modes.
    dense : dict of (int, int), tuple of (dict of str to Tensor, float)
        The network after its dense training and its accuracy, by seed and epochs.
    """

    mode_seconds: dict[str, float] = field(default_factory=dict)
    dense: dict[tuple[int, int], tuple[dict[str, torch.Tensor], float]] = field(default_factory=dict)


def compare(
    config: CompareConfig | None = None, reporter: Reporter | None = None, shared: Shared | None = None
) -> dict[str, Any]:
    """Run the whole comparison.

    The runs are processes started by ``multiprocessing`` with the ``spawn`` method: a script that calls this
    function needs the usual ``if __name__ == "__main__":``.

    Parameters
    ----------
    config : CompareConfig, optional
        What to do.
    reporter : Reporter, optional
        Where to tell about progress; silent by default.
    shared : Shared, optional
        Of comparisons that differ in nothing but sparsity and seed.

    Returns
    -------
    dict
        What ``result.json`` holds. Times are in s or, where the key says so, ms; memory in MB of 10**6 bytes;
        accuracies in percent; sparsities are shares in [0, 1].

        - ``runs``: one entry each for ``dense_fp32``, ``dense_best``, ``qsparseprop`` and, where they were asked for,
          ``sparse_fp32``, ``compressed`` and ``blocks``, see below; where fp32 contiguous is the best dense way to
          train, ``dense_best`` is the same run as ``dense_fp32``;
        - ``speedup_vs_dense_fp32``, ``speedup_vs_dense_best``: ratios of ``step_ms``;
        - ``sparsity`` as asked for, ``layer_sparsity`` as reached in each pruned layer;
        - ``dense_top1``, ``pruned_top1``: accuracy before pruning and right after it;
        - ``dense_modes_step_ms``: the timing that chose ``dense_best``;
        - ``config``, ``data``, ``environment``; ``total_s`` of all.

        A run has

        - ``config``: its precision and layout; ``top1``; ``losses`` and ``evaluations``;
        - ``step_ms``: the median of the ``timed_steps`` steps that did not open a turn; ``mean_to_median_step`` of the
          same, about 1 on a quiet machine; ``step_s`` of every step and their sum ``train_s``;
        - ``saved_mb``: kept for the backward pass in one step;
        - ``peak_rss_mb``: the largest resident memory of the run's process during what ``peak_rss_of`` says: its
          ``training`` or, where the system cannot restart the count, the whole ``process``;
          ``rss_before_training_mb``: what of it was there already;
        - ``setup_s``: the time to attach masks, or to measure and swap layers; ``replaced_layers`` and ``swap_table``.

    Raises
    ------
    ImportError
        If a package that the data need is missing, such as scikit-learn for the digits.
    ConfigurationError
        If the batch size is larger than the training set, or model, weights and data do not go together.
    FloatingPointError
        If the dense training diverges.
    RuntimeError
        If one of the three processes fails; the message holds its traceback.
    """
    config = config or CompareConfig()
    reporter = reporter or SilentReporter()
    began = time.perf_counter()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    config = replace(config, threads=torch.get_num_threads())
    reporter.stage("reading the images, making the network", _LOADED)
    model, data = prepare_network(config, max_images=config.max_images)
    train_loader, test_loader = make_loaders(data, config.batch_size, config.seed, config.augment, config.workers)

    shared = shared or Shared()
    best = _best_dense_mode(model, train_loader, shared, reporter)
    trainer = make_finetuner(model, best, config.pretraining, config.pretrain_epochs, len(train_loader))
    dense_top1 = _train_dense(trainer, train_loader, test_loader, config, shared, reporter)
    reporter.stage("pruning", _PRUNED)
    pruned = prune_model(model, config.prune, config.sparsity)
    pruned_top1 = trainer.evaluate(test_loader)
    reporter.message(
        f"  top-1 {dense_top1:.1f} %. Pruned {len(pruned['masks'])} layers to {100 * pruned['sparsity']:.1f} % zeros: "
        f"top-1 {pruned_top1:.1f} %."
    )

    specs = _run_specs(config, best)
    start = {"model": model.state_dict(), "masks": pruned["masks"], "data": data.state(), "config": asdict(config)}
    # Where plain fp32 is the best of the dense ones already, a second run of the same would only take longer.
    different = {name: spec for name, spec in specs.items() if name == "dense_fp32" or spec != specs["dense_fp32"]}
    measured = _finetune_all(different, start, reporter, config.evaluations)
    runs = {name: copy.deepcopy(measured[name if name in measured else "dense_fp32"]) for name in specs}

    for name, run in runs.items():
        run["evaluations"].insert(0, {"step": 0, "train_s": 0.0, "top1": pruned_top1})
        run["config"] = specs[name].mode.name
    sparse_ms = runs["qsparseprop"]["step_ms"]
    return {
        "sparsity": config.sparsity,
        "runs": runs,
        "speedup_vs_dense_fp32": runs["dense_fp32"]["step_ms"] / sparse_ms,
        "speedup_vs_dense_best": runs["dense_best"]["step_ms"] / sparse_ms,
        "dense_top1": dense_top1,
        "pruned_top1": pruned_top1,
        "dense_modes_step_ms": {name: 1e3 * seconds for name, seconds in shared.mode_seconds.items()},
        "layer_sparsity": pruned["layers"],
        "config": asdict(config),
        "data": {"name": data.name, "train": len(data.train_labels), "test": len(data.test_labels)},
        "environment": environment(),
        "total_s": time.perf_counter() - began,
    }


def _best_dense_mode(
    model: nn.Module, train_loader: DataLoader[Any], shared: Shared, reporter: Reporter
) -> TrainingMode:
    """The fastest dense way to train, timed if nobody has."""
    if not shared.mode_seconds:
        reporter.stage(f"trying {len(DENSE_MODES)} ways to train the dense network", _MODES_TRIED)
        on_step = reporter.progress("dense", MODE_STEPS)
        inputs, targets = next(iter(train_loader))
        shared.mode_seconds = time_dense_modes(model, inputs, targets, on_step)
    seconds = shared.mode_seconds
    best = min(DENSE_MODES, key=lambda mode: seconds[mode.name])
    listed = ", ".join(f"{name} {1e3 * s:.0f}" for name, s in seconds.items())
    reporter.message(f"Dense training, ms a step: {listed}. Best: {best.name}.")
    return best


def _train_dense(
    trainer: Finetuner, train_loader: DataLoader[Any], test_loader: DataLoader[Any], config: CompareConfig,
    shared: Shared, reporter: Reporter
) -> float:  # fmt: skip
    """Train the trainer's network dense, or take over what an earlier comparison has trained; its accuracy."""
    key = (config.seed, config.pretrain_epochs)
    if key in shared.dense:
        state, top1 = shared.dense[key]
        trainer.model.load_state_dict(state)
        return top1
    if config.weights is None:
        reporter.stage("training dense", _TRAINED)
        advance = reporter.progress("dense", config.pretrain_epochs * len(train_loader))
        for epoch in range(1, config.pretrain_epochs + 1):
            trainer.train(train_loader, on_step=lambda loss: advance(loss_note(loss)))
            summary = trainer.history.summary(len(train_loader))
            reporter.message(f"  epoch {epoch}/{config.pretrain_epochs}: {summary}")
    reporter.stage("measuring the accuracy of the dense network", _TRAINED)
    top1 = trainer.evaluate(test_loader)
    shared.dense[key] = copy.deepcopy(trainer.model.state_dict()), top1
    return top1


def _run_specs(config: CompareConfig, best: TrainingMode) -> dict[str, RunSpec]:
    """What is to be run, by name."""
    specs = {
        "dense_fp32": RunSpec(mode=DENSE_MODES[0]),
        "dense_best": RunSpec(mode=best),
    }
    # channels_last is the layout in which torch's own batch normalisation is fastest; bfloat16 halves what is read and
    # written around the sparse layers, but is slow on processors that cannot compute with it.
    swapped = RunSpec(
        mode=TrainingMode(bf16=best.bf16, channels_last=True), swap=True, fuse=config.blocks == "all",
        # Pruning globally leaves some layers much denser than others; which are worth it is for the stopwatch to say.
        min_sparsity=0.0 if config.min_sparsity is None else config.min_sparsity,
    )
    if config.sparse_fp32:
        specs["sparse_fp32"] = replace(swapped, scheme="float32")
    specs["qsparseprop"] = swapped
    if config.compress_saved:
        specs["compressed"] = replace(swapped, compress_saved=True)
    if config.blocks == "apart":
        specs["blocks"] = replace(swapped, fuse=True)
    return specs


def _finetune_all(
    specs: dict[str, RunSpec], start: dict[str, Any], reporter: Reporter, evaluations: int
) -> dict[str, dict[str, Any]]:
    """Fine-tune in one process a run, taking turns, and return what each measured."""
    with ExitStack() as stack:
        reporter.stage(f"starting {len(specs)} runs, each in a process of its own", _STARTED)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qsparseprop-"))
        path = os.path.join(folder, "start.pt")
        save_tensors(start, path)
        handles = {name: stack.enter_context(RunHandle(name, spec, path)) for name, spec in specs.items()}
        prepared = {}
        for name, handle in handles.items():
            if specs[name].swap:
                reporter.stage(f"{RUN_LABELS[name]}: timing each layer, dense and sparse", _SWAPPED)
            advance = reporter.progress(RUN_LABELS[name], len(start["masks"])) if specs[name].swap else None
            prepared[name] = handle.call("prepare", advance=advance)
        if prepared["qsparseprop"]["swap_table"]:
            reporter.message(prepared["qsparseprop"]["swap_table"])
        steps = prepared["qsparseprop"]["steps"]
        reporter.message(f"Fine-tuning for {steps} steps each, in turns of {_STEPS_PER_TURN} ...")
        reporter.stage("fine-tuning", _FINETUNED)
        bars = {name: reporter.progress(RUN_LABELS[name], steps) for name in handles}
        done, top1, began = 0, {}, time.perf_counter()
        ends = _turn_ends(steps)
        every = max(2, -(-len(ends) // evaluations))
        evaluate_at = {steps, *ends[every - 1 :: every]}
        for end in ends:
            for name, handle in handles.items():
                handle.call("train", end - done, advance=bars[name])
                if end in evaluate_at:
                    top1[name] = handle.call("evaluate")
            if end in evaluate_at:
                figures = ", ".join(f"{RUN_LABELS[name]} {value:.1f} %" for name, value in top1.items())
                reporter.message(f"  step {end}/{steps}: top-1 {figures}, {time.perf_counter() - began:.0f} s")
            done = end
        reporter.stage("counting what each run keeps for the backward pass", _MEASURED)
        runs = {name: handle.call("summary") for name, handle in handles.items()}
    for name, run in runs.items():
        run.update(prepared[name])
    return runs


def _turn_ends(steps: int) -> list[int]:
    return [*range(_STEPS_PER_TURN, steps, _STEPS_PER_TURN), steps]
