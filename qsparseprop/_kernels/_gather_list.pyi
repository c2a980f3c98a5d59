from collections.abc import Sequence

from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout, ProductRows, ValuePattern

class GatherList(ProductRows):
    @property
    def nbytes(self) -> int: ...
    @property
    def group_ptr(self) -> Tensor: ...
    @property
    def offset(self) -> Tensor: ...
    @property
    def index(self) -> Tensor: ...
    @property
    def plane(self) -> Tensor: ...
    def __new__(
        cls,
        group_ptr: Tensor,
        offset: Tensor,
        index: Tensor,
        plane: Tensor,
        source: PlaneLayout,
        target: PlaneLayout,
    ) -> GatherList: ...

class PatternList(GatherList):
    @property
    def pattern(self) -> ValuePattern: ...
    @property
    def swapped(self) -> bool: ...
    def __new__(
        cls,
        pattern: ValuePattern,
        groups: int,
        tap_phase: Sequence[int],
        tap_shift: Sequence[int],
        source: PlaneLayout,
        target: PlaneLayout,
        swapped: bool,
    ) -> PatternList: ...
