"""The operations that blocks take up: recorded as nodes of autograd where a gradient is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qsparseprop.nn.autograd import blocks as nodes
from qsparseprop.nn.autograd.graph import direct_apply, records_gradients
from qsparseprop.nn.deferred import steps
from qsparseprop.nn.deferred.passes import Activation
from qsparseprop.nn.deferred.results import result, result_of
from qsparseprop.nn.deferred.steps import Normalisation

if TYPE_CHECKING:
    from qsparseprop.nn.deferred.tensor import ChainTensor

_norm_node, _activation_node = direct_apply(nodes.BlockBatchNorm), direct_apply(nodes.BlockActivation)
_map_node, _addition_node = direct_apply(nodes.BlockChannelMap), direct_apply(nodes.BlockAddition)


def batch_norm(source: ChainTensor, weight: Tensor | None, bias: Tensor | None, norm: Normalisation) -> Tensor:
    """Record a batch normalisation."""
    if records_gradients() and any(t is not None and t.requires_grad for t in (source, weight, bias)):
        return _norm_node(source, weight, bias, norm)[0]
    return result(steps.normalise(source._pending, weight, bias, norm, False)[0], source.dtype)


def activate(source: ChainTensor, activation: Activation, in_place: bool) -> Tensor:
    """Record an activation."""
    if records_gradients() and source.requires_grad:
        return _activation_node(source, activation, in_place)[0]
    pending, _ = steps.activate(source._pending, activation, False)
    return _changed(result_of(pending, source, in_place), in_place)


def channel_map(source: ChainTensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Record a multiplication or a shift by a number for each channel, which gets no gradient."""
    if records_gradients() and source.requires_grad:
        return _map_node(source, scale, shift)
    return result(steps.scale_channels(source._pending, scale, shift), source.dtype)


def add(source: ChainTensor, other: Tensor, in_place: bool) -> Tensor:
    """Record an addition."""
    if records_gradients() and (source.requires_grad or other.requires_grad):
        return _addition_node(source, other, in_place)
    return _changed(result_of(steps.add(source._pending, other), source, in_place), in_place)


def _changed(tensor: Tensor, in_place: bool) -> Tensor:
    if in_place and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
    return tensor
