"""What a dense layer holds, pruned or not."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


def held(module: nn.Module, name: str) -> Tensor:
    """A tensor that a module has by a name, be it a parameter, a buffer, or what is computed of one."""
    return getattr(module, name)


def _sparsifier(module: nn.Module) -> parametrize.ParametrizationList | None:
    """The parametrization that a sparsifier of torch.ao.pruning has put on a weight, if that is the only one."""
    if not parametrize.is_parametrized(module, "weight"):
        return None
    all_of_it = module.parametrizations
    assert isinstance(all_of_it, nn.ModuleDict)
    chain = all_of_it["weight"]
    pruning = sys.modules.get("torch.ao.pruning.sparsifier.utils")  # where it is not imported, nobody has used it
    assert isinstance(chain, parametrize.ParametrizationList)
    only = len(chain) == 1 and set(all_of_it) == {"weight"}
    return chain if only and pruning is not None and type(chain[0]) is pruning.FakeSparsity else None


def foreign_parametrization(module: nn.Module) -> bool:
    """Whether a layer has parametrizations other than the mask of torch.ao.pruning."""
    return parametrize.is_parametrized(module) and _sparsifier(module) is None


def dense_type(module: nn.Module) -> type[nn.Module]:
    """Type of a dense layer; a parametrization makes a subclass, which is looked through."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def dense_values(module: nn.Module) -> Tensor | None:
    """Weight of a dense module, masked entries zero, of whatever layout and device; None where it has none."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and (weight.layout is not torch.strided or weight.is_nested):
        return weight.detach()
    return None if weight is None and "weight_orig" not in module._parameters else dense_weight(module)[0]


def dense_weight(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight of a dense module and the mask of the entries to keep.

    With a mask attached, by torch.nn.utils.prune or torch.ao.pruning, the mask decides (a kept weight may be zero).
    prune's weight is ``weight_orig * weight_mask``, since ``module.weight`` is refreshed only in a forward pass.
    """
    if (chain := _sparsifier(module)) is not None:
        sparse = held(chain[0], "mask")
        return held(chain, "original").detach() * sparse, sparse != 0
    parameters = dict(module.named_parameters(recurse=False))
    mask = dict(module.named_buffers(recurse=False)).get("weight_mask")
    if "weight_orig" in parameters and mask is not None:
        return parameters["weight_orig"].detach() * mask, mask != 0
    weight = held(module, "weight").detach()
    return weight, weight != 0


def has_mask(module: nn.Module) -> bool:
    """Whether a mask says which weights of a dense module exist: zeros were put there, not started from."""
    names = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("_mask")]
    return _sparsifier(module) is not None or any(not name.startswith("bias") for name in names)


def dense_bias(module: nn.Module) -> tuple[Tensor, bool] | None:
    """Bias of a dense module, pruned or not, and whether it requires a gradient."""
    parameters = dict(module.named_parameters(recurse=False))
    mask = dict(module.named_buffers(recurse=False)).get("bias_mask")
    if "bias_orig" in parameters and mask is not None:
        return parameters["bias_orig"].detach() * mask, parameters["bias_orig"].requires_grad
    bias: Tensor | None = getattr(module, "bias", None)
    return None if bias is None else (bias.detach(), bias.requires_grad)


def has_bias(module: nn.Module) -> bool:
    """Whether a dense module, pruned or not, has a bias."""
    parameters = dict(module.named_parameters(recurse=False))
    return parameters.get("bias", parameters.get("bias_orig")) is not None


def trains_weight(module: nn.Module) -> bool:
    """Whether the weight of a dense module, pruned or not, requires a gradient."""
    if (chain := _sparsifier(module)) is not None:
        return held(chain, "original").requires_grad
    parameters = dict(module.named_parameters(recurse=False))
    return parameters["weight_orig" if "weight_orig" in parameters else "weight"].requires_grad
