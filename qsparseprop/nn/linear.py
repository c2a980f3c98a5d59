"""Linear layers whose weight is sparse."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsparseprop.geometry import linear_geometry
from qsparseprop.nn._base import SparseModule, dense_bias, trains_weight
from qsparseprop.quantization import QuantConfig


class SparseLinear(SparseModule):
    """``y = x @ W.T + b`` with a sparse weight, in float32.

    Made by `from_dense`.

    Attributes
    ----------
    in_features, out_features : int
    weight, bias, crow_indices, col_indices
        See `SparseModule`.
    """

    _dense_type = nn.Linear

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def from_dense(cls, linear: nn.Linear, *, qconfig: QuantConfig | None = None) -> SparseLinear:
        """Take over the nonzeros of a dense layer.

        Parameters
        ----------
        linear : torch.nn.Linear
            With zeros in its weight, or pruned by torch.nn.utils.prune (mask attached or removed). It is not changed.
        qconfig : QuantConfig, optional
            For quantised layers.

        Raises
        ------
        TypeError
            For another kind of module, or an integer weight.
        ValueError
            If the weight has NaN or Inf, or is not on the CPU.
        """
        weight, mask = cls._check_dense(linear)
        layer = cls(linear.in_features, linear.out_features)
        layer._configure(qconfig)
        layer._set_weight(weight, mask, dense_bias(linear), trains_weight(linear))
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight and bias."""
        # on "meta": a dense layer that initialises itself would draw random numbers
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta", self.weight.dtype)
        linear.to_empty(device="cpu")
        with torch.no_grad():
            linear.weight.copy_(self.dense_weight())
            linear.weight.requires_grad_(self.weight.requires_grad)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        return linear.train(self.training)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the dense weight."""
        return self.out_features, self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        x : Tensor
            (..., in_features), floating point, any strides.

        Returns
        -------
        Tensor
            (..., out_features), of x's dtype, or autocast's where it is on.

        Raises
        ------
        TypeError, ValueError
            For another last dimension, an integer or complex dtype, or another device.
        """
        self._check_input(x)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{type(self).__name__} expects the last dimension to be in_features={self.in_features}, "
                             f"got shape {tuple(x.shape)}")
        if 0 in self.weight_shape:  # nothing to multiply
            return nn.functional.linear(x, self.dense_weight(), self.bias)
        plan = self._plan(linear_geometry(self.in_features, self.out_features), 1)
        leading = x.shape[:-1]
        rows = x if x.ndim == 2 else x.reshape(leading.numel(), self.in_features)
        return self._multiply(rows[..., None, None], plan).view(*leading, self.out_features)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"sparsity={self.sparsity:.4f}")


class QuantizedSparseLinear(SparseLinear):
    """``y = x @ W.T + b`` with a sparse weight, in 8-bit integers forward and backward.

    The float32 weight is requantised at every step that trains it; see `QuantConfig` for the schemes. Made by
    `from_dense`.
    """

    quantized = True
