from collections.abc import Sequence

from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout, ProductRows, ValuePattern

class DenseRows(ProductRows):
    @property
    def pattern(self) -> ValuePattern: ...
    @property
    def swapped(self) -> bool: ...
    @property
    def offset(self) -> Tensor: ...
    @property
    def plane(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...
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
