"""What blocks can take up: torch's functions, and what they are recorded as."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

from qsparseprop.nn.blocks import operations
from qsparseprop.nn.deferred.conditions import may_defer
from qsparseprop.nn.deferred.passes import Activation
from qsparseprop.nn.deferred.steps import Normalisation
from qsparseprop.nn.deferred.tensor import HANDLERS, DeferredTensor, pending_of
from qsparseprop.ops import check_storage

if TYPE_CHECKING:
    from qsparseprop.nn.deferred.tensor import ChainTensor

_RELU = Activation("clamp", (0.0, math.inf))


def _records(*functions: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


def _can_be_changed(source: Tensor) -> bool:
    """Whether torch lets a tensor be changed in place."""
    return not (source.is_leaf and source.requires_grad and torch.is_grad_enabled()) and (
        not source.is_inference() or torch.is_inference_mode_enabled())  # fmt: skip


def _activation(source: Any, activation: Activation, in_place: bool) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if not may_defer() or pending_of(source) is None:
            return NotImplemented
        if in_place and not _can_be_changed(source):
            return NotImplemented
        return operations.activate(source, activation, in_place)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@_records(torch.relu, Tensor.relu)
def _relu(input: Any) -> Any:
    return _activation(input, _RELU, False)


@_records(torch.relu_, Tensor.relu_, functional.relu_)
def _relu_(input: Any) -> Any:
    return _activation(input, _RELU, True)


@_records(functional.relu)
def _functional_relu(input: Any, inplace: bool = False) -> Any:
    return _activation(input, _RELU, bool(inplace))


@_records(functional.relu6)
def _relu6(input: Any, inplace: bool = False) -> Any:
    return _activation(input, Activation("clamp", (0.0, 6.0)), bool(inplace))


@_records(functional.hardtanh)
def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    if not _is_number(min_val) or not _is_number(max_val) or min_val >= max_val:
        return NotImplemented
    return _activation(input, Activation("clamp", (float(min_val), float(max_val))), bool(inplace))


@_records(functional.leaky_relu)
def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not _is_number(negative_slope):
        return NotImplemented
    return _activation(input, Activation("leaky_relu", (float(negative_slope),)), bool(inplace))


@_records(functional.silu)
def _silu(input: Any, inplace: bool = False) -> Any:
    return _activation(input, Activation("silu"), bool(inplace))


@_records(functional.hardswish)
def _hardswish(input: Any, inplace: bool = False) -> Any:
    return _activation(input, Activation("hardswish"), bool(inplace))


@_records(functional.gelu)
def _gelu(input: Any, *, approximate: str = "none") -> Any:
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(approximate)
    return NotImplemented if name is None else _activation(input, Activation(name), False)


@_records(functional.dropout, functional.dropout1d, functional.dropout2d)
def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    """Gives, as torch does, the tensor itself where there is nothing to drop."""
    if type(input) is not DeferredTensor or not _is_number(p) or not 0 <= p <= 1 or (training and p):
        return NotImplemented
    return input


@_records(functional.batch_norm)
def _batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if not may_defer() or (pending := pending_of(input)) is None or not pending.layout.channels_first:
            return NotImplemented
        if not (_known(running_mean) and _known(running_var) and _known(weight) and _known(bias)
                and _is_number(momentum) and _is_number(eps)):  # fmt: skip
            return NotImplemented
        norm = Normalisation(running_mean, running_var, bool(training), float(momentum), float(eps))
        try:
            return operations.batch_norm(input, weight, bias, norm)
        except (TypeError, ValueError):  # the kernels refuse it before anything has changed: torch knows more
            for name, tensor in (("weight", weight), ("bias", bias), ("running_mean", running_mean),
                                 ("running_var", running_var)):  # fmt: skip
                check_storage(tensor, f"{name} of the batch normalisation")  # but that
            return NotImplemented


def _known(tensor: Any) -> bool:
    return tensor is None or type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _addition(source: Any, other: Any, in_place: bool) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if not may_defer() or not isinstance(source, Tensor) or not isinstance(other, Tensor) or source is other:
            return NotImplemented
        first = source
        if not in_place and _goes_first(other, source):
            source, other = other, source
        if not in_place and _is_for_channels(source, other):
            return operations.channel_map(source, None, other)
        # torch's result looks like the first one
        looks_other = not in_place and source.stride() != other.stride() and (source is not first or 1 in source.shape)
        if (pending_of(source) is None or source.shape != other.shape or source.dtype is not other.dtype or looks_other
                or not (type(other) is DeferredTensor or _is_plain(other))
                or (in_place and not _can_be_changed(source))):  # fmt: skip
            return NotImplemented
        return operations.add(source, other, in_place)


def _goes_first(other: Tensor, source: Tensor) -> bool:
    """Whether an addition is better taken up behind the second summand: it can be, and has a pass to be done in."""
    first, second = pending_of(source), pending_of(other)
    return second is not None and (first is None or (second.is_mapped and not first.is_mapped))


def _is_for_channels(source: Tensor, other: Tensor) -> TypeGuard[ChainTensor]:
    """Whether a tensor holds a constant for each channel of a deferred one, as normalisations that are frozen have."""
    pending = pending_of(source)
    if (pending is None or not _is_plain(other) or other.dtype is not torch.float32 or source.dtype is not other.dtype
            or (other.requires_grad and torch.is_grad_enabled())):  # fmt: skip
        return False
    channels = pending.layout.images[1]
    behind = source.ndim - 2 if pending.layout.channels_first else 0
    shape = (channels, *(1,) * behind)
    return channels > 1 and tuple(other.shape) in (shape, (1,) * (source.ndim - len(shape)) + shape)


@_records(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
def _mul(input: Any, other: Any, *, out: Any = None) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if out is not None or not isinstance(input, Tensor) or not isinstance(other, Tensor) or not may_defer():
            return NotImplemented
        source, factor = (input, other) if pending_of(input) is not None else (other, input)
        return operations.channel_map(source, factor, None) if _is_for_channels(source, factor) else NotImplemented


def _is_plain(tensor: Tensor) -> bool:
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided
            and not tensor.is_neg() and not tensor.is_conj())  # fmt: skip


@_records(torch.add, Tensor.add)
def _add(input: Any, other: Any, *, alpha: Any = 1, out: Any = None) -> Any:
    return NotImplemented if out is not None or alpha != 1 else _addition(input, other, False)


@_records(Tensor.__add__, Tensor.__radd__)
def _operator_add(input: Any, other: Any) -> Any:
    return _addition(input, other, False)


@_records(Tensor.add_)
def _add_(input: Any, other: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if alpha != 1 else _addition(input, other, True)


@_records(Tensor.__iadd__)
def _operator_iadd(input: Any, other: Any) -> Any:
    return _addition(input, other, True)
