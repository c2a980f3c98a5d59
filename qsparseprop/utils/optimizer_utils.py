"""Parameter groups for optimizers, in which the weights of sparse layers are what they are: weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from qsparseprop import arguments
from qsparseprop.nn._values import SparseValues

__all__ = ["decays", "parameter_groups"]


def decays(parameter: nn.Parameter) -> bool:
    """Whether a parameter is a weight matrix or kernel, which are usually given weight decay; biases and norms are not.

    Many training scripts ask for ``parameter.ndim > 1`` instead, which leaves out the weights of sparse layers: these
    are one-dimensional.

    Parameters
    ----------
    parameter : nn.Parameter

    Returns
    -------
    bool
    """
    return isinstance(parameter, SparseValues) or parameter.ndim > 1


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Collection[str] = ()) -> list[dict[str, Any]]:
    """Two groups for an optimizer: weights, which decay, and everything else, which does not.

    For a swapped model they are the groups that ``parameter.ndim > 1`` makes of the dense one.

    Parameters
    ----------
    model : torch.nn.Module
        Parameters that do not want a gradient are left out.
    weight_decay : float
        Of the weights; not negative.
    no_decay : collection of str
        Names of further parameters that do not decay, as ``named_parameters`` gives them; a part of the name that ends
        before a dot stands for all below. One of the names of a parameter that several modules share is enough.

    Returns
    -------
    list of dict
        As ``torch.optim.AdamW`` takes them: ``params`` and ``weight_decay``.

    Raises
    ------
    ValueError
        For a negative weight decay, or a name that the model does not have.

    Examples
    --------
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3)
    """
    arguments.model(model)
    arguments.number(weight_decay, "weight_decay")
    no_decay = tuple(arguments.names(no_decay, "no_decay"))
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    named = dict(model.named_parameters(remove_duplicate=False))
    unused = [entry for entry in no_decay if not any(name == entry or name.startswith(f"{entry}.") for name in named)]
    if unused:
        raise ValueError(f"no_decay names {', '.join(map(repr, unused))}, which the model does not have")
    spared = {id(parameter) for name, parameter in named.items()
              if any(name == entry or name.startswith(f"{entry}.") for entry in no_decay)}  # fmt: skip
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[decays(parameter) and id(parameter) not in spared].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
