from torch import Tensor

from qsparseprop._kernels._frozen import CodedBuffer, FrozenStep

class PackStep(FrozenStep):
    def __new__(cls, source: int, out: CodedBuffer, inverse: Tensor) -> PackStep: ...

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
