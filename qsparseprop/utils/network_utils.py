"""Conversion of whole models: dense layers that are sparse enough, and faster so, are replaced."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qsparseprop import nn as sparse_nn
from qsparseprop._torch_compat import keep_off_fast_path
from qsparseprop.contents import is_convertible
from qsparseprop.nn._adapters import guard_merging
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_type, dense_weight, foreign_parametrization
from qsparseprop.nn._weight import check_before_loading
from qsparseprop.nn.transposed_linear import dense_conv1d
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils._carry import carry_attributes, carry_hooks, gradient_hooks, own_hooks
from qsparseprop.utils._example import Runner, copy_model, make_runner, not_called, record, still_held
from qsparseprop.utils._layer_timing import Stopwatch
from qsparseprop.utils._weights import Weights, weights_of
from qsparseprop.utils.fusion import Chain, chains, fuse_modules, unfuse_modules
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


def _owners(model: nn.Module) -> Counter[int]:
    """How many modules hold each Parameter."""
    return Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)


def _unsupported(found: Weights, owners: Counter[int]) -> str | None:
    """Why a layer cannot be replaced, or None."""
    module = found.module
    if (reason := _unsupported_kind(module)) is not None:
        return reason
    if foreign_parametrization(module):
        return "has a parametrization"
    if found.foreign is not None:
        return found.foreign.reason
    if any(owners[id(p)] > 1 for p in module.parameters(recurse=False)):
        return "shares a parameter with another module"
    if "forward" in vars(module):
        return "its forward was replaced by another one"
    if (own := _own_parts(module)):
        return f"holds {own} beside its weight"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r}"
    return _unsupported_weight(dense_weight(module)[0])


def _unsupported_kind(module: nn.Module) -> str | None:
    kind = type(module).__qualname__
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return f"{kind} is a subclass whose weight does not exist yet"
    dense_types = tuple(_replacements())
    if dense_type(module) not in dense_types:
        own = f"{type(module).__module__}.{kind}" if kind in {t.__name__ for t in dense_types} else kind
        if isinstance(module, dense_types):
            return f"{own} is a subclass with a behaviour of its own"
        return f"nothing sparse replaces {own}"
    return None


def _unsupported_weight(weight: Tensor) -> str | None:
    if weight.device.type != "cpu":
        return f"on device {weight.device}"
    if not is_convertible(weight.dtype) or weight.element_size() < 2:
        return f"weight of dtype {weight.dtype}"
    if not torch.isfinite(weight).all():
        return "weight has NaN or Inf"
    return None


def _own_parts(module: nn.Module) -> str:
    """Parameters and modules that a layer holds, which its type and prune know nothing of."""
    known = {"weight", "bias", "weight_orig", "bias_orig", "parametrizations"}
    return ", ".join(name for name in (*module._parameters, *module._modules) if name not in known)


def _untouched(module: nn.Module) -> nn.Module:
    """A dense layer of the same kind that nobody has set anything on, small and without memory."""
    kind = dense_type(module)
    sizes = (2, 2) if kind in (nn.Linear, dense_conv1d()) else (2, 2, 1)
    with torch.device("meta"):
        return kind(*sizes)


def _replace_children(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, given by their ids, wherever those appear."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            kinds = SparseModule, sparse_nn.MultiheadAttention  # whose weights are not dense
            keep_off_fast_path(parent, any(isinstance(m, kinds) for m in parent.modules()))
    if any(isinstance(m, SparseModule) for m in model.modules()):
        check_before_loading(model)
        guard_merging(model)


def _put_back_what_is_not_called(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    sparse: Mapping[str, nn.Module],
    run: Runner | None,
    decisions: Mapping[str, SwapDecision],
) -> None:
    """Undo the replacement of layers that a model holds, or calls, in their dense form as well.

    Modules that a model has in a Python list or in a function besides their place in it cannot be replaced there. Where
    there is a `run`, the swapped model itself is run once more, to see what no look at its attributes shows.
    """
    replaced = {name: dense[name] for name in sparse}
    held = still_held(model, replaced)
    try:
        unused = [] if run is None else not_called(model, sparse, replaced, run)
    except Exception as error:
        _replace_children(model, {id(layer): dense[name] for name, layer in sparse.items()})
        raise RuntimeError("the model runs on the example as it is, but not with sparse layers, so nothing was "
                           f"replaced: {error}. If it computes with the weight of a layer, name that layer in "
                           "skip_modules.") from error  # fmt: skip
    names = [name for name in sparse if name in held or name in unused]
    _replace_children(model, {id(sparse[name]): dense[name] for name in names})
    for name in names:
        decisions[name].swapped = False
        decisions[name].reason = "is also in a list, function, kept method or other tensor, where it cannot be replaced"


@torch.inference_mode(False)  # what is made in it could not be trained
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
        it. Otherwise the model is not run at all, and every layer that is sparse enough is replaced, except for those
        that the model also holds in a list, a dict or a kept method.
    qconfig : QuantConfig, optional
        For the quantised modules.
    fuse : bool
        Let sparse layers form blocks with the batch normalisation, additions and activations that follow them, while
        the model runs, see `qsparseprop.utils.fusion.fuse_modules`. What was computed together on the example is in the
        report.
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
    every_name = dict(model.named_modules(remove_duplicate=False))
    for item in skip_modules or ():
        module = item if isinstance(item, nn.Module) else every_name.get(item)
        if module is None or not any(module is m for m in named.values()):
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
        elif own_hooks(found.module):
            decision.reason = "has hooks"
        elif gradient_hooks(found.module):
            decision.reason = "its parameters have gradient hooks: remove them first (handle.remove())"
        elif found.zeros == found.total and not found.masked:
            # a new head, LoRA's B, a residual branch or a ControlNet that starts at zero: it is there to learn
            decision.reason = "has no nonzero and no mask: it was initialised to zero, not pruned"
        elif prototype and dense_type(found.module) not in _PROTOTYPES:
            decision.reason = f"nothing simulates {dense_type(found.module).__name__}"
        else:
            candidates[found.name] = decision

    recorded, read = record(model, candidates, run, fuse) if run is not None and candidates else ({}, set())
    dense = {name: named[name] for name in candidates}
    sparse: dict[str, nn.Module] = {}
    stopwatch = Stopwatch()
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
        seen = None if prototype else recorded.get(name)
        if seen is not None and not stopwatch.pays(dense[name], layer, seen, decision, fuse):
            continue
        carry_attributes(dense[name], layer, _untouched(dense[name]))
        decision.swapped = True
        sparse[name] = layer

    _replace_children(model, {id(dense[name]): layer for name, layer in sparse.items()})
    together: dict[str, Chain] = {}

    def run_and_tell(model: nn.Module) -> None:
        run(model)
        together.update(chains(model))  # before what the run has left is taken back

    if fuse:
        fuse_modules(model)
    if sparse:
        _put_back_what_is_not_called(model, dense, sparse, None if run is None else run_and_tell, candidates)
    if fuse:
        fuse_modules(model)  # those that were put back, too
        for decision in report.swapped:
            if decision.name in together and together[decision.name].joined:
                joined = "together with " + ", ".join(together[decision.name].joined)
                decision.reason = ", ".join(part for part in (joined, decision.reason) if part)
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
        If a layer that is sparse in the state is none in the model, or one that cannot be replaced wherever the model
        holds it, naming it; nothing has changed then.
    """
    if qconfig is not None and not quantize:
        raise ValueError("qconfig only goes with quantize=True")
    if fuse and not quantize:
        raise ValueError("fuse=True only goes with quantize=True")
    suffix = ".crow_indices"
    names = [key.removesuffix(suffix) for key in state_dict if key.endswith(suffix)]
    named = dict(model.named_modules(remove_duplicate=False))
    replacements, replaced = {}, {}
    for name in names:
        dense = named.get(name)
        if isinstance(dense, SparseModule):
            continue
        if dense is None or dense_type(dense) not in _replacements():
            kind = "does not have it" if dense is None else f"has a {type(dense).__name__} there"
            raise ValueError(f"{name} is a sparse layer in the state, the model {kind}")
        if id(dense) not in replacements:
            replacements[id(dense)] = _replacements()[dense_type(dense)][quantize].like(dense, qconfig)
            replaced[name] = dense
    _replace_or_refuse(model, replaced, replacements)
    if fuse:
        fuse_modules(model)
    return model


