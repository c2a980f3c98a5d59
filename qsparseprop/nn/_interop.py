"""What sparse modules answer to tools that take them for dense ones: sentences that name the way out.

Whatever is refused here is refused before anything has changed, and by rules that every process of a group comes to
by itself.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from qsparseprop.nn._weight import SparseWeight

# ---- tracers, which would need what only the dense layer has ----


def _untraceable(module: nn.Module | str, tool: str) -> str:
    name = module if isinstance(module, str) else type(module).__name__
    return (f"{name} cannot be taken over by {tool}: convert the model that swap_modules_with_dense(model, "
            "inplace=False) of qsparseprop.utils.network_utils gives (torch.compile and torch.export take sparse "
            "modules as they are)")


def refuse_input(module: nn.Module, x: Any) -> None:
    """Say what a layer that was given no tensor expects.

    Raises
    ------
    TypeError
        Always.
    """
    if isinstance(x, torch.fx.Proxy):
        raise TypeError(f"{_untraceable(module, 'torch.fx.symbolic_trace')}, or make sparse modules leaves, by a "
                        "torch.fx.Tracer whose is_leaf_module is true for them")
    raise TypeError(f"{type(module).__name__} expects a tensor, got {type(x).__name__}")


def refuse_tracing(module: nn.Module) -> None:
    """Refuse what would make a constant of the output: torch.jit.trace, and the exporters on top of it.

    Raises
    ------
    RuntimeError
        Within such a trace.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(_untraceable(module, "torch.jit.trace, which torch.onnx.export(dynamo=False), OpenVINO and "
                                                "others use"))


def refuse_scripting(module: nn.Module) -> NoReturn:
    """Refuse torch.jit.script.

    Raises
    ------
    RuntimeError
        Always.
    """
    raise RuntimeError(_untraceable(module, "torch.jit.script"))


def refuse_onnx() -> None:
    """Refuse the export of the operator of a layer to ONNX, which knows no such operator.

    Raises
    ------
    RuntimeError
        While torch.onnx exports something.
    """
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(_untraceable("a sparse module", "ONNX"))


# ---- tools that give a module another weight ----


def check_parameter(module: SparseWeight, name: str, parameter: Tensor | None) -> None:
    """Refuse a parameter that belongs to a dense layer, made by who took the module for one.

    Raises
    ------
    ValueError
        For a `weight` that is no vector: somebody has folded another layer into it, or loads a dense one by hand.
    NotImplementedError
        For what torch.nn.utils.prune, weight_norm and spectral_norm put beside a weight.
    """
    kind = type(module).__name__
    if name == "weight_orig":
        raise NotImplementedError(f"{kind} has no weights to mask, those that are zero do not exist: remove more of "
                                  "them by apply_further_mask(mask, optimizer) or GradualPruner, or prune before "
                                  "the swap")
    if name.startswith("weight_"):
        raise NotImplementedError(f"the weight of {kind} cannot be reparametrised, see the way back to dense layers: "
                                  "swap_modules_with_dense(model)")
    if name != "weight" or parameter is None or parameter.ndim == 1:
        return
    if tuple(parameter.shape) != (*module._values_shape, 1):  # a column of the right length is a slip, see forward
        raise ValueError(f"the weight of {kind} is the vector of its nonzeros, it cannot become a tensor of shape "
                         f"{tuple(parameter.shape)}: fold other layers into dense ones, after "
                         "swap_modules_with_dense(model), and load dense states within accept_dense_state()")


def check_deletion(module: nn.Module, name: str) -> None:
    """Refuse to let go of the weight to torch.nn.utils.parametrize and others; FSDP may take it.

    Raises
    ------
    NotImplementedError
        Where FSDP is not in use.
    """
    if name == "weight" and not (_distributed() and "torch.distributed.fsdp" in sys.modules):
        raise NotImplementedError(f"the weight of {type(module).__name__} cannot be parametrised or taken away, see "
                                  "the way back to dense layers: swap_modules_with_dense(model)")


# ---- who holds a weight whose pattern is to change ----


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _synchronised() -> set[int]:
    """Parameters, by their ids, whose gradients a DistributedDataParallel that is still alive exchanges.

    It leaves no trace on them, so that it has to be looked for among all objects, where there is a process group.
    """
    kinds: set[type] = {nn.parallel.DistributedDataParallel}
    found: set[type] = set()
    while kinds - found:
        found, kinds = kinds, kinds.union(*(kind.__subclasses__() for kind in kinds))
    return {id(p) for o in gc.get_objects() if type(o) in kinds for p in o.parameters()}


