"""When nothing is deferred, since somebody else takes part in what torch does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

from qsparseprop._torch_compat import (
    dispatch_modes,
    function_modes,
    is_differentiating_forward,
    is_jit_tracing,
    transforms_active,
    watcher,
)

#: Results of fewer elements are not deferred: what that costs by itself, a quarter of a millisecond for convolution,
#: normalisation and activation, forward and backward, is more than the passes that it saves.
LEAST_ELEMENTS = 1 << 18

_stepwise = threading.local()


def _watched() -> bool:
    """Whether a mode sees torch's functions, other than one that leaves those of deferred tensors to them."""
    return any(not getattr(mode, "leaves_deferred_tensors", False) for mode in function_modes())


def may_defer() -> bool:
    """Whether blocks may form: nobody traces, watches single operators or differentiates in another way."""
    return not (
        torch.compiler.is_compiling() or dispatch_modes() or _watched() or transforms_active()
        or is_differentiating_forward() or is_jit_tracing()
    )  # fmt: skip


def step_by_step() -> bool:
    """Whether every operation is computed when it is recorded.

    What somebody wants to see must be there when it is saved.
    """
    return watcher() is not None or getattr(_stepwise, "on", False)


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """Compute every operation behind a sparse layer when it is called, in the calling thread.

    Results are the same, up to rounding; this is for finding out whether deferring makes a difference.
    """
    before = getattr(_stepwise, "on", False)
    _stepwise.on = True
    try:
        yield
    finally:
        _stepwise.on = before
