"""A model as a graph of operators: traced by torch.export with a batch of any size, on dense weights, in float32."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree

from qsparseprop._torch_compat import Overload
from qsparseprop.inference.calls import Name, find_operator
from qsparseprop.inference.draft import Draft, Operator, Shape, names_in
from qsparseprop.inference.exporting import NotCapturable, export_model
from qsparseprop.nn._dense import dense_type, held
from qsparseprop.utils._example import copy_model
from qsparseprop.utils.network_utils import swap_modules_with_dense

__all__ = ["Captured", "NotCapturable", "Signature", "capture", "float_copy"]

#: Nothing happens in them where nothing is trained and results are not written to.
_NOTHING = {"aten.clone.default", "aten.detach.default", "aten.alias.default", "aten.contiguous.default",
            "aten.lift_fresh_copy.default", "aten.detach_.default", "aten._assert_tensor_metadata.default"}  # fmt: skip
#: Their second argument is the size of the result.
_SIZED = {"aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.expand.default"}
#: Names of parameters and buffers of layers that have one weight.
_USUAL = {"weight", "bias", "running_mean", "running_var"}
#: Arithmetic of sizes.
_ARITHMETIC = {operator.mul: "aten.mul.int", operator.add: "aten.add.int", operator.sub: "aten.sub.int",
               operator.floordiv: "aten.floordiv.int"}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives.

    Parameters
    ----------
    arguments : tuple
        Positional and keyword arguments, with a number in the place of each tensor and of each other thing.
    results : any
        The result, of the model's own types, with numbers of outputs in the place of tensors; it may hold None as well.
    others : dict
        What is no tensor, by its number.
    shapes : tuple of tuple
        Of each tensor; None for the batch.
    dtypes : tuple of dtype
    """

    arguments: Any
    results: Any
    others: dict[int, Any]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...]


@dataclass(frozen=True, eq=False)
class Captured:
    """A graph of `Operator` nodes, and what belongs to it."""

    draft: Draft
    signature: Signature


def float_copy(model: nn.Module) -> nn.Module:
    """A copy to take apart: dense layers with their zeros, masks in the weights, float32, in evaluation mode.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
    """
    dense = swap_modules_with_dense(copy_model(model), inplace=True)
    for module in dense.modules():
        for hook in [h for h in module._forward_pre_hooks.values() if isinstance(h, prune.BasePruningMethod)]:
            prune.remove(module, hook._tensor_name)
        for kind, remove in ((WeightNorm, remove_weight_norm), (SpectralNorm, remove_spectral_norm)):
            for normed in [h for h in module._forward_pre_hooks.values() if isinstance(h, kind)]:
                remove(module, normed.name)
        if parametrize.is_parametrized(module):
            _without_parametrizations(module)
    return dense.float().eval().requires_grad_(False)


