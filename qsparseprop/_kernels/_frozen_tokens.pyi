from torch import Tensor

from qsparseprop._kernels._frozen import CodedBuffer, FrozenStep

def most_tokens() -> int: ...
def block_shape() -> tuple[int, int]: ...

class TokenBuffer:
    @property
    def tokens(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def pitch(self) -> int: ...
    @property
    def zero(self) -> int: ...
    @property
    def size(self) -> int: ...
    def __new__(cls, tokens: int, columns: int, start: int, zero: int) -> TokenBuffer: ...

class TokenQuantizeStep(FrozenStep):
    def __new__(cls, source: int, out: TokenBuffer, inverse: Tensor) -> TokenQuantizeStep: ...

class TokenGatherStep(FrozenStep):
    def __new__(cls, source: CodedBuffer, out: TokenBuffer) -> TokenGatherStep: ...

class TokenProductStep(FrozenStep):
    def __new__(
        cls,
        rows: int,
        step_ptr: Tensor,
        place: Tensor,
        code: Tensor,
        source: TokenBuffer,
        out: CodedBuffer | int,
        factors: tuple[Tensor, ...],
        residual: CodedBuffer | None = None,
    ) -> TokenProductStep: ...
