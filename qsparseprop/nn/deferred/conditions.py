"""When nothing is deferred, since somebody else takes part in what torch does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._dynamo import eval_frame as _frames
from torch.autograd import forward_ad

#: Results of fewer elements are not deferred: what that costs by itself is more than the passes that it saves.
LEAST_ELEMENTS = 1 << 16

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch = torch._C._are_functorch_transforms_active

_autograd = torch._C._autograd

_stepwise = threading.local()


def _watched() -> bool:
    """Whether a mode sees torch's functions, other than one that leaves those of deferred tensors to them."""
    return any(not getattr(torch._C._get_function_stack_at(i), "leaves_deferred_tensors", False)
               for i in range(_function_modes()))  # fmt: skip


def may_defer() -> bool:
    """Whether blocks may form: nobody traces, watches single operators or differentiates in another way."""
    return not (
        torch.compiler.is_compiling() or _dispatch_modes() or _watched() or _functorch()
        or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None
    )  # fmt: skip


def keep_from_compiling(function: Callable[..., Any]) -> None:
    """Let torch.compile neither compile a function, where it runs outside of a graph, nor what that calls.

    Graphs break where a deferred tensor comes in; what deals with it then would be compiled by itself. The decorators
    of torch.compiler do this as well, but import torch._dynamo, which takes seconds.
    """
    code = function.__code__
    if hasattr(_frames, "set_code_exec_strategy"):
        skip = _frames._FrameAction.SKIP
        _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, skip))
    else:  # PyTorch 2.6
        _frames.skip_code(code)


def watcher() -> Any:
    """The innermost hook that sees what autograd saves (activation checkpointing, offloading, compression), or None.

    What is saved under it may not depend on guesses, nor on what became meanwhile of a tensor from outside: a second
    run must save the same.
    """
    if hasattr(_autograd, "_top_saved_tensors_default_hooks"):
        hooks = _autograd._top_saved_tensors_default_hooks(True)
        return None if hooks is None else hooks[0]
    # up to PyTorch 2.7 nothing tells which, and whether there are any only since to forbid them is an error then
    if not _autograd._saved_tensors_hooks_is_enabled():
        return None
    try:
        _autograd._saved_tensors_hooks_disable("there are hooks")
    except RuntimeError:
        return True
    finally:
        _autograd._saved_tensors_hooks_enable()
    return None


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
