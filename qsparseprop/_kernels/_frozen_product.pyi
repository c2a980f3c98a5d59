from torch import Tensor

from qsparseprop._kernels._frozen import CodedBuffer, FrozenStep
from qsparseprop._kernels._plan import ProductRows

class ProductWeights:
    @property
    def rows(self) -> ProductRows: ...
    def __new__(cls, rows: ProductRows, codes: Tensor) -> ProductWeights: ...

class ProductStep(FrozenStep):
    def __new__(
        cls,
        weights: ProductWeights,
        source: CodedBuffer,
        out: CodedBuffer | int,
        factors: tuple[Tensor, ...],
        residual: CodedBuffer | None = None,
        scales: int = -1,
        table: Tensor | None = None,
    ) -> ProductStep: ...