def _replace_or_refuse(
    model: nn.Module, replaced: Mapping[str, nn.Module], replacements: Mapping[int, nn.Module]
) -> None:
    """Replace layers, given by their names, by what `replacements` has for their ids, or change nothing."""
    _replace_children(model, dict(replacements))
    if held := still_held(model, replaced):
        _replace_children(model, {id(replacements[id(layer)]): layer for layer in replaced.values()})
        raise ValueError(f"the model also holds {', '.join(held)} in a list, function or kept method, where layers "
                         "cannot be replaced")  # fmt: skip


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
        places is replaced by one in all of them; parameters of replaced layers are new ones. Hooks of modules, and
        attributes that somebody has set on layers or their parameters, are taken over; gradient hooks of parameters
        are not.

    Raises
    ------
    ValueError
        If the model also holds a sparse layer where it cannot be replaced (a list, a kept method), naming it; no layer
        was replaced then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, SparseModule):
        return model.to_dense()
    if not inplace:
        model = copy_model(model)
    unfuse_modules(model)
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}
    replacements = {}
    for module in replaced.values():
        dense = replacements[id(module)] = module.to_dense()
        carry_hooks(module, dense)
        carry_attributes(module, dense, type(module).like(dense, module.qconfig))
    _replace_or_refuse(model, replaced, replacements)
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
    replacements, replaced = {}, {}
    for module in model.modules():
        plain = type(module) is nn.MultiheadAttention and not prune.is_pruned(module)
        if plain and module.bias_k is None and not module.add_zero_attn:
            replacements[id(module)] = sparse_nn.MultiheadAttention.from_dense(module)
            replaced[id(module)] = module
    _replace_children(model, replacements)
    held = still_held(model, replaced)
    _replace_children(model, {id(replacements[key]): replaced[key] for key in held})
    return model
