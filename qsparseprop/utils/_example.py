"""Running a model once on an example: what its layers get, who reads their weights, and which ones it really calls."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils import _pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from qsparseprop.arguments import shown
from qsparseprop.contents import check_memory
from qsparseprop.nn._dense import dense_type, dense_weight, held, trains_weight
from qsparseprop.nn.blocks.start import last_chain, start_chains
from qsparseprop.utils._layer_timing import LayerInput

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
        return _callable(model, example)
    if not isinstance(example, (tuple, list)):
        raise TypeError("input_shape must be a shape, a tensor, a tuple or dict of these, or a callable that runs the "
                        f"model, got {type(example).__name__}")  # fmt: skip
    if all(isinstance(item, Real) for item in example):  # numpy's numbers are some
        return _arguments((_tensor_of_shape(model, example),), {})
    return _arguments(tuple(_filled(model, item) for item in example), {})


def _tensor_of_shape(model: nn.Module, shape: Sequence[Any]) -> Tensor:
    shape = tuple(int(n) if _is_size(n) else n for n in shape)
    if not shape or not all(_is_size(n) and n > 0 for n in shape):
        raise ValueError(f"input_shape must be positive integers, batch included, got {shown(shape)}")
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    # neither values nor the state of torch's generator should depend on a conversion
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)


def _filled(model: nn.Module, item: Any) -> Any:
    """An argument: a shape becomes a tensor, anything else is what it is."""
    is_shape = isinstance(item, (tuple, list)) and item and all(map(_is_size, item))
    return _tensor_of_shape(model, item) if is_shape else item


def _is_size(n: Any) -> bool:
    return isinstance(n, Integral) and not isinstance(n, bool)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Runner:
    check_memory((args, kwargs), "the example input")

    def fresh(value: Any) -> Any:
        # a model may change its input in place, and is run more than once
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)

    def run(model: nn.Module) -> Any:
        return model(*_pytree.tree_map(fresh, args), **_pytree.tree_map(fresh, kwargs))

    return run


def _callable(original: nn.Module, function: Callable[..., Any]) -> Runner:
    """A function of the model, or one without parameters, which runs the one that it knows."""
    try:
        inspect.signature(function).bind(None)
        takes_model = True
    except TypeError:
        takes_model = False
    except ValueError:  # has no signature
        takes_model = True

    def run(model: nn.Module) -> Any:
        with _in_the_place_of(original, model):
            return function(model) if takes_model else function()

    return run


@contextlib.contextmanager
def _in_the_place_of(original: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let who holds a model, as a function may, find the parts of a copy in it."""
    if model is original:
        yield
        return
    own = dict(vars(original))
    vars(original).clear()
    vars(original).update(vars(model))
    try:
        yield
    finally:
        vars(original).clear()
        vars(original).update(own)


# ---- a model as it was ----


def copy_model(model: nn.Module) -> nn.Module:
    """Deep copy that also takes models which hold tensors that are part of a graph: the copy's are not.

    deepcopy refuses these. Prune's masked weights are such after a forward pass, and so are outputs that models keep.
    """
    memo: dict[int, Any] = {}
    for tensor in _reachable(model).tensors:
        if not tensor.is_leaf:
            memo[id(tensor)] = copy.deepcopy(tensor.detach(), memo)
    return copy.deepcopy(model, memo)


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
def _watchable() -> Iterator[None]:
    """With gradients, as in training, and by the interpreter: compiled code does not call what watches layers."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if "torch._dynamo" in sys.modules:  # which takes seconds to import; where nobody has, nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextlib.contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Leave attributes, parameters, buffers and gradients of a model as they were, whatever a forward pass does to it.

    Included are the contents of lists, dicts and the like, and modules that are only there.
    """
    attributes, holders, tensors, generators = _reachable(model)
    random_states = [generator.get_state() for generator in generators]
    contents = [(holder, copy.copy(holder)) for holder in holders]
    grads = [(t, t.grad) for t in tensors if t.is_leaf and t.grad is not None]
    leaves = [t for t in tensors if t.is_leaf and t.grad is None]
    values = [(t, t.detach().clone()) for t in [*tensors, *(grad for _, grad in grads)] if _can_be_kept(t)]
    try:
        yield
    finally:
        for module, own in attributes:
            vars(module).clear()
            vars(module).update(own)
        for holder, content in contents:
            holder.clear()
            (holder.extend if isinstance(holder, (list, deque)) else holder.update)(content)
        with torch.no_grad():
            for tensor, value in values:
                data = tensor.detach()
                if data.shape != value.shape or data.dtype != value.dtype:
                    tensor.data = value
                elif not torch.equal(data, value):
                    data.copy_(value)
        for generator, random_state in zip(generators, random_states, strict=True):
            generator.set_state(random_state)
        for parameter, grad in [*grads, *((leaf, None) for leaf in leaves)]:
            parameter.grad = grad


def _can_be_kept(tensor: Tensor) -> bool:
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        return False
    if is_traceable_wrapper_subclass(tensor) or tensor.is_inference() or tensor.is_meta:
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


class _Held(NamedTuple):
    """What a model holds: modules with their attributes, containers that may change, and more, each once."""

    attributes: list[tuple[nn.Module, dict[str, Any]]]
    holders: list[Any]
    tensors: list[Tensor]
    generators: list[torch.Generator]


