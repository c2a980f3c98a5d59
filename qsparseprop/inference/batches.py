"""Calibration data as arguments of a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.data import DataLoader

from qsparseprop.contents import check_memory

__all__ = ["Batch", "batches_of"]


class Batch(NamedTuple):
    """Arguments of one call.

    Attributes
    ----------
    args : tuple
    kwargs : dict
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def leaves(self) -> list[Any]:
        """Tensors and other things among them, in their order."""
        return _pytree.tree_leaves((self.args, dict(sorted(self.kwargs.items()))))

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are tensors, in float32 where they are floating point."""
        found = [leaf.detach() for leaf in self.leaves if isinstance(leaf, Tensor)]
        return [tensor.float() if tensor.is_floating_point() else tensor for tensor in found]

    def floats(self) -> Batch:
        """The same with float32 in the place of other floating point."""

        def as_float(leaf: Any) -> Any:
            return leaf.detach().float() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return Batch(*_pytree.tree_map(as_float, (self.args, self.kwargs)))

    def one_more(self) -> Batch:
        """With the first sample once more at the end."""
        sizes = [tensor.shape[0] for tensor in self.tensors if tensor.ndim]
        batch = sizes[0] if sizes else 0

        def grown(leaf: Any) -> Any:
            grows = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
            return torch.cat([leaf, leaf[:1]]) if grows else leaf

        return Batch(*_pytree.tree_map(grown, (self.args, self.kwargs)))

    def first(self) -> Batch:
        """The first sample alone; a copy of the whole where there is no batch."""
        sizes = [tensor.shape[0] for tensor in self.tensors if tensor.ndim]
        batch = sizes[0] if sizes else 0

        def one(leaf: Any) -> Any:
            cut = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch
            return leaf[:1].clone() if cut else leaf

        return Batch(*_pytree.tree_map(one, (self.args, self.kwargs)))


def batches_of(model: nn.Module, calibration: Iterable[Any]) -> list[Batch]:
    """Arguments for each batch of calibration data.

    Parameters
    ----------
    model : torch.nn.Module
    calibration : iterable
        Of tensors, of tuples or lists (positional arguments), of mappings (arguments by name), or a DataLoader, whose
        batches hold more than the model needs where labels are in them.

    Returns
    -------
    list of Batch

    Raises
    ------
    TypeError, ValueError
        If there are none, or something else.
    """
    if isinstance(calibration, Tensor) or not isinstance(calibration, Iterable):
        raise TypeError("calibration must be an iterable of batches, such as a DataLoader or a list of tensors, got "
                        f"{type(calibration).__name__}")  # fmt: skip
    labelled = isinstance(calibration, DataLoader)
    found = [_arguments(model, item, labelled) for item in calibration]
    check_memory([(batch.args, batch.kwargs) for batch in found], "the calibration data")
    found = [batch.floats() for batch in found]
    found = [batch for batch in found if all(tensor.numel() for tensor in batch.tensors)]
    if not found:
        raise ValueError("there are no calibration batches: scales need some examples of what the model will get")
    for batch in found:
        if not batch.tensors:
            raise TypeError("a calibration batch holds no tensor")
        if any(tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) for tensor in batch.tensors):
            raise ValueError("the calibration data holds NaN or infinity")
    return found


def _arguments(model: nn.Module, item: Any, labelled: bool) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,), {})
    if isinstance(item, Mapping):
        return Batch((), dict(item))
    if not isinstance(item, list | tuple):
        raise TypeError("a calibration batch must be a tensor, or a tuple, list or mapping of arguments, got "
                        f"{type(item).__name__}")  # fmt: skip
    if labelled and len(item) > _needed(model):
        first = item[: _needed(model)]
        if len(first) == 1 and isinstance(first[0], Mapping | list | tuple):
            return _arguments(model, first[0], False)
        return Batch(tuple(first), {})
    return Batch(tuple(item), {})


def _needed(model: nn.Module) -> int:
    """Positional arguments without defaults; one at least."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    return max(1, sum(p.kind in positional and p.default is p.empty for p in parameters))
