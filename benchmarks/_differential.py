"""One training step of a network in several executions, and how far they are from each other."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from qsparseprop.nn._base import SparseModule
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import Chain, chains
from qsparseprop.utils.network_utils import swap_modules_with_sparse, unfold_attention

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: Rounded to nearest: so executions differ by what they compute, not by random numbers.
QCONFIG = QuantConfig(grad="absmax")


#: Of batch normalisations: with the usual 1e-5 and the few pixels of small inputs, channels that are nearly constant
#: multiply every difference by hundreds, layer after layer, until nothing can be compared.
EPS = 0.1


@dataclass
class Step:
    """What one training step gave.

    Attributes
    ----------
    outputs : list of Tensor
        Every floating-point tensor in what the network returned.
    gradients : dict of str to Tensor
        By name; of sparse layers as dense tensors.
    buffers : dict of str to Tensor
        Afterwards: running statistics, numbers of batches.
    chains : dict of str to Chain
        Of the sparse layers that form blocks.
    """

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    chains: dict[str, Chain] = field(default_factory=dict)


def run_step(model: nn.Module, inputs: Any, seed: int = 0) -> Step:
    """Run forward and backward on a weighted sum of all outputs, all random numbers following from a seed."""
    model.zero_grad(set_to_none=True)
    random.seed(seed)
    torch.manual_seed(seed)
    outputs = _tensors(model(**inputs) if isinstance(inputs, Mapping) else model(*inputs))
    generator = torch.Generator().manual_seed(seed)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator)).mean() for y in outputs if y.requires_grad)
    loss.backward()
    return Step([y.detach().clone() for y in outputs], _gradients(model),
                _buffers(model), chains(model))  # fmt: skip


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": buffer.detach().clone() for prefix, module in model.named_modules()
            if not isinstance(module, SparseModule) for name, buffer in module.named_buffers(recurse=False)}


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = list(output.values())
    return [y for part in output for y in _tensors(part)] if isinstance(output, (list, tuple)) else []


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    gradients = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    for name, mask in existing(model).items():
        if name in gradients:
            gradients[name] = torch.zeros(mask.shape).masked_scatter(mask, gradients[name])
    return gradients


def distance(step: Step, other: Step, masks: Mapping[str, Tensor]) -> float:
    """Relative distance of all gradients of one step from those of another, together, where the masks are not zero."""
    ones = torch.ones(())
    return _distance({name: g * masks.get(name, ones) for name, g in step.gradients.items()},
                     {name: g * masks.get(name, ones) for name, g in other.gradients.items()})  # fmt: skip


def output_distance(step: Step, other: Step) -> float:
    """That of all outputs."""
    return _distance(*({str(i): y for i, y in enumerate(s.outputs)} for s in (step, other)))


def buffer_distance(step: Step, other: Step) -> float:
    """That of all buffers that are no integers: running statistics."""
    return _distance(*({name: buffer for name, buffer in s.buffers.items() if buffer.is_floating_point()}
                       for s in (step, other)))  # fmt: skip


def _distance(tensors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    assert tensors.keys() == others.keys()
    difference = sum((tensors[name] - b).double().square().sum().item() for name, b in others.items())
    size = sum(b.double().square().sum().item() for b in others.values())
    return math.sqrt(difference / size) if size else 0.0


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages use is their own affair
        yield


def pruned(make: Callable[[], nn.Module], sparsity: float = 0.9) -> nn.Module:
    """A network in training, every layer of it pruned, with its attention in layers that can be replaced."""
    torch.manual_seed(0)
    with _quiet():
        model = unfold_attention(make().train())
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eps = EPS
    for _, layer in _layers(model):
        if not layer.weight.any():  # classifiers that start at zero: nothing would get a gradient
            nn.init.normal_(layer.weight, std=0.02)
        prune.l1_unstructured(layer, "weight", sparsity)
        prune.remove(layer, "weight")
    return model


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, layer) for name, layer in model.named_modules()
            if (isinstance(layer, _LAYERS) and "weight" in layer._parameters) or _is_transposed(layer)]  # fmt: skip


def existing(model: nn.Module) -> dict[str, Tensor]:
    """Where the weights of a swapped model's sparse layers are, by the parameter's name."""
    return {f"{name}.weight": layer.mask() for name, layer in model.named_modules()
            if isinstance(layer, SparseModule)}  # fmt: skip


def swapped(model: nn.Module, fuse: bool, qconfig: QuantConfig = QCONFIG) -> nn.Module:
    """A copy with sparse layers wherever there are zeros."""
    return swap_modules_with_sparse(model, None, inplace=False, verbose=False, include_dense=False, qconfig=qconfig,
                                    fuse=fuse)  # fmt: skip


def flops(model: nn.Module, inputs: Any) -> dict[str, float]:
    """Two operations for each weight and place of each dense layer, in one forward pass of a copy."""
    model = copy.deepcopy(model)
    found: dict[str, float] = {}

    def watch(name: str, layer: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                places = args[0].numel() / module.in_channels
            else:
                places = output.numel() / module.weight.shape[1 if _is_transposed(module) else 0]
            found[name] = found.get(name, 0.0) + 2.0 * places * module.weight.numel()

        layer.register_forward_hook(hook)

    for name, layer in _layers(model):
        watch(name, layer)
    with torch.no_grad():
        model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    return found


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__module__ == "transformers.pytorch_utils" and type(layer).__name__ == "Conv1D"
