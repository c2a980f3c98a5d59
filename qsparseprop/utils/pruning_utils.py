"""Magnitude pruning of whole models, on top of ``torch.nn.utils.prune``.

What is pruned by default is every ``nn.Conv2d`` and ``nn.Linear`` except the first and the last one, as is usual:
all that the network knows passes through them, while in a ResNet-18 for 32x32 images they hold less than 0.1 % of the
weights and 0.4 % of the work, so pruning them could cost accuracy and gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop import arguments
from qsparseprop.contents import check_memory, check_memory_of
from qsparseprop.nn._dense import held
from qsparseprop.utils._gradual_pruner import GradualPruner
from qsparseprop.utils._prunable import check_prunable, refuse_unknown
from qsparseprop.utils._schedule import cubic_sparsity

#: torch's layers that register their weight before everything else.
_WEIGHT_FIRST = (nn.Linear, nn.modules.conv._ConvNd)

__all__ = [
    "GradualPruner",
    "collect_masks",
    "cubic_sparsity",
    "global_magnitude_prune",
    "layer_sparsity",
    "layerwise_magnitude_prune",
    "make_mask_enforcer",
    "make_pruning_permanent",
    "prunable_modules",
]


def prunable_modules(model: nn.Module, skip: Collection[str] | None = None) -> dict[str, nn.Module]:
    """Name the modules whose weight is pruned.

    Parameters
    ----------
    model : nn.Module
        Any model; its ``nn.Conv2d`` and ``nn.Linear`` count, in the order of their definition, a shared one once.
    skip : collection of str, optional
        Names, as ``named_modules`` gives them, to leave dense. ``None`` leaves out the first and the last one.

    Returns
    -------
    dict of str to nn.Module
        What is left.

    Raises
    ------
    ValueError
        If `skip` names something that is not such a module (a misspelt name would be pruned without a word).
    """
    arguments.model(model)
    candidates = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    if skip is None:
        names = list(candidates)
        skip = {*names[:1], *names[-1:]}
    refuse_unknown(skip, candidates, "skip names no Conv2d or Linear of the model")
    return {name: module for name, module in candidates.items() if name not in skip}


def global_magnitude_prune(
    model: nn.Module, sparsity: float, skip: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """Mask the smallest weights of the whole model, in place.

    One threshold for all layers: wide layers with small weights become sparser than `sparsity`, narrow ones less.

    Parameters
    ----------
    model : nn.Module
        Any model; a channels_last one stays channels_last.
    sparsity : float
        Share of the weights of the pruned modules that become zero, in [0, 1).
    skip : collection of str, optional
        Names of modules to leave dense, see `prunable_modules`.

    Returns
    -------
    dict of str to nn.Module
        The modules that now carry ``weight_orig`` and ``weight_mask``; `make_pruning_permanent` turns these back into a
        plain ``weight``.

    Raises
    ------
    ValueError
        If `sparsity` is outside [0, 1), `skip` holds an unknown name, or there is nothing to prune.
    """

    def mask_all(modules: dict[str, nn.Module]) -> None:
        targets = [(module, "weight") for module in modules.values()]
        prune.global_unstructured(targets, pruning_method=prune.L1Unstructured, amount=sparsity)

    return _prune(model, sparsity, skip, mask_all)


def layerwise_magnitude_prune(
    model: nn.Module, sparsity: float, skip: Collection[str] | None = None
) -> dict[str, nn.Module]:
    """Mask the smallest weights of each layer, in place: every pruned layer gets the same sparsity.

    Parameters, return value and errors are those of `global_magnitude_prune`.

    Parameters
    ----------
    model, sparsity, skip
        As for `global_magnitude_prune`.

    Returns
    -------
    dict of str to nn.Module
        As from `global_magnitude_prune`.
    """

    def mask_each(modules: dict[str, nn.Module]) -> None:
        for module in modules.values():
            prune.l1_unstructured(module, "weight", amount=sparsity)

    return _prune(model, sparsity, skip, mask_each)


def _prune(
    model: nn.Module, sparsity: float, skip: Collection[str] | None, apply: Callable[[dict[str, nn.Module]], None]
) -> dict[str, nn.Module]:
    arguments.number(sparsity, "sparsity")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    modules = prunable_modules(model, skip)
    check_memory_of(model)
    if not modules:
        raise ValueError("the model has no Conv2d or Linear to prune")
    for name, module in modules.items():
        check_prunable(name, module)
    # torch's pruning flattens weights with view(), which refuses channels_last ones.
    permuted = [module for module in modules.values() if not held(module, "weight").is_contiguous()]
    for module in permuted:
        module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch types it without
    places = {module: list(module._parameters).index("weight") for module in modules.values()
              if "weight" in module._parameters}  # fmt: skip
    apply(modules)
    for module, place in places.items():
        _move_parameter(module, "weight_orig", place)
    for module in permuted:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it without
        module.weight = held(module, "weight_orig").detach() * held(module, "weight_mask")
    return modules


def make_pruning_permanent(model: nn.Module) -> None:
    """Replace ``weight_orig`` and ``weight_mask`` by a plain ``weight`` with zeros, in place, where there are any.

    Parameters keep the order that they had before the pruning: optimizers know them by their position.

    Parameters
    ----------
    model : nn.Module
    """
    arguments.model(model)
    check_memory_of(model)
    for module in model.modules():
        if hasattr(module, "weight_mask") and "weight_orig" in module._parameters:  # others may call a buffer so, too
            place = list(module._parameters).index("weight_orig")
            # torch's pruning has put it behind the others, in front of which torch's layers have it.
            place = 0 if place == len(module._parameters) - 1 and isinstance(module, _WEIGHT_FIRST) else place
            prune.remove(module, "weight")
            _move_parameter(module, "weight", place)


def _move_parameter(module: nn.Module, name: str, place: int) -> None:
    """Give a parameter a place among those of its module."""
    others = [key for key in module._parameters if key != name]
    for key in (name, *others[place:]):
        module._parameters[key] = module._parameters.pop(key)


def collect_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the pruning masks that are attached to a model.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to torch.Tensor
        Module name to bool mask of the weight's shape, ``True`` where the weight is kept; masks stay readable after
        `make_pruning_permanent`.
    """
    arguments.model(model)
    check_memory_of(model)
    return {name: m.weight_mask.bool() for name, m in model.named_modules() if hasattr(m, "weight_mask")}


