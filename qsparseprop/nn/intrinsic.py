"""A convolution or none, batch normalisation, addition and activation as one module; a linear layer and its activation.

The modules hold the parameters of their first part only. A batch normalisation behind a sparse convolution stays a
module of the model at its own place, whose parameters, statistics and mode are used, so that a fused model has the
state_dict of the unfused one. Blocks compute in channels_last order; for how, see ``_norm_act.py`` and
``_linear_act.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop.geometry import Geometry, conv_geometry, embedded, linear_geometry, prefer_batch_innermost
from qsparseprop.nn import _linear_act
from qsparseprop.nn._base import KERNEL_DTYPES
from qsparseprop.nn._conv import SparseConvNd
from qsparseprop.nn._handover import PackedInput, PackedTensor, handed_over
from qsparseprop.nn._norm_act import Convolution, Settings, affine, norm_act, packs_input, uses_batch_statistics
from qsparseprop.nn.conv2d import QuantizedSparseConv2d
from qsparseprop.nn.functional import check_finite, packed_forward_pass, packed_input
from qsparseprop.nn.linear import QuantizedSparseLinear, SparseLinear
from qsparseprop.ops import check_storage, is_channels_last
from qsparseprop.quantization import QuantConfig


class _HandsOver(nn.Module):
    """A module that knows who reads its output."""

    #: The blocks whose convolutions or linear layers read the output, that with the largest kernel first, and whether
    #: anybody else does; set when a fused model runs.
    _readers: tuple[Any, ...] = ()
    _read_elsewhere: bool = True

    #: Attributes that the module does not have from what it was made of.
    _own: tuple[str, ...] = ("_readers", "_read_elsewhere")

    def __getstate__(self) -> dict[str, Any]:
        # a copy of a block is none of its readers, which a copied model finds anew; for plans see SparseModule
        return {k: v for k, v in self.__dict__.items() if k not in ("_plans", "_copies", "_readers", "_read_elsewhere")}

    def _without_own(self) -> dict[str, Any]:
        """Attributes of the module that the block was made of."""
        return {k: v for k, v in self.__dict__.items() if k not in self._own}


class _Block(_HandsOver):
    """What blocks with a batch normalisation have in common: the activation's limits too."""

    low, high = -math.inf, math.inf
    _own = (*_HandsOver._own, "_norm", "high")

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch normalisation."""
        raise NotImplementedError

    def _settings(
        self, shape: tuple[int, ...], dtype: torch.dtype, packs: bool, inputs: tuple[Tensor | None, ...]
    ) -> Settings:
        """Settings for an output of that shape and a kernel that writes `dtype`; whether it may be packed on the way.

        There will be a backward pass if one of the inputs wants a gradient.
        """
        norm, keep = self.norm, self._read_elsewhere
        for name in ("weight", "bias", "running_mean", "running_var"):
            check_storage(getattr(norm, name), f"{name} of the batch normalisation")
        saves = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (*inputs, norm.weight, norm.bias)
        )  # fmt: skip
        consumer = None
        unseen = keep and torch.is_inference_mode_enabled()  # changes of the output would be
        if packs and not unseen and self._readers and all(shape[1] == reader.in_channels for reader in self._readers):
            first, *others = self._readers
            geometry, qconfig = first._geometry(shape[0], shape[2:]), first._qconfig
            if packs_input(qconfig, geometry):
                consumer = (geometry, qconfig)
                keep = keep or not all(reader._shares(shape, geometry, qconfig) for reader in others)
        return Settings(dtype, uses_batch_statistics(norm, shape), norm.eps, self.low, self.high, saves, consumer, keep)

    def _act(self, y: Tensor, residual: Tensor | float | None) -> Tensor:
        """What follows batch normalisation, by torch."""
        if residual is not None:
            y = y + residual
        return y if self.low == -math.inf else y.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        activation = "" if self.low == -math.inf else f", activation=[{self.low:g}, {self.high:g}]"
        return super().extra_repr() + activation


def _is_like(residual: Tensor | float | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a residual, if any, needs neither broadcasting nor conversion."""
    if not isinstance(residual, Tensor):
        return residual is None
    if tuple(residual.shape) == shape:
        return residual.dtype == dtype and residual.is_cpu
    try:
        torch.broadcast_shapes(residual.shape, shape)
    except RuntimeError:
        raise ValueError(f"the residual must have shape {shape}, or one that can be broadcast to it, "
                         f"got {tuple(residual.shape)}") from None
    return False


