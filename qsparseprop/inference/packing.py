"""Weights as few bytes: codes of a byte, and where they are in the fewest bits of three ways.

Of `n` nonzeros among `size` places, in bytes: a matrix takes `size`; codes and a bitmap `n + size / 8`; codes and
places after Elias (1974) and Fano (1971) about `n + n * (2 + log2(size / n)) / 8`. The last one splits each place, row
by row a number that grows, into low bits, stored as they are, and the rest, stored as a bitmap in which the `i`-th one
is at bit `rest + i`. Up to an eighth of zeros the matrix is smallest, up to three quarters the bitmap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qsparseprop.inference.steps import Weight

__all__ = ["WAYS", "PackedWeight", "pack_weight", "part_sizes", "unpack_weight"]

#: The ways in which places are written; the first one that is smallest is taken.
WAYS = ("elias-fano", "bitmap", "matrix")


class PackedWeight(NamedTuple):
    """A weight without its scales.

    Attributes
    ----------
    way : str
        One of `WAYS`.
    rows, columns, nonzeros : int
    parts : dict of str to Tensor
        Bytes, of the sizes that `part_sizes` says: ``codes`` are int8, the others uint8.
    """

    way: str
    rows: int
    columns: int
    nonzeros: int
    parts: dict[str, Tensor]


def _low_bits(size: int, nonzeros: int) -> int:
    """How many bits of a place are stored as they are."""
    return max((size // nonzeros).bit_length() - 1, 0)


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def part_sizes(way: str, rows: int, columns: int, nonzeros: int) -> dict[str, int]:
    """How many bytes each part of a packed weight has.

    Parameters
    ----------
    way : str
        One of `WAYS`.
    rows, columns, nonzeros : int

    Returns
    -------
    dict of str to int
    """
    size = rows * columns
    if way == "matrix":
        return {"codes": size}
    if way == "bitmap":
        return {"codes": nonzeros, "bits": _bytes(size)}
    if nonzeros == 0:
        return {"codes": 0, "low": 0, "high": 0}
    low = _low_bits(size, nonzeros)
    return {"codes": nonzeros, "low": _bytes(nonzeros * low), "high": _bytes(nonzeros + ((size - 1) >> low))}


def pack_weight(weight: Weight) -> PackedWeight:
    """Write a weight in the smallest way. Codes that are zero are left out: they add nothing to a product.

    Parameters
    ----------
    weight : Weight

    Returns
    -------
    PackedWeight
    """
    kept = weight.codes != 0
    row = torch.arange(weight.rows).repeat_interleave(weight.crow_indices.diff().long())[kept]
    place = (row * weight.columns + weight.col_indices[kept].long()).numpy()
    codes = weight.codes[kept]
    rows, columns, nonzeros = weight.rows, weight.columns, codes.numel()
    way = min(WAYS, key=lambda way: sum(part_sizes(way, rows, columns, nonzeros).values()))
    parts = {"codes": codes}
    if way == "matrix":
        parts = {"codes": torch.zeros(rows * columns, dtype=torch.int8).index_put_((torch.from_numpy(place),), codes)}
    elif way == "bitmap":
        parts["bits"] = _packed_bits(_marked(place, rows * columns))
    else:
        low = _low_bits(rows * columns, nonzeros) if nonzeros else 0
        bits = np.empty((nonzeros, low), dtype=np.uint8)
        for k in range(low):
            bits[:, k] = place >> k & 1
        parts["low"] = _packed_bits(bits.reshape(-1))
        high = (place >> low) + np.arange(nonzeros)
        parts["high"] = _packed_bits(_marked(high, nonzeros + (rows * columns - 1 >> low) if nonzeros else 0))
    return PackedWeight(way, rows, columns, nonzeros, parts)


def _marked(place: np.ndarray, size: int) -> np.ndarray:
    bits = np.zeros(size, dtype=np.uint8)
    bits[place] = 1
    return bits


def _packed_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def _ones(part: Tensor, count: int, name: str) -> np.ndarray:
    """Where the ones of a bitmap are, of which there must be so many."""
    bits = np.unpackbits(part.numpy(), bitorder="little")
    found = np.flatnonzero(bits)
    if found.size != count:
        raise ValueError(f"its {name} have {found.size} ones, for {count} nonzeros")
    return found


def _split_places(packed: PackedWeight) -> np.ndarray:
    """The places of codes that were written after Elias and Fano."""
    if not packed.nonzeros:
        return np.zeros(0, dtype=np.int64)
    low = _low_bits(packed.rows * packed.columns, packed.nonzeros)
    place = _ones(packed.parts["high"], packed.nonzeros, "high bits") - np.arange(packed.nonzeros)
    place <<= low
    bits = np.unpackbits(packed.parts["low"].numpy(), bitorder="little")
    count = packed.nonzeros * low
    if bits[count:].any():
        raise ValueError("its low bits go on behind the last nonzero")
    columns = bits[:count].reshape(packed.nonzeros, low)
    for k in range(low):
        place |= columns[:, k].astype(np.int64) << k
    return place


def unpack_weight(packed: PackedWeight, scale: Tensor) -> Weight:
    """Read a weight. All sizes are compared with each other before memory is taken.

    Parameters
    ----------
    packed : PackedWeight
    scale : Tensor
        float32, (rows,).

    Returns
    -------
    Weight
        With memory of its own.

    Raises
    ------
    ValueError
        If the parts are not those of a weight.
    """
    rows, columns, nonzeros = packed.rows, packed.columns, packed.nonzeros
    wanted = part_sizes(packed.way, rows, columns, nonzeros)
    for name, size in wanted.items():
        got = packed.parts[name].numel()
        if got != size:
            raise ValueError(f"{nonzeros} nonzeros of {rows} x {columns} ({packed.way}) have {size} bytes of {name}, "
                             f"not {got}")  # fmt: skip
    codes = packed.parts["codes"]
    if packed.way == "matrix":
        place = np.flatnonzero(codes.numpy())
        if place.size != nonzeros:
            raise ValueError(f"its matrix has {place.size} nonzeros, not {nonzeros}")
        codes = codes[torch.from_numpy(place)]
    elif packed.way == "bitmap":
        place = _ones(packed.parts["bits"], nonzeros, "bits")
    else:
        place = _split_places(packed)
    if place.size and (int(place[-1]) >= rows * columns or not (np.diff(place) > 0).all()):
        raise ValueError(f"its places do not ascend within {rows} x {columns}")
    crow = np.zeros(rows + 1, dtype=np.int32)
    crow[1:] = np.cumsum(np.bincount(place // columns, minlength=rows))
    col = (place % columns).astype(np.int32)
    return Weight(torch.from_numpy(crow), torch.from_numpy(col), codes.clone(), scale, columns)
