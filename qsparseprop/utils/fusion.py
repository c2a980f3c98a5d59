"""Blocks: quantised sparse layers whose results are deferred, together with what follows them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from qsparseprop import arguments
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn.blocks.start import is_starting, start_chains, stop_chains
from qsparseprop.nn.deferred.usage import name_of

__all__ = ["Chain", "chains", "fuse_modules", "unfuse_modules"]


class Chain(NamedTuple):
    """What a sparse layer was computed together with when it last ran.

    True where there is anything.

    Attributes
    ----------
    packed : bool
        Whether its input came packed out of the chain before it.
    joined : tuple of str
        What was taken up behind it: ("BatchNorm", "ReLU") and the like; the longest of several chains.
    """

    packed: bool
    joined: tuple[str, ...]

    def __bool__(self) -> bool:
        return self.packed or bool(self.joined)


def fuse_modules(model: nn.Module) -> nn.Module:
    """Let the layers of a model form blocks while it runs, in place.

    The model's own forward pass is what runs. Quantised sparse convolutions (of one and two dimensions) and linear
    layers give tensors that are computed when somebody wants them: batch normalisation, additions and activations that
    follow are recorded, and done in one pass when the next sparse layer takes the result. Dense layers of these kinds,
    and batch normalisations, start such chains, too. See `qsparseprop.nn.deferred`.

    Parameters
    ----------
    model : torch.nn.Module
        Without quantised sparse layers it stays as it is.

    Returns
    -------
    torch.nn.Module
        The same `model`. Its modules, their names and the state_dict are what they were.
    """
    arguments.model(model)
    sparse = [module for module in model.modules() if isinstance(module, SparseModule) and module.can_defer]
    for module in sparse:
        module.deferring = True
    if sparse:
        for each in model.modules():
            start_chains(each)
    return model


def unfuse_modules(model: nn.Module) -> nn.Module:
    """Undo `fuse_modules`, in place.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The same `model`.
    """
    arguments.model(model)
    for module in model.modules():
        _unfuse(module)
    return model


def _unfuse(module: nn.Module) -> None:
    if isinstance(module, SparseModule):
        for name in ("deferring", "_usages"):  # nothing is left, which a dense layer would be given
            vars(module).pop(name, None)
    elif is_starting(module):
        stop_chains(module)


@contextlib.contextmanager
def fused_as_before_on_error(model: nn.Module) -> Iterator[None]:
    """Where what is done in this context fails, unfuse what it has fused."""
    fused = {id(m) for m in model.modules() if is_starting(m) or (isinstance(m, SparseModule) and m.deferring)}
    try:
        yield
    except BaseException:
        for module in model.modules():
            if id(module) not in fused:
                _unfuse(module)
        raise


def chains(model: nn.Module) -> dict[str, Chain]:
    """What the layers of a fused model were computed together with when it last ran.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    dict
        For each sparse layer that can form blocks, by its qualified name.
    """
    arguments.model(model)
    return {name: Chain(module.took_packed(), tuple(map(name_of, module.last_chain())))
            for name, module in model.named_modules() if isinstance(module, SparseModule) and module.deferring}
