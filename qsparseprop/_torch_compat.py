"""What depends on torch beyond its documented interface, each piece with a test that says what broke.

``tests/test_torch_compat.py``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame as _frames
from torch.autograd import forward_ad, profiler
from torch.optim.swa_utils import AveragedModel

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def called_by_parameter() -> bool:
    """Whether the method of a tensor in whose ``__torch_function__`` this is called was called by nn.Parameter itself.

    That wants `detach` of a subclass to give the subclass; everybody else is to get a plain tensor.
    """
    return sys._getframe(2).f_code is nn.Parameter.__new__.__code__


def before_averaging(check: Callable[[nn.Module, nn.Module], None]) -> None:
    """Have `check(average, model)` called before a model's weights go into an average of torch.optim.swa_utils.

    An average is taken element by element, and torch calls nothing of the modules that it averages.
    """
    update = AveragedModel.update_parameters

    @functools.wraps(update)
    def checked(self: AveragedModel, model: nn.Module) -> None:
        check(self.module, model)
        update(self, model)

    AveragedModel.update_parameters = checked


def keep_from_compiling(function: Callable[..., Any]) -> None:
    """Let torch.compile neither compile a function, where it runs outside of a graph, nor what that calls.

    Graphs break where a deferred tensor comes in; what deals with it then would be compiled by itself. The decorators
    of torch.compiler do this as well, but import torch._dynamo, which takes seconds.
    """
    skip = _frames._FrameAction.SKIP
    _frames.set_code_exec_strategy(function.__code__, _frames._FrameExecStrategy(skip, skip))


def watcher() -> Any:
    """The innermost hook that sees what autograd saves (activation checkpointing, offloading, compression), or None.

    What is saved under it may not depend on guesses, nor on what became meanwhile of a tensor from outside: a second
    run must save the same.
    """
    hooks = _top_hooks(True)
    return None if hooks is None else hooks[0]


def forward_mode_is_on() -> bool:
    """Whether tangents of forward-mode differentiation are carried along."""
    return forward_ad._current_level >= 0


#: How many dispatch modes are on.
dispatch_modes = torch._C._len_torch_dispatch_stack


def profiler_is_on() -> bool:
    """Whether a profiler records the operators of any thread."""
    return profiler._is_profiler_enabled


def refusing_derivatives(overload: Any, message: str) -> Callable[..., Any]:
    """The autograd kernel of an operator that writes into its arguments: it refuses those that want a gradient.

    It cannot wait for the backward pass: torch would go on with the history of what was written over, or take the
    gradient for zero.
    """

    def refusing(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise NotImplementedError(message)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return refusing
