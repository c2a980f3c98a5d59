from torch import Tensor

from qsparseprop._kernels._plan import ProductRows

def spmm(
    planes: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    correction: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    rows: ProductRows,
    bias: Tensor | None,
    out: Tensor,
    threads: int,
    least: float = ...,
    greatest: float = ...,
) -> None: ...
def quantized_spmm(
    values: Tensor,
    rows: ProductRows,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    clip: Tensor | None,
    planes: Tensor,
    bias: Tensor | None,
    out: Tensor,
    threads: int,
    least: float = ...,
    greatest: float = ...,
) -> None: ...
def sddmm(
    planes: Tensor,
    dy: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    dy_scale: Tensor | None,
    rows: ProductRows,
    images: int,
    values: int,
    threads: int,
) -> Tensor: ...