def layer_sparsity(model: nn.Module, names: Collection[str]) -> dict[str, float]:
    """Return the share of zeros, in [0, 1], of the weights of the named modules of a dense model.

    Parameters
    ----------
    model : nn.Module
    names : collection of str
        As ``named_modules`` gives them.

    Returns
    -------
    dict of str to float
    """
    return {name: 1 - torch.count_nonzero(w).item() / w.numel() for name, w in _weights(model, names).items()}


def make_mask_enforcer(model: nn.Module, masks: Mapping[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that sets the masked weights of a dense model to zero again, to be called after each step.

    For optimizers that treat every element by itself (SGD, Adam, ...) this alone trains exactly what ``prune``'s
    reparametrisation and zeroed gradients train: the weights that count never see the others, whose own gradient and
    momentum are thrown away here. It is also the cheapest of the three - one multiplication a weight - which makes it
    the fair way to train a masked dense model against a sparse one. (With clipping by the global gradient norm the
    masked gradients would count.)

    Parameters
    ----------
    model : nn.Module
        Dense model with plain weights.
    masks : mapping of str to torch.Tensor
        Module name to mask of the weight's shape, nonzero where the weight is kept.

    Returns
    -------
    callable
        Takes nothing, returns nothing. It keeps the masks as float32: with bool ones the multiplication takes about
        three times as long.
    """
    weights = _weights(model, masks)
    for name in weights:
        arguments.instance(masks[name], torch.Tensor, f"masks[{name!r}]", "a tensor")
        check_memory(masks[name], f"masks[{name!r}]")
    tensors = list(weights.values())
    # The same strides as the weight, or the multiplication walks through memory in two orders at once.
    float_masks = [torch.empty_like(weight).copy_(masks[name]) for name, weight in weights.items()]

    def enforce() -> None:
        with torch.no_grad():
            torch._foreach_mul_(tensors, float_masks)

    return enforce


def _weights(model: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    arguments.model(model)
    check_memory_of(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    refuse_unknown(names, modules, "the model does not have", "names")
    without = [name for name in names if not isinstance(getattr(modules[name], "weight", None), torch.Tensor)]
    if without:
        raise ValueError(f"without a weight: {', '.join(without)}")
    return {name: held(modules[name], "weight").detach() for name in names}
