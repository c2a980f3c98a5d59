"""Timing layers, dense and sparse, to find out which are worth replacing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qsparseprop.layout.modes import Modes
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_bias, dense_type, dense_weight, trains_weight
from qsparseprop.nn.deferred import ordinary
from qsparseprop.nn.deferred.usage import Operation
from qsparseprop.utils.measurement_utils import compare_interleaved
from qsparseprop.utils.swap_report import SwapDecision

__all__ = ["LayerInput", "Stopwatch"]


#: Layers of the same kind and sizes whose sparsities differ by no more are timed once: less than a stopwatch can tell.
_SAME_SPARSITY = 0.01
#: What a layer's time is multiplied by to be clearly a shorter one.
_CLEARLY = 0.97


@dataclass
class LayerInput:
    """What a layer got when a model ran.

    Attributes
    ----------
    x : Tensor
    requires_grad : bool
        Whether its input wanted a gradient.
    autocast : torch.dtype, optional
        What autocast computed in there; None where it was off.
    chain : sequence
        The operations behind it that can join it.
    """

    x: Tensor
    requires_grad: bool
    autocast: torch.dtype | None = None
    chain: Sequence[Operation] = ()

    def precision(self) -> torch.autocast:
        """Autocast as it was there, whatever it is now."""
        return torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None)


class Stopwatch:
    """Times layers, those that are alike once."""

    def __init__(self) -> None:
        self._timed: dict[tuple[Any, ...], list[tuple[SwapDecision, bool, Modes | None]]] = {}

    def pays(
        self, dense: nn.Module, sparse: nn.Module, seen: LayerInput, decision: SwapDecision, fuse: bool = False
    ) -> bool:
        """Whether a sparse layer takes the input and is the faster one; times and reason go into the decision.

        With `fuse` both are timed together with what would join the sparse one. Where lists and dense rows take about
        the same time, both are tried, and the layer gets the faster ones.
        """
        weight, bias, x = dense_weight(dense)[0], dense_bias(dense), seen.x
        # what decides how long it takes, except for the zeros
        key = (dense_type(dense), dense.extra_repr(), weight.shape, weight.stride(), weight.dtype, trains_weight(dense),
               None if bias is None else bias[1], x.shape, x.stride(), x.dtype, seen.requires_grad,
               seen.autocast, fuse, tuple(seen.chain))  # fmt: skip
        timed = self._timed.setdefault(key, [])
        for other, pays, modes in timed:
            if abs(other.sparsity - decision.sparsity) <= _SAME_SPARSITY:
                decision.dense_ms, decision.sparse_ms = other.dense_ms, other.sparse_ms
                decision.products = other.products
                _set_modes(sparse, modes)
                decision.reason = ", ".join(part for part in (other.reason, f"timed as {other.name}") if part)
                return pays
        pays, modes = _pays(dense, sparse, seen, decision, fuse)
        _set_modes(sparse, modes)
        timed.append((replace(decision), pays, modes))
        return pays


def _set_modes(layer: nn.Module, modes: Modes | None) -> None:
    if modes is not None and isinstance(layer, SparseModule):
        layer.suggest_modes(modes)


def _with_other_modes(sparse: nn.Module) -> SparseModule | None:
    """A copy of a layer that has seen its input, whose products go the other way where that may be faster."""
    if not isinstance(sparse, SparseModule) or (plan := sparse.last_plan()) is None or not sparse.quantized:
        return None
    if (modes := plan.other_modes()) is None:
        return None
    other = copy.deepcopy(sparse)
    other.product_modes = modes
    return other


def _pays(
    dense: nn.Module, sparse: nn.Module, seen: LayerInput, decision: SwapDecision, fuse: bool
) -> tuple[bool, Modes | None]:
    """Whether a sparse layer takes the input and is the faster one, and modes if others than its own are better.

    Times and reason go into the decision.
    """
    dense, sparse = _plain_dense(dense), copy.deepcopy(sparse)
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.no_grad(), seen.precision():
                y = sparse(seen.x)
        except (NotImplementedError, TypeError, ValueError) as error:
            decision.reason = f"cannot take its input: {error}"
            return False, None
        def step(layer: nn.Module) -> Callable[[], None]:
            if isinstance(layer, SparseModule):
                layer.deferring = fuse and layer.can_defer
            return _training_step(nn.Sequential(layer, *_followers(seen.chain, y)), seen)

        modes = None
        if (other := _with_other_modes(sparse)) is not None:
            between = compare_interleaved({"sparse": step(sparse), "other": step(other)}).medians
            if between["other"] < _CLEARLY * between["sparse"]:
                sparse, modes = other, other.product_modes
        timed = compare_interleaved({"dense": step(dense), "sparse": step(sparse)})
    decision.dense_ms, decision.sparse_ms = 1e3 * timed.medians["dense"], 1e3 * timed.medians["sparse"]
    if isinstance(sparse, SparseModule) and sparse.quantized:
        decision.products = str(sparse.product_modes)
    faster = decision.dense_ms > decision.sparse_ms
    decision.reason = ", ".join(part for part in ("" if faster else "faster dense", timed.note) if part)
    return faster, modes


class _With(nn.Module):
    """An operation with a constant."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], constant: Tensor) -> None:
        super().__init__()
        self._function, self._constant = function, constant

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x, self._constant)


_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "clamp": nn.Hardtanh, "leaky_relu": nn.LeakyReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}  # fmt: skip


def _followers(chain: Sequence[Operation], y: Tensor) -> list[nn.Module]:
    """Modules like those that would join a layer which gives `y`."""
    modules: list[nn.Module] = []
    for operation in chain:
        if operation == "BatchNorm":
            modules.append((nn.BatchNorm2d if y.ndim == 4 else nn.BatchNorm1d)(y.shape[1]))
        elif operation == "add":
            modules.append(_With(torch.add, torch.zeros_like(y)))
        elif operation in ("scale", "shift"):
            number = torch.ones(y.shape[1], *(1,) * (y.ndim - 2)) if y.ndim > 3 else torch.ones(y.shape[-1])
            modules.append(_With(torch.mul if operation == "scale" else torch.add, number))
        elif operation == ("clamp", (0.0, math.inf)):
            modules.append(nn.ReLU())
        else:
            modules.append(_ACTIVATIONS[operation[0]](*operation[1]))
    return modules


def _training_step(module: nn.Module, seen: LayerInput) -> Callable[[], None]:
    x = seen.x.detach().requires_grad_(seen.requires_grad)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grad: Tensor | None = None

    def step() -> None:
        nonlocal grad
        x.grad = None
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            with seen.precision():
                y = ordinary(module(x))
            if grad is None:
                grad = torch.ones_like(y)
            if y.requires_grad:
                y.backward(grad)
        # as an optimizer would: of a weight that stays the same codes are kept, which training does not have
        increment_version(parameters)

    return step


def _plain_dense(module: nn.Module) -> nn.Module:
    """A copy of a dense layer without prune's bookkeeping and without hooks, for timing."""
    weight, _ = dense_weight(module)
    kind = dense_type(module)
    plain = kind.__new__(kind)
    plain.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        plain.__dict__[hooks] = type(plain.__dict__[hooks])()
    bias = dense_bias(module)
    for held in (plain._parameters, plain._buffers, plain._modules):
        held.clear()
    for name in ("weight", "bias"):
        plain.__dict__.pop(name, None)
    # its own, too: a step of it must not touch the gradient of the model's
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias[0].clone(), bias[1]))
    # a clone may lose the memory format that makes the dense layer fast
    plain.register_parameter("weight", nn.Parameter(weight.clone(memory_format=torch.preserve_format)))
    return plain
