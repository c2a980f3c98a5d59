"""The graph of a model, if one graph is right for whatever it may be called with."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from qsparseprop.nn._base import SparseModule
from qsparseprop.nn.attention import MultiheadAttention
from qsparseprop.nn.intrinsic import QuantizedBNReLU2d


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what changes buffers becomes part of the graph, and is not done while tracing

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = (SparseModule, QuantizedBNReLU2d, MultiheadAttention)
        return isinstance(module, own) or super().is_leaf_module(module, name)


def _trace_in(model: nn.Module, training: bool) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph in a mode, and the tensors made by the forward pass, which the graph wants as attributes of the model.

    The model is as it was afterwards.
    """
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        for module in before:
            module.training = training
        graph = _Tracer().trace(model)
        constants = {name: value for name, value in vars(model).items() if name not in before[model]}
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
    return graph, constants


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)


def trace(model: nn.Module) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace a model by ``torch.fx``.

    Parameters
    ----------
    model : torch.nn.Module
        It is not changed.

    Returns
    -------
    graph : torch.fx.Graph
    constants : dict
        Attributes that the model needs for the graph.

    Raises
    ------
    TypeError
        If a graph would take one value of an argument, or of the mode, for all of them.
    Exception
        Whatever user code raises that cannot be traced.
    """
    if "forward" in vars(model):
        raise TypeError("its forward pass was replaced")
    for parameter in inspect.signature(type(model).forward).parameters.values():
        if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
            raise TypeError(f"its forward pass has an optional argument, {parameter.name}")
    (graph, constants), (other, others) = (_trace_in(model, mode) for mode in (True, False))
    if graph.python_code("self").src != other.python_code("self").src:
        raise TypeError("its forward pass looks at the mode: put dropout into modules")
    if constants.keys() != others.keys() or not all(_equal(constants[name], others[name]) for name in constants):
        raise TypeError("its forward pass makes tensors that differ from call to call or between modes")
    return graph, constants
