"""One training of the ``finetune`` command: dense training or given weights, pruning, conversion, fine-tuning.

A run lives in a folder, from which it goes on after it was stopped: ``run.json`` (settings), ``dense/`` (the dense
training), ``last.pt``, ``best.pt`` and ``log.jsonl`` (see `Finetuner.fit`), and at the end ``result.json``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import held
from qsparseprop.utils._classes import check_classes, classes_in
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import replacing
from qsparseprop.utils.measurement_utils import (
    current_rss_mb,
    environment,
    peak_rss_mb,
    release_free_memory,
    reset_peak_rss,
    saved_for_backward_bytes,
)
from qsparseprop.utils.network_utils import sparsity, swap_modules_for_state
from qsparseprop.utils.pruning_utils import GradualPruner

from .data import ImageData
from .data.loaders import Share
from .finetuner import CheckpointError, Finetuner, FitResult, read_checkpoint
from .finetuner.fit import LAST
from .locks import locked
from .processes import processes, sent_bytes
from .recipe import make_finetuner, steps_of
from .reporter import Reporter
from .results import format_result, without_nan
from .run_config import CLASSES, GRADUAL, MOVABLE, SETTINGS, RunConfig, resumed_settings, stored_settings
from .setup_run import make_loaders, parse_scheme, prepare_network, prune_model, swap_model

__all__ = ["RunConfig", "Stopped", "format_result", "run_training", "stored_settings", "swap_like"]

RESULT = "result.json"

#: Gradual pruning goes on up to this share of the steps, in about so many turns.
_GRADUAL_END, _GRADUAL_TURNS = 0.6, 20


class Stopped(Exception):
    """A signal ended the run; it can be resumed.

    Attributes
    ----------
    signal : signal.Signals
    """

    def __init__(self, result: FitResult) -> None:
        assert result.stopped_by is not None
        super().__init__(f"stopped by {result.stopped_by.name}")
        self.signal = result.stopped_by


def run_training(
    config: RunConfig,
    folder: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    chosen: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    progress: bool | None = None,
    time_layers: int = 0,
) -> dict[str, Any]:
    """Train a network dense (or take given weights), prune it, convert it, and fine-tune it.

    Parameters
    ----------
    config : RunConfig
    folder : path-like, optional
        Where everything is written to.
    resume : bool
        Go on with the run in the folder; its settings count.
    chosen : mapping, optional
        Settings that the user has named: with `resume` they must be those of the run.
    reporter : Reporter, optional
        Where to tell what happens.
    progress, time_layers
        See `Finetuner.fit`.

    Returns
    -------
    dict
        What ``result.json`` holds: ``top1`` of the end, ``best_top1``, ``dense_top1`` before and ``pruned_top1`` right
        after pruning, in percent; ``step_ms`` (median), ``train_s``, ``saved_mb``, ``peak_rss_mb``; ``sparsity``,
        ``layer_sparsity``, ``replaced_layers``, ``config``, ``environment``; with `time_layers` ``layer_times``;
        ``data_wait_share``, from 0 to 1; ``processes``, and where there are several ``sent_mb``, the gradients that
        each of them sends in a step, MB of 10**6 bytes.

    Raises
    ------
    ConfigurationError
        If settings, files or folder do not go together.
    Stopped
        If a signal ended it.
    NonFiniteLossError, OSError, ImportError
        As from `Finetuner.fit` and `load_data`.
    """
    together = processes()
    say = None if reporter is None or not together.first else reporter.message
    if folder is None:
        if resume:
            raise ConfigurationError("to resume a run its folder must be given")
        with tempfile.TemporaryDirectory(prefix="qsparseprop-") as temporary:
            return run_training(config, temporary, reporter=reporter, progress=progress, time_layers=time_layers)
    with contextlib.ExitStack() as stack:
        config = together.from_first(lambda: _open(Path(folder), config, resume, chosen or {}, stack))
        return _train_in(Path(folder), config, resume, say, progress, time_layers)


def _open(
    folder: Path, config: RunConfig, resume: bool, chosen: Mapping[str, Any], stack: contextlib.ExitStack
) -> RunConfig:
    """Lock the folder of a run; its settings."""
    if resume:
        # before anything is made there
        resumed_settings(folder, config, chosen)
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(folder))
    if resume:
        return resumed_settings(folder, config, chosen)
    _refuse_results(folder)
    return config


def _refuse_results(folder: Path) -> None:
    for name in (SETTINGS, LAST):
        if (folder / name).exists():
            raise ConfigurationError(f"{folder} holds a run already: resume it, or choose another folder")
    if (folder / RESULT).exists():
        raise ConfigurationError(f"{folder / RESULT} would be overwritten: choose another folder")


def _train_in(
    folder: Path, config: RunConfig, resume: bool, say: Callable[[str], None] | None, progress: bool | None,
    time_layers: int,
) -> dict[str, Any]:  # fmt: skip
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    together = processes()
    if together.count > 1 and config.prune == GRADUAL:
        raise ConfigurationError("gradual pruning changes what processes have in common: train with one process, or "
                                 "prune at once (--prune uniform or global)")  # fmt: skip
    begun = together.from_first((folder / LAST).exists)
    model, data = prepare_network(config, load_weights_too=not begun)
    if together.rank:
        # the same start everywhere, but each rounds gradients in its own way
        torch.manual_seed(config.seed + 1_000_003 * together.rank)
    share = Share(together.rank, together.count)
    loaders = make_loaders(data, config.batch_size, config.seed, config.augment, config.workers, share)
    if not resume and together.first:
        _write_settings(folder, config, data)

    setup = _State(config, folder, resume, progress, say, data)
    if not begun:
        if config.weights is None and config.sparsity:
            setup.train_dense(model, loaders)
        setup.prune(model, loaders[1])
    # the same order of batches in every fine-tuning, but not that of the dense training again
    loaders = make_loaders(data, config.batch_size, config.seed + 1, config.augment, config.workers, share)
    tuner = setup.finetuner(model, loaders[0])
    if resume and together.first and asdict(config) != stored_settings(folder):
        # moved, and now the images have been found to be the same
        _write_settings(folder, config, data)
    return setup.finetune(tuner, loaders, time_layers)


def _write_settings(folder: Path, config: RunConfig, data: ImageData) -> None:
    settings = asdict(config) | ({} if data.classes is None else {CLASSES: data.classes})
    with replacing(folder / SETTINGS) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


class _State:
    """A run while it goes on, and what of it is needed to resume it: kept in the checkpoints as a tuner's state."""

    def __init__(
        self, config: RunConfig, folder: Path, resume: bool, progress: bool | None,
        report: Callable[[str], None] | None, data: ImageData,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.resume = config, folder, resume
        self.images, self.classes = data.fingerprint(), None if data.classes is None else list(data.classes)
        self.progress, self.report = progress, report
        self.facts: dict[str, Any] = {}
        self.masks: dict[str, torch.Tensor] = {}

    def say(self, text: str) -> None:
        if self.report is not None:
            self.report(text)

    def state_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "masks": self.masks, "config": asdict(self.config),
                "images": self.images}  # fmt: skip

    def begin_from(self, content: Mapping[str, Any], name: str) -> None:
        """Take over what a checkpoint knows, under some name, of the run; refuse another run's."""
        check_classes(self.classes, classes_in(content),
                      (f"the run in {self.folder}", f"the images in {self.config.data}"),
                      "put the images back, or start another run")  # fmt: skip
        self.load_state_dict(content["stateful"][name])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("images", self.images) != self.images:
            raise ConfigurationError(f"the images in {self.config.data} are not those that the run in {self.folder} "
                                     "was begun with: put them back, or start another run")  # fmt: skip
        settings = asdict(self.config)
        for name, value in state.get("config", {}).items():  # older runs have none
            if name not in MOVABLE and settings.get(name) != value:
                raise ConfigurationError(f"the run in {self.folder} was made with {name} {value}, but its {SETTINGS} "
                                         f"says {settings.get(name)}: put it back, or start another run")  # fmt: skip
        self.facts, self.masks = dict(state["facts"]), dict(state["masks"])

    def train_dense(self, model: nn.Module, loaders: Any) -> None:
        config = self.config
        self.say(f"Training {config.model} dense for {config.pretrain_epochs} epoch(s) of "
                 f"{steps_of(len(loaders[0]), config.accumulate)} steps ...")
        tuner = make_finetuner(model, config.mode, config.pretraining, config.pretrain_epochs, len(loaders[0]),
                               accumulate=config.accumulate)  # fmt: skip
        folder = self.folder / "dense"
        begun = tuner.together.from_first(lambda: _checkpoint_in(folder)) if self.resume else None
        known = begun is not None and "dense" in (begun.get("stateful") or {})
        if begun is None or known:  # those of before do not know their images
            tuner.stateful["dense"] = self
        if begun is not None and known:
            self.begin_from(begun, "dense")
        tuner.about["classes"] = self.classes
        result = tuner.fit(loaders[0], config.pretrain_epochs, folder=folder, resume=self.resume,
                           progress=self.progress, report=self.report)  # fmt: skip
        if result.stopped_by is not None:
            raise Stopped(result)

    def prune(self, model: nn.Module, test_loader: Any) -> None:
        config = self.config
        trainer = make_finetuner(model, config.mode, config, 1, 1)
        dense_top1 = trainer.evaluate(test_loader)
        gradual = config.prune == GRADUAL
        # e.g. 80 % on the way to 96 %: enough for sparse layers to pay from the first step on
        start = 1 - math.sqrt(1 - config.sparsity) if gradual else config.sparsity
        if config.sparsity == 0:
            self.facts = {"dense_top1": dense_top1, "pruned_top1": dense_top1, "layer_sparsity": {}, "sparsity": 0.0}
            return
        pruned = prune_model(model, "global" if gradual else config.prune, start)
        self.masks = pruned["masks"]
        self.facts = {"dense_top1": dense_top1, "pruned_top1": trainer.evaluate(test_loader),
                      "layer_sparsity": pruned["layers"], "sparsity": pruned["sparsity"]}  # fmt: skip
        self.say(f"  top-1 {dense_top1:.1f} %. {len(self.masks)} layers with {100 * pruned['sparsity']:.1f} % zeros: "
            f"top-1 {self.facts['pruned_top1']:.1f} %.")  # fmt: skip

    def finetuner(self, model: nn.Module, loader: Any) -> Finetuner:
        config = self.config
        together = processes()
        shape = (config.batch_size // together.count, *loader.dataset.images.shape)
        state = together.from_first(lambda: _checkpoint_in(self.folder))
        if state is not None:
            try:
                self.begin_from(state, "run")
                _check_masks(model, self.masks)
                swap_like(model, state["model"], config)
            except ConfigurationError:
                raise
            except KeyError as error:
                raise CheckpointError(f"{self.folder / LAST} is not that of such a run: it lacks {error}") from error
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                raise CheckpointError(f"{self.folder / LAST} is not that of such a run: {error}") from error
            self.say(f"Resuming at step {len(state['history']['losses'])}.")
        elif config.scheme != "dense":
            began = time.perf_counter()
            state, replaced, table = together.from_first(lambda: self._swap(model, shape))
            if not together.first:
                # what the first process has measured counts for all
                swap_like(model, state, config)
                model.load_state_dict(state)
            self.facts |= {"replaced_layers": replaced, "setup_s": time.perf_counter() - began}
            self.say(table)
        tuner = make_finetuner(model, config.mode, config, config.epochs, len(loader), self.masks,
                               config.compress_saved, config.accumulate)  # fmt: skip
        tuner.stateful["run"], tuner.about["classes"] = self, self.classes
        if config.prune == GRADUAL:
            steps = config.epochs * steps_of(len(loader), config.accumulate)
            end = max(1, int(_GRADUAL_END * steps))
            if not any(isinstance(module, SparseModule) for module in model.modules()):
                raise ConfigurationError("gradual pruning needs sparse layers, and no layer of the network has become "
                                         "one: choose a wider network, or another way to prune")  # fmt: skip
            pruner = GradualPruner(model, tuner.optimizer, config.sparsity, end_step=end,
                                   interval=max(1, end // _GRADUAL_TURNS))  # fmt: skip
            hold, prune = tuner.after_step, pruner.step
            tuner.after_step = prune if hold is None else lambda: (hold(), prune())
            tuner.stateful["pruner"] = pruner
        return tuner

    def _swap(self, model: nn.Module, shape: tuple[int, ...]) -> tuple[dict[str, torch.Tensor], list[str], str]:
        config = self.config
        # global pruning leaves some layers much denser than others; which are worth it is for the stopwatch to say
        # Gradual pruning is for sparse layers, and what does not pay at its beginning may do so at its end.
        replaced, table = swap_model(model, shape, config.mode, config.scheme, min(0.5, config.sparsity),
                                     include_dense=config.prune != GRADUAL, fuse=config.blocks)  # fmt: skip
        return model.state_dict(), replaced, table

    def finetune(self, tuner: Finetuner, loaders: Any, time_layers: int) -> dict[str, Any]:
        config = self.config
        steps = steps_of(len(loaders[0]), config.accumulate)
        self.say(f"Fine-tuning for {config.epochs} epoch(s) of {steps} steps ...")
        begun = len(tuner.history.losses)
        release_free_memory()
        before = current_rss_mb()
        of_training = reset_peak_rss()
        fitted = tuner.fit(loaders[0], config.epochs, evaluation_batches=loaders[1], folder=self.folder,
                           resume=self.resume, progress=self.progress, time_layers=time_layers,
                           report=self.report, evaluate_every=config.evaluate_every)  # fmt: skip
        if fitted.stopped_by is not None:
            raise Stopped(fitted)
        assert fitted.best is not None  # there was an evaluation
        peak = peak_rss_mb()
        history = tuner.history
        tuner.model.train()
        saved = saved_for_backward_bytes(lambda: tuner.loss(*next(iter(loaders[0]))), tuner.model)
        timed = history.timed_seconds()
        result = {
            "top1": history.evaluations[-1].top1, "best_top1": fitted.best.top1, **self.facts,
            "model_sparsity": sparsity(tuner.model), "step_ms": 1e3 * history.median_step_seconds(),
            "mean_to_median_step": statistics.fmean(timed) / statistics.median(timed),
            "train_s": history.train_seconds, "data_wait_share": history.wait_share(),
            "steps": len(history.losses), "saved_mb": saved / 1e6,
            "peak_rss_mb": peak, "rss_before_training_mb": before,
            "peak_rss_of": "training" if of_training else "process",
            "losses": history.losses, "evaluations": [vars(e) for e in history.evaluations],
            "layer_times": [vars(t) for t in fitted.layer_times], "config": asdict(config), "classes": self.classes,
            "environment": environment(), "processes": tuner.together.count,
        }  # fmt: skip
        if tuner.parallel is not None:
            result["sent_mb"] = sent_bytes(tuner.parallel) / max(len(history.losses) - begun, 1) / 1e6
        if tuner.together.first:
            with replacing(self.folder / RESULT) as temporary:
                temporary.write_text(json.dumps(without_nan(result), indent=1) + "\n", encoding="utf-8")
        return result


def _checkpoint_in(folder: Path) -> dict[str, Any] | None:
    return read_checkpoint(folder / LAST) if (folder / LAST).exists() else None


def _check_masks(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> None:
    for name, mask in masks.items():
        weight = held(model.get_submodule(name), "weight")
        if mask.shape != weight.shape:
            raise ValueError(f"the mask of {name} is {tuple(mask.shape)}, its weight {tuple(weight.shape)}")


def swap_like(model: nn.Module, state: Mapping[str, torch.Tensor], config: RunConfig) -> None:
    """Replace the layers of a fresh model that are sparse in a state by empty ones of the same pattern.

    Parameters
    ----------
    model : nn.Module
    state : mapping of str to Tensor
    config : RunConfig
        Of the run that the state is of.
    """
    if config.scheme == "dense":
        return
    quantize, qconfig = parse_scheme(config.scheme)
    swap_modules_for_state(model, state, quantize=quantize, qconfig=qconfig, fuse=quantize and config.blocks)
