from torch import Tensor

from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop._kernels._statistics import Scheme

def pack(x: Tensor, layout: PlaneLayout, threads: int) -> Tensor: ...
def quantize_pack(
    x: Tensor, layout: PlaneLayout, scheme: Scheme, seed: Tensor | None, threads: int
) -> tuple[Tensor, Tensor, Tensor]: ...
