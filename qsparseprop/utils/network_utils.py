"""Conversion of whole models: dense layers that are sparse enough, and faster so, are replaced."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qsparseprop import nn as sparse_nn
from qsparseprop.nn._adapters import guard_merging
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_bias, dense_type, dense_weight, foreign_parametrization, trains_weight
from qsparseprop.nn._weight import check_before_loading
from qsparseprop.nn.intrinsic import QuantizedBNReLU2d
from qsparseprop.nn.transposed_linear import dense_conv1d
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils._example import LayerInput, Runner, copy_model, make_runner, not_called, record
from qsparseprop.utils._weights import Weights, weights_of
from qsparseprop.utils.fusion import fuse_modules, unfuse_modules
from qsparseprop.utils.measurement_utils import compare_interleaved
from qsparseprop.utils.swap_report import SwapDecision, SwapReport

__all__ = [
    "SwapDecision",
    "SwapReport",
    "sparsity",
    "swap_modules_for_state",
    "swap_modules_with_dense",
    "swap_modules_with_sparse",
    "unfold_attention",
]

#: dense type -> sparse types, in float32 and quantised
_REPLACEMENTS: dict[type[nn.Module], tuple[type[SparseModule], type[SparseModule]]] = {
    kind: (getattr(sparse_nn, f"Sparse{kind.__name__}"), getattr(sparse_nn, f"QuantizedSparse{kind.__name__}"))
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
_PROTOTYPES: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: sparse_nn.FakeQuantLinear,
    nn.Conv2d: sparse_nn.FakeQuantConv2d,
}


def _replacements() -> dict[type[nn.Module], tuple[type[SparseModule], type[SparseModule]]]:
    """What can be replaced, transformers' layers included where transformers is in use."""
    conv1d = dense_conv1d()
    transposed = (sparse_nn.SparseTransposedLinear, sparse_nn.QuantizedSparseTransposedLinear)
    return _REPLACEMENTS if conv1d is None else {**_REPLACEMENTS, conv1d: transposed}


def sparsity(model: nn.Module) -> float:
    """Fraction of zeros in the prunable weights of a model, biases not counted.

    Prunable is what has a line in the report of `swap_modules_with_sparse`: the weights of linear, convolutional,
    recurrent and attention layers, of torch's and of other packages', and those of sparse layers; embeddings only where
    they were pruned. Masks that are still attached count as zeros. 0.0 for a model without such layers.
    """
    # a weight that several modules share counts once
    found = {w.identity: w for w in weights_of(model)}.values()
    total = sum(w.total for w in found)
    return sum(w.zeros for w in found) / total if total else 0.0


def _training_step(module: nn.Module, x: Tensor, x_grad: bool):
    x = x.detach().requires_grad_(x_grad)
    parameters = [p for p in module.parameters() if p.requires_grad]
    grad: Tensor | None = None

    def step() -> None:
        nonlocal grad
        x.grad = None
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            y = module(x)
            if grad is None:
                grad = torch.ones_like(y)
            if y.requires_grad:
                y.backward(grad)

    return step


def _plain_dense(module: nn.Module) -> nn.Module:
    """A copy of a dense layer without prune's bookkeeping and without hooks, for timing."""
    weight, _ = dense_weight(module)
    kind = dense_type(module)
    plain = kind.__new__(kind)
    plain.__dict__ = {k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()}
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        plain.__dict__[hooks] = type(plain.__dict__[hooks])()
    bias = dense_bias(module)
    for held in (plain._parameters, plain._buffers, plain._modules):
        held.clear()
    for name in ("weight", "bias"):
        plain.__dict__.pop(name, None)
    # its own, too: a step of it must not touch the gradient of the model's
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias[0].clone(), bias[1]))
    # a clone may lose the memory format that makes the dense layer fast
    plain.register_parameter("weight", nn.Parameter(weight.clone(memory_format=torch.preserve_format)))
    return plain


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each Parameter."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _unsupported(found: Weights, owners: Counter[int]) -> str | None:
    """Why a layer cannot be replaced, or None."""
    module = found.module
    kind = type(module).__qualname__
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return f"{kind} is a subclass whose weight does not exist yet"
    dense_types = tuple(_replacements())
    if dense_type(module) not in dense_types:
        if isinstance(module, dense_types):
            own = f"{type(module).__module__}.{kind}" if kind in {t.__name__ for t in dense_types} else kind
            return f"{own} is a subclass with a behaviour of its own"
        return f"nothing sparse replaces {kind}"
    if foreign_parametrization(module):
        return "has a parametrization"
    if found.foreign is not None:
        return found.foreign.reason
    if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        return "shares a parameter with another module"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    weight, _ = dense_weight(module)
    if weight.device.type != "cpu":
        return f"on device {weight.device}"
    if not weight.is_floating_point():
        return f"weight of dtype {weight.dtype}"
    if not torch.isfinite(weight).all():
        return "weight has NaN or Inf"
    return None


