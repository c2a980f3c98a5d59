"""Sparse modules, drop-in for torch.nn.Linear, torch.nn.Conv1d and torch.nn.Conv2d."""

from qsparseprop.nn._state import accept_dense_state
from qsparseprop.nn.attention import MultiheadAttention
from qsparseprop.nn.conv1d import QuantizedSparseConv1d, SparseConv1d
from qsparseprop.nn.conv2d import QuantizedSparseConv2d, SparseConv2d
from qsparseprop.nn.fake_quant import FakeQuantConv2d, FakeQuantLinear
from qsparseprop.nn.linear import QuantizedSparseLinear, SparseLinear

__all__ = [
    "FakeQuantConv2d",
    "FakeQuantLinear",
    "MultiheadAttention",
    "QuantizedSparseConv1d",
    "QuantizedSparseConv2d",
    "QuantizedSparseLinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "accept_dense_state",
]