class QuantizedSparseConvBn2d(_Block, QuantizedSparseConv2d):
    """A sparse convolution and the batch normalisation of its output.

    Made by `fuse`, or by ``swap_modules_with_sparse(model, ..., fuse=True)``.

    Attributes
    ----------
    norm : torch.nn.BatchNorm2d
        Not a submodule: it belongs to the model, see the module's description.
    low, high : float
        Limits of the activation.
    """

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The batch normalisation."""
        return self._norm[0]

    @classmethod
    def fuse(cls, conv: QuantizedSparseConv2d, norm: nn.BatchNorm2d, high: float = math.inf) -> QuantizedSparseConvBn2d:
        """A block of a sparse convolution, which gives it its parameters, and a batch normalisation.

        Parameters
        ----------
        conv : QuantizedSparseConv2d
        norm : torch.nn.BatchNorm2d
            Of the same channels.
        high : float
            Upper limit of the activation: 6 for ReLU6.

        Raises
        ------
        TypeError
            For other modules.
        ValueError
            If the channels differ.
        """
        if type(conv) is not QuantizedSparseConv2d:
            raise TypeError(f"{cls.__name__}.fuse expects a QuantizedSparseConv2d, got {type(conv).__name__}")
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"{cls.__name__}.fuse expects a torch.nn.BatchNorm2d, got {type(norm).__name__}")
        if norm.num_features != conv.out_channels:
            raise ValueError(f"the batch normalisation has {norm.num_features} features, the convolution "
                             f"{conv.out_channels} channels")
        block = cls.__new__(cls)
        block.__dict__.update(conv.__dict__)
        block._norm = (norm,)  # in a tuple, so that it does not become a submodule
        if cls.low == 0:
            block.high = high
        return block

    def unfuse(self) -> QuantizedSparseConv2d:
        """The convolution alone, with the same parameters."""
        conv = QuantizedSparseConv2d.__new__(QuantizedSparseConv2d)
        conv.__dict__.update(self._without_own())
        return conv

    def forward(self, x: Tensor, residual: Tensor | float | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x : Tensor
            (images, in_channels, height, width), floating point, any strides.
        residual : Tensor or float, optional
            Added before the activation; only of `QuantizedSparseConvBnAddReLU2d`. One of the output's shape and dtype
            is added on the way, others by torch, which broadcasts them.

        Returns
        -------
        Tensor
            (images, out_channels, out_height, out_width) of x's dtype, or autocast's where it is on, channels_last.

        Raises
        ------
        TypeError, ValueError
            As from the convolution and from torch.nn.BatchNorm2d; for a residual of a shape that does not fit.
        """
        self._check_input(x)
        if torch.compiler.is_compiling() or x.ndim != 4 or x.numel() == 0 or 0 in self.weight_shape:
            return self._one_by_one(x, residual)
        if x.shape[1] != self.in_channels:
            return self._one_by_one(x, residual)  # which says what is wrong
        geometry = self._geometry(x.shape[0], tuple(x.shape[2:]))
        packed = handed_over(x)
        if packed is not None:
            geometry = embedded(geometry, packed.geometry) or geometry
            packed = packed if packed.fits(geometry, self._qconfig) else None
        if packed is None and isinstance(x, PackedTensor):
            x = x.view_as(x)  # an ordinary tensor
        shape = (x.shape[0], self.out_channels, *geometry.output_size)
        given, (x, kernel_dtype, dtype) = x, self._dtypes(x)
        if not _is_like(residual, shape, dtype):
            return self._one_by_one(given, residual)
        settings = self._settings(shape, kernel_dtype, dtype == kernel_dtype, (x, self.weight, self.bias, residual))
        if not settings.saves and not settings.batch_statistics and residual is None:
            y = self._folded(x, packed, geometry, kernel_dtype)
            return y if y.dtype == dtype else y.to(dtype)
        plan = self._plan(geometry, self.groups)
        settings.convolution = Convolution(plan, self._qconfig, is_channels_last(x), packed)
        y = norm_act(x, self.norm, settings, residual, self.weight, self.bias)
        return y if y.dtype == dtype else y.to(dtype)

    def _geometry(self, batch: int, size: tuple[int, int]) -> Geometry:
        """Where everything of the convolution lies for channels_last images of a size."""
        images_last = self.vectorizing_over_on
        if images_last is None:
            images_last = prefer_batch_innermost(batch, size, True)
        return conv_geometry(self.in_channels, self.out_channels, size, self.kernel_size, self.stride, self._pads,
                             self.dilation, batch, images_last)

    def _shares(self, shape: tuple[int, ...], packed_for: Geometry, qconfig: QuantConfig) -> bool:
        """Whether the convolution can read an input of that shape that was packed for another one."""
        own = self._qconfig
        return (own.input, own.granularity, own.grad_weight) == (qconfig.input, qconfig.granularity, "int8") and (
            embedded(self._geometry(shape[0], shape[2:]), packed_for) is not None)

    def _folded(self, x: Tensor, packed: PackedInput | None, geometry: Geometry, dtype: torch.dtype) -> Tensor:
        """Inference: batch normalisation in the scales and the bias of the product, the activation where it is written.

        One pass over the output in place of three.
        """
        norm, plan, qconfig = self.norm, self._plan(geometry, self.groups), self._qconfig
        if qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(self.weight, "the weight")
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        _, scale, shift = affine(mean, variance, norm.eps, norm.weight, norm.bias)
        if self.bias is not None:
            shift = shift + self.bias * scale
        parts = packed_input(x, plan, qconfig) if packed is None else packed.parts
        return packed_forward_pass(parts, x.shape[0], self.weight, shift.float(), plan, qconfig, dtype, scale.float(),
                                   (self.low, self.high))

    def _one_by_one(self, x: Tensor, residual: Tensor | float | None) -> Tensor:
        x = x.view_as(x) if isinstance(x, PackedTensor) else x
        return self._act(self.norm(SparseConvNd.forward(self, x)), residual)