def _own_hooks(module: nn.Module) -> bool:
    """Whether a layer has hooks other than prune's."""
    pre = [h for h in module._forward_pre_hooks.values() if not isinstance(h, prune.BasePruningMethod)]
    return bool(pre or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def _mind_fast_path(encoder: nn.TransformerEncoderLayer | nn.TransformerEncoder) -> None:
    """Keep torch's encoders from computing, in evaluation, with weights instead of modules that are not dense."""
    replaced = any(isinstance(m, (SparseModule, sparse_nn.MultiheadAttention)) for m in encoder.modules())
    if isinstance(encoder, nn.TransformerEncoder):
        encoder.use_nested_tensor = encoder.use_nested_tensor and not replaced
        return
    kinds = ((nn.functional.relu, nn.ReLU), (nn.functional.gelu, nn.GELU))  # 1 and 2 let it take the fast path
    encoder.activation_relu_or_gelu = 0 if replaced else next(
        (i for i, (f, m) in enumerate(kinds, 1) if encoder.activation is f or isinstance(encoder.activation, m)), 0)


def _replace_children(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, given by their ids, wherever those appear."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            _mind_fast_path(parent)
    if any(isinstance(m, SparseModule) for m in model.modules()):
        check_before_loading(model)
        guard_merging(model)


#: Layers of the same kind and sizes whose sparsities differ by no more are timed once: less than a stopwatch can tell.
_SAME_SPARSITY = 0.01


class _Stopwatch:
    """Times layers, those that are alike once."""

    def __init__(self) -> None:
        self._timed: dict[tuple[Any, ...], list[tuple[SwapDecision, bool]]] = {}

    def pays(self, dense: nn.Module, sparse: nn.Module, seen: LayerInput, decision: SwapDecision) -> bool:
        """Whether a sparse layer takes the input and is the faster one; times and reason go into the decision."""
        weight, bias, x = dense_weight(dense)[0], dense_bias(dense), seen.x
        # what decides how long it takes, except for the zeros
        key = (dense_type(dense), dense.extra_repr(), weight.shape, weight.stride(), weight.dtype, trains_weight(dense),
               None if bias is None else bias[1], x.shape, x.stride(), x.dtype, seen.requires_grad)  # fmt: skip
        timed = self._timed.setdefault(key, [])
        for other, pays in timed:
            if abs(other.sparsity - decision.sparsity) <= _SAME_SPARSITY:
                decision.dense_ms, decision.sparse_ms = other.dense_ms, other.sparse_ms
                decision.reason = ", ".join(part for part in (other.reason, f"timed as {other.name}") if part)
                return pays
        pays = _pays(dense, sparse, seen, decision)
        timed.append((replace(decision), pays))
        return pays


def _pays(dense: nn.Module, sparse: nn.Module, seen: LayerInput, decision: SwapDecision) -> bool:
    """Whether a sparse layer takes the input and is the faster one; times and reason go into the decision."""
    steps = {
        "dense": _training_step(_plain_dense(dense), seen.x, seen.requires_grad),
        "sparse": _training_step(copy.deepcopy(sparse), seen.x, seen.requires_grad),
    }
    with torch.random.fork_rng(devices=[]):
        try:
            steps["sparse"]()
        except (NotImplementedError, TypeError, ValueError) as error:
            decision.reason = f"cannot take its input: {error}"
            return False
        timed = compare_interleaved(steps)
    decision.dense_ms, decision.sparse_ms = 1e3 * timed.medians["dense"], 1e3 * timed.medians["sparse"]
    faster = decision.dense_ms > decision.sparse_ms
    decision.reason = ", ".join(part for part in ("" if faster else "faster dense", timed.note) if part)
    return faster


def _put_back_what_is_not_called(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    sparse: Mapping[str, nn.Module],
    run: Runner,
    decisions: Mapping[str, SwapDecision],
) -> None:
    """Run the swapped model itself, and undo the replacement of layers that it still calls in their dense form.

    Modules that a model has in a Python list or in a function besides their place in it cannot be replaced there.
    """
    try:
        unused = not_called(model, sparse, run)
    except Exception as error:
        _replace_children(model, {id(layer): dense[name] for name, layer in sparse.items()})
        raise RuntimeError("the model runs on the example as it is, but not with sparse layers, so nothing was "
                           f"replaced: {error}. If it computes with the weight of a layer, name that layer in "
                           "skip_modules.") from error  # fmt: skip
    _replace_children(model, {id(sparse[name]): dense[name] for name in unused})
    for name in unused:
        decisions[name].swapped = False
        decisions[name].reason = "is called from a list or a kept method, where it cannot be replaced"


def swap_modules_with_sparse(
    model: nn.Module,
    input_shape: Sequence[Any] | Tensor | Mapping[str, Any] | Callable[..., Any] | None,
    inplace: bool = True,
    verbose: bool = True,
    prototype: bool = False,
    quantize: bool = True,
    skip_modules: Iterable[str | nn.Module] | None = None,
    min_sparsity: float = 0.8,
    include_dense: bool = True,
    qconfig: QuantConfig | None = None,
    fuse: bool = False,
    on_layer: Callable[[str], None] | None = None,
) -> nn.Module:
    """Replace the layers of a model that are sparse enough, and faster so.

    These are ``Linear``, ``Conv1d`` to ``Conv3d`` and ``ConvTranspose1d`` to ``ConvTranspose3d`` of torch, and
    ``Conv1D`` of transformers.

    Parameters
    ----------
    model : torch.nn.Module
        On the CPU, with zeros in its weights or pruned by torch.nn.utils.prune or torch.ao.pruning (masks attached or
        removed).
    input_shape : sequence of int, Tensor, sequence or mapping of these, callable, or None
        What the model is run on once, in its present mode, which decides the sizes (and the memory format) at which
        layers are timed: the shape of its input, batch included, or an example input; a tuple or list of both, for a
        model with several arguments, or a mapping with their names (arguments that are neither shape nor tensor are
        passed as they are); or a function that is called with the model and runs it, for models that need more, such as
        targets. A function without parameters runs the model by itself. None goes with ``include_dense=False``, which
        runs nothing.
    inplace : bool
        Change `model`; otherwise a deep copy.
    verbose : bool
        Print the table of decisions.
    prototype : bool
        Dense modules that simulate quantisation instead (`FakeQuantLinear`, `FakeQuantConv2d`), in every layer that is
        sparse enough: they are slower, so nothing is timed.
    quantize : bool
        8-bit integers; otherwise sparse float32 modules.
    skip_modules : iterable of str or Module, optional
        Layers to leave alone, by qualified name or as objects.
    min_sparsity : float
        Layers with a smaller fraction of zeros stay dense.
    include_dense : bool
        Time each layer, dense and sparse, forward and backward, at its real input (one of those that differ in nothing
        but at most 1 % of zeros), and leave it dense where that is faster, where the model computes with its weight
        directly, or where the model, which is run once more after the swap, does not call the layer that has replaced
        it. Otherwise the model is not run at all, and every layer that is sparse enough is replaced.
    qconfig : QuantConfig, optional
        For the quantised modules.
    fuse : bool
        Make one block of a sparse convolution and the BatchNorm2d, addition and ReLU that follow it, of other
        BatchNorm2d with the ReLU behind them, and of a sparse linear layer and its ReLU or GELU, see
        `qsparseprop.utils.fusion.fuse_modules`. What was fused, or why not, is in the report. Blocks of images return
        channels_last tensors.
    on_layer : callable, optional
        Called with the name of each layer before it is timed, which takes seconds where layers are large.

    Returns
    -------
    torch.nn.Module
        The model (or its copy), with the decisions in `model.swap_report`. A module that appears in several places is
        replaced by one sparse module in all of them. Parameters of replaced layers are new ones: create the optimizer
        afterwards.

    Raises
    ------
    TypeError, ValueError
        For arguments that make no sense, or a name in `skip_modules` that the model does not have. The model is
        unchanged then.
    RuntimeError
        If the model runs on the example with its dense layers only. It is unchanged then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity must be a fraction between 0 and 1, got {min_sparsity!r}")
    if qconfig is not None and not quantize:
        raise ValueError("qconfig only goes with quantize=True")
    if prototype and not quantize:
        raise ValueError("prototype=True simulates quantised layers and only goes with quantize=True")
    if fuse and (prototype or not quantize):
        raise ValueError("fuse=True only goes with quantize=True, and not with prototype=True")
    if input_shape is None and include_dense and not prototype:
        raise ValueError("input_shape=None runs nothing and only goes with include_dense=False")
    run = None if input_shape is None else make_runner(model, input_shape)
    if not include_dense:
        run = None
    named = dict(model.named_modules())
    skipped: set[int] = set()
    for item in skip_modules or ():
        module = item if isinstance(item, nn.Module) else named.get(item)
        if module is None:
            raise ValueError(f"skip_modules names {item!r}, which the model does not have")
        skipped.update(id(m) for m in module.modules())
    if not inplace:
        kept = [name for name, module in named.items() if id(module) in skipped]
        model = copy_model(model)
        named = dict(model.named_modules())
        skipped = {id(named[name]) for name in kept}

    report = SwapReport()
    candidates: dict[str, SwapDecision] = {}
    owners = _owners(model)
    for found in weights_of(model):
        if isinstance(found.module, SparseModule):
            continue
        decision = SwapDecision(found.name, type(found.module).__name__, found.shape, None, found.sparsity)
        report.append(decision)
        if id(found.module) in skipped:
            decision.reason = "in skip_modules"
        elif (why := _unsupported(found, owners)) is not None:
            decision.reason = why
        elif found.sparsity < min_sparsity:
            decision.reason = f"below min_sparsity={min_sparsity:g}"
        elif found.name == "":
            decision.reason = "it is the model itself: use from_dense"
        elif _own_hooks(found.module):
            decision.reason = "has hooks"
        elif found.zeros == found.total and not found.masked:
            # a new head, LoRA's B, a residual branch or a ControlNet that starts at zero: it is there to learn
            decision.reason = "has no nonzero and no mask: it was initialised to zero, not pruned"
        elif prototype and dense_type(found.module) not in _PROTOTYPES:
            decision.reason = f"nothing simulates {dense_type(found.module).__name__}"
        else:
            candidates[found.name] = decision

    recorded, read = record(model, candidates, run) if run is not None and candidates else ({}, set())
    dense = {name: named[name] for name in candidates}
    sparse: dict[str, nn.Module] = {}
    stopwatch = _Stopwatch()
    for name, decision in candidates.items():
        of = dense_type(dense[name])
        kind = _PROTOTYPES[of] if prototype else _replacements()[of][quantize]
        if name in recorded:
            decision.input_shape = tuple(recorded[name].x.shape)
        if name in read:
            decision.reason = "its weight is read outside of its own forward pass"
            continue
        if name not in recorded and run is not None and not prototype:
            decision.reason = "not reached by the example input, so not timed"
            continue
        if on_layer is not None:
            on_layer(name)
        layer = kind.from_dense(dense[name], qconfig=qconfig)
        if name in recorded and not prototype and not stopwatch.pays(dense[name], layer, recorded[name], decision):
            continue
        decision.swapped = True
        sparse[name] = layer

    _replace_children(model, {id(dense[name]): layer for name, layer in sparse.items()})
    if run is not None and sparse:
        _put_back_what_is_not_called(model, dense, sparse, run, candidates)
    if fuse:
        fused = fuse_modules(model)
        for decision in report.swapped:
            decision.reason = fused.pop(decision.name, decision.reason)
        report.extend(SwapDecision(name, "BatchNorm2d", (), None, 0.0, reason=why) for name, why in fused.items()
                      if isinstance(model.get_submodule(name), QuantizedBNReLU2d))  # fmt: skip
    model.swap_report = report
    if verbose:
        sys.stdout.write(f"{report}\n")
    return model


def swap_modules_for_state(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    quantize: bool = True,
    qconfig: QuantConfig | None = None,
    fuse: bool = False,
) -> nn.Module:
    """Replace the dense layers of a fresh model that are sparse in a state dict by empty sparse ones, in place.

    What follows is ``model.load_state_dict(state_dict)``. The weights of the dense layers are not looked at, so the
    model may have been made on the meta device (load with ``assign=True`` then).

    Parameters
    ----------
    model : torch.nn.Module
        As it was before `swap_modules_with_sparse`.
    state_dict : mapping of str to Tensor
        The state of a model that `swap_modules_with_sparse` has changed.
    quantize, qconfig, fuse
        As for `swap_modules_with_sparse`; they are not part of a state.

    Returns
    -------
    torch.nn.Module
        The same `model`.

    Raises
    ------
    ValueError
        If a layer that is sparse in the state is none in the model, naming it; nothing has changed then.
    """
    if qconfig is not None and not quantize:
        raise ValueError("qconfig only goes with quantize=True")
    if fuse and not quantize:
        raise ValueError("fuse=True only goes with quantize=True")
    suffix = ".crow_indices"
    names = [key.removesuffix(suffix) for key in state_dict if key.endswith(suffix)]
    named = dict(model.named_modules(remove_duplicate=False))
    replacements = {}
    for name in names:
        dense = named.get(name)
        if isinstance(dense, SparseModule):
            continue
        if dense is None or dense_type(dense) not in _replacements():
            kind = "does not have it" if dense is None else f"has a {type(dense).__name__} there"
            raise ValueError(f"{name} is a sparse layer in the state, the model {kind}")
        replacements[id(dense)] = _replacements()[dense_type(dense)][quantize].like(dense, qconfig)
    _replace_children(model, replacements)
    if fuse:
        fuse_modules(model)
    return model


def swap_modules_with_dense(model: nn.Module, inplace: bool = True) -> nn.Module:
    """Replace the sparse layers of a model by dense ones with the same weights, for export or for comparison.

    Parameters
    ----------
    model : torch.nn.Module
    inplace : bool
        Change `model`; otherwise a deep copy.

    Returns
    -------
    torch.nn.Module
        The model (or its copy); where it is a sparse layer itself, the dense one. A module that appears in several
        places is replaced by one in all of them; parameters of replaced layers are new ones. Hooks on sparse layers
        are not taken over.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, SparseModule):
        return model.to_dense()
    if not inplace:
        model = copy_model(model)
    unfuse_modules(model)
    _replace_children(model, {id(m): m.to_dense() for m in model.modules() if isinstance(m, SparseModule)})
    return model


def unfold_attention(model: nn.Module) -> nn.Module:
    """Replace the nn.MultiheadAttention modules of a model by ones whose projections can be made sparse, in place.

    To be called before pruning, or after pruning was made permanent, and before `swap_modules_with_sparse`. Modules
    with ``add_bias_kv``, ``add_zero_attn`` or attached masks, and subclasses, stay as they are.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same `model`; parameters of the projections are new ones.
    """
    replacements = {}
    for module in model.modules():
        plain = type(module) is nn.MultiheadAttention and not prune.is_pruned(module)
        if plain and module.bias_k is None and not module.add_zero_attn:
            replacements[id(module)] = sparse_nn.MultiheadAttention.from_dense(module)
    _replace_children(model, replacements)
    return model
