"""What depends on torch beyond its documented interface, each piece with a test that says what broke.

The tests are in ``tests/test_torch_compat.py`` and ``tests/test_torch_compat_export.py``. Not here:
``DisableTorchFunctionSubclass``, which torch documents in spite of its place; a module's own dictionaries
(``_parameters``, ``_forward_hooks``), the only way to keep their order; and what compiled modules ask (DLPack's table
of C functions in ``_kernels/_tensor.pyx``, which they can do without).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame as _frames
from torch._subclasses import FakeTensor
from torch.autograd import Variable, forward_ad, profiler
from torch.multiprocessing import reductions
from torch.nn.modules import module as _module
from torch.optim.swa_utils import AveragedModel

__all__ = [
    "FakeTensor",
    "Overload",
    "OverloadPacket",
    "at_the_end_of_backward",
    "before_averaging",
    "called_by_parameter",
    "current_backward",
    "dispatch_modes",
    "forget_shared_storages",
    "forward_hooks",
    "forward_pre_hooks",
    "function_modes",
    "is_differentiating_forward",
    "is_jit_tracing",
    "is_parameter_node",
    "keep_from_compiling",
    "keep_off_fast_path",
    "name_of_node",
    "options_of_parallel",
    "overrides_functions",
    "profiler_is_on",
    "refuse_data_pointer",
    "refusing_derivatives",
    "saved_tensors_hook",
    "size_guards",
    "transforms_active",
    "version_of",
    "watcher",
    "without_dispatch",
]

#: An operator as it stands in a graph, and all of one name.
Overload = torch._ops.OpOverload
OverloadPacket = torch._ops.OpOverloadPacket
#: How many modes see operators (FakeTensorMode, FlopCounterMode, ...) or torch's functions (set_default_device, ...).
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
#: Whether torch.func (vmap, grad, jvp, ...) is at work.
transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: Has a tensor without memory refuse to give a pointer to it.
refuse_data_pointer: Callable[[Tensor], None] = torch._C._set_throw_on_mutable_data_ptr
#: A context in which operators do not ask the ``__torch_dispatch__`` of tensors.
without_dispatch = torch._C._DisableTorchDispatch
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_current_graph_task = torch._C._current_graph_task_id
_tracing_state = torch._C._get_tracing_state
_no_torch_function = torch._C._disabled_torch_function_impl

# ---- modes ----


def function_modes() -> list[Any]:
    """The modes that see torch's functions, the outermost first."""
    return [torch._C._get_function_stack_at(i) for i in range(_function_modes())]


def is_differentiating_forward() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return forward_ad._current_level >= 0


def is_jit_tracing() -> bool:
    """Whether torch.jit.trace, or the older ONNX exporter, records operators."""
    return _tracing_state() is not None


def overrides_functions(kind: type[Tensor]) -> bool:
    """Whether a type of tensors does something to torch's functions; parameters do not."""
    return kind.__torch_function__ is not _no_torch_function


# ---- autograd ----


def current_backward() -> int | None:
    """A number of the backward pass that runs in this thread; None where none does."""
    task = _current_graph_task()
    return None if task < 0 else task


def at_the_end_of_backward(callback: Callable[[], None]) -> None:
    """Have something called when the backward pass that runs in this thread is done."""
    Variable._execution_engine.queue_callback(callback)


def name_of_node(tensor: Tensor) -> str | None:
    """Of what made a tensor, as "ReluBackward0"; None for leaves."""
    node = tensor.grad_fn
    return None if node is None else node.name()


#: Nodes through which a parameter reaches an operator unchanged but for its dtype or shape.
_VIEWS_AND_CASTS = ("ToCopyBackward", "TBackward", "TransposeBackward", "PermuteBackward", "ViewBackward",
                    "UnsafeViewBackward", "ReshapeAliasBackward", "ExpandBackward", "CloneBackward")  # fmt: skip


def is_parameter_node(node: Any) -> bool:
    """Whether a node gives the gradient of a leaf, perhaps through casts and changes of shape."""
    while node is not None and node.name().startswith(_VIEWS_AND_CASTS):
        node = node.next_functions[0][0]
    return node is not None and node.name().endswith("AccumulateGrad")


def version_of(tensor: Tensor) -> Tensor:
    """A tensor without elements that counts what is written to another one, and does not keep it or its memory."""
    counter = tensor.detach()  # which shares the counter, and keeps it when it gets other data
    counter.data = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return counter


# ---- modules ----


def forward_hooks(module: nn.Module) -> int:
    """How many hooks are given a module's output, after it has run."""
    return len(module._forward_hooks) + len(_module._global_forward_hooks)


def forward_pre_hooks(module: nn.Module) -> int:
    """How many hooks are given a module's input, before it runs."""
    return len(module._forward_pre_hooks) + len(_module._global_forward_pre_hooks)


def keep_off_fast_path(encoder: nn.TransformerEncoderLayer | nn.TransformerEncoder, off: bool) -> None:
    """Keep torch's encoders from computing, in evaluation, with the weights of their modules; or let them again."""
    if isinstance(encoder, nn.TransformerEncoder):
        encoder.use_nested_tensor = encoder.use_nested_tensor and not off
        return
    kinds = ((nn.functional.relu, nn.ReLU), (nn.functional.gelu, nn.GELU))  # 1 and 2 let it take the fast path
    encoder.activation_relu_or_gelu = 0 if off else next(
        (i for i, (f, m) in enumerate(kinds, 1) if encoder.activation is f or isinstance(encoder.activation, m)), 0)


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

    AveragedModel.update_parameters = checked  # type: ignore[method-assign]  # torch calls nothing that is meant for it


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


def saved_tensors_hook() -> Any:
    """The innermost hook that would be given a tensor that is saved now, or None; an error where they are forbidden."""
    hooks = _top_hooks(False)
    return None if hooks is None else hooks[0]


def forget_shared_storages() -> None:
    """Let go of what other processes have sent and nobody uses any more.

    torch keeps a small piece of each of the last 128. Large blocks that are allocated between these leave holes of
    their size in the heap, which may come to a gigabyte.
    """
    cache: Any = getattr(reductions, "shared_cache", None)
    if hasattr(cache, "free_dead_references") and hasattr(cache, "lock"):
        with cache.lock:
            cache.free_dead_references()


def size_guards(exported: Any) -> list[str]:
    """What torch.export took for granted of the sizes of inputs, as expressions of Python.

    Such as ``L['x'].size()[0] % 2 == 0``; nothing in versions of torch that do not keep them.
    """
    return list(getattr(exported, "_guards_code", None) or ())


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


def options_of_parallel(wrapped: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """What a ``DistributedDataParallel`` was made with, for another one to be made alike; its hooks and their states.

    It keeps most of its arguments under their names. ``broadcast_buffers`` became ``forward_sync_buffers``; the size of
    buckets is kept in bytes; and what of a device mesh is used is its group.
    """
    known = inspect.signature(type(wrapped).__init__).parameters.keys() - {"self", "module", "device_mesh"}
    kept = vars(wrapped)
    options = {name: value for name, value in kept.items() if name in known}
    if not kept.get("bucket_bytes_cap_default", True):
        options["bucket_cap_mb"] = kept["bucket_bytes_cap"] / 2**20
    return options, [(hook, state) for hook, state in kept.get("_comm_hooks", ())]
