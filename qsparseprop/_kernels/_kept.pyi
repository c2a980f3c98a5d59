from torch import Tensor

from qsparseprop._kernels._plan import ProductRows

def digest(values: Tensor, threads: int) -> bytes: ...
def kept_bytes(rows: ProductRows) -> int: ...
def multiply(
    values: Tensor,
    rows: ProductRows,
    scale: Tensor,
    zero_point: Tensor | None,
    clip: Tensor | None,
    planes: Tensor,
    bias: Tensor | None,
    out: Tensor,
    threads: int,
    trained: bool = ...,
    least: float = ...,
    greatest: float = ...,
) -> int: ...
