"""Shape, sparsity and size of the weights in a state dict, dense or sparse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qsparseprop.contents import is_convertible, unreadable

from ._errors import ConfigurationError

__all__ = ["WeightInfo", "format_weights", "weight_infos"]

_PATTERN = ("crow_indices", "col_indices", "_extra_state")


@dataclass(frozen=True)
class WeightInfo:
    """One weight.

    Attributes
    ----------
    name : str
        Its key.
    shape : tuple of int
        As if it were dense.
    nonzeros : int
        Values that are not zero; of a sparse weight those that exist.
    sparse : bool
        Whether only the nonzeros are stored.
    bytes, dense_bytes : int
        Memory of the values and, of a sparse one, its pattern; and of the same weight stored dense.
    """

    name: str
    shape: tuple[int, ...]
    nonzeros: int
    sparse: bool
    bytes: int
    dense_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        total = math.prod(self.shape)
        return 1 - self.nonzeros / total if total else 0.0


def weight_infos(state: Mapping[str, Tensor]) -> list[WeightInfo]:
    """Describe the weights in a state dict; other entries (biases, statistics) are added up in one called ``(other)``.

    Parameters
    ----------
    state : mapping of str to Tensor

    Returns
    -------
    list of WeightInfo
        A sparse weight's shape is known where its module's ``_extra_state`` is in the state; otherwise it is what its
        pattern reaches.

    Raises
    ------
    ConfigurationError
        For a tensor whose contents cannot be read, such as an expanded one, or a sparse weight without its pattern.
    """
    for key, tensor in state.items():
        if (problem := unreadable(tensor)) is not None:
            raise ConfigurationError(f"{key}: {problem}")
    infos, other_elements, other_bytes = [], 0, 0
    modules = {key.removesuffix("crow_indices") for key in state if key.endswith("crow_indices")}
    for key, tensor in state.items():
        module, name = key[: key.rfind(".") + 1], key[key.rfind(".") + 1 :]
        if module in modules and name in _PATTERN:
            continue
        if module in modules and name == "weight":
            crow, col = state[module + "crow_indices"], state.get(module + "col_indices")
            if col is None:
                raise ConfigurationError(f"{module}col_indices is missing, values and pattern only make sense together")
            extra = state.get(module + "_extra_state")
            if extra is not None and extra.dtype == torch.int64 and extra.ndim == 1 and 2 < extra.numel() < 10:
                shape = tuple(extra[1:].tolist())
            else:
                shape = (crow.numel() - 1, int(col.max()) + 1 if col.numel() else 0)
            size = tensor.nbytes + crow.nbytes + col.nbytes
            dense_bytes = math.prod(shape) * tensor.element_size()
            infos.append(WeightInfo(key, shape, tensor.numel(), True, size, dense_bytes))
        elif tensor.ndim >= 2 and is_convertible(tensor.dtype):
            nonzeros = int((tensor != 0).sum())  # count_nonzero does not know numbers of 8 bits
            infos.append(WeightInfo(key, tuple(tensor.shape), nonzeros, False, tensor.nbytes, tensor.nbytes))
        else:
            other_elements, other_bytes = other_elements + tensor.numel(), other_bytes + tensor.nbytes
    infos.append(WeightInfo("(other)", (other_elements,), other_elements, False, other_bytes, other_bytes))
    return infos


def format_weights(infos: Sequence[WeightInfo]) -> str:
    """Return a table, with a line for all of them."""
    rows = [("weight", "shape", "stored", "nonzeros", "zeros", "kB", "dense kB")]
    total = [sum(getattr(info, name) for info in infos) for name in ("nonzeros", "bytes", "dense_bytes")]
    elements = sum(math.prod(info.shape) for info in infos)
    for info in infos:
        rows.append((info.name, "x".join(map(str, info.shape)), "sparse" if info.sparse else "dense",
                     str(info.nonzeros), f"{100 * info.sparsity:.1f} %", f"{info.bytes / 1e3:.1f}",
                     f"{info.dense_bytes / 1e3:.1f}"))  # fmt: skip
    rows.append(("all", str(elements), "", str(total[0]), f"{100 * (1 - total[0] / max(elements, 1)):.1f} %",
                 f"{total[1] / 1e3:.1f}", f"{total[2] / 1e3:.1f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if i < 3 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
             for row in rows]  # fmt: skip
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
