"""Backward passes that are started with tensors of subclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map_only

#: torch's functions that run its engine.
STARTS_BACKWARD = frozenset((torch.autograd.grad, torch.autograd.backward, Tensor.backward))

_SIGNATURES = {function: inspect.signature(function) for function in STARTS_BACKWARD}


def run_backward(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], kind: type[Tensor]
) -> Any:
    """What a ``__torch_function__`` does for one of `STARTS_BACKWARD`.

    Much that runs in a backward pass is not autograd's: hooks, and the parts of a model that checkpointing runs again,
    which must do what they did the first time. So functions of subclasses are not switched off meanwhile; torch is
    given tensors, and places in the graph, that have none.
    """
    bound = _SIGNATURES[func].bind(*args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        if bound.arguments.get("materialize_grads"):  # for which torch wants the tensors
            return func(*args, **kwargs)
        for name, value in bound.arguments.items():
            bound.arguments[name] = tree_map_only(kind, _place if name == "inputs" else _plain, value)
    return func(*bound.args, **bound.kwargs)


def _plain(tensor: Tensor) -> Tensor:
    with torch.enable_grad():  # backward passes that checkpointing starts are started without
        return tensor.view_as(tensor)


def _place(tensor: Tensor) -> Any:
    return get_gradient_edge(tensor) if tensor.requires_grad else _plain(tensor)  # about the latter torch complains
