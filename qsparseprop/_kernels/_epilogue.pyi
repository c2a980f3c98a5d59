from collections.abc import Sequence

from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop._kernels._statistics import Scheme

ACTIVATIONS: tuple[str, ...]

def epilogue(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
    code_scale: Tensor | None,
    code_shift: Tensor | None,
    codes: Tensor | None,
    saved: Tensor | None,
    threads: int,
) -> None: ...
def epilogue_range(
    x: Tensor,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
    threads: int,
) -> Tensor: ...
def activation_range(ranges: Tensor, activation: str, options: Sequence[float]) -> Tensor: ...
def epilogue_pack(
    x: Tensor,
    residual: Tensor | None,
    out: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str,
    options: Sequence[float],
    code_scale: Tensor | None,
    code_shift: Tensor | None,
    codes: Tensor | None,
    saved: Tensor | None,
    ranges: Tensor,
    layout: PlaneLayout,
    scheme: Scheme,
    threads: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
def epilogue_sums(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: str,
    options: Sequence[float],
    threads: int,
) -> Tensor: ...
def epilogue_grad(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: str,
    options: Sequence[float],
    factor: Tensor | None,
    dx: Tensor,
    g: Tensor | None,
    threads: int,
) -> None: ...
def epilogue_grad_pack(
    dy: Tensor,
    codes: Tensor | None,
    saved: Tensor | None,
    activation: str,
    options: Sequence[float],
    factor: Tensor | None,
    g: Tensor | None,
    ranges: Tensor,
    layout: PlaneLayout,
    scheme: Scheme,
    seed: Tensor | None,
    threads: int,
) -> tuple[Tensor, Tensor, Tensor]: ...
