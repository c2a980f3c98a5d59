"""Finding convolution - BatchNorm - [add] - ReLU, and linear layer - activation, in a model; making blocks of them."""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from qsparseprop.nn.conv2d import QuantizedSparseConv2d
from qsparseprop.nn.intrinsic import (
    QuantizedBNReLU2d,
    QuantizedSparseConvBn2d,
    QuantizedSparseConvBnAddReLU2d,
    QuantizedSparseConvBnReLU2d,
    QuantizedSparseLinearAct,
)
from qsparseprop.nn.linear import QuantizedSparseLinear
from qsparseprop.utils._tracing import trace

_ACTIVATION_MODULES = {nn.ReLU: "relu", nn.ReLU6: "relu6", nn.GELU: "gelu"}
_ACTIVATION_FUNCTIONS = {
    torch.relu: "relu", torch.relu_: "relu", nn.functional.relu: "relu", nn.functional.relu_: "relu",
    nn.functional.relu6: "relu6", nn.functional.gelu: "gelu",
}  # fmt: skip
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_LIMITS = {"relu": math.inf, "relu6": 6.0}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_BLOCKS = (QuantizedSparseConvBn2d, QuantizedBNReLU2d, QuantizedSparseLinearAct)
#: Of the module operator.
_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor",
             "ilshift", "irshift", "iconcat", "setitem", "delitem")  # fmt: skip


class FusedForward:
    """A model's forward pass as a graph in which blocks have taken the place of their parts.

    It is an attribute of the model that hides the method of its class. With `hand_over` blocks give each other packed
    activations. `blocks` are the names of those that were made with it.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, blocks: Sequence[str], hand_over: bool = True) -> None:
        self.model, self.graph, self.blocks, self.hand_over = model, graph, tuple(blocks), hand_over
        self._compiled: Callable[..., Any] | None = None
        self._places: list[tuple[dict[str, nn.Module | None], str, nn.Module]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph on the model."""
        if self._compiled is None:
            self._compile()
        if not torch.compiler.is_compiling():
            for children, name, block in self._places:
                if children.get(name) is not block:
                    self._refuse(name)
        if args and args[0] is self.model:  # from a method: accelerate makes one when it unwraps a model
            args = args[1:]
        return self._compiled(self.model, *args, **kwargs)

    def _compile(self) -> None:
        self._places.clear()
        for target in self.blocks:
            parent, _, name = target.rpartition(".")
            children = self.model.get_submodule(parent)._modules
            if not isinstance(children.get(name), _BLOCKS):
                self._refuse(target)
            self._places.append((children, name, children[name]))
        if self.hand_over:
            _connect(self.graph, self.model)
        code = self.graph.python_code("self")
        scope = dict(code.globals)
        exec(code.src, scope)
        self._compiled = scope["forward"]

    @staticmethod
    def _refuse(name: str) -> None:
        raise RuntimeError(f"{name} was part of a block, with what follows it, and has been replaced: turn the whole "
                           "model back first, by swap_modules_with_dense or unfuse_modules")

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedForward:
        return FusedForward(copy.deepcopy(self.model, memo), copy.deepcopy(self.graph), self.blocks, self.hand_over)

    def __reduce__(self) -> Any:
        raise TypeError("a model with fused blocks cannot be pickled as a whole: save its state_dict, or a copy by "
                        "swap_modules_with_dense(model, inplace=False)")


def _fused_forward(module: nn.Module) -> FusedForward | None:
    """The traced forward pass of a module that was fused, also where somebody has made a method of it."""
    forward = vars(module).get("forward")
    forward = getattr(forward, "__func__", forward)
    return forward if isinstance(forward, FusedForward) else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


