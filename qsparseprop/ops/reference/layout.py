"""How matrices lie in memory."""

from __future__ import annotations

from torch import Tensor

__all__ = ["transpose"]


def transpose(x: Tensor, images: int, rows: int, columns: int) -> Tensor:
    """See `qsparseprop.ops.transpose`."""
    return x.reshape(images, rows, columns).transpose(1, 2).contiguous()
