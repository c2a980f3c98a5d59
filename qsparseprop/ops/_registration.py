"""One place where operators are registered with ``torch.library``, and the short way past its dispatcher."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsparseprop._kernels._tensor import are_plain, check_storage
from qsparseprop._torch_compat import dispatch_modes, profiler_is_on, refusing_derivatives

_library = torch.library.Library("qsparseprop", "DEF")

#: The implementations behind the operators.
_direct: dict[str, Callable] = {}


def shortcut(name: str, *tensors: Tensor | None) -> Callable:
    """An operator for internal use, without the dispatcher, which costs as much as the kernels of a small layer.

    The dispatcher stays where somebody watches, a profiler or a dispatch mode, and where it has something to do: one of
    the tensors that come from outside is a subclass, a negative view, wrapped, or without its memory (see `are_plain`).
    Operators call others, of which they are made, without tensors: then only a profiler matters.
    """
    if profiler_is_on() or (tensors and (dispatch_modes() or not are_plain(*tensors))):
        return getattr(torch.ops.qsparseprop, name).default
    return _direct[name]


def saved_tensors(ctx: Any) -> tuple[Tensor | None, ...]:
    """What an autograd.Function saved, for those who read it by torch, which reads freed memory."""
    tensors = ctx.saved_tensors  # once: hooks make them anew
    for tensor in tensors:
        check_storage(tensor, "a tensor that was saved for the backward pass")
    return tensors


def _checked(function: Callable) -> Callable:
    """An implementation that refuses tensors whose memory is too small, as nobody else does."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        for name, argument in zip(names, args, strict=False):
            if isinstance(argument, Tensor):
                check_storage(argument, name)
            elif isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
                for i, tensor in enumerate(argument):
                    check_storage(tensor, f"{name}[{i}]")
        return function(*args)

    return checked


_NO_DERIVATIVE = "the operators of qsparseprop have no derivatives: use the modules of qsparseprop.nn"


def _refuse_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    """Without it torch would take the gradient for zero, and warn of that only."""
    raise NotImplementedError(_NO_DERIVATIVE)


def operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as the CPU implementation of an operator.

    Parameters
    ----------
    schema : str
        Its name and arguments, as `torch.library.define` takes them.
    fake : callable
        Gives the shapes and dtypes of the results.
    """

    def register(function: Callable) -> Callable:
        name = schema.partition("(")[0]
        _direct[name] = function
        _library.define(schema)
        _library.impl(name, _checked(function), "CPU")
        torch.library.register_fake(f"qsparseprop::{name}", fake, lib=_library)
        overload = getattr(torch.ops.qsparseprop, name).default
        if overload._schema.is_mutable:
            _library.impl(name, refusing_derivatives(overload, _NO_DERIVATIVE), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(f"qsparseprop::{name}", _refuse_derivative, lib=_library)
        overload.__doc__ = function.__doc__
        return overload

    return register
