"""Chains behind layers that are not sparse: their product is torch's, what follows is deferred.

So the batch normalisation behind a dense convolution keeps 8 bits of its input, and what comes out is packed for the
sparse layer that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop._torch_compat import forward_hooks, forward_pre_hooks
from qsparseprop.nn.autograd.blocks import BlockStart
from qsparseprop.nn.autograd.graph import records_gradients
from qsparseprop.nn.deferred import conditions
from qsparseprop.nn.deferred.conditions import may_defer
from qsparseprop.nn.deferred.layout import Layout, images, linear
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.tensor import DeferredTensor, ordinary, pending_of
from qsparseprop.nn.deferred.usage import Operation, Usage, longest
from qsparseprop.ops import are_plain

#: Layers whose results start chains, and those that start them with their own inputs.
PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class _Hook:
    """What becomes of a module's tensors, see `Usage`; nothing of it is copied or saved."""

    def __init__(self) -> None:
        self._usages: dict[bool, Usage] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_usages": {}}

    def _begin(self, x: Any, features_last: bool, borrowed: bool) -> Tensor | None:
        """A deferred tensor with the values of an ordinary one; None where nothing is deferred."""
        if not may_defer():
            return None
        if type(x) is DeferredTensor and pending_of(x) is None:
            x = ordinary(x)  # as it may be when checkpointing runs this again
        if type(x) is not Tensor or x.numel() < conditions.LEAST_ELEMENTS:
            return None
        trains = records_gradients()
        usage = self._usages.get(trains)
        if usage is None:
            usage = self._usages[trains] = Usage()
        layout = _layout_of(x, features_last)
        if layout is None or (borrowed and not layout.by_rows):  # a copy in another order costs what is saved
            return None
        if usage.begin(borrowed).plain:
            return None
        pending = Pending(layout.rows(x.detach()), layout, usage, borrowed)
        if trains and x.requires_grad:
            return BlockStart.apply(x, pending)
        return DeferredTensor(pending, x.dtype)


def _layout_of(x: Tensor, features_last: bool) -> Layout | None:
    if (x.ndim < 2 or (x.ndim > 4 and not features_last) or x.numel() == 0
            or x.dtype not in (torch.float32, torch.bfloat16) or not x.is_cpu or x.layout is not torch.strided
            or not are_plain(x)):  # fmt: skip
        return None
    shape = tuple(x.shape)
    if features_last or x.ndim == 2:
        found = [linear(shape)]
    else:
        found = [images(shape, contiguous) for contiguous in (True, False)[: x.ndim - 2]]
    strides = _that_count(shape, x.stride())
    return next((layout for layout in found if _that_count(shape, layout.strides) == strides), None)


def _that_count(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """Strides of dimensions that are walked: those of others may change when a tensor is saved and given back."""
    return [stride for n, stride in zip(shape, strides, strict=True) if n > 1]


class StartBehind(_Hook):
    """A forward hook that defers what follows a dense layer."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """The module's output, deferred, or None."""
        if forward_hooks(module) > 1 or not _is_dense(module, PRODUCTS):
            return None
        if isinstance(output, Tensor) and output._is_view():
            return None  # as linear layers give for images: hooks and changes in place treat views otherwise
        return self._begin(output, isinstance(module, nn.Linear), False)


class StartBefore(_Hook):
    """A pre-hook by which a batch normalisation of an ordinary tensor starts a chain."""

    def __call__(self, module: nn.Module, args: Any) -> tuple[Any, ...] | None:
        """The module's arguments with its input deferred, or None."""
        # Its memory is that of the model's tensor, and its history begins anew: only batch_norm may see it.
        if len(args) != 1 or forward_pre_hooks(module) > 1 or forward_hooks(module) or not _is_dense(module, NORMS):
            return None
        x = self._begin(args[0], False, True)
        return None if x is None else (x,)


def start_chains(module: nn.Module) -> None:
    """Let a dense layer or a batch normalisation start chains, if it is of a kind that can."""
    if is_starting(module):
        return
    if _is_dense(module, PRODUCTS):
        module.register_forward_hook(StartBehind())
    elif _is_dense(module, NORMS):
        module.register_forward_pre_hook(StartBefore())


def _is_dense(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what torch's of that kind computes; users exchange classes and methods at any time."""
    return type(module) in kinds and "forward" not in vars(module)


def is_start(hook: Any) -> bool:
    """Whether a hook is one of ours."""
    return isinstance(hook, _Hook)


def is_starting(module: nn.Module) -> bool:
    """Whether `start_chains` was called for a module."""
    return any(is_start(hook) for hooks in (module._forward_hooks, module._forward_pre_hooks)
               for hook in hooks.values())  # fmt: skip


def last_chain(module: nn.Module) -> list[Operation]:
    """What joined a dense layer, for which `start_chains` was called, when it last ran."""
    given: list[Any] = list(module._forward_hooks.values())
    hooks = [hook for hook in given if isinstance(hook, _Hook)]
    return longest(usage.chain() for hook in hooks for usage in hook._usages.values())


def stop_chains(module: nn.Module) -> None:
    """Undo `start_chains`."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if is_start(hook)]:
            del hooks[key]
