"""Shape, sparsity and size of the weights in a state dict, dense or sparse.

A state may come from a file that nobody has checked. What follows from sizes alone is taken from them, and values are
read only where memory holds as many as the sizes say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from qsparseprop import arguments
from qsparseprop.contents import unreadable

from .state_files import stored_bytes

__all__ = ["WeightInfo", "format_weights", "weight_infos"]

_PATTERN = ("crow_indices", "col_indices", "_extra_state")
#: A weight of more dimensions is none.
_MOST_DIMENSIONS = 8
#: How often the values of one storage are read at most; tied weights share theirs with one or two others.
_MOST_READINGS = 16


@dataclass(frozen=True)
class WeightInfo:
    """One weight.

    Attributes
    ----------
    name : str
        Its key.
    shape : tuple of int
        As if it were dense.
    nonzeros : int or None
        Values that are not zero; of a sparse weight those that exist. None where they were not counted.
    sparse : bool
        Whether only the nonzeros are stored.
    bytes, dense_bytes : int
        Memory of the values and, of a sparse one, its pattern; and of the same weight stored dense.
    note : str
        Why something is not known, or does not fit.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int | None
    sparse: bool
    bytes: int
    dense_bytes: int
    note: str = ""

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros; None where the nonzeros were not counted."""
        total = math.prod(self.shape)
        if self.nonzeros is None:
            return None
        return 1 - self.nonzeros / total if total else 0.0


def weight_infos(state: Mapping[str, Tensor]) -> list[WeightInfo]:
    """Describe the weights in a state dict; other entries (biases, statistics) are added up in one called ``(other)``.

    Weights are the tensors of at least two dimensions of floating-point or complex dtype, the sparse ones of torch
    among them, and the weights of sparse modules. Entries that are no tensors are left out.

    Parameters
    ----------
    state : mapping of str to Tensor
        Trusted in nothing: tensors may be expanded, on the meta device, of any dtype and layout, and not fit together.

    Returns
    -------
    list of WeightInfo
        A sparse weight's shape is known where its module's ``_extra_state`` is in the state and fits; otherwise it is
        what its pattern reaches.

    Raises
    ------
    TypeError
        If a key is no string.
    """
    arguments.instance(state, Mapping, "state", "a mapping of names to tensors")
    for key in state:
        if not isinstance(key, str):
            raise TypeError(f"the keys of a state dict are strings, got {type(key).__name__}")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    infos, other_elements, other_bytes = [], 0, 0
    readings: Counter[int] = Counter()
    modules = {key.removesuffix("crow_indices") for key in tensors if key.endswith("crow_indices")}
    for key, tensor in tensors.items():
        module, name = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
        if module in modules and name in _PATTERN:
            continue
        if tensor.is_nested:  # has no sizes to speak of
            infos.append(WeightInfo(key, (), None, False, 0, 0, "nested, not counted"))
        elif module in modules and name == "weight":
            infos.append(_sparse_info(key, tensor, *(tensors.get(module + part) for part in _PATTERN)))
        elif is_lazy(tensor):
            infos.append(WeightInfo(key, (), None, False, 0, 0, "does not exist yet"))
        elif tensor.ndim >= 2 and (tensor.is_floating_point() or tensor.is_complex()):
            infos.append(_dense_info(key, tensor, readings))
        else:
            other_elements, other_bytes = other_elements + tensor.numel(), other_bytes + _size(tensor)
    infos.append(WeightInfo("(other)", (other_elements,), other_elements, False, other_bytes, other_bytes))
    return infos


def _size(tensor: Tensor | None) -> int:
    """Bytes of values; what a tensor without storage would need."""
    if tensor is None or is_lazy(tensor) or tensor.is_nested:
        return 0
    stored = stored_bytes(tensor)
    return tensor.numel() * tensor.element_size() if stored is None else stored


def _readable(tensor: Tensor) -> bool:
    """Whether each element has its place in memory."""
    return unreadable(tensor) is None and stored_bytes(tensor) == tensor.numel() * tensor.element_size()


def _is_vector(part: Tensor | None) -> TypeGuard[Tensor]:
    return part is not None and not is_lazy(part) and not part.is_nested and part.ndim == 1


def _sparse_info(
    key: str, weight: Tensor, crow: Tensor | None, col: Tensor | None, extra: Tensor | None
) -> WeightInfo:
    """The weight of a sparse module of this package."""
    size = _size(weight) + _size(crow) + _size(col)
    if not (_is_vector(weight) and _is_vector(crow) and _is_vector(col)) or weight.numel() != col.numel():
        found = () if is_lazy(weight) or weight.is_nested else tuple(weight.shape)
        return WeightInfo(key, found, None, True, size, size, "pattern and values do not go together")
    rows = max(0, crow.numel() - 1)
    shape, note = _saved_shape(extra), ""
    if extra is None:
        note = "the shape is what its pattern reaches"
    elif shape is None or shape[0] != rows or math.prod(shape) < col.numel():
        shape, note = None, "_extra_state does not fit; the shape is what its pattern reaches"
    if shape is None:
        known = _readable(col) and not col.is_floating_point() and not col.is_complex()
        shape = (rows, max(0, int(col.max()) + 1) if known and col.numel() else 0)
        if not known:
            note = "its shape is not known"
    return WeightInfo(key, shape, weight.numel(), True, size, math.prod(shape) * weight.element_size(), note)


def _saved_shape(extra: Tensor | None) -> tuple[int, ...] | None:
    """The weight's shape from a sparse module's ``_extra_state``: the number of its format, then the sizes."""
    if not _is_vector(extra) or extra.dtype != torch.int64 or not 3 <= extra.numel() <= _MOST_DIMENSIONS + 1:
        return None
    if not _readable(extra):
        return None
    shape = tuple(extra[1:].tolist())
    return shape if min(shape) >= 0 else None


def _dense_info(key: str, tensor: Tensor, readings: Counter[int]) -> WeightInfo:
    shape, dense_bytes = tuple(tensor.shape), tensor.numel() * tensor.element_size()
    if tensor.layout is not torch.strided:
        parts = _sparse_parts(tensor)
        if not parts:
            note = f"layout {str(tensor.layout).removeprefix('torch.')}, not counted"
            return WeightInfo(key, shape, None, False, dense_bytes, dense_bytes, note)
        *_, values = parts
        return WeightInfo(key, shape, values.numel(), True, sum(map(_size, parts)), dense_bytes)
    if tensor.device.type == "meta":
        return WeightInfo(key, shape, None, False, 0, dense_bytes, "on the meta device, without values")
    if not _readable(tensor):
        note = "its elements share memory or have none, not counted"
        return WeightInfo(key, shape, None, False, _size(tensor), dense_bytes, note)
    readings[tensor.untyped_storage().data_ptr()] += dense_bytes
    if readings[tensor.untyped_storage().data_ptr()] > _MOST_READINGS * tensor.untyped_storage().nbytes():
        return WeightInfo(key, shape, None, False, dense_bytes, dense_bytes, "shares memory with many, not counted")
    nonzeros, note = _count_nonzero(tensor)
    return WeightInfo(key, shape, nonzeros, False, dense_bytes, dense_bytes, note)


def _sparse_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Indices and, last, values of one of torch's sparse tensors; nothing of other layouts."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
    return ()


@torch.no_grad()
def _count_nonzero(tensor: Tensor) -> tuple[int | None, str]:
    try:
        # torch does not count in 8 bits, and bfloat16 has the zeros of all such formats
        small = tensor.is_floating_point() and tensor.element_size() == 1
        return int((tensor.to(torch.bfloat16) if small else tensor).count_nonzero()), ""
    except (NotImplementedError, RuntimeError):
        return None, f"values of {str(tensor.dtype).removeprefix('torch.')} are not counted"


def _printable(text: str) -> str:
    """A name from a file must not move a terminal's cursor, nor be more than an output's encoding can print."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _share(zeros: float | None) -> str:
    return "-" if zeros is None else f"{100 * zeros:.1f} %"


