"""Linear layers that store their weight the other way round, as GPT-2 has them, with a sparse weight."""

from __future__ import annotations

import sys
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qsparseprop.layout.geometry import Geometry, linear_geometry, linear_numbers
from qsparseprop.nn._dense import held
from qsparseprop.nn._docstrings import describes_quantised
from qsparseprop.nn.linear import SparseLinear
from qsparseprop.quantization import QuantConfig

__all__ = ["QuantizedSparseTransposedLinear", "SparseTransposedLinear", "dense_conv1d"]


def dense_conv1d() -> type[nn.Module] | None:
    """The class Conv1D of transformers; None where nobody has imported it, so that no model can have one."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


_Linear = TypeVar("_Linear", bound="SparseTransposedLinear")


class SparseTransposedLinear(SparseLinear):
    """``y = x @ W + b`` with a sparse weight of shape (in_features, out_features), in float32.

    In place of ``Conv1D`` of transformers, which in spite of its name is a linear layer. Pattern and values are in the
    order of that weight, as masks and states of dense layers are. Usually made by `from_dense`; the constructor makes a
    layer without weights, for `load_state_dict` and `regrow`.

    Parameters
    ----------
    nf, nx : int
        Features of the output and of the input, in this order, as Conv1D has it.
    device, dtype
        As in torch.nn.Linear; the bias starts at zero.
    qconfig : QuantConfig, optional
        For quantised layers.

    Attributes
    ----------
    in_features, out_features : int
    nx, nf : int
        The same, as Conv1D calls them.
    weight, bias, crow_indices, col_indices
        See `SparseWeight`; a row of the pattern is an input.
    """

    _dense_type = nn.Module  # see `_check_kind`
    transposed = True

    def __init__(
        self,
        nf: int,
        nx: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        qconfig: QuantConfig | None = None,
    ) -> None:
        super().__init__(nx, nf, True, device, dtype, qconfig=qconfig)
        self.nf, self.nx = nf, nx

    @classmethod
    def _check_kind(cls, module: nn.Module) -> None:
        wanted = dense_conv1d()
        if wanted is None or not isinstance(module, wanted):
            raise TypeError(f"{cls.__name__}.from_dense expects Conv1D of transformers, "
                            f"got {type(module).__module__}.{type(module).__qualname__}")

    @classmethod
    def like(cls: type[_Linear], dense: nn.Module, qconfig: QuantConfig | None = None) -> _Linear:
        """See `SparseLinear.like`; the dense layer is a Conv1D of transformers."""
        weight = held(dense, "weight")
        nx, nf = weight.shape
        return cls(nf, nx, weight.device, weight.dtype, qconfig=qconfig).train(dense.training)

    def to_dense(self) -> nn.Module:  # type: ignore[override]  # Conv1D is no Linear
        """A Conv1D of transformers with the same weight and bias.

        Returns
        -------
        transformers.pytorch_utils.Conv1D

        Raises
        ------
        RuntimeError
            If transformers has not been imported.
        """
        kind = dense_conv1d()
        if kind is None:
            raise RuntimeError(f"the dense layer of a {type(self).__name__} is Conv1D of transformers: import "
                               "transformers.pytorch_utils first")

        def make(device: str, dtype: torch.dtype) -> Any:
            with torch.device(device):
                return kind(self.nf, self.nx).to(dtype)

        return self._fill_dense(make)

    def forward(self, x: Tensor) -> Tensor:
        """See `SparseLinear.forward`; transformers calls the input x."""
        return super().forward(x)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the dense weight."""
        return self.in_features, self.out_features

    @property
    def _outputs(self) -> int:
        return self.out_features

    def _dense_product(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense_weight().t(), self._bias_or_none())

    def _layout(self) -> Geometry:
        return linear_geometry(self.out_features, self.in_features, True)

    def _layout_numbers(self) -> list[int]:
        return [*linear_numbers(self.out_features, self.in_features), 1]


@describes_quantised
class QuantizedSparseTransposedLinear(SparseTransposedLinear):
    """``y = x @ W + b`` with a sparse weight of shape (in_features, out_features), in 8-bit integers."""

    quantized = True
