"""Running a model once on an example: what its layers get, who reads their weights, and which ones it really calls."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree

from qsparseprop.nn._dense import dense_type, dense_weight, trains_weight

#: Runs a model once.
Runner = Callable[[nn.Module], Any]


def make_runner(model: nn.Module, example: Any) -> Runner:
    """How to run a model, from what the user gives as its input; see `swap_modules_with_sparse`.

    Raises
    ------
    TypeError, ValueError
        For something that is no input.
    """
    if isinstance(example, nn.Module):
        raise TypeError("input_shape must be an input of the model or a callable that runs it, got a module")
    if isinstance(example, Tensor):
        return _arguments((example,), {})
    if isinstance(example, Mapping):
        return _arguments((), {key: _filled(model, value) for key, value in example.items()})
    if callable(example):
        return _callable(example)
    if not isinstance(example, (tuple, list)):
        raise TypeError("input_shape must be a shape, a tensor, a tuple or dict of these, or a callable that runs the "
                        f"model, got {type(example).__name__}")  # fmt: skip
    if all(isinstance(item, (int, float)) for item in example):
        return _arguments((_tensor_of_shape(model, example),), {})
    return _arguments(tuple(_filled(model, item) for item in example), {})


def _tensor_of_shape(model: nn.Module, shape: Sequence[Any]) -> Tensor:
    shape = tuple(shape)
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"input_shape must be positive integers, batch included, got {shape!r}")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # neither values nor the state of torch's generator should depend on a conversion
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)


def _filled(model: nn.Module, item: Any) -> Any:
    """An argument: a shape becomes a tensor, anything else is what it is."""
    is_shape = isinstance(item, (tuple, list)) and item and all(type(n) is int for n in item)
    return _tensor_of_shape(model, item) if is_shape else item


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Runner:
    def fresh(value: Any) -> Any:
        # a model may change its input in place, and is run more than once
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    def run(model: nn.Module) -> Any:
        return model(*_pytree.tree_map(fresh, args), **_pytree.tree_map(fresh, kwargs))

    return run


def _callable(function: Callable[..., Any]) -> Runner:
    """A function of the model, or one without parameters that runs a model of its own."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return lambda model: function()
    except ValueError:  # has no signature
        pass
    return function


# ---- a model as it was ----


def copy_model(model: nn.Module) -> nn.Module:
    """Deep copy that also takes models with prune's masks attached.

    Prune keeps the masked weight as a plain attribute, which after a forward pass is part of a graph and as such
    refused by deepcopy; for the time of the copy a detached view stands in.
    """
    attributes = [
        (module, key, value)
        for module in model.modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    try:
        for module, key, value in attributes:
            vars(module)[key] = value.detach()
        return copy.deepcopy(model)
    finally:
        for module, key, value in attributes:
            vars(module)[key] = value


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the generators of torch, numpy and Python as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - what models draw from
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Leave attributes, buffers and gradients of a model as they were, whatever a forward pass does to them."""
    attributes = [(m, dict(vars(m))) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    holders = [value for _, values in attributes for value in values.values() if isinstance(value, (dict, list, set))]
    contents = [(holder, copy.copy(holder)) for holder in holders]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        yield
    finally:
        for module, values in attributes:
            vars(module).clear()
            vars(module).update(values)
        for holder, content in contents:
            if isinstance(holder, list):
                holder[:] = content
            else:
                holder.clear()
                holder.update(content)
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value) and not buffer.is_inference():
                    buffer.copy_(value)
        for parameter, grad in grads:
            parameter.grad = grad


# ---- what a run shows ----


@dataclass
class LayerInput:
    """What a layer got: its input, and whether that wants a gradient."""

    x: Tensor
    requires_grad: bool


class _WatchedParameter(nn.Parameter):
    """A parameter that tells when it is computed with."""

    tell: Callable[[], None] = staticmethod(lambda: None)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _HARMLESS:
            for value in _pytree.tree_leaves((args, kwargs)):
                if isinstance(value, cls):
                    value.tell()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


#: What is the same of the values of a sparse weight.
_HARMLESS = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "requires_grad", "is_cuda", "is_cpu",
             "is_meta", "layout", "is_leaf", "grad", "grad_fn")} | {Tensor.is_floating_point, torch.is_floating_point}


def record(model: nn.Module, names: Iterable[str], run: Runner) -> tuple[dict[str, LayerInput], set[str]]:
    """Run a copy of a model once.

    A copy, so that batch statistics, random state of modules and hooks of the model stay untouched.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Dense layers to watch.
    run : callable
        See `make_runner`.

    Returns
    -------
    inputs : dict of str to LayerInput
        Of the layers that were called; the largest of several inputs.
    read : set of str
        Layers whose weight was computed with outside of their own forward pass.
    """
    probe = copy_model(model)
    probe.train(model.training)
    inputs: dict[str, LayerInput] = {}
    read: set[str] = set()

    def watch(name: str, layer: nn.Module) -> None:
        inside = 0
        forward = layer.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            x = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(x, Tensor) and (name not in inputs or x.numel() > inputs[name].x.numel()):
                inputs[name] = LayerInput(x.detach().clone(memory_format=torch.preserve_format), x.requires_grad)
            inside += 1
            try:
                return forward(*args, **kwargs)
            finally:
                inside -= 1

        layer.forward = watched
        weight = _WatchedParameter(layer.weight.detach(), layer.weight.requires_grad)
        layer.register_parameter("weight", weight)  # which looks at it
        weight.tell = lambda: None if inside else read.add(name)

    for name in names:
        layer = probe.get_submodule(name)
        _bake_mask(layer)
        watch(name, layer)
    with random_state_kept(), torch.enable_grad():
        run(probe)
    return inputs, read


def _bake_mask(layer: nn.Module) -> None:
    """Make a mask permanent, so that the weight is a parameter that can be watched."""
    if parametrize.is_parametrized(layer):
        # not by torch's function: that changes the class, which the layer shares with the one that it is a copy of
        weight, _ = dense_weight(layer)
        kind, requires_grad = dense_type(layer), trains_weight(layer)
        del layer._modules["parametrizations"]
        layer.__class__ = kind
        layer.register_parameter("weight", nn.Parameter(weight, requires_grad))
    if prune.is_pruned(layer) and hasattr(layer, "weight_orig"):
        prune.remove(layer, "weight")


def not_called(model: nn.Module, layers: Mapping[str, nn.Module], run: Runner) -> list[str]:
    """Which of some layers a model does not call when it is run; it is left as it was."""
    called: set[str] = set()
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        # the first run of lazy modules cannot be taken back
        model = copy_model(model)
        layers = {name: model.get_submodule(name) for name in layers}

    def listen(name: str, layer: nn.Module) -> None:
        forward = layer.forward

        def heard(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return forward(*args, **kwargs)

        layer.forward = heard

    with state_kept(model), random_state_kept():
        for name, layer in layers.items():
            listen(name, layer)
        with torch.enable_grad():
            run(model)
    return [name for name in layers if name not in called]
