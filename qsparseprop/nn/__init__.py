"""Sparse modules, drop-in for torch.nn.Linear and torch.nn.Conv2d."""

from qsparseprop.nn.conv2d import QuantizedSparseConv2d, SparseConv2d
from qsparseprop.nn.linear import QuantizedSparseLinear, SparseLinear

__all__ = ["QuantizedSparseConv2d", "QuantizedSparseLinear", "SparseConv2d", "SparseLinear"]
