"""The operators of masks with a bit an element."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop._kernels import _mask
from qsparseprop._kernels._memory import empty
from qsparseprop.ops._registration import operator
from qsparseprop.ops.threads import thread_count

__all__ = ["dense_layout", "keep_masked", "relu_mask", "relu_mask_", "words"]


def words(elements: int) -> int:
    """16-bit words of a mask."""
    return -(-elements // 16)


def dense_layout(x: Tensor) -> Tensor | None:
    """The memory of a tensor as a flat one, or None where it has gaps or overlaps."""
    if x.is_contiguous():
        return x.view(-1)
    strides = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            return None
        expected *= size
    return x.as_strided((x.numel(),), (1,))


def _flat(x: Tensor) -> Tensor:
    flat = dense_layout(x)
    if flat is None:
        raise ValueError(f"x must have neither gaps nor overlaps, got shape {tuple(x.shape)} with strides {x.stride()}")
    return flat


@operator(
    "relu_mask(Tensor x) -> (Tensor, Tensor)",
    lambda x: (torch.empty_like(x), x.new_empty(words(x.numel()), dtype=torch.int16)),
)
def relu_mask(x: Tensor) -> tuple[Tensor, Tensor]:
    """``relu(x)``, and what its backward pass needs.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16; dimensions in any order, without gaps.

    Returns
    -------
    y : Tensor
        Like x.
    mask : Tensor
        int16, (ceil(elements / 16),): bit i % 16 of word i // 16 tells whether the gradient passes element i, in the
        order of memory, which is ``not (x <= 0)``.
    """
    out, mask = torch.empty_like(x), empty((words(x.numel()),), torch.int16)
    _mask.relu(_flat(x), _flat(out), mask, thread_count())
    return out, mask


@operator(
    "relu_mask_(Tensor(a!) x) -> Tensor",
    lambda x: x.new_empty(words(x.numel()), dtype=torch.int16),
)
def relu_mask_(x: Tensor) -> Tensor:
    """`relu_mask` in place; returns the mask.

    Parameters
    ----------
    x : Tensor
        As for `relu_mask`.

    Returns
    -------
    Tensor
        The mask.
    """
    mask = empty((words(x.numel()),), torch.int16)
    _mask.relu(_flat(x), _flat(x), mask, thread_count())
    return mask


@operator("keep_masked(Tensor x, Tensor mask) -> Tensor", lambda x, mask: torch.empty_like(x))
def keep_masked(x: Tensor, mask: Tensor) -> Tensor:
    """The elements of x whose bit in a mask of `relu_mask` is set, and zeros.

    Parameters
    ----------
    x : Tensor
        float32 or bfloat16; dimensions in the order that the mask was made in, without gaps.
    mask : Tensor
        Of `relu_mask`.

    Returns
    -------
    Tensor
        Like x.
    """
    out = torch.empty_like(x)
    _mask.keep(_flat(x), mask, _flat(out), thread_count())
    return out
