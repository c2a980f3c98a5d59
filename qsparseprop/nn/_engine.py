"""Backward passes that are started with tensors of subclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

#: torch's functions that run its engine.
STARTS_BACKWARD: frozenset[Callable[..., Any]] = frozenset(
    (torch.autograd.grad, torch.autograd.backward, Tensor.backward)
)

_PARAMETERS = {function: tuple(inspect.signature(function).parameters) for function in STARTS_BACKWARD}


def run_backward(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], kind: type[Tensor]
) -> Any:
    """What a ``__torch_function__`` does for one of `STARTS_BACKWARD`.

    Much that runs in a backward pass is not autograd's: hooks, and the parts of a model that checkpointing runs again,
    which must do what they did the first time. So functions of subclasses are not switched off meanwhile; torch is
    given tensors, and places in the graph, that have none.
    """
    names = _PARAMETERS[func]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    with torch._C.DisableTorchFunctionSubclass():
        # torch wants the tensors for the former, and has the words for what it does not take
        if given.get("materialize_grads") or len(given) != len(args) + len(kwargs):
            return func(*args, **kwargs)
        given = {name: _each(kind, _place if name == "inputs" else _plain, value) for name, value in given.items()}
    return func(**given)


def _each(kind: type[Tensor], change: Callable[[Tensor], Any], value: Any) -> Any:
    """A tensor of a kind, changed, or those in a sequence."""
    if isinstance(value, kind):
        return change(value)
    return type(value)([_each(kind, change, v) for v in value]) if type(value) in (tuple, list) else value


def _plain(tensor: Tensor) -> Tensor:
    with torch.enable_grad():  # backward passes that checkpointing starts are started without
        return tensor.view_as(tensor)


def _place(tensor: Tensor) -> Any:
    return get_gradient_edge(tensor) if tensor.requires_grad else _plain(tensor)  # about the latter torch complains