def check_owners(modules: Iterable[nn.Module]) -> None:
    """Refuse to change the number of elements of sparse weights which others have laid out by it.

    Decided by types and by what the process holds, which is the same in all processes of a group, and without asking
    them.

    Raises
    ------
    NotImplementedError
        For parameters under FSDP (both kinds), tensor parallelism and DistributedDataParallel.
    """
    weights = [module._parameters.get("weight") for module in modules]
    check_unsplit(weights)
    if _distributed():
        ids = {id(weight) for weight in weights if weight is not None and weight.requires_grad}
        if ids & _synchronised():
            gc.collect()  # a wrapper is part of a cycle, and outlives the last name that somebody had for it
            if ids & _synchronised():
                _refuse_change("DistributedDataParallel has made buffers for its gradient")


def check_unsplit(weights: Iterable[Tensor | None]) -> None:
    """Refuse to prune parameters, None for what is none, that are not wholly in this process; see `check_owners`."""
    for weight in weights:
        if weight is None:
            _refuse_change("something else, FSDP's flat parameter for one, holds its values")
        if is_traceable_wrapper_subclass(weight):
            _refuse_change(f"it is a {type(weight).__name__}, which FSDP or tensor parallelism has split")
        if getattr(weight, "_fsdp_flattened", False):
            _refuse_change("it is a view of FSDP's flat parameter")


def _refuse_change(why: str) -> None:
    raise NotImplementedError(f"the pattern of a weight cannot change, {why}: prune or regrow the model before it is "
                              "wrapped, or let the wrapper go, change the model, and wrap it and make its optimizer "
                              "anew")


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that holds the state, behind the wrappers of accelerate, Lightning and others.

    Raises
    ------
    TypeError
        For what is no optimizer.
    NotImplementedError
        For one whose state cannot follow a change of the pattern in every process.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        own = getattr(optimizer, "state", None)
        if own and own is not inner.state:
            raise NotImplementedError(f"{type(optimizer).__name__} keeps a state beside that of the optimizer that it "
                                      "wraps, so that single weights can neither be removed nor added: make a new one "
                                      "instead")
        optimizer = inner
    if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise NotImplementedError("LBFGS keeps its state for all parameters together, so that single weights can "
                                  "neither be removed nor added: make a new optimizer instead")
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")  # nobody has one if it is not imported
    if zero is not None and isinstance(optimizer, zero.ZeroRedundancyOptimizer):
        raise NotImplementedError("ZeroRedundancyOptimizer keeps the state of a weight in one process only and buffers "
                                  "of its size in all: change the pattern without an optimizer in every process, and "
                                  "make a new one in each")
    return optimizer


def element_state(optimizer: Any, weight: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps for each element of a weight.

    Raises
    ------
    ValueError
        If it does not train the weight.
    NotImplementedError
        If it keeps something for the weight that belongs to no single element.
    """
    if weight.requires_grad and not any(weight is p for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("the optimizer does not train the weight of this module")
    state = {k: v for k, v in optimizer.state.get(weight, {}).items() if isinstance(v, Tensor)}
    other = {k: tuple(v.shape) for k, v in state.items() if v.shape != weight.shape and v.numel() > 1}
    if other:
        name, shape = next(iter(other.items()))
        raise NotImplementedError(f"{type(optimizer).__name__} keeps {name} of shape {shape} for a weight of shape "
                                  f"{tuple(weight.shape)}, so that single weights can neither be removed nor added: "
                                  "make a new optimizer instead")
    return {k: v for k, v in state.items() if v.shape == weight.shape}


# ---- graphs from before a change of the pattern ----


def _refuse_gradient(_: Any) -> None:
    raise RuntimeError("the pattern of a sparse weight has been changed by apply_further_mask, regrow or "
                       "load_state_dict after a forward pass whose backward pass was still to come: change it between "
                       "optimizer.step() and the next forward pass")


def outdate_graphs(weight: nn.Parameter) -> None:
    """Have backward passes through graphs that exist fail, as they do where torch sees a change in place."""
    if weight.is_inference():
        return  # it is in no graph, and has no version
    if weight.requires_grad:
        # what accumulates its gradient: later graphs get a new one, see `SparseWeight._replace`
        torch.autograd.graph.get_gradient_edge(weight).node.register_prehook(_refuse_gradient)
    torch.autograd.graph.increment_version(weight)
