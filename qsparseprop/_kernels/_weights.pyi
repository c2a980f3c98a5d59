from torch import Tensor

from qsparseprop._kernels._plan import ProductRows

def gather_weight(values: Tensor, given: ProductRows, out: Tensor) -> None: ...
def quantize_weight(
    values: Tensor,
    rows: ProductRows,
    factor: Tensor | None,
    zero_point: Tensor | None,
    clip: Tensor | None,
    codes: Tensor,
    scale: Tensor | None,
    total: Tensor | None,
    threads: int,
) -> None: ...
