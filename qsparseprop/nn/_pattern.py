"""How a module holds the pattern of its weight: once, as the kernels read it, and as CSR for whoever asks."""

from __future__ import annotations

import weakref
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsparseprop._kernels._plan import ValuePattern
from qsparseprop._torch_compat import version_of
from qsparseprop.ops import check_storage

#: What of a module's attributes is the pattern, which is stored as crow_indices and col_indices.
HELD = ("_pattern", "_crow", "_columns", "_values_shape", "_shown")


class PatternHolder:
    """The pattern of a module's weight.

    `crow_indices` and `col_indices` are made when somebody asks: copies, as those in a state, so that what writes to
    them does not reach the pattern. It changes by `apply_further_mask`, `regrow`, `load_state_dict`, or where tensors
    are assigned to the two attributes; these are held as they are, in the memory that they take, and what writes to
    them does change the pattern. The next use of a module after somebody has written to a copy is refused; what
    torch.compile has compiled does not notice.

    Attributes
    ----------
    crow_indices, col_indices : Tensor
        CSR, int32.
    """

    _pattern: ValuePattern | None
    #: What graphs take for the pattern, attributes since torch.export wants its constants to be: what `_pattern` holds
    #: (the memory itself: nobody may write there), or, without one, what was assigned.
    _crow: Tensor
    _columns: Tensor
    _values_shape: torch.Size
    _shown: list[tuple[weakref.ref[Tensor], Tensor]]

    def __setattr__(self, name: str, value: Any) -> None:
        """See torch.nn.Module, which makes modules its children, and parameters its own, before it asks a property."""
        known = isinstance(value, nn.Module | nn.Parameter)
        if known and isinstance(own := getattr(type(self), name, None), property):
            own.__set__(self, value.detach() if isinstance(value, nn.Parameter) else value)
        else:
            super().__setattr__(name, value)

    @property
    def crow_indices(self) -> Tensor:
        """Row pointers in CSR, int32, (rows + 1,)."""
        return self._show(0)

    @crow_indices.setter
    def crow_indices(self, given: Tensor) -> None:
        self._assign(0, given)

    @property
    def col_indices(self) -> Tensor:
        """Column of each value, int32, (nonzeros,)."""
        return self._show(1)

    @col_indices.setter
    def col_indices(self, given: Tensor) -> None:
        self._assign(1, given)

    def _hold_pattern(self, crow: Tensor, col: Tensor, pattern: ValuePattern | None) -> None:
        """Hold a pattern; with `pattern`, which was made of them, the tensors are not needed any more."""
        held, shape = (crow, col), col.shape
        if pattern is not None:
            held, shape = pattern.held, torch.Size((pattern.count,))
        # at once, since other threads may be reading; and a Parameter is to be an attribute like any other tensor
        self.__dict__.update(zip(HELD, (pattern, *held, shape, []), strict=True))

    def _indices(self) -> tuple[Tensor, Tensor]:
        """The pattern as CSR: tensors of the caller's own, or those that were assigned."""
        pattern = self._pattern
        return (self._crow, self._columns) if pattern is None else (pattern.crow_indices, pattern.col_indices)

    def _show(self, place: int) -> Tensor:
        if torch.compiler.is_compiling():
            return self._traced_indices()[place]
        if self._pattern is None:
            return self._indices()[place]
        with torch.inference_mode(False):  # tensors of inference mode count no versions
            pattern = self._pattern
            shown = pattern.col_indices if place else pattern.crow_indices
            others = [(ref, version) for ref, version in self._shown if version._version or ref() is not None]
            self.__dict__["_shown"] = [*others, (weakref.ref(shown), version_of(shown))]
        return shown

    def _traced_indices(self) -> tuple[Tensor, Tensor]:
        """The pattern as CSR in operations that torch.compile can trace; what it has compiled notices no writes."""
        crow, held = self._crow, self._columns
        if held.dtype == torch.int32:
            return crow.clone(), held.clone()
        count, rows = self._values_shape.numel(), crow.numel() - 1
        if held.dtype == torch.int64:
            bits = (held[:, None] >> torch.arange(64) & 1).view(-1)
            # bits that are not set go behind the others, since operations that a graph has give results of known sizes
            place = torch.where(bits != 0, bits.cumsum(0) - 1, count)
            column = torch.arange(bits.numel() // rows, dtype=torch.int32).repeat(rows)
            return crow.clone(), column.new_empty(count + 1).scatter(0, place, column)[:-1]
        if held.numel() == count:
            return crow.clone(), held.to(torch.int32) & 0xFFFF
        return crow.clone(), torch.arange(count // rows, dtype=torch.int32).repeat(rows)  # all, which needs no columns

    def _assign(self, place: int, given: Tensor) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{('crow_indices', 'col_indices')[place]} must be a tensor, got {type(given).__name__}")
        crow, col = self._indices()
        self._hold_pattern(*((crow, given) if place else (given, col)), None)

    def _refuse_written(self) -> None:
        """Refuse to go on with a pattern that somebody believes to have changed."""
        if any(version._version for _, version in self._shown):
            raise ValueError(f"crow_indices and col_indices of {type(self).__name__} are copies: somebody has written "
                             "to one, which does not change the pattern. Assign what is to be the pattern to the "
                             "module (layer.col_indices = changed), or use apply_further_mask, regrow or "
                             "load_state_dict")

    def _forget_shown(self) -> None:
        self.__dict__["_shown"] = []

    def _held_indices(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        """What is held, with the names of what it stands for."""
        return ("crow_indices", self._crow), ("col_indices", self._columns)

    def _check_held(self) -> None:
        for name, tensor in self._held_indices():
            check_storage(tensor, name)

    def _same_pattern(self, other: PatternHolder) -> bool:
        """Whether two patterns of weights of one shape are the same."""
        mine, theirs = (self._crow, self._columns), (other._crow, other._columns)
        if self._pattern is None or other._pattern is None:
            mine, theirs = self._indices(), other._indices()
        return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def _stored_pattern(self) -> dict[str, Any]:
        """What a pickle has in place of what is held; nothing before there is a pattern."""
        if "_pattern" not in self.__dict__:
            return {}
        indices: tuple[Any, ...] = self._indices()
        if get_spawning_popen() is not None and all(t.is_cpu for t in indices):
            # Tensors would go to the new process as shared memory, which ends with these copies before it has begun.
            indices = tuple(t.numpy() for t in indices)
        return dict(zip(("crow_indices", "col_indices"), indices, strict=True))


def restored(indices: Any) -> Any:
    """Indices of a pickle as a tensor, if they came as an array."""
    return torch.from_numpy(indices) if isinstance(indices, np.ndarray) else indices
