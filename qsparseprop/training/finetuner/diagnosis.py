"""Where in a model the first number that is not finite appears."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layer_times import _tensors

__all__ = ["first_bad_layer"]


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


class _Found(Exception):
    """Ends the forward pass; `name` and `sentence` are what `first_bad_layer` gives."""

    def __init__(self, name: str | None, sentence: str) -> None:
        super().__init__(sentence)
        self.name, self.sentence = name, sentence


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
    try:
        for name, module in model.named_modules():
            before, after = functools.partial(_look_before, name), functools.partial(_look_after, name)
            handles.append(module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        with torch.no_grad():
            forward()
    except _Found as found:
        return found.name, found.sentence
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return None, "every layer's output is finite: look at the targets and the loss function"


def _look_before(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if name == "" and not _finite((args, kwargs)):
        raise _Found(None, "the input of the model has NaN or Inf")
    for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if tensor.is_floating_point() and not _finite(tensor):
            raise _Found(name, f"{key!r} of {_describe(name, module)} has NaN or Inf")


def _look_after(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if not _finite(output):  # inner modules report first, so this one made them itself
        raise _Found(name, f"the output of {_describe(name, module)} is the first with NaN or Inf")


def _describe(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
