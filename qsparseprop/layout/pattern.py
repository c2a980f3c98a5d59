"""The sparsity pattern of a weight: CSR, checked, and a number that tells patterns apart."""

from __future__ import annotations

import torch
from torch import Tensor

from qsparseprop._kernels._plan import ValuePattern
from qsparseprop._kernels._tensor import tensor_version
from qsparseprop.contents import holds_tensors, unreadable

__all__ = [
    "check_pattern",
    "checked_pattern",
    "compact_pattern",
    "dense_pattern",
    "pattern_stamp",
    "row_indices",
    "tensor_version",
]


def check_pattern(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], prefix: str = "") -> None:
    """Check a CSR pattern, sizes before contents: in memory of the order of what the tensors take.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        int32, (rows + 1,) and (nonzeros,).
    shape : (int, int)
        Rows and columns.
    prefix : str
        In front of the names in errors: where the pattern lies in a model's state.

    Raises
    ------
    TypeError
        For another dtype.
    ValueError
        For tensors whose contents cannot be read; if row pointers do not ascend from 0 to the number of nonzeros, or
        columns are out of range, unsorted or double.
    """
    _check_sizes(crow_indices, col_indices, shape, prefix, (torch.int32,))
    counts = crow_indices.to(torch.int64).diff()  # int32 might wrap
    if crow_indices[0] != 0 or crow_indices[-1] != col_indices.numel() or (counts < 0).any():
        raise ValueError(f"{prefix}crow_indices must ascend from 0 to the number of nonzeros, {col_indices.numel()}")
    if col_indices.numel() == 0:
        return
    low, high = col_indices.aminmax()
    if low < 0 or high >= shape[1]:
        raise ValueError(f"{prefix}col_indices must lie in [0, {shape[1]}), got {int(low)} to {int(high)}")
    ascends = col_indices[1:] > col_indices[:-1]
    first = crow_indices[1:-1]  # of rows, which may start anywhere
    ascends[first[(first > 0) & (first < col_indices.numel())].to(torch.int64) - 1] = True
    if not ascends.all():
        raise ValueError(f"{prefix}col_indices must ascend within each row, without duplicates")


def _check_sizes(
    crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], prefix: str, columns: tuple[torch.dtype, ...]
) -> None:
    """What `check_pattern` checks of the tensors without a look at their elements; `columns` has their dtypes."""
    rows, cols = shape
    crow_name, col_name = f"{prefix}crow_indices", f"{prefix}col_indices"
    for name, tensor, dtypes in ((crow_name, crow_indices, (torch.int32,)), (col_name, col_indices, columns)):
        if (problem := unreadable(tensor)) is not None:
            raise (ValueError if isinstance(tensor, Tensor) else TypeError)(f"{name}: {problem}")
        if holds_tensors(tensor):
            raise TypeError(f"{name} must be a tensor in memory, got {type(tensor).__name__}")
        if tensor.dtype not in dtypes or tensor.ndim != 1:
            raise TypeError(f"{name} must be a 1-D tensor of dtype torch.int32, got {tensor.dtype} of shape "
                            f"{tuple(tensor.shape)}")
    if crow_indices.numel() != rows + 1:
        raise ValueError(f"{crow_name} must have {rows + 1} elements, got {crow_indices.numel()}")
    if col_indices.numel() > rows * cols:
        raise ValueError(f"{col_name} must have at most {rows} * {cols} elements, got {col_indices.numel()}")


def compact_pattern(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> ValuePattern | None:
    """A pattern as the kernels read it, in memory of its own.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR, int32.
    shape : (int, int)
        Rows and columns.

    Returns
    -------
    ValuePattern or None
        None where there is nothing to hold, on other devices, and for what is no pattern: `check_pattern` says why.
    """
    if 0 in shape:
        return None
    try:
        _check_sizes(crow_indices, col_indices, shape, "", (torch.int32,))
        return ValuePattern(crow_indices, col_indices, shape[1])
    except (TypeError, ValueError, RuntimeError):  # the last one from subclasses of Tensor
        return None


def checked_pattern(
    crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int], compact: bool = False
) -> ValuePattern:
    """The same, or an error; with `compact` of tensors that may also be those that another `ValuePattern` holds.

    Raises
    ------
    TypeError, ValueError
        See `check_pattern`.
    """
    if compact and isinstance(col_indices, Tensor) and col_indices.dtype in (torch.int16, torch.int64):
        _check_sizes(crow_indices, col_indices, shape, "", (torch.int16, torch.int64))
    else:
        check_pattern(crow_indices, col_indices, shape)
    return ValuePattern(crow_indices, col_indices, shape[1])


def row_indices(crow_indices: Tensor) -> Tensor:
    """Row of each nonzero (nonzeros,), int64, from the row pointers of CSR."""
    return torch.repeat_interleave(torch.arange(crow_indices.numel() - 1, device=crow_indices.device),
                                   crow_indices.diff().to(torch.int64))


def pattern_stamp(crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """A number made of a pattern, which others hardly share: float64 scalar, exact, below 2^50; on "meta" any."""

    def mixed(t: Tensor) -> Tensor:
        total, start = torch.zeros((), dtype=torch.int64, device=t.device), 0
        for part in t.split(1 << 18):  # at once they would take several times the memory of the pattern
            # a factor for each place, so that the order counts; the products fit into 64 bits
            factor = torch.arange(start, start + part.numel(), device=t.device) * 2654435761 % 2**31 + 1
            total, start = total + ((part.to(torch.int64) + 1) * factor % 2**31).sum(), start + part.numel()
        return total

    return (mixed(crow_indices) * 2**17 + mixed(col_indices)).remainder(2**50).to(torch.float64)


def dense_pattern(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR pattern of a 2-D mask: row pointers and columns (int32), and flat positions (int64)."""
    flat = mask.reshape(-1).nonzero().squeeze(1)
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask.sum(1), 0, out=crow[1:])
    return crow.to(torch.int32), (flat % max(mask.shape[1], 1)).to(torch.int32), flat