class QuantizedSparseConvBnReLU2d(QuantizedSparseConvBn2d):
    """A sparse convolution, batch normalisation and ReLU (or ReLU6)."""

    low = 0.0


class QuantizedSparseConvBnAddReLU2d(QuantizedSparseConvBnReLU2d):
    """A sparse convolution, batch normalisation, the addition of a residual, and ReLU: the end of a residual block."""


class QuantizedBNReLU2d(_Block, nn.BatchNorm2d):
    """Batch normalisation and ReLU (or ReLU6) behind anything but a sparse convolution, with or without an addition.

    The forward pass is in floating point; for the backward pass the input is kept in 8 bits, with a scale for every
    channel, and one bit an element for the activation. The result is packed for a sparse convolution that reads it.
    Made by `fuse`, or by ``swap_modules_with_sparse(model, ..., fuse=True)``. It is a BatchNorm2d, with the same
    parameters and state, but the activation is part of it: `swap_modules_with_dense` comes before anything that puts
    other modules in the place of batch normalisations, such as ``SyncBatchNorm.convert_sync_batchnorm``.

    Attributes
    ----------
    low, high : float
        Limits of the activation.
    """

    low = 0.0

    @property
    def norm(self) -> nn.BatchNorm2d:
        """The module itself."""
        return self

    @classmethod
    def fuse(cls, norm: nn.BatchNorm2d, high: float = math.inf) -> QuantizedBNReLU2d:
        """A block with the parameters and statistics of a batch normalisation.

        Parameters
        ----------
        norm : torch.nn.BatchNorm2d
        high : float
            Upper limit of the activation: 6 for ReLU6.

        Raises
        ------
        TypeError
            For another module.
        """
        if type(norm) is not nn.BatchNorm2d:
            raise TypeError(f"{cls.__name__}.fuse expects a torch.nn.BatchNorm2d, got {type(norm).__name__}")
        block = cls.__new__(cls)
        block.__dict__.update(norm.__dict__)
        block.high = high
        return block

    def unfuse(self) -> nn.BatchNorm2d:
        """The batch normalisation alone, with the same parameters."""
        norm = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
        norm.__dict__.update(self._without_own())
        return norm

    def forward(self, x: Tensor, residual: Tensor | float | None = None) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x : Tensor
            (images, num_features, height, width), floating point, any strides.
        residual : Tensor or float, optional
            Added before the activation. One of x's shape and dtype is added on the way, others by torch, which
            broadcasts them.

        Returns
        -------
        Tensor
            Like x, channels_last.

        Raises
        ------
        ValueError
            As from torch.nn.BatchNorm2d; for a residual of a shape that does not fit.
        """
        if (torch.compiler.is_compiling() or x.ndim != 4 or x.numel() == 0 or x.shape[1] != self.num_features
                or not x.is_cpu or x.dtype not in KERNEL_DTYPES):  # fmt: skip
            return self._act(super().forward(x), residual)
        shape = tuple(x.shape)
        if not _is_like(residual, shape, x.dtype):
            return self._act(super().forward(x), residual)
        return norm_act(x, self, self._settings(shape, x.dtype, True, (x, residual)), residual)


class QuantizedSparseLinearAct(_HandsOver, QuantizedSparseLinear):
    """A sparse linear layer and the activation behind it, or one without that reads what such a block has packed.

    Made by `fuse`, or by ``swap_modules_with_sparse(model, ..., fuse=True)``. For the backward pass ReLU keeps one bit
    an element and GELU its slope in 8 bits, to 1/400. No gradient passes an element that is not finite.

    Attributes
    ----------
    activation : str or None
        "relu", "relu6", "gelu" or "gelu_tanh".
    """

    activation: str | None = None
    _own = (*_HandsOver._own, "activation")

    @classmethod
    def fuse(cls, linear: QuantizedSparseLinear, activation: str | None) -> QuantizedSparseLinearAct:
        """A block of a sparse linear layer, which gives it its parameters, and an activation.

        Parameters
        ----------
        linear : QuantizedSparseLinear
        activation : str or None
            "relu", "relu6", "gelu", "gelu_tanh", or None for none.

        Raises
        ------
        TypeError
            For another module.
        ValueError
            For another activation.
        """
        if type(linear) is not QuantizedSparseLinear:
            raise TypeError(f"{cls.__name__}.fuse expects a QuantizedSparseLinear, got {type(linear).__name__}")
        if activation not in _linear_act.FUNCTIONS:
            raise ValueError(f"the activation must be one of {', '.join(map(repr, _linear_act.FUNCTIONS))}, got "
                             f"{activation!r}")
        block = cls.__new__(cls)
        block.__dict__.update(linear.__dict__)
        block.activation = activation
        return block

    def unfuse(self) -> QuantizedSparseLinear:
        """The linear layer alone, with the same parameters."""
        linear = QuantizedSparseLinear.__new__(QuantizedSparseLinear)
        linear.__dict__.update(self._without_own())
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Parameters
        ----------
        x : Tensor
            (..., in_features), floating point, any strides.

        Returns
        -------
        Tensor
            (..., out_features), of x's dtype, or autocast's where it is on (and x not float64, as in torch).

        Raises
        ------
        TypeError, ValueError
            As from the linear layer.
        """
        self._check_input(x)
        if (torch.compiler.is_compiling() or x.ndim == 0 or x.numel() == 0 or x.shape[-1] != self.in_features
                or not self.out_features):  # fmt: skip
            return self._one_by_one(x)
        geometry = linear_geometry(self.in_features, self.out_features)
        packed = handed_over(x)
        if packed is not None and not packed.fits(geometry, self._qconfig):
            packed = None
        if packed is None and isinstance(x, PackedTensor):
            x = x.view_as(x)  # an ordinary tensor
        x, kernel_dtype, dtype = self._dtypes(x)
        saves = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, self.weight, self.bias))  # fmt: skip
        consumer, keep = None, True
        if self.activation is not None and self._readers and dtype == kernel_dtype:
            consumer, keep = self._consumer()
        y = _linear_act.linear_act(x, self.weight, self.bias, _linear_act.Settings(
            self.activation, self._plan(geometry, 1), self._qconfig, kernel_dtype, saves, packed, consumer, keep
        ))  # fmt: skip
        return y if y.dtype == dtype else y.to(dtype)

    def _consumer(self) -> tuple[tuple[Geometry, QuantConfig] | None, bool]:
        """For whom the output is packed, if for anybody, and whether others read it too."""
        first, *others = self._readers
        geometry, qconfig = linear_geometry(first.in_features, first.out_features), first._qconfig
        if any(r.in_features != self.out_features for r in self._readers) or not packs_input(qconfig, geometry):
            return None, True
        alike = all((r._qconfig.input, r._qconfig.granularity, r._qconfig.grad_weight)
                    == (qconfig.input, qconfig.granularity, "int8") for r in others)  # fmt: skip
        keep = self._read_elsewhere or not alike
        if keep and torch.is_inference_mode_enabled():  # changes of the output would not be seen
            return None, True
        return (geometry, qconfig), keep

    def _one_by_one(self, x: Tensor) -> Tensor:
        x = x.view_as(x) if isinstance(x, PackedTensor) else x
        return _linear_act.FUNCTIONS[self.activation](SparseLinear.forward(self, x))

    def extra_repr(self) -> str:
        """What the module prints of itself."""
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")