def format_weights(infos: Sequence[WeightInfo]) -> str:
    """Return a table, with a line for all of them; weights whose nonzeros are not known count in its sizes only.

    Parameters
    ----------
    infos : sequence of WeightInfo

    Returns
    -------
    str
    """
    rows: list[tuple[Any, ...]] = [("weight", "shape", "stored", "nonzeros", "zeros", "kB", "dense kB", "")]
    for info in infos:
        rows.append((_printable(info.name), "x".join(map(str, info.shape)), "sparse" if info.sparse else "dense",
                     "-" if info.nonzeros is None else str(info.nonzeros), _share(info.sparsity),
                     f"{info.bytes / 1e3:.1f}", f"{info.dense_bytes / 1e3:.1f}", info.note))  # fmt: skip
    size, dense_size = (sum(getattr(info, name) for info in infos) for name in ("bytes", "dense_bytes"))
    counted = [info for info in infos if info.nonzeros is not None]
    nonzeros, elements = sum(info.nonzeros or 0 for info in counted), sum(math.prod(info.shape) for info in counted)
    zeros = 1 - nonzeros / elements if elements else 0.0
    rows.append(("all", str(sum(math.prod(info.shape) for info in infos)), "", str(nonzeros), _share(zeros),
                 f"{size / 1e3:.1f}", f"{dense_size / 1e3:.1f}", ""))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) if 3 <= i < 7 else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in rows]  # fmt: skip
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
