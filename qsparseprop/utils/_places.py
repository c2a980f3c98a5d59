"""Putting modules in the places of others in a model, and finding the places where that is not possible."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from qsparseprop._torch_compat import keep_off_fast_path
from qsparseprop.nn import MultiheadAttention
from qsparseprop.nn._adapters import guard_merging
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._weight import check_before_loading
from qsparseprop.utils._example import Runner, not_called, still_held
from qsparseprop.utils.swap_report import SwapDecision

__all__ = ["put_back_what_is_not_called", "replace_children", "replace_or_refuse"]


def replace_children(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Put modules in the places of others, given by their ids, wherever those appear."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
        if isinstance(parent, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            kinds = SparseModule, MultiheadAttention  # whose weights are not dense
            keep_off_fast_path(parent, any(isinstance(m, kinds) for m in parent.modules()))
    if any(isinstance(m, SparseModule) for m in model.modules()):
        check_before_loading(model)
        guard_merging(model)


def put_back_what_is_not_called(
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
        replace_children(model, {id(layer): dense[name] for name, layer in sparse.items()})
        raise RuntimeError("the model runs on the example as it is, but not with sparse layers, so nothing was "
                           f"replaced: {error}. If it computes with the weight of a layer, name that layer in "
                           "skip_modules.") from error  # fmt: skip
    names = [name for name in sparse if name in held or name in unused]
    replace_children(model, {id(sparse[name]): dense[name] for name in names})
    for name in names:
        decisions[name].swapped = False
        decisions[name].reason = "is also in a list, function, kept method or other tensor, where it cannot be replaced"


def replace_or_refuse(
    model: nn.Module, replaced: Mapping[str, nn.Module], replacements: Mapping[int, nn.Module]
) -> None:
    """Replace layers, given by their names, by what `replacements` has for their ids, or change nothing."""
    replace_children(model, dict(replacements))
    if held := still_held(model, replaced):
        replace_children(model, {id(replacements[id(layer)]): layer for layer in replaced.values()})
        raise ValueError(f"the model also holds {', '.join(held)} in a list, function or kept method, where layers "
                         "cannot be replaced")  # fmt: skip
