"""ReLU, ReLU6, max-pooling and dropout that keep one bit an element, or the place of the maximum, for backward.

Results and gradients are those of PyTorch's own operators, bit for bit, random numbers included.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.ops.masks import dense_layout

__all__ = ["BitDropout", "BitHardtanh", "BitReLU", "ByteMaxPool2d"]


#: What the kernels of `ops.masks` take.
_KERNEL_DTYPES = (torch.float32, torch.bfloat16)


def _pack_bits(mask: Tensor) -> Tensor:
    """Bits of a bool tensor in the order of its memory: int16, bit i % 16 of word i // 16."""
    flat = dense_layout(mask)
    packed = np.packbits((mask.reshape(-1) if flat is None else flat).numpy(), bitorder="little")
    if packed.size % 2:
        packed = np.append(packed, np.uint8(0))
    return torch.from_numpy(packed.view("<i2").astype(np.int16, copy=False))


def _unpack_bits(bits: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """0 and 1 in a dtype, in the shape and memory format of `like`, whose memory has the order that was packed."""
    packed = bits.numpy().astype("<i2", copy=False).view(np.uint8)
    mask = torch.from_numpy(np.unpackbits(packed, count=like.numel(), bitorder="little")).to(dtype)
    return mask.as_strided(like.shape, like.stride())


def _dense_like(x: Tensor) -> Tensor:
    """Shape and strides that torch gives to an elementwise result, without memory."""
    return torch.empty_like(x, device="meta")


class _Masked(torch.autograd.Function):
    """Gradients pass where a bit is set."""

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (bits,) = ops.saved_tensors(ctx)
        if dy.dtype in _KERNEL_DTYPES and dy.stride() == ctx.layout.stride():
            return ops.keep_masked(dy, bits), None, None, None
        mask = _unpack_bits(bits, ctx.layout, dy.dtype)
        # the operator behind ReLU's own backward pass; several times as fast as a product with a bool mask
        return torch.ops.aten.threshold_backward(dy, mask, 0), None, None, None


class BitReLU(_Masked):
    """``relu(x)``, in place or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        """The result; bits say where it is greater than 0."""
        ops.check_storage(x, "the input of relu")
        if x.dtype not in _KERNEL_DTYPES or dense_layout(x) is None or not ops.are_plain(x):
            y = x.relu_() if inplace else x.relu()
            mask = ~(y <= 0)  # which is true for a NaN, as in torch's backward pass
            ctx.layout, bits = _dense_like(mask), _pack_bits(mask)
        elif inplace:
            y, bits = x, ops.relu_mask_(x)
            ctx.layout = _dense_like(y)
        else:
            y, bits = ops.relu_mask(x)
            ctx.layout = _dense_like(y)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Where a bit is set."""
        return _Masked.backward(ctx, dy)[:2]


class BitHardtanh(_Masked):
    """``hardtanh(x, low, high)``, in place or not; ReLU6 is one from 0 to 6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        """The result; bits say where torch lets gradients pass."""
        # torch's own rule, which is subtle about bounds that a 16-bit number cannot hold
        mask = torch.ops.aten.hardtanh_backward(torch.ones_like(x), x, low, high) != 0
        y = torch.ops.aten.hardtanh_(x, low, high) if inplace else torch.ops.aten.hardtanh(x, low, high)
        if inplace:
            ctx.mark_dirty(x)
        ctx.layout = _dense_like(mask)
        ctx.save_for_backward(_pack_bits(mask))
        return y


class BitDropout(torch.autograd.Function):
    """``dropout(x, p)`` in training, with the random numbers that torch draws for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """The result; bits say what was kept."""
        noise = torch.empty_like(x).bernoulli_(1 - p)
        mask = noise != 0
        ctx.layout, ctx.p = _dense_like(mask), p
        ctx.save_for_backward(_pack_bits(mask))
        return x * noise.div_(1 - p)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """Where a bit is set, scaled as the result was."""
        (bits,) = ops.saved_tensors(ctx)
        return dy * _unpack_bits(bits, ctx.layout, dy.dtype).div_(1 - ctx.p), None


class ByteMaxPool2d(torch.autograd.Function):
    """``max_pool2d`` of (batch, channels, height, width) whose windows have at most 256 places."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
                dilation: tuple[int, int], ceil_mode: bool) -> Tensor:  # fmt: skip
        """The result; a byte each says which place of a window it came from."""
        settings = (kernel, stride, padding, dilation)
        y, index = torch.ops.aten.max_pool2d_with_indices(x, *settings, ceil_mode)
        first_row, first_column = _window_starts(y, stride, padding)
        row = (index // x.shape[3] - first_row) // dilation[0]
        column = (index % x.shape[3] - first_column) // dilation[1]
        ctx.save_for_backward((row * kernel[1] + column).to(torch.uint8))
        ctx.settings, ctx.ceil_mode, ctx.layout = settings, ceil_mode, _dense_like(x)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        """To the places that the results came from."""
        (place,) = ops.saved_tensors(ctx)
        kernel, stride, padding, dilation = ctx.settings
        place = place.long()
        first_row, first_column = _window_starts(dy, stride, padding)
        row = first_row + place // kernel[1] * dilation[0]
        index = row * ctx.layout.shape[3] + first_column + place % kernel[1] * dilation[1]
        # only its shape and memory format are looked at
        like = torch.empty_strided(ctx.layout.shape, ctx.layout.stride(), dtype=dy.dtype)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(dy, like, *ctx.settings, ctx.ceil_mode, index)
        return dx, None, None, None, None, None


def _window_starts(y: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column at which the window of each output begins, padding included."""
    rows = (torch.arange(y.shape[2]) * stride[0] - padding[0])[:, None]
    return rows, torch.arange(y.shape[3]) * stride[1] - padding[1]