def _without_parametrizations(module: nn.Module) -> None:
    """Leave what parametrizations compute, on a copy: torch's function changes the class, which the model shares."""
    assert isinstance(module.parametrizations, nn.ModuleDict)
    values = {name: held(module, name).detach().clone() for name in module.parametrizations}
    module.__class__ = dense_type(module)
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def capture(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Captured:
    """Trace a model.

    Parameters
    ----------
    model : torch.nn.Module
        From `float_copy`.
    args : sequence
        Example inputs; the first dimension of tensors that have as many elements there as the first one is the batch.
    kwargs : dict

    Returns
    -------
    Captured

    Raises
    ------
    NotCapturable
        If the model depends on values, keeps state, has operators that are not ATen's, or one batch size.
    """
    leaves, arguments = _pytree.tree_flatten((tuple(args), dict(sorted(kwargs.items()))))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        raise NotCapturable("it takes no tensors")
    batch = tensors[0].shape[0] if tensors[0].ndim else 0
    if batch < 1:
        raise NotCapturable("its first input has no batch")
    grown = [_at_least_two(leaf, batch) for leaf in leaves]
    dynamic = [_dynamic(leaf, batch) for leaf in leaves]
    positional, keyword = _pytree.tree_unflatten(grown, arguments)
    exported = export_model(model, positional, keyword, _pytree.tree_unflatten(dynamic, arguments))
    reader = _Reader(exported, dict(model.named_modules(remove_duplicate=False)))
    draft = reader.draft()
    shapes = tuple(draft.shapes[name] for name in draft.inputs)
    for shape, leaf in zip(shapes, tensors, strict=True):
        if _dynamic(leaf, batch) is not None and shape[0] is not None:
            raise NotCapturable(f"it works for a batch of {shape[0]} only; batches of another size tell apart what is "
                                "none of an input and has as many rows")  # fmt: skip
    results = exported.call_spec.out_spec
    assert results is not None
    numbers = iter(range(len(draft.outputs)))
    given = [next(numbers) if there else None for there in reader.given]
    answers = _with_numbers(given, results)
    others = {index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
    dtypes = tuple(tensor.dtype for tensor in tensors)
    return Captured(draft, Signature(structure(arguments), answers, others, shapes, dtypes))


def structure(spec: _pytree.TreeSpec) -> Any:
    """Tuples, lists and dicts of a tree, with numbers for leaves.

    Parameters
    ----------
    spec : TreeSpec

    Returns
    -------
    tuple, list, dict or int
    """
    return _pytree.tree_unflatten(list(range(spec.num_leaves)), spec)


def _at_least_two(leaf: Any, batch: int) -> Any:
    """Example inputs with two or more samples: torch.export takes a size of one for a constant."""
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach()
    if batch == 1 and leaf.ndim and leaf.shape[0] == 1:
        leaf = torch.cat([leaf, leaf])
    return leaf.clone()


def _dynamic(leaf: Any, batch: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch:
        return {0: torch.export.Dim.AUTO}
    return None


def _with_numbers(given: list[int | None], results: _pytree.TreeSpec) -> Any:
    """A result of the model's own types, of those that torch knows, with numbers of outputs for tensors."""
    try:
        answers = _pytree.tree_unflatten(given, results)
        known = _pytree.tree_leaves(answers) == given
    except Exception as error:
        # whatever the constructor of such a type says to numbers
        raise NotCapturable(f"its result takes nothing but tensors ({error})") from error
    if not known:
        raise NotCapturable("its result is of a type that does not keep what it is given")
    return answers


class _Reader:
    """Nodes of an exported program, as a draft of operators."""

    def __init__(self, exported: torch.export.ExportedProgram, modules: Mapping[str, nn.Module]) -> None:
        self.exported, self.modules = exported, modules
        self.names: dict[str, Any] = {}
        self.constants: dict[str, Tensor] = {}
        #: Paths of the parameters and buffers that a node is computed of, of those that depend on nothing else.
        self.made_of: dict[str, tuple[str, ...]] = {}
        self.nodes: list[Operator] = []
        self.shapes: dict[str, Shape] = {}
        self.floating: set[str] = set()
        self.rows: dict[str, int] = {}
        self.inputs: list[str] = []
        #: Of what the model gives, whether it is a tensor; otherwise it is None.
        self.given: list[bool] = []

    def draft(self) -> Draft:
        self._placeholders()
        outputs: tuple[str, ...] = ()
        for node in self.exported.graph.nodes:
            if node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                outputs = self._outputs(node.args[0])
        draft = Draft(tuple(self.inputs), outputs, list(self.nodes), self.constants, self.shapes, self.floating,
                      self.rows)  # fmt: skip
        draft.without_unread()
        return draft

    def _placeholders(self) -> None:
        signature, state = self.exported.graph_signature, self.exported.state_dict
        of_state = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        lifted = signature.inputs_to_lifted_tensor_constants
        if signature.inputs_to_lifted_custom_objs:
            raise NotCapturable("it holds objects that are no tensors")
        for node in self.exported.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in of_state or node.name in lifted:
                target = of_state.get(node.name) or lifted[node.name]
                held = state[target] if target in state else self.exported.constants[target]
                assert isinstance(held, Tensor)
                self.constants[node.name] = held.detach().contiguous()
                self.made_of[node.name] = (target,)
                self._describe(node)
            elif isinstance(node.meta.get("val"), Tensor):
                self.inputs.append(node.name)
                self._describe(node)
                # a value that a guard narrows, such as an even one, is no symbol
                if any(isinstance(n, torch.SymInt) and not n.node.expr.is_symbol for n in node.meta["val"].shape):
                    raise NotCapturable("it works for some sizes of the batch only")

    def _describe(self, node: fx.Node, name: str | None = None) -> None:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            name = node.name if name is None else name
            sizes = [_multiple(n) for n in value.shape]
            self.shapes[name] = tuple(size for size, _ in sizes)
            factors = {factor for _, factor in sizes} - {1}
            if factors:
                self.rows[name] = max(factors)
            if value.dtype is torch.float32:
                self.floating.add(name)

    def _outputs(self, results: Any) -> tuple[str, ...]:
        found = []
        for result in results:
            self.given.append(result is not None)
            if result is None:
                continue
            if not isinstance(result, fx.Node):
                raise NotCapturable(f"its result holds {result!r}, which is no tensor")
            name = self._argument(result)
            if not isinstance(name, Name) or not isinstance(result.meta.get("val"), Tensor):
                raise NotCapturable("its result holds a number")
            found.append(name.name)
        if not found:
            raise NotCapturable("its result holds no tensor")
        return tuple(found)

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return Name(self.names.get(argument.name, argument.name))
        if isinstance(argument, list | tuple):
            return type(argument)(self._argument(each) for each in argument) if type(argument) in (list, tuple) else [
                self._argument(each) for each in argument]  # fmt: skip
        return argument

    def _read(self, node: fx.Node) -> None:
        name = self._operator_name(node)
        if all(source.name in self.made_of for source in node.all_input_nodes):
            self.made_of[node.name] = self._paths(node)
        arguments = tuple(self._argument(argument) for argument in node.args)
        if name in _NOTHING or "dropout" in name:  # in training it draws random numbers, which is refused
            if isinstance(arguments[0], Name):
                self.names[node.name] = arguments[0].name
            return
        if name == "getitem" and self._part_of_norm(node, arguments):
            return
        keywords = {key: self._argument(value) for key, value in node.kwargs.items()
                    if key not in ("device", "pin_memory", "layout")}  # fmt: skip
        if name in _SIZED:
            arguments = (arguments[0], self._size(node, arguments))
            if name != "aten.expand.default":
                name = "aten.reshape.default"
            if self._same_shape(node):
                self.names[node.name] = arguments[0].name
                return
        if name == "aten.slice.Tensor" and self._same_shape(node) and node.args[4:] in ((), (1,)):
            self.names[node.name] = arguments[0].name  # all of it
            return
        if "batch_norm" not in name:  # of which only the first output is read, see `_part_of_norm`
            try:
                find_operator(name)
            except ValueError as error:
                raise NotCapturable(str(error)) from error
        self._describe(node)
        inputs = tuple(dict.fromkeys(names_in([arguments, keywords])))
        self.nodes.append(Operator(inputs=inputs, output=node.name, layer=self._layer(node), operator=name,
                                   arguments=arguments, keywords=keywords))  # fmt: skip

    def _operator_name(self, node: fx.Node) -> str:
        target = node.target
        if target is operator.getitem:
            return "getitem"
        if target in _ARITHMETIC:
            return _ARITHMETIC[target]
        if isinstance(target, Overload) and target.namespace == "aten":
            if torch.Tag.nondeterministic_seeded in target.tags and _draws(node, target):
                raise NotCapturable(f"it draws random numbers ({target})")
            return str(target)
        raise NotCapturable(f"it has an operator that is not one of ATen, {target}")

    def _part_of_norm(self, node: fx.Node, arguments: tuple[Any, ...]) -> bool:
        """Whether it is the first output of a batch normalisation, whose others are of training."""
        source = self.nodes[-1] if self.nodes else None
        if source is None or arguments != (Name(source.output), 0) or "batch_norm" not in source.operator:
            return False
        _, weight, bias, mean, variance, momentum, epsilon = source.arguments
        source.operator = "aten.batch_norm.default"
        source.arguments = (source.arguments[0], weight, bias, mean, variance, False, momentum, epsilon, False)
        source.output = node.name
        self._describe(node)
        return True

    def _same_shape(self, node: fx.Node) -> bool:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        mine, theirs = node.meta["val"].shape, source.meta["val"].shape
        return [_expression(n) for n in mine] == [_expression(n) for n in theirs]

    def _size(self, node: fx.Node, arguments: tuple[Any, ...]) -> list[Any]:
        """The size of a result: -1 for what depends on the batch, so that others need not be left to be guessed."""
        asked = list(arguments[1])
        if node.target is torch.ops.aten.expand.default:
            return asked
        sizes: list[Any] = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
        return sizes if sizes.count(-1) <= 1 else asked

    def _paths(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(path for source in node.all_input_nodes for path in self.made_of.get(source.name, ()))

    def _layer(self, node: fx.Node) -> str:
        """Name of the layer: the innermost module, or its parameter where that is none of the usual ones.

        Modules that share a parameter are told apart by who is called.
        """
        stack = node.meta.get("nn_module_stack") or {}
        caller = str(list(stack.values())[-1][0]) if stack else ""
        paths = self._paths(node)
        path = next((path for path in paths if path.endswith("weight")), paths[0] if paths else None)
        if path is None:
            return caller
        owner, _, leaf = path.rpartition(".")
        if caller in self.modules and leaf in self.modules[caller]._parameters:
            owner = caller
        usual = owner and leaf in _USUAL
        return owner if usual else f"{owner}.{leaf}".lstrip(".")


def _draws(node: fx.Node, target: Overload) -> bool:
    """Whether an operator with dropout in it has some, or is one of random numbers."""
    names = [argument.name for argument in target._schema.arguments]
    given = {**{a.name: a.default_value for a in target._schema.arguments}, **dict(zip(names, node.args, strict=False)),
             **node.kwargs}  # fmt: skip
    off = [given.get("train") is False, given.get("training") is False, given.get("dropout_p") == 0]
    return not any(off)


def _multiple(size: Any) -> tuple[int | None, int]:
    """A size as a draft has it, and how many times the batch it is: that of all inputs is one."""
    if isinstance(size, int):
        return size, 1
    expression = size.node.expr
    batch = next(iter(expression.free_symbols), None)
    factor, rest = expression.xreplace(dict.fromkeys(expression.free_symbols, batch)).as_coeff_Mul()
    if not rest.is_symbol or not factor.is_Integer or factor < 1:
        return -1, 1
    return None, int(factor)


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr
