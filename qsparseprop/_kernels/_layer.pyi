from torch import Tensor

from qsparseprop._kernels._plan import ProductRows
from qsparseprop._kernels._statistics import Scheme

def forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    rows: ProductRows,
    scheme: Scheme,
    seed: Tensor | None,
    clip: Tensor | None,
    out: Tensor,
    trained: bool,
    threads: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def backward(
    dy: Tensor,
    values: Tensor,
    packed: tuple[Tensor, Tensor | None, Tensor | None] | None,
    rows: ProductRows,
    differentiated: ProductRows | None,
    scheme: Scheme,
    seed: Tensor | None,
    clip: Tensor | None,
    dx: Tensor | None,
    swapped: bool,
    threads: int,
) -> Tensor | None: ...
