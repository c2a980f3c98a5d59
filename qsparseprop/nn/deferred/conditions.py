"""When nothing is deferred, since somebody else takes part in what torch does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack

#: Results of fewer elements are not deferred: what that costs by itself is more than the passes that it saves.
LEAST_ELEMENTS = 1 << 16

#: Modes of torch functions that do nothing to deferred tensors.
UNCONCERNED: set[type] = set()

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_functorch = torch._C._are_functorch_transforms_active

_stepwise = threading.local()


def may_defer() -> bool:
    """Whether blocks may form: nobody traces, watches single operators or differentiates in another way."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _functorch()
        or (_function_modes() and not all(type(mode) in UNCONCERNED for mode in _get_current_function_mode_stack()))
        or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None
    )  # fmt: skip


def watcher() -> Any:
    """The innermost hook that sees what autograd saves (activation checkpointing, offloading, compression), or None.

    What is saved under it may not depend on guesses, nor on what became meanwhile of a tensor from outside: a second
    run must save the same.
    """
    hooks = _saved_tensors_hooks(True)
    return None if hooks is None else hooks[0]


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
