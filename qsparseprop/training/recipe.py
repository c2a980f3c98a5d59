"""How networks are trained by the ``finetune`` command: optimizer, weight decay, learning rates and their schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import lr_scheduler

from qsparseprop.nn._values import SparseValues
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.optimizer_utils import parameter_groups
from qsparseprop.utils.pruning_utils import make_mask_enforcer
from qsparseprop.utils.saved_tensors import compress_saved_tensors

from .finetuner import Finetuner
from .setup_run import TrainingMode

__all__ = ["OPTIMIZERS", "SCHEDULES", "Recipe", "make_finetuner", "make_optimizer", "make_scheduler",
           "set_batch_norm_momentum", "steps_of", "without_decay"]  # fmt: skip

#: Optimizers, with the learning rates that they have unless told otherwise.
OPTIMIZERS = {"adamw": 2e-3, "sgd": 0.05}

SCHEDULES = ("onecycle", "cosine", "step", "constant")

#: Steps of the shortest one-cycle schedule that torch can compute: one fourth of them, less one, is its rise.
_SHORTEST = 5

#: Shares of the steps after which the schedule ``step`` divides the learning rate by ten, as the ResNet paper does.
_STEP_AT = (1 / 2, 3 / 4)

#: Trainings of fewer steps have a batch normalisation that follows the weights faster.
_FEW_STEPS, _FAST_MOMENTUM = 100, 0.3

#: Dense layers whose zeros are held by masks.
_MASKED = (nn.Linear, nn.Conv2d)

#: Modules whose ``weight`` is one whatever its sizes are, and those whose parameters are none.
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
_NO_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)

#: Parameters of modules of other kinds that are no weights: embeddings of positions, tokens that are learned, biases.
_NO_WEIGHT = re.compile(r"(^|_)(pos|position|positional)(_|$)|(^|_)token$|bias|embed")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained; the same for dense and sparse layers.

    Attributes
    ----------
    learning_rate : float or None
        Peak of the schedule; None for 0.002 (AdamW) or 0.05 (SGD).
    pretrain_learning_rate : float or None
        The same of the dense training before pruning; None for that of the fine-tuning.
    optimizer : {"adamw", "sgd"}
    momentum : float or None
        Of SGD, which is Nesterov's; None for 0.9.
    weight_decay : float or None
        Of weights; biases, normalisations, embeddings and other parameters that are no weights have none
        (see `without_decay`). None for AdamW's 0.01 of all parameters, or none at all with SGD.
    schedule : {"onecycle", "cosine", "step", "constant"}
        How the learning rate changes from step to step: up for a fourth of the steps and down to nothing; down to
        nothing by half a cosine; a tenth after half of the steps and a hundredth after three fourths; not at all.
    warmup : float
        Epochs in which the learning rate rises to its peak before one of the last three begins.
    """

    learning_rate: float | None = None
    pretrain_learning_rate: float | None = None
    optimizer: str = "adamw"
    momentum: float | None = None
    weight_decay: float | None = None
    schedule: str = "onecycle"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise ConfigurationError(f"unknown optimizer {self.optimizer!r}, choose from {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES:
            raise ConfigurationError(f"unknown schedule {self.schedule!r}, choose from {', '.join(SCHEDULES)}")
        if self.learning_rate is None:
            # what is written down is what was used
            object.__setattr__(self, "learning_rate", OPTIMIZERS[self.optimizer])
        for name in ("learning_rate", "pretrain_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be positive, got {value}")
        if self.momentum is not None and self.optimizer != "sgd":
            raise ConfigurationError("momentum goes with the optimizer sgd only")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ConfigurationError(f"momentum must be at least 0 and less than 1, got {self.momentum}")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ConfigurationError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.warmup < math.inf:
            raise ConfigurationError(f"warmup must not be negative, got {self.warmup}")
        if self.warmup and self.schedule == "onecycle":
            raise ConfigurationError("the schedule onecycle has a rise of its own: warmup goes with cosine, step and "
                                     "constant")  # fmt: skip

    def check_warmup(self, **epochs: int) -> None:
        """Refuse a warm-up that a training has no room for.

        Parameters
        ----------
        **epochs : int
            Of trainings, by what they are called.
        """
        for name, count in epochs.items():
            if self.warmup >= count:
                raise ConfigurationError(f"warmup must be shorter than {name}, got {self.warmup:g} of {count}")

    @property
    def pretraining(self) -> Recipe:
        """The recipe of the dense training before pruning."""
        return replace(self, learning_rate=self.pretrain_learning_rate or self.learning_rate)

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Recipe:
        """Make one of what a configuration that has it has become by ``asdict``.

        Parameters
        ----------
        settings : mapping
        """
        return Recipe(**{field.name: settings[field.name] for field in fields(Recipe)})


def without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters with several dimensions that are no weights, and have no weight decay.

    Those of normalisations and embeddings; what the modules themselves name by ``no_weight_decay()``, as timm's do;
    and, in modules that are no layers of torch, biases, learned tokens and positions, and what is in truth a vector.
    The values of sparse layers are weights, though they are one-dimensional. A parameter that several modules share has
    no decay if it is no weight in one of them: an embedding that is the last layer's weight, too, is an embedding.

    Parameters
    ----------
    model : torch.nn.Module
    """
    spared = set()
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        told = getattr(module, "no_weight_decay", None)
        spared |= {path + name for name in told()} if callable(told) else set()
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, SparseValues) or (isinstance(module, _LAYERS) and "bias" not in name):
                continue
            vector = sum(size > 1 for size in parameter.shape) <= 1
            if vector or isinstance(module, _NO_LAYERS) or _NO_WEIGHT.search(name):
                spared.add(path + name)
    shared = {id(one) for name, one in model.named_parameters(remove_duplicate=False) if name in spared}
    return {name for name, one in model.named_parameters() if id(one) in shared}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe over a model's parameters.

    Parameters
    ----------
    model : torch.nn.Module
    recipe : Recipe
    """
    decay, rate = recipe.weight_decay, recipe.learning_rate
    assert rate is not None  # set by the recipe itself
    parameters: Any = model.parameters()
    if decay is not None:
        parameters = parameter_groups(model, decay, without_decay(model))
    # The fused ones are the fastest of torch's; anything else would slow down the dense network, which has ten times as
    # many weights to update.
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=rate, fused=True)
    momentum = 0.9 if recipe.momentum is None else recipe.momentum
    return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0, fused=True)


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """Return the learning rate schedule of a recipe, stepped after every step; None where nothing changes.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    recipe : Recipe
    steps, steps_per_epoch : int
        Of the whole training, and of an epoch.
    """
    if recipe.schedule == "onecycle":
        rate = recipe.learning_rate
        assert rate is not None  # set by the recipe itself
        return lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, _SHORTEST), pct_start=0.25,
                                       cycle_momentum=False)  # fmt: skip
    rise = round(recipe.warmup * steps_per_epoch)
    parts: list[lr_scheduler.LRScheduler] = []
    if rise:
        parts.append(lr_scheduler.LinearLR(optimizer, start_factor=1 / rise, total_iters=rise))
    rest = max(steps - rise, 1)
    if recipe.schedule == "cosine":
        parts.append(lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest))
    elif recipe.schedule == "step":
        # no earlier than after the first step: a milestone of 0 would be passed over
        milestones = [max(1, int(share * rest)) for share in _STEP_AT]
        parts.append(lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1))
    if len(parts) < 2:
        return parts[0] if parts else None
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[rise])


