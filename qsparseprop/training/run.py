"""One training of the ``finetune`` command: dense training or given weights, pruning, conversion, fine-tuning.

A run lives in a folder, from which it goes on after it was stopped: ``run.json`` (settings), ``dense/`` (the dense
training), ``last.pt``, ``best.pt`` and ``log.jsonl`` (see `Finetuner.fit`), and at the end ``result.json``.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import held
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

from .finetuner import CheckpointError, Finetuner, FitResult, read_checkpoint
from .finetuner.fit import LAST
from .locks import locked
from .recipe import Recipe, make_finetuner, steps_of
from .reporter import Reporter
from .results import format_result, without_nan
from .setup_run import (
    PRUNERS,
    TrainingMode,
    make_loaders,
    parse_augment,
    parse_scheme,
    prepare_network,
    prune_model,
    swap_model,
)

__all__ = ["RunConfig", "Stopped", "format_result", "run_training", "stored_settings", "swap_like"]

SETTINGS, RESULT = "run.json", "result.json"

#: Pruning that goes on while the network is fine-tuned, up to this share of the steps, in about so many turns.
GRADUAL = "gradual"
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


@dataclass(frozen=True)
class RunConfig(Recipe):
    """What `run_training` does: a `Recipe`, and attributes that mean the same as in `CompareConfig`.

    Attributes
    ----------
    scheme : str
        Besides what `parse_scheme` takes: ``dense`` for no conversion, with masks that keep the zeros.
    precision : {"bf16", "fp32"}
        Of everything but the 8-bit layers; bf16 is autocast.
    accumulate : int
        Batches of a step, in both trainings, see `Finetuner`.
    evaluate_every : int
        Epochs of the fine-tuning after which it is evaluated, and at its end.
    """

    model: str = "resnet18"
    width: int | None = None
    weights: str | None = None
    data: str = "digits"
    normalize: str = "data"
    image_size: int | None = None
    sparsity: float = 0.9
    prune: str = "global"
    scheme: str = "int8"
    precision: str = "bf16"
    compress_saved: bool = False
    epochs: int = 2
    pretrain_epochs: int = 1
    batch_size: int = 64
    threads: int | None = None
    seed: int = 0
    new_head: bool = False
    accumulate: int = 1
    evaluate_every: int = 1
    augment: str | None = None
    workers: int | None = None
    blocks: bool = True

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(RunConfig).items():
            value = getattr(self, name)
            allowed = hint | int if isinstance(0.5, hint) else hint
            if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
                raise ConfigurationError(f"{name} cannot be {value!r}")
        super().__post_init__()
        for name in ("epochs", "pretrain_epochs", "batch_size", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {getattr(self, name)}")
        self.check_warmup(epochs=self.epochs, **({} if self.weights else {"pretrain_epochs": self.pretrain_epochs}))
        if self.prune not in (*PRUNERS, GRADUAL):
            raise ConfigurationError(f"unknown prune {self.prune!r}, choose from {', '.join((*PRUNERS, GRADUAL))}")
        if self.prune == "none" and self.weights is None:
            raise ConfigurationError("without pruning there must be weights that have zeros already")
        if self.new_head and self.weights is None:
            raise ConfigurationError("new_head (--new-head) goes with weights (--weights) only")
        if self.prune == GRADUAL and self.scheme == "dense":
            raise ConfigurationError("gradual pruning goes with sparse layers only, not with the scheme dense")
        if self.sparsity == 0 and self.scheme != "dense":
            raise ConfigurationError("sparsity 0 is for training a dense network: it goes with the scheme dense only")
        if not 0 <= self.sparsity < 1:
            raise ConfigurationError(f"sparsity must be at least 0 and less than 1, got {self.sparsity}")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigurationError(f"unknown precision {self.precision!r}, choose from bf16, fp32")
        if self.workers is not None and self.workers < 0:
            raise ConfigurationError(f"workers must not be negative, got {self.workers}")
        if self.scheme != "dense":
            parse_scheme(self.scheme)
        if self.augment is not None:
            parse_augment(self.augment)

    @property
    def mode(self) -> TrainingMode:
        """Precision and memory layout; channels_last is the faster one."""
        return TrainingMode(self.precision == "bf16", channels_last=True)


def stored_settings(folder: Path, wanted: str = "run") -> dict[str, Any]:
    """Settings of the run in a folder, for `RunConfig`.

    Parameters
    ----------
    folder : Path
    wanted : str
        What is said not to be there where it is not.

    Returns
    -------
    dict

    Raises
    ------
    ConfigurationError
        If there is none.
    """
    try:
        stored = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"{folder} holds no {wanted}: there is no {SETTINGS}") from None
    except OSError as error:
        raise ConfigurationError(f"{folder} holds no {wanted}: {SETTINGS}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{folder / SETTINGS} cannot be read: {error}") from error
    known = {field.name for field in fields(RunConfig)}
    if not isinstance(stored, dict) or not stored.keys() <= known:
        raise ConfigurationError(f"{folder / SETTINGS} is not the settings of a run")
    return stored


def _resumed_settings(folder: Path, config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """Settings of the run in a folder, with which those that the user names must agree."""
    # runs of before these could be chosen had today's defaults
    later = {field.name for field in fields(Recipe)} | {"accumulate", "evaluate_every"}
    stored = {f.name: f.default for f in fields(RunConfig) if f.name in later}
    stored |= stored_settings(folder, "run to resume")
    for name, value in chosen.items():
        if name in stored and stored[name] != value:
            raise ConfigurationError(f"the run in {folder} has {name} {stored[name]}, not {value}; leave it out, or "
                                     "start another run")  # fmt: skip
    return RunConfig(**{**asdict(config), **stored})


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
        ``layer_sparsity``, ``replaced_layers``, ``config``, ``environment``; with `time_layers` ``layer_times``.

    Raises
    ------
    ConfigurationError
        If settings, files or folder do not go together.
    Stopped
        If a signal ended it.
    NonFiniteLossError, OSError, ImportError
        As from `Finetuner.fit` and `load_data`.
    """
    say = None if reporter is None else reporter.message
    if folder is None:
        if resume:
            raise ConfigurationError("to resume a run its folder must be given")
        with tempfile.TemporaryDirectory(prefix="qsparseprop-") as temporary:
            return run_training(config, temporary, reporter=reporter, progress=progress, time_layers=time_layers)
    folder = Path(folder)
    if resume:
        # before anything is made there
        _resumed_settings(folder, config, chosen or {})
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if resume:
            config = _resumed_settings(folder, config, chosen or {})
        else:
            _refuse_results(folder)
        return _train_in(folder, config, resume, say, progress, time_layers)


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
    begun = (folder / LAST).exists()
    model, data = prepare_network(config, load_weights_too=not begun)
    if not resume:
        with replacing(folder / SETTINGS) as temporary:
            temporary.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")

    setup = _State(config, folder, resume, progress, say, data.fingerprint())
    loaders = make_loaders(data, config.batch_size, config.seed, config.augment, config.workers)
    if not begun:
        if config.weights is None and config.sparsity:
            setup.train_dense(model, loaders)
        setup.prune(model, loaders[1])
    # the same order of batches in every fine-tuning, but not that of the dense training again
    loaders = make_loaders(data, config.batch_size, config.seed + 1, config.augment, config.workers)
    return setup.finetune(setup.finetuner(model, loaders[0]), loaders, time_layers)


