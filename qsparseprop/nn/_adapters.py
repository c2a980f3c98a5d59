"""Adapters beside sparse layers: what peft's own methods must not do to these."""

from __future__ import annotations

import functools

from torch import nn

from qsparseprop.nn._weight import SparseWeight

#: What peft calls before it merges the first adapter of a model.
_CHECK = "_check_merge_allowed"


def _refuse_merging(tuner: nn.Module) -> None:
    names = [name.removesuffix(".base_layer") for name, module in tuner.named_modules()
             if isinstance(module, SparseWeight) and name.endswith(".base_layer")]
    if names:
        raise NotImplementedError(f"the adapters of {', '.join(names)} cannot be merged into sparse layers, whose "
                                  "zeros they would fill: call swap_modules_with_dense(model) of "
                                  "qsparseprop.utils.network_utils first, and merge then (or unload() the adapters)")
    getattr(type(tuner), _CHECK)(tuner)


def guard_merging(model: nn.Module) -> None:
    """Let peft refuse to merge adapters into sparse layers before it has merged any; others are merged as before.

    Parameters
    ----------
    model : nn.Module
        Where it holds no model of peft's, nothing happens.
    """
    for tuner in model.modules():
        if callable(getattr(type(tuner), _CHECK, None)):
            tuner.__dict__[_CHECK] = functools.partial(_refuse_merging, tuner)
