"""What a run is told to do, and the file in which its folder keeps that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from qsparseprop.utils.errors import ConfigurationError

from .recipe import Recipe
from .setup_run import PRUNERS, TrainingMode, parse_augment, parse_scheme

__all__ = ["CLASSES", "GRADUAL", "MOVABLE", "SETTINGS", "RunConfig", "resumed_settings", "stored_settings"]

SETTINGS = "run.json"

#: Under which the file of the settings also says what the images' classes are called, for people; checkpoints decide.
CLASSES = "classes"

#: Settings by which a resumed run may differ: where its images lie, and which processes read them.
MOVABLE = ("data", "workers")

#: Pruning that goes on while the network is fine-tuned.
GRADUAL = "gradual"


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
    test_split : int
        Decides which images are for the test, where the data does not: the same in all trainings, whatever their seed,
        since these start from the weights of each other.
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
    test_split: int = 0

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
        dense_first = self.weights is None and self.sparsity > 0
        self.check_warmup(epochs=self.epochs, **({"pretrain_epochs": self.pretrain_epochs} if dense_first else {}))
        if self.workers is not None and self.workers < 0:
            raise ConfigurationError(f"workers must not be negative, got {self.workers}")
        if not 0 <= self.sparsity < 1:
            raise ConfigurationError(f"sparsity must be at least 0 and less than 1, got {self.sparsity}")
        if self.precision not in ("bf16", "fp32"):
            raise ConfigurationError(f"unknown precision {self.precision!r}, choose from bf16, fp32")
        if self.scheme != "dense":
            parse_scheme(self.scheme)
        if self.augment is not None:
            parse_augment(self.augment)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse what makes no sense together."""
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
    if not isinstance(stored, dict) or not stored.keys() <= known | {CLASSES}:
        raise ConfigurationError(f"{folder / SETTINGS} is not the settings of a run")
    stored.pop(CLASSES, None)
    # runs of before had their seed for it
    return {"test_split": stored.get("seed", 0), **stored}


def resumed_settings(folder: Path, config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """Settings of the run in a folder, with which those that the user names must agree, but for `MOVABLE`."""
    # runs of before these could be chosen had today's defaults
    later = {field.name for field in fields(Recipe)} | {"accumulate", "evaluate_every"}
    stored = {f.name: f.default for f in fields(RunConfig) if f.name in later}
    stored |= stored_settings(folder, "run to resume")
    for name, value in chosen.items():
        if name in MOVABLE:
            stored[name] = value
        elif name in stored and stored[name] != value:
            raise ConfigurationError(f"the run in {folder} has {name} {stored[name]}, not {value}; leave it out, or "
                                     "start another run")  # fmt: skip
    return RunConfig(**{**asdict(config), **stored})
