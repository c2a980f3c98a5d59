"""Which layers of a model can become sparse ones, by which modules, and why the others cannot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qsparseprop import arguments
from qsparseprop import nn as sparse_nn
from qsparseprop.contents import is_convertible
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_type, dense_values, foreign_parametrization
from qsparseprop.nn.transposed_linear import dense_conv1d
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils._carry import gradient_hooks, own_hooks
from qsparseprop.utils._weights import Weights, weights_of
from qsparseprop.utils.swap_report import SwapDecision, SwapReport

__all__ = ["SwapOptions", "find_candidates", "names_to_skip", "sparse_types", "untouched"]

#: dense type -> sparse types, in float32 and quantised
_REPLACEMENTS: dict[type[nn.Module], tuple[type[SparseModule], type[SparseModule]]] = {
    kind: (getattr(sparse_nn, f"Sparse{kind.__name__}"), getattr(sparse_nn, f"QuantizedSparse{kind.__name__}"))
    for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
}
_PROTOTYPES: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: sparse_nn.FakeQuantLinear.from_dense,
    nn.Conv2d: sparse_nn.FakeQuantConv2d.from_dense,
}


def sparse_types() -> dict[type[nn.Module], tuple[type[SparseModule], type[SparseModule]]]:
    """What can be replaced, transformers' layers included where transformers is in use."""
    conv1d = dense_conv1d()
    transposed = (sparse_nn.SparseTransposedLinear, sparse_nn.QuantizedSparseTransposedLinear)
    return _REPLACEMENTS if conv1d is None else {**_REPLACEMENTS, conv1d: transposed}


def untouched(module: nn.Module) -> nn.Module:
    """A dense layer of the same kind that nobody has set anything on, small and without memory."""
    kind = dense_type(module)
    sizes = (2, 2) if kind in (nn.Linear, dense_conv1d()) else (2, 2, 1)
    with torch.device("meta"):
        return kind(*sizes)


class SwapOptions(NamedTuple):
    """Arguments of `swap_modules_with_sparse` that decide which layers become what."""

    prototype: bool
    quantize: bool
    min_sparsity: float
    qconfig: QuantConfig | None
    fuse: bool

    def check(self) -> None:
        """Raise a TypeError or ValueError for what makes no sense, by itself or together."""
        for name in ("prototype", "quantize", "fuse"):
            arguments.flag(getattr(self, name), name)
        arguments.number(self.min_sparsity, "min_sparsity")
        if not 0.0 <= self.min_sparsity <= 1.0:
            raise ValueError(f"min_sparsity must be a fraction between 0 and 1, got {self.min_sparsity!r}")
        if self.qconfig is not None:
            arguments.instance(self.qconfig, QuantConfig, "qconfig", "a QuantConfig")
        if self.qconfig is not None and not self.quantize:
            raise ValueError("qconfig only goes with quantize=True")
        if self.prototype and not self.quantize:
            raise ValueError("prototype=True simulates quantised layers and only goes with quantize=True")
        if self.fuse and (self.prototype or not self.quantize):
            raise ValueError("fuse=True only goes with quantize=True, and not with prototype=True")

    def make(self, dense: nn.Module) -> nn.Module:
        """What replaces a candidate."""
        kind = dense_type(dense)
        make = _PROTOTYPES[kind] if self.prototype else sparse_types()[kind][self.quantize].from_dense
        return make(dense, qconfig=self.qconfig)


def names_to_skip(model: nn.Module, skip_modules: Iterable[str | nn.Module] | None) -> set[str]:
    """Names of the modules that are to be left alone, and of all below them.

    Raises
    ------
    TypeError
        For a string in place of several.
    ValueError
        For one that the model does not have.
    """
    named = dict(model.named_modules())
    every_name = dict(model.named_modules(remove_duplicate=False))
    skipped: set[int] = set()
    for item in arguments.names(skip_modules, "skip_modules", True) or ():
        if not isinstance(item, str | nn.Module):
            raise TypeError(f"skip_modules must be names and modules, got {arguments.shown(item)} among them")
        module = item if isinstance(item, nn.Module) else every_name.get(item)
        if module is None or not any(module is m for m in named.values()):
            raise ValueError(f"skip_modules names {arguments.shown(item)}, which the model does not have")
        skipped.update(id(m) for m in module.modules())
    return {name for name, module in named.items() if id(module) in skipped}


def find_candidates(
    model: nn.Module, skipped: set[str], options: SwapOptions
) -> tuple[SwapReport, dict[str, SwapDecision]]:
    """A line for every module with a prunable weight that is dense; those that nothing speaks against, by their names.

    The others have the reason in their line.
    """
    report = SwapReport()
    candidates: dict[str, SwapDecision] = {}
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for found in weights_of(model):
        if isinstance(found.module, SparseModule):
            continue
        decision = SwapDecision(found.name, type(found.module).__name__, found.shape, None, found.sparsity)
        report.append(decision)
        reason = "in skip_modules" if found.name in skipped else _unsupported(found, owners)
        if reason is None:
            reason = _left_alone(found, options)
        if reason is None:
            candidates[found.name] = decision
        else:
            decision.reason = reason
    return report, candidates


def _left_alone(found: Weights, options: SwapOptions) -> str | None:
    """Why a layer that could be replaced stays, or None."""
    module = found.module
    if found.sparsity < options.min_sparsity:
        return f"below min_sparsity={options.min_sparsity:g}"
    if found.name == "":
        return "it is the model itself: use from_dense"
    if own_hooks(module):
        return "has hooks"
    if gradient_hooks(module):
        return "its parameters have gradient hooks: remove them first (handle.remove())"
    if found.zeros == found.total and not found.masked:
        # a new head, LoRA's B, a residual branch or a ControlNet that starts at zero: it is there to learn
        return "has no nonzero and no mask: it was initialised to zero, not pruned"
    if options.prototype and dense_type(module) not in _PROTOTYPES:
        return f"nothing simulates {dense_type(module).__name__}"
    return None


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
    return _unsupported_weight(dense_values(module))


def _unsupported_kind(module: nn.Module) -> str | None:
    kind = type(module).__qualname__
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module.parameters(recurse=False)):
        return f"{kind} is a subclass whose weight does not exist yet"
    dense_types = tuple(sparse_types())
    if dense_type(module) in dense_types:
        return None
    own = f"{type(module).__module__}.{kind}" if kind in {t.__name__ for t in dense_types} else kind
    if isinstance(module, dense_types):
        return f"{own} is a subclass with a behaviour of its own"
    return f"nothing sparse replaces {own}"


def _own_parts(module: nn.Module) -> str:
    """Parameters and modules that a layer holds, which its type and prune know nothing of."""
    known = {"weight", "bias", "weight_orig", "bias_orig", "parametrizations"}
    return ", ".join(name for name in (*module._parameters, *module._modules) if name not in known)


def _unsupported_weight(weight: Tensor | None) -> str | None:
    if weight is None:
        return "has no weight"
    if weight.layout is not torch.strided:
        return f"its weight is a {weight.layout} tensor"
    if weight.device.type != "cpu":
        return f"on device {weight.device}"
    if not is_convertible(weight.dtype) or weight.element_size() < 2:
        return f"weight of dtype {weight.dtype}"
    if not torch.isfinite(weight).all():
        return "weight has NaN or Inf"
    return None
