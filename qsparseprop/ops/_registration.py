"""One place where operators are registered with ``torch.library``, and the short way past its dispatcher."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.profiler import record_function

from qsparseprop._kernels._tensor import are_plain, check_storage
from qsparseprop._torch_compat import dispatch_modes, profiler_is_on, refusing_derivatives

_library = torch.library.Library("qsparseprop", "DEF")


class Operator:
    """An operator, to be called past torch's dispatcher, which costs as much as the kernels of a small layer.

    The dispatcher stays where somebody watches, a profiler or a dispatch mode, and where it has something to do: a
    tensor is a subclass, a negative view, wrapped, or without its memory (see `are_plain`).

    Attributes
    ----------
    function : callable
        The implementation.
    overload : torch.OpOverload
        What is registered.
    """

    __slots__ = ("function", "overload")

    def __init__(self, function: Callable[..., Any], overload: Callable[..., Any]) -> None:
        self.function, self.overload = function, overload

    def chosen(self, *args: Any) -> Callable[..., Any]:
        """What is called with these arguments."""
        watched = profiler_is_on() or dispatch_modes() or not are_plain(*args)
        return self.overload if watched else self.function

    def __call__(self, *args: Any) -> Any:
        return self.chosen(*args)(*args)


_NOTHING = contextlib.nullcontext()


def seen_as(name: str) -> Any:
    """What runs in this context is one event to a profiler, by a name such as operators have."""
    return record_function(f"qsparseprop::{name}") if profiler_is_on() else _NOTHING


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a profiler sees by its name, as it sees operators; "_plain" behind that is left out."""
    name = function.__name__.removesuffix("_plain")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not profiler_is_on():
            return function(*args, **kwargs)
        with seen_as(name):
            return function(*args, **kwargs)

    return call


def check_tensors(**tensors: Tensor | None) -> None:
    """Refuse tensors whose storage was made smaller than they are."""
    for name, tensor in tensors.items():
        check_storage(tensor, name)


@overload
def in_memory(tensor: Tensor, name: str) -> Tensor: ...
@overload
def in_memory(tensor: Tensor | None, name: str) -> Tensor | None: ...
def in_memory(tensor: Tensor | None, name: str) -> Tensor | None:
    """A tensor that comes from outside as the kernels can read it, without a history where it had to be copied.

    Copied are views with the negative bit, subclasses, and tensors that only say that they are zero.

    Parameters
    ----------
    tensor : Tensor or None
    name : str
        What an error calls it.

    Returns
    -------
    Tensor or None
        The same one where it can be read as it is.

    Raises
    ------
    ValueError
        If its storage was made smaller than it is.
    """
    if tensor is None or are_plain(tensor):
        return tensor
    check_storage(tensor, name)
    return tensor.detach().clone().as_subclass(Tensor)


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """What an autograd.Function saved, which may have been freed meanwhile, or replaced by hooks.

    Which of them are tensors, and which None, knows the function that saved them.

    Parameters
    ----------
    ctx : object
        Of the function.

    Returns
    -------
    tuple
        Of tensors and None.
    """
    return tuple([in_memory(tensor, "a tensor that was saved for the backward pass") for tensor in ctx.saved_tensors])


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that refuses tensors whose memory is too small, as nobody else does."""
    names = list(inspect.signature(function).parameters)

    @functools.wraps(function)
    def checked(*args: Any) -> Any:
        for name, argument in zip(names, args, strict=False):
            if isinstance(argument, Tensor):
                check_storage(argument, name)
        return function(*args)

    return checked


_NO_DERIVATIVE = "the operators of qsparseprop have no derivatives: use the modules of qsparseprop.nn"


def _refuse_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    """Without it torch would take the gradient for zero, and warn of that only."""
    raise NotImplementedError(_NO_DERIVATIVE)


def operator(
    schema: str,
    fake: Callable[..., Any],
    *,
    tags: Sequence[torch.Tag] = (),
    backward: Callable[..., Any] = _refuse_derivative,
    setup_context: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as the CPU implementation of an operator.

    Parameters
    ----------
    schema : str
        Its name and arguments, as `torch.library.define` takes them.
    fake : callable
        Gives the shapes and dtypes of the results.
    tags : sequence of torch.Tag
    backward, setup_context : callable
        As for `torch.library.register_autograd`; without them the operator has no derivative, and says so.

    Returns
    -------
    callable
        A decorator, which makes an `Operator` of the function.
    """

    def register(function: Callable[..., Any]) -> Operator:
        name = schema.partition("(")[0]
        _library.define(schema, tags=tuple(tags))
        _library.impl(name, _checked(function), "CPU")
        torch.library.register_fake(f"qsparseprop::{name}", fake, lib=_library)
        overload = getattr(torch.ops.qsparseprop, name).default
        if overload._schema.is_mutable:
            _library.impl(name, refusing_derivatives(overload, _NO_DERIVATIVE), "Autograd", with_keyset=True)
        else:
            torch.library.register_autograd(f"qsparseprop::{name}", backward, setup_context=setup_context, lib=_library)
        overload.__doc__ = function.__doc__
        return Operator(function, overload)

    return register