class _Finder:
    """The parts of blocks in a traced graph."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.places = Counter(id(child) for module in model.modules() for child in module._modules.values())
        self.apart = _fused_parts(model)
        self.calls = Counter(id(self.modules[n.target]) for n in graph.nodes if n.op == "call_module")

    def module(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        return self.modules[node.target] if isinstance(node, fx.Node) and node.op == "call_module" else None

    def activation_name(self, node: fx.Node) -> str | None:
        """What `QuantizedSparseLinearAct` calls the activation that a node is; None where it is none."""
        module, name = self.module(node), None
        if module is not None:
            name = None if _has_hooks(module) else _ACTIVATION_MODULES.get(type(module))
        elif node.op == "call_function":
            name = _ACTIVATION_FUNCTIONS.get(node.target)
        elif node.op == "call_method" and node.target in ("relu", "relu_"):
            name = "relu"
        if name != "gelu":
            return name
        return _GELUS.get(getattr(module, "approximate", None) or node.kwargs.get("approximate", "none"))

    def limit(self, node: fx.Node) -> float | None:
        """Upper limit of the activation that a node is; None where it has none."""
        return _LIMITS.get(self.activation_name(node))

    def other_summand(self, node: fx.Node, summand: fx.Node) -> fx.Node | None:
        """What a node adds to a summand; None where it is no plain addition of two, or changes the other one."""
        adds = (node.op == "call_function" and node.target in _ADDITIONS) or (
            node.op == "call_method" and node.target in ("add", "add_"))  # fmt: skip
        if not adds or node.kwargs or len(node.args) != 2 or not all(isinstance(a, fx.Node) for a in node.args):
            return None
        other = node.args[1] if node.args[0] is summand else node.args[0]
        changed = self.in_place(node) and node.args[0] is other
        return None if other is summand or changed else other

    def in_place(self, node: fx.Node) -> bool:
        """Whether a node may change what it is given."""
        if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
            return node.target.__name__ in _IN_PLACE
        module = self.module(node)
        name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
        marked = node.kwargs.get("inplace") or node.kwargs.get("out") is not None or getattr(module, "inplace", False)
        if node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS:
            marked = marked or True in node.args[1:]  # relu(x, True)
        return bool(marked) or name.endswith("_")

    def undisturbed(self, parts: list[fx.Node]) -> bool:
        """Whether nothing between the parts of a block, which run where the last one is, changes anything."""
        node = parts[0].next
        while node is not parts[-1]:
            if node not in parts and self.in_place(node):
                return False
            node = node.next
        return True

    def obstacle(self, node: fx.Node) -> str:
        """Why a layer cannot be part of a block, empty where it can."""
        layer = self.module(node)
        if self.places[id(layer)] > 1:
            return "is at several places of the model"
        if _part_of(node.target, self.apart):
            return "belongs to a part that was fused by itself"
        if self.calls[id(layer)] > 1:
            return "is called more than once"
        if _has_hooks(layer):
            return "has hooks"
        return "is called in an unusual way" if len(node.args) != 1 or node.kwargs else ""

    def after(self, conv_node: fx.Node) -> tuple[fx.Node | None, str]:
        """The batch normalisation behind a convolution, or why there is none that fits."""
        if reason := self.obstacle(conv_node):
            return None, reason
        if len(conv_node.users) != 1:
            return None, "its output is used elsewhere"
        (node,) = conv_node.users
        norm = self.module(node)
        if type(norm) is not nn.BatchNorm2d:
            return None, "no BatchNorm2d behind it"
        if self.calls[id(norm)] > 1 or _has_hooks(norm):
            return None, "its BatchNorm2d is called more than once or has hooks"
        return node, ""

    def activation(self, norm_node: fx.Node) -> tuple[list[fx.Node], fx.Node | None, float]:
        """What follows a batch normalisation up to its activation, what is added there, and the upper limit.

        The nodes are none, the activation, or an addition and the activation.
        """
        if len(norm_node.users) == 1:
            (user,) = norm_node.users
            if (limit := self.limit(user)) is not None:
                return [user], None, limit
            summand = self.other_summand(user, norm_node)
            if summand is not None and len(user.users) == 1:
                (last,) = user.users
                if (limit := self.limit(last)) is not None:
                    return [user, last], summand, limit
        return [], None, math.inf

    def norms(self) -> set[str]:
        """Names of the batch normalisations that may become blocks of their own."""
        return {name for name, module in self.modules.items()
                if type(module) is nn.BatchNorm2d and self.calls[id(module)] == 1 and self.places[id(module)] == 1
                and not _has_hooks(module) and not _part_of(name, self.apart)}


def _replace(graph: fx.Graph, target: str, parts: list[fx.Node], residual: fx.Node | None) -> fx.Node:
    """Put the call of a block in the place of its parts."""
    last = parts[-1]
    with graph.inserting_before(last):
        node = graph.call_module(target, (parts[0].args[0], *(() if residual is None else (residual,))))
    last.replace_all_uses_with(node)
    for part in reversed(parts):
        graph.erase_node(part)
    return node


def _names(parts: list[fx.Node]) -> list[str]:
    return ["add"] * (len(parts) - 1) + ["ReLU"] if parts else []


def _fused_parts(model: nn.Module) -> set[str]:
    """Names of the parts of a model that were fused by themselves."""
    return {name for name, module in model.named_modules(remove_duplicate=False)
            if name and _fused_forward(module) is not None}


def _part_of(name: str, parts: set[str]) -> str | None:
    """Which of the parts a module belongs to, the outermost one; None for none."""
    ends = [i for i, character in enumerate(name) if character == "."]
    return next((name[:end] for end in ends if name[:end] in parts), None)


def _connect(graph: fx.Graph, model: nn.Module) -> None:
    """Tell every block which others' convolutions read its output, and whether it has other readers.

    Parts that were fused by themselves hand over nothing to others: they may also be called alone.
    """
    parts = _fused_parts(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    nodes = [n for n in graph.nodes if n.op == "call_module"]
    for node in nodes:
        block = modules[node.target]
        if isinstance(block, _BLOCKS):
            kind = QuantizedSparseLinearAct if isinstance(block, QuantizedSparseLinearAct) else QuantizedSparseConvBn2d
            calls = [user for user in nodes if user in node.users and isinstance(modules[user.target], kind)
                     and user.args[0] is node and _part_of(user.target, parts) == _part_of(node.target, parts)]
            block._read_elsewhere = len(node.users) > len(calls) or any(node in user.args[1:] for user in calls)
            readers = [modules[user.target] for user in calls]
            if kind is QuantizedSparseConvBn2d:
                # what is packed for the largest kernel may serve the others, see `geometry.embedded`
                readers.sort(key=lambda reader: -math.prod(reader.kernel_size))
            block._readers = tuple(readers)


def _fuse_linear(graph: fx.Graph, find: _Finder, blocks: dict[str, nn.Module], found: dict[str, str]) -> None:
    """Add the blocks that begin with a linear layer."""
    nodes = [n for n in graph.nodes if type(find.module(n)) is QuantizedSparseLinear]
    calls: dict[fx.Node, str] = {}  # of blocks with an activation: their names
    for node in nodes:
        user = next(iter(node.users), None)
        name = find.activation_name(user) if len(node.users) == 1 else None
        reason = find.obstacle(node)
        if not reason and name is None:
            reason = "its output is used elsewhere" if len(node.users) > 1 else "no ReLU or GELU behind it"
        if not reason and not find.undisturbed([node, user]):
            reason = "something is changed in place meanwhile"
        if reason:
            found[node.target] = f"not fused: {reason}"
        else:
            found[node.target] = f"fused with {'GELU' if 'gelu' in name else 'ReLU'}"
            blocks[node.target] = QuantizedSparseLinearAct.fuse(find.module(node), name)
            calls[_replace(graph, node.target, [node, user], None)] = node.target
    for node in nodes:  # the others that read what those can pack
        if node.target not in blocks and not find.obstacle(node) and node.args[0] in calls:
            blocks[node.target] = QuantizedSparseLinearAct.fuse(find.module(node), None)
            found[node.target] = f"fused with {calls[node.args[0]]}"


def fuse_modules(model: nn.Module) -> dict[str, str]:
    """Make blocks of quantised sparse layers and what follows them, in place.

    These are convolutions with BatchNorm2d, additions and ReLU, and linear layers with ReLU or GELU.

    Parameters
    ----------
    model : torch.nn.Module
        Its sparse convolutions and linear layers are replaced by blocks of ``qsparseprop.nn.intrinsic`` with the same
        parameters, further BatchNorm2d with a ReLU behind them beside such convolutions as well, and its forward pass
        by the traced graph. Names and state_dict stay as they are. A model that ``torch.fx`` cannot trace, or not for
        both modes and all arguments, stays as it is.

    Returns
    -------
    dict
        For each such layer by its qualified name: what it was fused with, or why not; and for each BatchNorm2d
        that became a block with the ReLU behind it, because what is before it is no sparse convolution that fits.
    """
    if _fused_forward(model) is not None:
        _undo(model)  # tracing looks at the method of the class
    names = {n: m for n, m in model.named_modules() if type(m) in (QuantizedSparseConv2d, QuantizedSparseLinear)}
    if not names:
        return {}
    try:
        graph, constants = trace(model)
    except Exception as error:  # whatever user code does with a proxy
        return dict.fromkeys(names, f"not fused: torch.fx cannot trace the model ({type(error).__name__}: {error})")
    find = _Finder(model, graph)
    found = dict.fromkeys(names, "not fused: the traced graph does not call it")
    blocks: dict[str, nn.Module] = {}
    for conv_node in [n for n in graph.nodes if type(find.module(n)) is QuantizedSparseConv2d]:
        norm_node, reason = find.after(conv_node)
        name = next(n for n, m in names.items() if m is find.module(conv_node))
        if norm_node is None:
            found[name] = f"not fused: {reason}"
            continue
        rest, residual, high = find.activation(norm_node)
        if not find.undisturbed([conv_node, norm_node, *rest]):
            found[name] = "not fused: something is changed in place meanwhile"
            continue
        kind = (QuantizedSparseConvBn2d, QuantizedSparseConvBnReLU2d, QuantizedSparseConvBnAddReLU2d)[len(rest)]
        blocks[conv_node.target] = kind.fuse(find.module(conv_node), find.module(norm_node), high)
        found[name] = f"fused with {', '.join([str(norm_node.target), *_names(rest)])}"
        _replace(graph, conv_node.target, [conv_node, norm_node, *rest], residual)
    # only beside blocks of convolutions: alone they would change a model's numerics for little
    norms = find.norms() if blocks else ()
    for node in [n for n in graph.nodes if n.op == "call_module" and n.target in norms]:
        rest, residual, high = find.activation(node)
        if rest and len(node.args) == 1 and not node.kwargs and find.undisturbed([node, *rest]):
            blocks[node.target] = QuantizedBNReLU2d.fuse(find.module(node), high)
            found[node.target] = f"fused with {', '.join(_names(rest))}"
            _replace(graph, node.target, [node, *rest], residual)
    _fuse_linear(graph, find, blocks, found)
    if not blocks:
        return found
    graph.lint()
    for target, block in blocks.items():
        parent, _, child = target.rpartition(".")
        model.get_submodule(parent).register_module(child, block)
    vars(model).update(constants, forward=FusedForward(model, graph, list(blocks)))
    return found


def _undo(model: nn.Module) -> None:
    """Undo what fusing a model has made, but not what was made in parts of it before."""
    blocks = _fused_forward(model).blocks
    del vars(model)["forward"]
    for target in blocks:
        parent, _, name = target.rpartition(".")
        block = model.get_submodule(target)
        if isinstance(block, _BLOCKS):
            model.get_submodule(parent).register_module(name, block.unfuse())


def unfuse_modules(model: nn.Module) -> None:
    """Undo `fuse_modules`, in place, also of parts that were fused by themselves.

    Raises
    ------
    RuntimeError
        Where something (accelerate's mixed precision) has wrapped the fused forward pass; nothing has changed then.
    """
    for module in model.modules():
        forward = getattr(vars(module).get("forward"), "__func__", vars(module).get("forward"))
        if forward is not None and _fused_forward(module) is None and isinstance(inspect.unwrap(forward), FusedForward):
            raise RuntimeError(f"the forward pass of {type(module).__name__} was fused and then wrapped: take that off "
                               "first, by accelerator.unwrap_model(model, keep_fp32_wrapper=False) if it is "
                               "accelerate's")
    for module in list(model.modules()):
        if _fused_forward(module) is not None:
            del vars(module)["forward"]
        for name, child in list(module.named_children()):
            if isinstance(child, _BLOCKS):
                module.register_module(name, child.unfuse())
