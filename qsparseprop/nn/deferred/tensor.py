"""Tensors whose values are computed when somebody wants them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from qsparseprop._torch_compat import (
    called_by_parameter,
    keep_from_compiling,
    overrides_functions,
    refuse_data_pointer,
    watcher,
    without_dispatch,
)
from qsparseprop.nn._engine import STARTS_BACKWARD, run_backward
from qsparseprop.nn.deferred.gradient import PendingGradient
from qsparseprop.nn.deferred.pending import Pending
from qsparseprop.nn.deferred.usage import Usage

#: What blocks can take up: torch's function -> what records it, or gives NotImplemented. `record` fills it.
HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}

#: What reaches a tensor's memory past the dispatcher, or asks for its type.
_MEMORY = {
    getattr(Tensor, name)
    for name in ("__array__", "__deepcopy__", "__dlpack__", "__dlpack_device__", "__format__", "__reduce_ex__",
                 "__repr__", "is_set_to", "numpy", "pin_memory", "share_memory_", "tolist", "type", "apply_", "map_",
                 "map2_")
}  # fmt: skip
#: What asks for the memory alone: no history is needed, and no mode sees an operator (torch.compile asks this way).
_STORAGE = {getattr(Tensor, name) for name in ("_typed_storage", "data_ptr", "is_shared", "storage", "untyped_storage")}
_DATA: Any = Tensor.data  # of the class: a descriptor
_GET_DATA, _SET_DATA = _DATA.__get__, _DATA.__set__
#: What gives a tensor another memory.
_OTHER_MEMORY = (torch.ops.aten.set_, torch.ops.aten.resize_, torch.ops.aten.resize_as_)


class DeferredTensor(Tensor):
    """A tensor that knows what is still to be done, until its values are wanted.

    It is a real tensor for autograd, with a history, hooks and versions. Every operation that no block takes up works
    on an ordinary tensor, computed at the first of them.
    """

    _pending: Pending | PendingGradient

    @staticmethod
    def __new__(cls, pending: Pending | PendingGradient, dtype: torch.dtype) -> DeferredTensor:
        """A tensor of the layout that what is pending has."""
        layout = pending.layout
        tensor = Tensor._make_wrapper_subclass(cls, layout.shape, strides=layout.strides, dtype=dtype)
        # whoever reaches for its memory past the dispatcher gets an error
        refuse_data_pointer(tensor)
        tensor._pending = pending
        return tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Record what blocks take up; let torch do everything else."""
        kwargs = kwargs or {}
        if len(types) > 1 and func not in STARTS_BACKWARD and any(map(_wants_to_be_asked, types)):
            args, kwargs = tree_map_only(DeferredTensor, ordinary, (args, kwargs))
            return func(*args, **kwargs)
        if func is Tensor.detach and called_by_parameter():
            return _leaf_like(args[0])
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in STARTS_BACKWARD:
            return run_backward(func, args, kwargs, cls)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _STORAGE:
                return func(args[0]._pending.plain())
            if func in _MEMORY:
                args, kwargs = tree_map_only(DeferredTensor, ordinary, (args, kwargs))
            elif func == _GET_DATA:  # Python makes such objects anew each time
                return args[0]._pending.plain().data
            elif func == _SET_DATA:
                own, other = args[0]._pending.plain(), ordinary(args[1])
                if (own.data_ptr(), own.shape, own.stride()) != (other.data_ptr(), other.shape, other.stride()):
                    _refuse_other_memory()
                return None  # what `y.data += 1` assigns at last
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch has a function there
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator on the values."""
        if func.overloadpacket in _OTHER_MEMORY:  # of an ordinary tensor, too: torch would go on with our empty memory
            _refuse_other_memory()
        deferred = []

        def values(tensor: DeferredTensor) -> Tensor:
            deferred.append(tensor)
            return tensor._pending.plain()

        if func._schema.is_mutable and not torch.is_inference_mode_enabled():
            _check_written(func, args, kwargs or {})
        given = args
        args, kwargs = tree_map_only(DeferredTensor, values, (args, kwargs or {}))
        result = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags:  # squeeze_ and the like change the tensor itself, too
            with without_dispatch():
                func(*given, **kwargs)
        for tensor in deferred:
            if result is tensor._pending._values:  # in place: the result is the tensor that was given
                return tensor
        return result


def _check_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what torch refuses where it counts a tensor's versions, which it does not in a ``__torch_dispatch__``."""
    if func is torch.ops.aten.detach_.default:  # counted by nobody
        return
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in given if isinstance(given, (list, tuple)) else (given,):
                if type(tensor) is DeferredTensor and tensor.is_inference():
                    raise RuntimeError("Inplace update to inference tensor outside InferenceMode is not allowed: take "
                                       "a clone() of it first")  # fmt: skip


def _refuse_other_memory() -> None:
    raise RuntimeError("the memory of a sparse layer's result cannot be exchanged, nor given to another tensor: take a "
                       "clone() of it")  # fmt: skip


_method: Any
for _method in (DeferredTensor.__torch_function__, DeferredTensor.__torch_dispatch__):
    keep_from_compiling(_method.__func__)


def _wants_to_be_asked(kind: type) -> bool:
    """Whether a type of tensors does something to torch's functions; parameters do not."""
    return kind is not Tensor and kind is not DeferredTensor and overrides_functions(kind)


def _leaf_like(tensor: DeferredTensor) -> DeferredTensor:
    """What nn.Parameter wants of `detach`: a tensor of the same kind, whose values are known."""
    pending = tensor._pending
    with torch._C.DisableTorchFunctionSubclass():
        values = pending.plain().detach()
    leaf = DeferredTensor(Pending(values, pending.layout, Usage()), values.dtype)
    leaf._pending._values = values
    return leaf


if TYPE_CHECKING:

    class ChainTensor(DeferredTensor):
        """One of which `pending_of` gives something, which no gradient is."""

        _pending: Pending


def pending_of(tensor: Tensor) -> Pending | None:
    """What is pending of a tensor, if nobody has seen its values yet, and it can be taken up here."""
    if type(tensor) is not DeferredTensor:
        return None
    pending = tensor._pending
    if not isinstance(pending, Pending) or not pending.open:
        return None
    here = watcher()
    return pending if here is None or here is pending.watcher else None


def ordinary(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the same memory and history."""
    if type(tensor) is not DeferredTensor:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.view_as(tensor)
