"""Linear layers whose weight is sparse."""

from __future__ import annotations

import math
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from qsparseprop.layout.geometry import Geometry, linear_geometry, linear_numbers
from qsparseprop.nn._base import SparseModule
from qsparseprop.nn._dense import dense_bias, has_bias, trains_weight
from qsparseprop.nn._docstrings import describes_quantised
from qsparseprop.nn.autograd.graph import NoGradient
from qsparseprop.nn.deferred import ordinary
from qsparseprop.nn.deferred.layout import linear as linear_layout
from qsparseprop.quantization import QuantConfig

__all__ = ["QuantizedSparseLinear", "SparseLinear"]


_Linear = TypeVar("_Linear", bound="SparseLinear")


class SparseLinear(SparseModule):
    """``y = x @ W.T + b`` with a sparse weight, in float32.

    Usually made by `from_dense`; the constructor makes a layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    in_features, out_features, bias, device, dtype
        As in torch.nn.Linear; the bias starts at zero.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_features, out_features : int
    weight, bias, crow_indices, col_indices
        See `SparseWeight`.
    """

    _dense_type: ClassVar[type[nn.Module]] = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qconfig: QuantConfig | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._set_up(bias, qconfig, device, dtype)

    @classmethod
    def from_dense(cls: type[_Linear], linear: nn.Module, *, qconfig: QuantConfig | None = None) -> _Linear:
        """Take over the nonzeros of a dense layer.

        Parameters
        ----------
        linear : torch.nn.Module
            A torch.nn.Linear, or Conv1D of transformers where the class is for that, with zeros in its weight, or
            pruned by torch.nn.utils.prune or torch.ao.pruning (mask attached or removed). It is not changed.
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
        return cls.like(linear, qconfig)._fill(weight, mask, dense_bias(linear), trains_weight(linear))

    @classmethod
    def like(cls: type[_Linear], dense: nn.Module, qconfig: QuantConfig | None = None) -> _Linear:
        """A layer without weights, with the settings of a dense one.

        Parameters
        ----------
        dense : torch.nn.Linear
        qconfig : QuantConfig, optional
            For quantised layers.

        Returns
        -------
        SparseLinear
        """
        assert isinstance(dense, nn.Linear)
        layer = cls(dense.in_features, dense.out_features, has_bias(dense), dense.weight.device,
                    dense.weight.dtype, qconfig=qconfig)  # fmt: skip
        return layer.train(dense.training)

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weight and bias."""
        return self._fill_dense(
            lambda **where: nn.Linear(self.in_features, self.out_features, self.bias is not None, **where)
        )

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the dense weight."""
        return self.out_features, self.in_features

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer.

        Parameters
        ----------
        input : Tensor
            (..., in_features), floating point, any strides.

        Returns
        -------
        Tensor
            (..., out_features), of input's dtype, or autocast's where it is on (and input not float64, as in torch).

        Raises
        ------
        TypeError, ValueError
            For another last dimension, an integer or complex dtype, or another device.
        """
        if self._defers(input) and (y := self._deferred(input)) is not None:
            return y
        input = ordinary(input)
        self._check_input(input)
        if input.ndim == 0 or input.shape[-1] != self.in_features:
            raise ValueError(f"{type(self).__name__} expects the last dimension to be in_features={self.in_features}, "
                             f"got shape {tuple(input.shape)}")
        if not (self.in_features and self.out_features):  # nothing to multiply
            return self._dense_product(input)
        rows, shape = input, None
        if input.ndim != 2:
            leading = input.shape[:-1]
            rows, shape = input.reshape(math.prod(leading), self.in_features), (*leading, self.out_features)
        if torch.compiler.is_compiling():
            y = self._trace(rows[..., None, None], self._layout_numbers(), 1)
            return y.view(shape or (*input.shape[:-1], self.out_features))
        return self._product(rows, self._layout(), 1, shape)

    def _deferred(self, x: Tensor) -> Tensor | None:
        """The deferred result, or None where there can be none."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(x.shape)
            if len(shape) < 2 or shape[-1] != self.in_features:
                return None
            images = (math.prod(shape[:-1]), shape[-1], 1, 1)
            return self._defer(x, images, lambda _: linear_layout((*shape[:-1], self.out_features)), self._layout(), 1)

    def _dense_product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight(), self._bias_or_none())

    def _bias_or_none(self) -> Tensor | None:
        """The bias, which gets no gradient where it has no elements."""
        return self.bias if self.bias is None or self.bias.numel() else NoGradient.apply(self.bias)

    def _layout(self) -> Geometry:
        return linear_geometry(self.in_features, self.out_features)

    def _layout_numbers(self) -> list[int]:
        """The same for `traced_product`."""
        return linear_numbers(self.in_features, self.out_features)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        return (f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
                f"sparsity={self.sparsity:.4f}")


@describes_quantised
class QuantizedSparseLinear(SparseLinear):
    """``y = x @ W.T + b`` with a sparse weight, in 8-bit integers forward and backward."""

    quantized = True
    can_defer = True
