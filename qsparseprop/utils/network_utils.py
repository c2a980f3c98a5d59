"""Conversion of whole models: dense layers that are sparse enough, and faster so, are replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qsparseprop import arguments
from qsparseprop import nn as sparse_nn
from qsparseprop.contents import check_memory_of
from qsparseprop.layout.modes import forced_modes
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_type
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils._candidates import SwapOptions, find_candidates, names_to_skip, sparse_types, untouched
from qsparseprop.utils._carry import carry_attributes, carry_hooks
from qsparseprop.utils._example import Runner, copy_model, make_runner, record, still_held
from qsparseprop.utils._layer_timing import Stopwatch
from qsparseprop.utils._places import put_back_what_is_not_called, replace_children, replace_or_refuse
from qsparseprop.utils._weights import weights_of
from qsparseprop.utils.fusion import Chain, chains, fuse_modules, fused_as_before_on_error, unfuse_modules
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


def sparsity(model: nn.Module) -> float:
    """Fraction of zeros in the prunable weights of a model, biases not counted.

    Prunable is what has a line in the report of `swap_modules_with_sparse`: the weights of linear, convolutional,
    recurrent and attention layers, of torch's and of other packages', and those of sparse layers; embeddings only where
    they were pruned. Masks that are still attached count as zeros. 0.0 for a model without such layers.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    float
        In [0, 1].
    """
    arguments.model(model)
    # a weight that several modules share counts once
    found = {w.identity: w for w in weights_of(model)}.values()
    total = sum(w.total for w in found)
    return sum(w.zeros for w in found) / total if total else 0.0


@torch.inference_mode(False)  # what is made in it could not be trained
def swap_modules_with_sparse(  # noqa: PLR0913 - settings, by keyword
    model: nn.Module,
    input_shape: Sequence[Any] | Tensor | Mapping[str, Any] | Callable[..., Any] | None,
    inplace: bool = True,
    verbose: bool = True,
    prototype: bool = False,
    quantize: bool = True,
    *,
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
        Change `model`; otherwise a deep copy. This and the next three are taken by position as well, in this order;
        write their names.
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
    arguments.model(model)
    for name, value in (("inplace", inplace), ("verbose", verbose), ("include_dense", include_dense)):
        arguments.flag(value, name)
    if on_layer is not None and not callable(on_layer):
        raise TypeError(f"on_layer must be a function, got {arguments.shown(on_layer)}")
    options = SwapOptions(prototype, quantize, min_sparsity, qconfig, fuse)
    options.check()
    forced_modes()  # a setting that makes no sense must not look like layers that do not pay
    if input_shape is None and include_dense and not prototype:
        raise ValueError("input_shape=None runs nothing and only goes with include_dense=False")
    run = None if input_shape is None else make_runner(model, input_shape)
    if not include_dense:
        run = None
    skipped = names_to_skip(model, skip_modules)
    if not inplace:
        model = copy_model(model)
    report, candidates = find_candidates(model, skipped, options)
    named = dict(model.named_modules())
    dense = {name: named[name] for name in candidates}
    sparse = _sparse_layers(model, dense, candidates, run, options, on_layer)
    together: dict[str, Chain] = {}
    with fused_as_before_on_error(model):
        replace_children(model, {id(dense[name]): layer for name, layer in sparse.items()})
        if fuse:
            fuse_modules(model)
        if sparse:
            again = None if run is None else _telling_chains(run, together)
            put_back_what_is_not_called(model, dense, sparse, again, candidates)
    if fuse:
        fuse_modules(model)  # those that were put back, too
        report.tell_chains({name: chain.joined for name, chain in together.items()})
    model.swap_report = report  # type: ignore[assignment]  # torch types only what modules hold themselves
    if verbose:
        print(report)
    return model


def _telling_chains(run: Runner, together: dict[str, Chain]) -> Runner:
    """A run that also tells what was computed together, before what it has left in the model is taken back."""

    def run_and_tell(model: nn.Module) -> None:
        run(model)
        together.update(chains(model))

    return run_and_tell


def _sparse_layers(
    model: nn.Module,
    dense: Mapping[str, nn.Module],
    decisions: Mapping[str, SwapDecision],
    run: Runner | None,
    options: SwapOptions,
    on_layer: Callable[[str], None] | None,
) -> dict[str, nn.Module]:
    """Sparse forms of the candidates, by name, without those that are slower at what the run gives them."""
    recorded, read = record(model, decisions, run, options.fuse) if run is not None and decisions else ({}, set())
    timed = run is not None and not options.prototype
    layers: dict[str, nn.Module] = {}
    stopwatch = Stopwatch()
    for name, decision in decisions.items():
        seen = recorded.get(name)
        if seen is not None:
            decision.input_shape = tuple(seen.x.shape)
        if name in read:
            decision.reason = "its weight is read outside of its own forward pass"
            continue
        if seen is None and timed:
            decision.reason = "not reached by the example input, so not timed"
            continue
        if on_layer is not None:
            on_layer(name)
        layer = options.make(dense[name])
        if timed and not stopwatch.pays(dense[name], layer, recorded[name], decision, options.fuse):
            continue
        carry_attributes(dense[name], layer, untouched(dense[name]))
        decision.swapped = True
        layers[name] = layer
    return layers


def swap_modules_for_state(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
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
    arguments.model(model)
    arguments.instance(state_dict, Mapping, "state_dict", "a mapping of names to tensors")
    arguments.flag(quantize, "quantize")
    arguments.flag(fuse, "fuse")
    if qconfig is not None and not quantize:
        raise ValueError("qconfig only goes with quantize=True")
    if fuse and not quantize:
        raise ValueError("fuse=True only goes with quantize=True")
    suffix = ".crow_indices"
    names = [key.removesuffix(suffix) for key in state_dict if isinstance(key, str) and key.endswith(suffix)]
    named = dict(model.named_modules(remove_duplicate=False))
    replacements, replaced = {}, {}
    for name in names:
        dense = named.get(name)
        if isinstance(dense, SparseModule):
            continue
        if dense is None or dense_type(dense) not in sparse_types():
            kind = "does not have it" if dense is None else f"has a {type(dense).__name__} there"
            raise ValueError(f"{name} is a sparse layer in the state, the model {kind}")
        if id(dense) not in replacements:
            try:
                replacements[id(dense)] = sparse_types()[dense_type(dense)][quantize].like(dense, qconfig)
            except NotImplementedError as error:
                raise ValueError(f"{name} is a sparse layer in the state, and cannot be one here: {error}") from error
            replaced[name] = dense
    replace_or_refuse(model, replaced, replacements)
    if fuse:
        fuse_modules(model)
    return model


def swap_modules_with_dense(model: nn.Module, *, inplace: bool = True) -> nn.Module:
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
    arguments.model(model)
    arguments.flag(inplace, "inplace")
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
    replace_or_refuse(model, replaced, replacements)
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
    arguments.model(model)
    check_memory_of(model)
    replacements: dict[int, nn.Module] = {}
    replaced: dict[int, nn.Module] = {}
    for module in model.modules():
        plain = type(module) is nn.MultiheadAttention and not prune.is_pruned(module)
        if plain and module.bias_k is None and not module.add_zero_attn:
            replacements[id(module)] = sparse_nn.MultiheadAttention.from_dense(module)
            replaced[id(module)] = module
    replace_children(model, replacements)
    held = still_held(model, replaced)
    replace_children(model, {id(replacements[key]): replaced[key] for key in held})
    return model
