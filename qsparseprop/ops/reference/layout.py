"""How matrices lie in memory."""

from __future__ import annotations

from qsparseprop.ops.reference._signature import reference_of
from qsparseprop.ops.transpose import transpose as operator

__all__ = ["transpose"]


@reference_of(operator)
def transpose(x, images, rows, columns):
    """See `qsparseprop.ops.transpose`."""
    return x.reshape(images, rows, columns).transpose(1, 2).contiguous()
