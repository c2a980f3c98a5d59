"""Where in a model the first number that is not finite appears."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layer_times import _tensors

__all__ = ["NonFiniteLossError", "first_bad_layer"]


class NonFiniteLossError(FloatingPointError):
    """The loss of a training step was NaN or infinite.

    Parameters
    ----------
    loss : float
    step : int
        Number of the step, from 1.
    layer : str or None
        The first layer whose parameters or output are not finite; None where it is not the model's fault.
    sentence : str
        What is not finite, for the message.

    Attributes
    ----------
    step, layer
        As above.
    """

    def __init__(self, loss: float, step: int, layer: str | None, sentence: str) -> None:
        super().__init__(f"the loss is {loss} in training step {step}: {sentence}")
        self.step, self.layer = step, layer


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


class _Found(Exception):
    """Ends the forward pass, unless the model takes it for an error of its own."""


class _Search:
    """The hooks, and the first thing that one of them finds."""

    def __init__(self) -> None:
        self.found: tuple[str | None, str] | None = None

    def _end(self, name: str | None, sentence: str) -> None:
        self.found = self.found or (name, sentence)
        raise _Found(sentence)

    def before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "" and not _finite((args, kwargs)):
            self._end(None, "the input of the model has NaN or Inf")
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.is_floating_point() and not _finite(tensor):
                self._end(name, f"{key!r} of {_describe(name, module)} has NaN or Inf")

    def after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not _finite(output):  # inner modules report first, so this one made them itself
            self._end(name, f"the output of {_describe(name, module)} is the first with NaN or Inf")


def first_bad_layer(model: nn.Module, forward: Callable[[], Any]) -> tuple[str | None, str]:
    """Run a forward pass and say which module is the first to turn finite numbers into others.

    Buffers (the statistics of batch normalisation) are left as they were.

    Parameters
    ----------
    model : nn.Module
        Whose modules are watched.
    forward : callable
        Runs the model once.

    Returns
    -------
    name : str or None
        Qualified name of the module; None where none does so: the data or the loss function are to blame.
    sentence : str
        The same for people, with the reason where it can be seen.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handles = []
    search = _Search()
    try:
        for name, module in model.named_modules():
            before, after = functools.partial(search.before, name), functools.partial(search.after, name)
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        with contextlib.suppress(_Found), torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return search.found or (None, "every layer's output is finite: look at the targets and the loss function")


def _describe(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
