"""Adapters (LoRA and its relatives) on models that have been swapped already."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from qsparseprop import arguments
from qsparseprop.nn._adapters import guard_merging
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import held
from qsparseprop.utils._places import replace_children

__all__ = ["attach_adapters"]

_Result = TypeVar("_Result")


def attach_adapters(model: nn.Module, attach: Callable[[nn.Module], _Result]) -> _Result:
    """Let a library that knows torch's layers only put adapters on a model with sparse ones.

    While `attach` runs, dense layers with the same weights stand where the sparse ones do. Afterwards the sparse ones,
    the same objects, are back in their places, wherever these are then, with the `requires_grad` that their stand-ins
    were given. (A model may just as well be given its adapters first and be swapped then.)

    Parameters
    ----------
    model : nn.Module
        Swapped by `swap_modules_with_sparse`.
    attach : callable
        Takes the model, changes it or makes another one of it, and returns what it likes.

    Returns
    -------
    object
        What `attach` has returned.

    Raises
    ------
    ValueError
        For a model that is a sparse layer itself; nothing has changed then.

    Warns
    -----
    UserWarning
        Where adapters have taken something out of a layer's weight at their start (PiSSA, OLoRA, LoftQ): the layer
        stays dense then, since what is left has no zeros.

    Examples
    --------
    >>> config = LoraConfig(target_modules=["fc1", "fc2"])
    >>> model = attach_adapters(model, lambda m: get_peft_model(m, config))
    """
    arguments.model(model)
    if not callable(attach):
        raise TypeError(f"attach must be a function, got {arguments.shown(attach)}")
    if isinstance(model, SparseModule):
        raise ValueError("the model is a sparse layer itself: put it into a torch.nn.Sequential")
    sparse = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    dense = {name: module.to_dense() for name, module in sparse.items()}
    for name, module in dense.items():
        module._stands_in_for = name  # which copies of it have, too
    replace_children(model, {id(module): dense[name] for name, module in sparse.items()})
    changed, result = model, None
    try:
        result = attach(model)
        changed = result if isinstance(result, nn.Module) else model
    finally:
        _put_back(changed, sparse, dense)
    guard_merging(changed)
    return result


def _put_back(model: nn.Module, sparse: dict[str, SparseModule], dense: dict[str, nn.Module]) -> None:
    replacements: dict[int, nn.Module] = {}
    for name, stand_in in model.named_modules():
        origin = stand_in.__dict__.pop("_stands_in_for", None)
        if origin is None:
            continue
        module = sparse[origin] if stand_in is dense[origin] else copy.deepcopy(sparse[origin])
        if not _same_weights(module, stand_in):
            warnings.warn(f"{name} stays dense: attaching the adapters has changed its weight", stacklevel=3)
            continue
        for key, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(getattr(stand_in, key).requires_grad)
        replacements[id(stand_in)] = module.train(stand_in.training)
    replace_children(model, replacements)


def _same_weights(module: SparseModule, stand_in: nn.Module) -> bool:
    bias = module.bias is None or _same_bits(module.bias, held(stand_in, "bias"))
    return bias and _same_bits(module.dense_weight(), held(stand_in, "weight"))


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality that NaN has with itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))
