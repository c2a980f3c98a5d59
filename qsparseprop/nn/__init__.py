"""Sparse modules, drop-in for torch.nn.Linear, the convolutions of torch.nn, and Conv1D of transformers."""

from qsparseprop.nn._state import accept_dense_state
from qsparseprop.nn.attention import MultiheadAttention
from qsparseprop.nn.conv1d import QuantizedSparseConv1d, SparseConv1d
from qsparseprop.nn.conv2d import QuantizedSparseConv2d, SparseConv2d
from qsparseprop.nn.conv3d import QuantizedSparseConv3d, SparseConv3d
from qsparseprop.nn.conv_transpose import (
    QuantizedSparseConvTranspose1d,
    QuantizedSparseConvTranspose2d,
    QuantizedSparseConvTranspose3d,
    SparseConvTranspose1d,
    SparseConvTranspose2d,
    SparseConvTranspose3d,
)
from qsparseprop.nn.fake_quant import FakeQuantConv2d, FakeQuantLinear
from qsparseprop.nn.linear import QuantizedSparseLinear, SparseLinear
from qsparseprop.nn.transposed_linear import QuantizedSparseTransposedLinear, SparseTransposedLinear

__all__ = [
    "FakeQuantConv2d",
    "FakeQuantLinear",
    "MultiheadAttention",
    "QuantizedSparseConv1d",
    "QuantizedSparseConv2d",
    "QuantizedSparseConv3d",
    "QuantizedSparseConvTranspose1d",
    "QuantizedSparseConvTranspose2d",
    "QuantizedSparseConvTranspose3d",
    "QuantizedSparseLinear",
    "QuantizedSparseTransposedLinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseConv3d",
    "SparseConvTranspose1d",
    "SparseConvTranspose2d",
    "SparseConvTranspose3d",
    "SparseLinear",
    "SparseTransposedLinear",
    "accept_dense_state",
]
