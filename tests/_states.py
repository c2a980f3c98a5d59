"""Layers and models to be saved and loaded, and when two states are the same."""

from __future__ import annotations

import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import dense_example, set_weight

KINDS = ("QuantizedSparseLinear", "SparseLinear", "QuantizedSparseConv2d", "SparseConv1d")


def layer_and_input(kind: str, density: float = 0.3, seed: int = 0) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    if "Conv1d" in kind:
        dense, x = set_weight(nn.Conv1d(6, 8, 3, 2, 1, groups=2), density, seed), torch.randn(5, 6, 11)
    else:
        dense, x = dense_example(kind, density, seed)
    return getattr(qnn, kind).from_dense(dense), dense, x


def skeleton(layer: SparseWeight, device: str | None = None) -> SparseWeight:
    if hasattr(layer, "in_features"):
        return type(layer)(layer.in_features, layer.out_features, device=device)
    return type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                       groups=layer.groups, device=device)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def swapped(seed: int, quantize: bool = True) -> nn.Module:
    """A small network with sparse layers, a shared one among them, and dense ones."""
    torch.manual_seed(seed)
    shared = nn.Linear(16, 16)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16), shared, nn.ReLU(),
                          shared, nn.Linear(16, 3))
    for index in (0, 3, 4):
        set_weight(model[index], 0.15, seed + index)
    return swap_modules_with_sparse(model, (2, 3, 4, 4), quantize=quantize, include_dense=False, verbose=False,
                                    skip_modules=["7"], min_sparsity=0.5)  # fmt: skip
