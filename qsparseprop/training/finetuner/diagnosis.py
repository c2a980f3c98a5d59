"""Where in a model the first number that is not finite appears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .layer_times import _tensors

__all__ = ["first_bad_layer"]


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


class _Found(Exception):
    pass


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
    found: list[tuple[str | None, str]] = []
    handles = []

    def before(name: str, module: nn.Module):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name == "" and not _finite((args, kwargs)):
                found.append((None, "the input of the model has NaN or Inf"))
                raise _Found
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.is_floating_point() and not _finite(tensor):
                    found.append((name, f"{key!r} of {_describe(name, module)} has NaN or Inf"))
                    raise _Found

        return hook

    def after(name: str, module: nn.Module):
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            # Inner modules report first, so this one made them itself.
            if not _finite(output):
                found.append((name, f"the output of {_describe(name, module)} is the first with NaN or Inf"))
                raise _Found

        return hook

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name, module), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(after(name, module)))
        with torch.no_grad():
            forward()
    except _Found:
        pass
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return found[0] if found else (None, "every layer's output is finite: look at the targets and the loss function")


def _describe(name: str, module: nn.Module) -> str:
    return f"layer {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
