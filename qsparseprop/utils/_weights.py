"""Which modules of a model have weights that are pruned, whether they can be sparse layers or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qsparseprop.contents import check_memory_of
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_values, has_mask, held
from qsparseprop.nn._foreign_masks import ForeignMask, foreign_masks

#: Parts of the names that layers outside of torch.nn give their weights, the projections of experts for instance.
_NAMES = ("weight", "kernel", "proj")

_PRUNABLE = (nn.Linear, nn.modules.conv._ConvNd)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass
class Weights:
    """The weights of one module: what there is, how much of it is zero, and whether anybody pruned it.

    Attributes
    ----------
    name : str
        Of the module.
    module : nn.Module
    shape : tuple of int
        Of the largest weight; empty where it does not exist yet.
    zeros, total : int
        Of all weights, masked ones counted as zeros.
    masked : bool
        Whether a mask says which weights exist.
    foreign : ForeignMask or None
        What another tool keeps beside the weight, for this tool to apply.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    zeros: int
    total: int
    masked: bool = False
    foreign: ForeignMask | None = None

    @property
    def identity(self) -> tuple[int, ...]:
        """The same for modules that share their weights."""
        if isinstance(self.module, SparseModule):
            return (id(self.module),)
        own = tuple(id(p) for p in self.module.parameters(recurse=False) if p.ndim > 1)
        return own or (id(self.module),)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros; 1 for a weight without elements."""
        return self.zeros / self.total if self.total else 1.0


def weights_of(model: nn.Module) -> list[Weights]:
    """The modules of a model with prunable weights, in their order, each once, sparse ones included.

    What counts is a parameter of two or more dimensions that is called a weight (``weight``, ``weight_ih_l0``,
    ``in_proj_weight``, ``kernel``, ``gate_up_proj`` and the like), the packed weights of torch.ao, and lazy ones.
    Embeddings are looked up, not multiplied; they count where somebody pruned them: with a mask, or with more than half
    of their entries zero.
    """
    check_memory_of(model)
    masks = foreign_masks(model)
    found = [w for name, module in model.named_modules() if (w := _weights(name, module)) is not None]
    for w in found:
        w.foreign = masks.get(w.name)
        if w.foreign is not None and w.foreign.mask is not None and not w.masked:
            weight = dense_values(w.module) if isinstance(w.module, _PRUNABLE) else held(w.module, "weight").detach()
            assert weight is not None  # of the mask's shape
            w.zeros, w.masked = _zeros(weight * w.foreign.mask), True
    return found


def _weights(name: str, module: nn.Module) -> Weights | None:
    if isinstance(module, SparseModule):
        total = torch.Size(module.weight_shape).numel()
        return Weights(name, module, tuple(module.weight_shape), total - module.nonzeros, total, True)
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return Weights(name, module, (), 0, 0)
    weights = list(_dense_weights(module))
    if not weights:
        return None
    shape = max((tuple(w.shape) for w in weights), key=lambda s: torch.Size(s).numel())
    result = Weights(name, module, shape, sum(map(_zeros, weights)), sum(w.numel() for w in weights), has_mask(module))
    return None if isinstance(module, _EMBEDDINGS) and not result.masked and result.sparsity <= 0.5 else result


def _dense_weights(module: nn.Module) -> Iterator[Tensor]:
    """Weights that the module itself holds, masked where there are masks."""
    packed = _packed_weights(module)
    if packed is not None:
        yield from packed
        return
    if isinstance(module, _PRUNABLE):
        weight = dense_values(module)
        yield from () if weight is None else (weight,)
        return
    masks = dict(module.named_buffers(recurse=False))
    for name, parameter in module.named_parameters(recurse=False):
        plain = name.removesuffix("_orig")
        if parameter.ndim > 1 and any(part in plain for part in _NAMES):
            mask = masks.get(f"{plain}_mask")
            yield parameter.detach() if mask is None else parameter.detach() * mask


def _packed_weights(module: nn.Module) -> list[Tensor] | None:
    """Weights that a module of torch.ao keeps packed in 8 bits; where torch.ao is not imported, nobody has used it."""
    utils = sys.modules.get("torch.ao.nn.quantized.modules.utils")
    recurrent = sys.modules.get("torch.ao.nn.quantized.dynamic.modules.rnn")
    if utils is not None and isinstance(module, utils.WeightedQuantizedModule):
        return [module.weight()]
    if recurrent is not None and isinstance(module, (recurrent.RNNBase, recurrent.RNNCellBase)):
        return list(module.get_weight().values())
    return None


def _zeros(weight: Tensor) -> int:
    """Zeros of a weight of any kind; those of kinds that cannot be looked at are not counted."""
    try:
        if weight.is_quantized:
            weight = weight.dequantize()
        if weight.layout is not torch.strided:
            weight = weight.to_dense()
        return 0 if weight.is_meta else weight.numel() - int(torch.count_nonzero(weight))
    except (RuntimeError, NotImplementedError):
        return 0
