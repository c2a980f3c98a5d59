"""The sparsity pattern of a weight, and the lists of (offset, value) that the kernels walk."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop.geometry import Geometry

GROUP = 4  # nonzeros that the kernels take at a time; rows are padded to it


class GatherList(NamedTuple):
    """Rows of slots, each row padded to whole groups of four; int32 throughout.

    Attributes
    ----------
    group_ptr : Tensor
        (rows + 1,) first group of each row.
    offset : Tensor
        (slots,) lanes from the start of a block.
    index : Tensor
        (slots,) which value a slot holds, -1 for padding.
    plane : Tensor
        (slots,) plane that the offset lies in.
    """

    group_ptr: Tensor
    offset: Tensor
    index: Tensor
    plane: Tensor


class Plan(NamedTuple):
    """A pattern on a geometry: the list of the forward pass and weight gradient, and that of the input gradient."""

    geometry: Geometry
    forward: GatherList
    backward: GatherList


def check_pattern(crow_indices: Tensor, col_indices: Tensor, shape: tuple[int, int]) -> None:
    """Check a CSR pattern.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        int32, (rows + 1,) and (nonzeros,).
    shape : (int, int)
        Rows and columns.

    Raises
    ------
    TypeError
        For another dtype.
    ValueError
        If row pointers do not ascend from 0 to the number of nonzeros, or columns are out of range, unsorted or double.
    """
    rows, cols = shape
    for name, tensor in (("crow_indices", crow_indices), ("col_indices", col_indices)):
        if tensor.dtype != torch.int32 or tensor.ndim != 1:
            raise TypeError(f"{name} must be a 1-D tensor of dtype torch.int32, got {tensor.dtype} of shape "
                            f"{tuple(tensor.shape)}")
    if crow_indices.numel() != rows + 1:
        raise ValueError(f"crow_indices must have {rows + 1} elements, got {crow_indices.numel()}")
    counts = crow_indices.diff()
    if crow_indices[0] != 0 or crow_indices[-1] != col_indices.numel() or (counts < 0).any():
        raise ValueError(f"crow_indices must ascend from 0 to the number of nonzeros, {col_indices.numel()}")
    if col_indices.numel() == 0:
        return
    low, high = col_indices.aminmax()
    if low < 0 or high >= cols:
        raise ValueError(f"col_indices must lie in [0, {cols}), got {int(low)} to {int(high)}")
    flat = row_indices(crow_indices).to(torch.int64) * cols + col_indices
    if (flat.diff() <= 0).any():
        raise ValueError("col_indices must ascend within each row, without duplicates")


def row_indices(crow_indices: Tensor) -> Tensor:
    """Row of each nonzero (nonzeros,), int64, from the row pointers of CSR."""
    return torch.repeat_interleave(torch.arange(crow_indices.numel() - 1, device=crow_indices.device),
                                   crow_indices.diff().to(torch.int64))


def dense_pattern(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CSR pattern of a 2-D mask: row pointers and columns (int32), and flat positions (int64)."""
    flat = mask.reshape(-1).nonzero().squeeze(1)
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(mask.sum(1), 0, out=crow[1:])
    return crow.to(torch.int32), (flat % max(mask.shape[1], 1)).to(torch.int32), flat


def _gather_list(rows: int, row: Tensor, plane: Tensor, offset: Tensor, order: Tensor) -> GatherList:
    """List whose row r holds, padded, the nonzeros `order[row == r]`; `row` ascends."""
    count = torch.bincount(row, minlength=rows)
    groups = (count + GROUP - 1) // GROUP
    group_ptr = torch.zeros(rows + 1, dtype=torch.int64)
    torch.cumsum(groups, 0, out=group_ptr[1:])
    slot_row = torch.repeat_interleave(torch.arange(rows), GROUP * groups)
    place = torch.arange(slot_row.numel()) - GROUP * group_ptr[slot_row]
    start = count.cumsum(0) - count
    # padding reads where the row's last nonzero reads: memory that is in the cache, times zero
    source = order[start[slot_row] + torch.minimum(place, count[slot_row] - 1)]
    index = torch.where(place < count[slot_row], source, -1)
    return GatherList(*(t.to(torch.int32) for t in (group_ptr, offset[source], index, plane[source])))


def make_plan(crow_indices: Tensor, col_indices: Tensor, geometry: Geometry, groups: int = 1) -> Plan:
    """Lists of a pattern on a geometry.

    Parameters
    ----------
    crow_indices, col_indices : Tensor
        CSR pattern of the weight seen as (out_channels, in_channels / groups * taps), int32.
    geometry : Geometry
    groups : int
        Groups of the convolution.
    """
    rows, taps = crow_indices.numel() - 1, len(geometry.tap_shift)
    row, col = row_indices(crow_indices), col_indices.to(torch.int64)
    tap = col % taps
    channel = col // taps + row // max(rows // groups, 1) * (geometry.in_channels // groups)
    shift = torch.tensor(geometry.tap_shift)[tap]
    plane = torch.tensor(geometry.tap_phase)[tap] * geometry.in_channels + channel
    x, y = geometry.input_grid, geometry.output_grid
    nonzeros = torch.arange(col.numel())
    forward = _gather_list(rows, row, plane, plane * x.pitch + x.front + shift, nonzeros)
    order = torch.argsort(plane, stable=True)
    backward = _gather_list(x.planes, plane[order], row, row * y.pitch + y.front - shift, order)
    return Plan(geometry, forward, backward)