def _reachable(model: nn.Module) -> _Held:
    """All that a model holds by its attributes, and these by theirs: methods, closures and weak references too."""
    attributes, holders, tensors, generators = found = _Held([], [], [], [])
    seen: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value  # a temporary one must not give its id to another
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, nn.Module) and not isinstance(value, torch.jit.ScriptModule):
            attributes.append((value, dict(vars(value))))
            waiting.extend(vars(value).values())
        elif isinstance(value, torch.jit.ScriptModule):
            tensors.extend(value.buffers())
            tensors.extend(value.parameters())
        elif isinstance(value, torch.Generator):
            generators.append(value)
        else:
            if isinstance(value, (dict, list, set, deque)):
                holders.append(value)
            waiting.extend(_held_by(value))
    return found


def _held_by(value: Any) -> Iterable[Any]:
    """What can be reached from a value that is neither a tensor nor a module."""
    if isinstance(value, types.CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # not filled yet
            return ()
    return next((parts(value) for kinds, parts in _PARTS if isinstance(value, kinds)), ())


_PARTS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    (dict, lambda v: v.values()),
    ((list, set, deque, tuple, frozenset), lambda v: v),
    (functools.partial, lambda v: (v.func, v.args, v.keywords)),
    (types.MethodType, lambda v: (v.__self__, v.__func__)),
    (types.FunctionType, lambda v: (v.__closure__ or (), v.__defaults__, v.__kwdefaults__)),
    (weakref.ref, lambda v: (v(),)),
)


# ---- what a run shows ----


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


def _watch(parameter: Tensor, tell: Callable[[], None]) -> None:
    """Have a parameter tell, as the object that it is, since others may hold it."""
    if type(parameter) is nn.Parameter:
        parameter.__class__ = _WatchedParameter
        vars(parameter)["tell"] = tell


def _watch_no_more(parameter: nn.Parameter) -> None:
    if type(parameter) is _WatchedParameter:
        del parameter.tell
        parameter.__class__ = nn.Parameter  # type: ignore[assignment]  # not of the class that it is of


def record(
    model: nn.Module, names: Iterable[str], run: Runner, chains: bool = False
) -> tuple[dict[str, LayerInput], set[str]]:
    """Run a copy of a model once.

    A copy, so that batch statistics, random state of modules and hooks of the model stay untouched.

    Parameters
    ----------
    model : nn.Module
    names : iterable of str
        Dense layers to watch.
    run : callable
        See `make_runner`.
    chains : bool
        Whether to find out what blocks would take up behind the layers.

    Returns
    -------
    inputs : dict of str to LayerInput
        Of the layers that were called; the largest of several inputs.
    read : set of str
        Layers whose weight was computed with outside of their own forward pass.
    """
    try:
        probe = copy_model(model)
    except Exception as error:
        raise TypeError(f"the model cannot be copied to be run on the example: {error}. include_dense=False replaces "
                        "layers without running it") from error  # fmt: skip
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
                autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
                x, x_grad = x.detach().clone(memory_format=torch.preserve_format), x.requires_grad
                inputs[name] = LayerInput(x, x_grad, autocast)
            inside += 1
            try:
                return forward(*args, **kwargs)
            finally:
                inside -= 1

        if chains:
            start_chains(layer)
        layer.forward = watched
        _watch(held(layer, "weight"), lambda: None if inside else read.add(name))

    for name in names:
        layer = probe.get_submodule(name)
        _bake_mask(layer)
        watch(name, layer)
    # what a function keeps is no part of the copy, but of the model
    with state_kept(model), random_state_kept(), _watchable():
        run(probe)
    for name, seen in inputs.items():
        seen.chain = last_chain(probe.get_submodule(name))
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


def not_called(
    model: nn.Module, layers: Mapping[str, nn.Module], replaced: Mapping[str, nn.Module], run: Runner
) -> list[str]:
    """Which of some layers a model does not call when it is run, or computes with what they have replaced.

    The model is left as it was.

    Parameters
    ----------
    model : nn.Module
    layers, replaced : mapping of str to nn.Module
        What is in the model now, and what was there before.
    run : callable
        See `make_runner`.
    """
    called: set[str] = set()
    outdated: set[str] = set()
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
        for parameter in replaced[name].parameters():
            _watch(parameter, lambda: outdated.add(name))

    with state_kept(model), random_state_kept():
        for name, layer in layers.items():
            listen(name, layer)
        try:
            with _watchable():
                run(model)
        finally:
            for layer in replaced.values():
                for parameter in layer.parameters():
                    _watch_no_more(parameter)
    return [name for name in layers if name not in called or name in outdated]


def still_held(model: nn.Module, replaced: Mapping[Any, nn.Module]) -> list[Any]:
    """Which of some layers that were replaced a model still holds, or their parameters, beside its modules.

    In lists, dicts, kept methods and the like: for what other branches of its forward pass call, or for somebody who
    collects parameters there.
    """
    found = _reachable(model)
    modules = {id(module) for module, _ in found.attributes}
    taken = [place for tensor in found.tensors if (place := _memory(tensor)) is not None]

    def holds(layer: nn.Module) -> bool:
        places = [place for p in layer.parameters() if (place := _memory(p)) is not None]
        return id(layer) in modules or any(a < end and start < b for a, b in places for start, end in taken)

    return [name for name, layer in replaced.items() if holds(layer)]


def _memory(tensor: Tensor) -> tuple[int, int] | None:
    """Where a tensor begins and ends; files are read into one storage, so that this tells more than the storage."""
    if not _can_be_kept(tensor) or not tensor.numel():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()
