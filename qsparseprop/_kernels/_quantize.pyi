from collections.abc import Sequence

from torch import Tensor

def quantize(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    channels: int,
    inner: int,
    group: int,
    scheme: str,
    bits: int,
    options: Sequence[float],
    seed: int,
    threads: int,
) -> None: ...
def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out: Tensor,
    channels: int,
    inner: int,
    group: int,
    threads: int,
) -> None: ...
