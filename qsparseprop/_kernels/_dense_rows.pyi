from collections.abc import Sequence

from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout, ProductRows

class ValuePattern:
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __new__(cls, crow_indices: Tensor, col_indices: Tensor, columns: int) -> ValuePattern: ...
    @property
    def crow_indices(self) -> Tensor: ...
    @property
    def col_indices(self) -> Tensor: ...

class DenseRows(ProductRows):
    @property
    def pattern(self) -> ValuePattern: ...
    @property
    def swapped(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    def __new__(
        cls,
        pattern: ValuePattern,
        groups: int,
        tap_phase: Sequence[int],
        tap_shift: Sequence[int],
        source: PlaneLayout,
        target: PlaneLayout,
        swapped: bool,
    ) -> DenseRows: ...
