"""What the tests of blocks share: models whose layers defer, and the same ones computed step by step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qsparseprop import nn as qnn
from qsparseprop.nn.deferred import DeferredTensor, one_by_one, pending_of
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.network_utils import swap_modules_with_sparse


def prune(model: nn.Module, density: float = 0.3) -> nn.Module:
    """Zeros in all layers but convolutions of images."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, (nn.Conv1d, nn.Conv2d)) and module.in_channels > 3):
                module.weight.mul_(torch.rand_like(module.weight) < density)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                settle(module)
    return model


def settle(norm: nn.Module) -> nn.Module:
    """A batch normalisation with numbers that are not those of the beginning."""
    if norm.affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if norm.running_mean is not None:
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return norm


def swapped(model: nn.Module, shape: tuple[int, ...], pruned: bool = False, **settings) -> nn.Module:
    """A sparse copy of a model whose layers defer, pruned first unless it is."""
    return swap_modules_with_sparse(model if pruned else prune(model), shape, inplace=False, fuse=True, verbose=False,
                                    include_dense=False, min_sparsity=0.5, qconfig=QuantConfig(**settings))  # fmt: skip


def sparse(layer: nn.Module, **settings) -> nn.Module:
    """A quantised layer of a dense one."""
    kind = getattr(qnn, f"QuantizedSparse{type(layer).__name__}")
    return kind.from_dense(prune(layer), qconfig=QuantConfig(**settings))


def conv_net(channels: int = 12) -> nn.Sequential:
    """Three convolutions with what is usual between them."""
    layers: list[nn.Module] = []
    for stride in (1, 2, 1):
        layers += [nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def mlp(activation: nn.Module, width: int = 40) -> nn.Sequential:
    """Three linear layers."""
    return nn.Sequential(nn.Linear(24, width), activation, nn.Linear(width, width), activation, nn.Linear(width, width))


def is_deferred(tensor: Tensor) -> bool:
    """Whether a tensor's values are still to be computed."""
    return type(tensor) is DeferredTensor and pending_of(tensor) is not None


def stepwise(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A call of a model in which every operation is computed when it is called."""

    def call(*args: Tensor) -> Tensor:
        with one_by_one():
            return model(*args)

    return call


def run(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None, seed: int = 1) -> dict[str, Tensor]:
    """The output of a model, or of another call of it, all gradients and all buffers."""
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = (model if call is None else call)(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    found = {"output": y.detach().clone(), "input": x.grad}
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(mine: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """All of what `run` gives is the same."""
    assert list(mine) == list(others)
    for name, value in mine.items():
        assert type(value) is Tensor, name
        assert torch.equal(value, others[name]), name


def relative(a: Tensor, b: Tensor) -> float:
    """The norm of a difference, by that of what is right."""
    return ((a - b).norm() / b.norm()).item()


def assert_close(mine: dict[str, Tensor], others: dict[str, Tensor], most: float) -> None:
    """All of what `run` gives agrees but for quantisation, gradients that cancel included."""
    assert list(mine) == list(others)
    for name, value in mine.items():
        if value.is_floating_point() and relative(value, others[name]) > most:
            assert (value - others[name]).norm() < 1e-3 * others["output"].norm(), name
