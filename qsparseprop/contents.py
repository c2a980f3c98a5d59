"""What is known of a tensor before its elements are read: tensors of files promise more than they hold."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qsparseprop._kernels._tensor import check_storage
from qsparseprop._torch_compat import FakeTensor

__all__ = ["check_memory", "check_memory_of", "holds_tensors", "is_convertible", "unreadable"]


@functools.cache
def is_convertible(dtype: torch.dtype) -> bool:
    """Whether numbers of a dtype are floating-point ones that torch can convert, which it cannot for half bytes."""
    try:
        return dtype.is_floating_point and torch.empty(1, dtype=dtype).to(torch.float32).numel() == 1
    except RuntimeError:
        return False


def holds_tensors(tensor: Tensor) -> bool:
    """Whether a tensor's elements are those of others, as a DTensor's are."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_memory(values: object, name: str) -> None:
    """Raise a ValueError where a tensor among values has lost its memory: torch's own operators read it all the same.

    Parameters
    ----------
    values : object
        A tensor, or containers of tensors and other things.
    name : str
        What they are, for the message.
    """
    for value in _pytree.tree_leaves(values):
        if isinstance(value, Tensor) and not holds_tensors(value):
            check_storage(value, name)


def check_memory_of(model: nn.Module) -> None:
    """Do so for all parameters and buffers of a model, naming the one.

    Parameters
    ----------
    model : torch.nn.Module
    """
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if type(tensor) in (Tensor, nn.Parameter):  # not wrappers of others, and lazy ones
                check_storage(tensor, f"{name}.{key}" if name else key)


def unreadable(value: object) -> str | None:
    """What keeps the elements of a tensor from being read within a small multiple of the memory that it takes.

    The elements themselves are not looked at.

    Parameters
    ----------
    value : object
        A tensor, or what stands in the place of one.

    Returns
    -------
    str or None
        What was expected and what it is; None for a dense tensor, of any dtype, whose elements have memory.
    """
    if not isinstance(value, Tensor):
        return f"expected a tensor, got {type(value).__name__}"
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        kind = "a nested" if value.is_nested else f"a quantized {value.dtype}" if value.is_quantized else value.layout
        return f"expected a dense (strided) tensor, got {kind} one"
    if value.is_meta or isinstance(value, FakeTensor) or value._is_zerotensor():
        return "has no contents (it is on the meta device, or fake): load the state with map_location='cpu'"
    if holds_tensors(value):  # its own storage says nothing
        return None
    try:
        check_storage(value, "the tensor")
    except ValueError as error:
        return str(error)
    size, nbytes = value.numel() * value.itemsize, value.untyped_storage().nbytes()
    if size > nbytes:
        return (f"the {value.numel()} elements of a tensor of shape {tuple(value.shape)} share {nbytes} bytes of "
                "memory (it is expanded): save it after contiguous()")
    return None
