from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout, ProductRows

class CodedBuffer:
    @property
    def layout(self) -> PlaneLayout: ...
    @property
    def start(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def view(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def zero(self) -> int: ...
    def __new__(
        cls,
        layout: PlaneLayout,
        start: int,
        images: int,
        zero: int,
        view: int = 0,
        first: int = 0,
        channels: int = -1,
    ) -> CodedBuffer: ...

class FrozenStep: ...

class PackStep(FrozenStep):
    def __new__(cls, source: int, out: CodedBuffer, inverse: Tensor) -> PackStep: ...

class ProductStep(FrozenStep):
    def __new__(
        cls,
        rows: ProductRows,
        codes: Tensor,
        source: CodedBuffer,
        out: CodedBuffer | int,
        factors: tuple[Tensor, ...],
        residual: CodedBuffer | None = None,
        table: Tensor | None = None,
    ) -> ProductStep: ...

class CodedStep(FrozenStep):
    def __new__(
        cls,
        kind: str,
        source: CodedBuffer,
        out: CodedBuffer | int,
        numbers: tuple[int, ...] = (),
        factors: tuple[Tensor, ...] = (),
        other: CodedBuffer | None = None,
        table: Tensor | None = None,
    ) -> CodedStep: ...

class Segment:
    @property
    def steps(self) -> tuple[FrozenStep, ...]: ...
    @property
    def arena(self) -> int: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def isa(self) -> str: ...
    def __new__(
        cls, steps: tuple[FrozenStep, ...], arena: int, tensors: int, inputs: int, outputs: tuple[int, ...]
    ) -> Segment: ...
    def __call__(self, inputs: tuple[Tensor, ...], threads: int) -> tuple[Tensor, ...]: ...