def set_batch_norm_momentum(model: nn.Module, steps: int) -> None:
    """Let running statistics follow the weights within a short training.

    In so few steps the network's own momentum, mostly torch's 0.1, would leave them far behind.

    Parameters
    ----------
    model : torch.nn.Module
        Trainings of at least 100 steps give it its own momentum back.
    steps : int
        Of the training.
    """
    for module in model.modules():
        if isinstance(module, _NormBase):
            own = module.__dict__.setdefault("_own_momentum", module.momentum)
            module.momentum = own if own is None or steps >= _FEW_STEPS else max(own, _FAST_MOMENTUM)


def steps_of(batches: int, accumulate: int) -> int:
    """Steps of an epoch.

    Parameters
    ----------
    batches, accumulate : int
        Batches of the epoch, and of a step; the last step has those that are left.
    """
    return -(-batches // accumulate)


def make_finetuner(
    model: nn.Module,
    mode: TrainingMode,
    recipe: Recipe,
    epochs: int,
    batches: int,
    masks: Mapping[str, torch.Tensor] | None = None,
    compress_saved: bool = False,
    accumulate: int = 1,
) -> Finetuner:
    """Return a `Finetuner` as all trainings of the ``finetune`` command have it, one of several processes if need be.

    Parameters
    ----------
    model : torch.nn.Module
    mode : TrainingMode
    recipe : Recipe
    epochs, batches : int
        Of the training; batches of one epoch.
    masks : mapping of str to Tensor, optional
        Of layers by name; those that are dense are held at their zeros.
    compress_saved : bool
        Train with `compress_saved_tensors`.
    accumulate : int
        Batches of a step.

    Returns
    -------
    Finetuner
    """
    memory_format = torch.channels_last if mode.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch types it without
    steps = steps_of(batches, accumulate)
    set_batch_norm_momentum(model, epochs * steps)
    # After the conversion, which gives the weights other memory. Sparse layers need no mask.
    held = {name: mask for name, mask in (masks or {}).items() if isinstance(model.get_submodule(name), _MASKED)}
    optimizer = make_optimizer(model, recipe)
    tuner = Finetuner(
        model,
        optimizer,
        scheduler=make_scheduler(optimizer, recipe, epochs * steps, steps),
        autocast_dtype=torch.bfloat16 if mode.bf16 else None,
        memory_format=memory_format,
        after_step=make_mask_enforcer(model, held) if held else None,
        forward_context=compress_saved_tensors if compress_saved else None,
        accumulate=accumulate,
    )
    tuner.distribute()
    return tuner
