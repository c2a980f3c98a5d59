"""What a `Finetuner` is made of, checked before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from qsparseprop import arguments

__all__ = ["check_batches", "check_fit", "check_settings", "warn_of_other_parameters"]


def _has(value: object, *methods: str) -> bool:
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in methods)


def _check_functions(functions: Mapping[str, Any]) -> None:
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, got {arguments.shown(value)}")


def check_settings(
    model: object,
    optimizer: object,
    scheduler: object,
    autocast_dtype: object,
    memory_format: object,
    scheduler_per_epoch: object,
    max_grad_norm: object,
    stateful: object,
    accumulate: object,
    functions: Mapping[str, Any],
) -> None:
    """Raise a TypeError or ValueError for the arguments of a `Finetuner` that make no sense."""
    arguments.model(model)
    # wrappers of accelerate, Lightning and others are no torch.optim.Optimizer
    if not _has(optimizer, "step", "zero_grad", "state_dict"):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {arguments.shown(optimizer)}")
    if scheduler is not None and not _has(scheduler, "step", "state_dict"):
        raise TypeError(f"scheduler must be one of torch.optim.lr_scheduler, got {arguments.shown(scheduler)}")
    if autocast_dtype is not None:
        arguments.instance(autocast_dtype, torch.dtype, "autocast_dtype", "a torch.dtype")
    arguments.instance(memory_format, torch.memory_format, "memory_format", "a torch.memory_format")
    arguments.flag(scheduler_per_epoch, "scheduler_per_epoch")
    if max_grad_norm is not None:
        arguments.number(max_grad_norm, "max_grad_norm", 0)
    arguments.whole_number(accumulate, "accumulate", 1)
    if stateful is not None:
        arguments.instance(stateful, Mapping, "stateful", "a mapping of names to objects")
        for name, value in stateful.items():  # type: ignore[attr-defined]  # a mapping, as was checked
            if not _has(value, "state_dict", "load_state_dict"):
                raise TypeError(f"stateful[{arguments.shown(name)}] must have state_dict and load_state_dict, got "
                                f"{arguments.shown(value)}")  # fmt: skip
    if functions["loss_function"] is None:
        raise TypeError("loss_function must be a function, got None")
    _check_functions(functions)


def check_fit(
    epochs: object, evaluate_every: object, checkpoint_every: object, time_layers: object, report: object
) -> None:
    """Raise a TypeError or ValueError for numbers of `Finetuner.fit` that make no sense."""
    arguments.whole_number(epochs, "epochs", 1)
    arguments.whole_number(evaluate_every, "evaluate_every", 1)
    if checkpoint_every is not None:
        arguments.whole_number(checkpoint_every, "checkpoint_every", 1)
    arguments.whole_number(time_layers, "time_layers")
    _check_functions({"report": report})


def check_batches(batches: object, name: str) -> None:
    """Raise a TypeError for what holds no batches."""
    iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if isinstance(batches, str | torch.Tensor) or not iterable:
        raise TypeError(f"{name} must be batches, such as a DataLoader or a list, got {arguments.shown(batches)}")


def warn_of_other_parameters(model: nn.Module, optimizer: Any, loss_function: object) -> None:
    """Warn where the optimizer trains what the model no longer has: that of a model which was swapped behind it.

    What trains on purpose with another model's parameters, or a part of its own, has one of both only.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        return
    given = {id(parameter) for group in groups for parameter in group["params"]}
    modules = [part for part in (model, loss_function) if isinstance(part, nn.Module)]
    strangers = given - {id(parameter) for module in modules for parameter in module.parameters()}
    left_out = [name for name, parameter in model.named_parameters()
                if parameter.requires_grad and id(parameter) not in given]  # fmt: skip
    if strangers and left_out:
        warnings.warn(
            f"the optimizer does not have {len(left_out)} of the model's parameters ({left_out[0]}, ...), which stay "
            f"as they are, but {len(strangers)} that the model does not have: make the optimizer after the swap, whose "
            "layers have parameters of their own",
            stacklevel=4,
        )
