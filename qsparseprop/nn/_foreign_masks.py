"""Masks that other tools keep beside a model's layers, where neither the weight nor the layer shows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ForeignMask(NamedTuple):
    """A mask that somebody else applies to a layer's weight.

    Attributes
    ----------
    mask : Tensor or None
        bool, of the weight's shape, True where the weight is kept; None where it is not fixed (a mask that is learned).
    reason : str
        Why the layer cannot be replaced, and what to do.
    """

    mask: Tensor | None
    reason: str


def _path(name: str) -> str:
    """A qualified name whatever it is joined by: ``features:0:weight__0`` is ``.features.0.weight.0.``."""
    return "." + ".".join(re.findall(r"[A-Za-z0-9]+", name)) + "."


def _masks(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and parameters that are called a mask, by their qualified names."""
    for holder, module in model.named_modules():
        for key, tensor in [*module._buffers.items(), *module._parameters.items()]:
            if tensor is not None and "mask" in key.lower():
                yield (f"{holder}.{key}" if holder else key), tensor


def _is_layer(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and not isinstance(weight, nn.parameter.UninitializedParameter) and weight.ndim > 1


def _mention(key: str, layer: str) -> int:
    """How much of a layer's name is in that of a mask that is kept elsewhere in a part of the model they share."""
    parts = layer.split(".")
    for shared in range(len(parts)):
        prefix = "".join(f"{part}." for part in parts[:shared])
        path = _path(".".join(parts[shared:]))
        if key.startswith(prefix) and any(path + end in _path(key[len(prefix):]) for end in ("weight.", "mask.")):
            return len(path)
    return 0


def _as_mask(tensor: Tensor) -> Tensor | None:
    """What a tensor of zeros and ones keeps; None for other tensors."""
    tensor = tensor.detach()
    if tensor.dtype == torch.bool:
        return tensor
    return tensor != 0 if bool(((tensor == 0) | (tensor == 1)).all()) else None


def foreign_masks(model: nn.Module) -> dict[str, ForeignMask]:
    """Find masks which neither ``torch.nn.utils.prune`` nor ``torch.ao.pruning`` has put on their layers.

    A tensor is taken for the mask of a layer if it is called one, has the shape of its weight, and either is kept
    elsewhere under the layer's name (NNCF: ``__nncf_hooks.post_hooks.LAYER:weight__0.0.binary_mask``), or in the layer
    itself, where it excludes weights that are not zero.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    dict of str to ForeignMask
        By the qualified name of the layer.
    """
    masks = list(_masks(model))
    layers = {name: module._parameters["weight"] for name, module in model.named_modules()
              if masks and _is_layer(module)}  # fmt: skip
    found: dict[str, ForeignMask] = {}
    for key, tensor in masks:
        owner = key.rpartition(".")[0]
        mask, name = _as_mask(tensor), owner
        if owner not in layers or layers[owner].shape != tensor.shape:
            fits = {_mention(key, name): name for name, weight in layers.items() if weight.shape == tensor.shape}
            if not max(fits, default=0):
                continue
            name = fits[max(fits)]
        elif mask is None or not bool((layers[owner].detach()[~mask] != 0).any()):
            continue
        tool = "by multiplying the weight by it"
        if "nncf" in key:
            tool = "nncf.strip(model, strip_format=nncf.StripFormat.IN_PLACE)"
        found[name] = ForeignMask(mask, f"masked by {key}: make that permanent first, {tool}")
    return found