class _State:
    """A run while it goes on, and what of it is needed to resume it: kept in the checkpoints as a tuner's state."""

    def __init__(
        self, config: RunConfig, folder: Path, resume: bool, progress: bool | None,
        report: Callable[[str], None] | None, images: str,
    ) -> None:  # fmt: skip
        self.config, self.folder, self.resume, self.images = config, folder, resume, images
        self.progress, self.report = progress, report
        self.facts: dict[str, Any] = {}
        self.masks: dict[str, torch.Tensor] = {}

    def say(self, text: str) -> None:
        if self.report is not None:
            self.report(text)

    def state_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "masks": self.masks, "config": asdict(self.config),
                "images": self.images}  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("images", self.images) != self.images:
            raise ConfigurationError(f"the images in {self.config.data} are not those that the run in {self.folder} "
                                     "was begun with: put them back, or start another run")  # fmt: skip
        settings = asdict(self.config)
        for name, value in state.get("config", {}).items():  # older runs have none
            if settings.get(name) != value:
                raise ConfigurationError(f"the run in {self.folder} was made with {name} {value}, but its {SETTINGS} "
                                         f"says {settings.get(name)}: put it back, or start another run")  # fmt: skip
        self.facts, self.masks = dict(state["facts"]), dict(state["masks"])

    def train_dense(self, model: nn.Module, loaders: Any) -> None:
        config = self.config
        self.say(f"Training {config.model} dense for {config.pretrain_epochs} epoch(s) of "
                 f"{steps_of(len(loaders[0]), config.accumulate)} steps ...")
        tuner = make_finetuner(model, config.mode, config.pretraining, config.pretrain_epochs, len(loaders[0]),
                               accumulate=config.accumulate)  # fmt: skip
        result = tuner.fit(loaders[0], config.pretrain_epochs, folder=self.folder / "dense", resume=self.resume,
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
        shape = (config.batch_size, *loader.dataset.images.shape)
        if (self.folder / LAST).exists():
            state = read_checkpoint(self.folder / LAST)
            try:
                self.load_state_dict(state["stateful"]["run"])
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
            # global pruning leaves some layers much denser than others; which are worth it is for the stopwatch to say
            # Gradual pruning is for sparse layers, and what does not pay at its beginning may do so at its end.
            replaced, table = swap_model(model, shape, config.mode, config.scheme, min(0.5, config.sparsity),
                                         include_dense=config.prune != GRADUAL, fuse=config.blocks)  # fmt: skip
            self.facts |= {"replaced_layers": replaced, "setup_s": time.perf_counter() - began}
            self.say(table)
        tuner = make_finetuner(model, config.mode, config, config.epochs, len(loader), self.masks,
                               config.compress_saved, config.accumulate)  # fmt: skip
        tuner.stateful["run"] = self
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

    def finetune(self, tuner: Finetuner, loaders: Any, time_layers: int) -> dict[str, Any]:
        config = self.config
        steps = steps_of(len(loaders[0]), config.accumulate)
        self.say(f"Fine-tuning for {config.epochs} epoch(s) of {steps} steps ...")
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
            "layer_times": [vars(t) for t in fitted.layer_times], "config": asdict(config),
            "environment": environment(),
        }  # fmt: skip
        with replacing(self.folder / RESULT) as temporary:
            temporary.write_text(json.dumps(without_nan(result), indent=1) + "\n", encoding="utf-8")
        return result


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
