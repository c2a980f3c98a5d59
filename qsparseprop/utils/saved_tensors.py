"""Activations that wait for the backward pass in 8 bits, or in one, instead of 32.

`compress_saved_tensors` is a context manager for forward passes of any model on the CPU, `CompressedModule` a module
around one. What operators save for backward is encoded by group (see `_codec`), except for

- ReLU, ReLU6 (hardtanh), dropout and max-pooling, which are exchanged for operators that keep a bit an element, or the
  place of the maximum in its window: exactly the same results and gradients;
- what is not floating point, has less than ``min_size`` elements, is a parameter or a view or cast of one, or does not
  come from a parameter at all (inputs, buffers, constants): these are not touched;
- values whose error would grow: logarithms of probabilities, and tensors with NaN or Inf.

A tensor that several operators save is encoded once. What another hook has taken over, such as activation checkpointing
inside of the context, is left to it. A compiled model may run inside: of what its graphs save, only tensors from
outside of them are encoded; the others do not tell where they come from.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from qsparseprop import arguments
from qsparseprop._torch_compat import is_parameter_node, name_of_node, saved_tensors_hook
from qsparseprop.contents import holds_tensors
from qsparseprop.nn.autograd.masked import BitDropout, BitHardtanh, BitReLU, ByteMaxPool2d
from qsparseprop.nn.deferred.tensor import pending_of
from qsparseprop.ops.masks import dense_layout

from ._codec import SCHEMES, Codes, encode

__all__ = ["CompressedModule", "SavedBytes", "compress_saved_tensors"]

#: Results of which an exponential is taken in the backward pass.
_LOGARITHMS = ("LogSoftmaxBackward", "LogBackward", "LogsumexpBackward")
#: Results from whose sign the backward pass reads a mask.
_SIGNED_RESULTS = ("ReluBackward", "ThresholdBackward", "LeakyReluBackward", "EluBackward", "HardtanhBackward")


#: Called with every tensor that a compression keeps, while somebody counts.
_COUNTERS: list[Callable[[Tensor], Any]] = []


@contextlib.contextmanager
def counting_compressed(
    count: Callable[[Tensor], Any],
) -> Iterator[tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]]:
    """Let `count` see every tensor that is kept for the backward pass, compressed or not.

    Parameters
    ----------
    count : callable
        Called with each tensor. One may come several times.

    Yields
    ------
    pack, unpack : callable
        Hooks to enter: torch calls only the innermost ones, so they pass on to a compression around them.
    """
    outer = _innermost_compression()

    def pack(tensor: Tensor) -> Any:
        if outer is not None:
            return outer.pack(tensor)
        count(tensor)
        return tensor

    _COUNTERS.append(count)
    _COUNTING_HOOKS[pack] = outer
    try:
        yield pack, (lambda tensor: tensor) if outer is None else _unpack
    finally:
        _COUNTERS.remove(count)
        del _COUNTING_HOOKS[pack]


#: Hooks that only count, and the compression that they pass on to.
_COUNTING_HOOKS: dict[Any, Any] = {}


def _innermost_compression() -> compress_saved_tensors | None:
    """The compression in whose hands a tensor would be that is saved now, if any."""
    hook = saved_tensors_hook()
    if hook in _COUNTING_HOOKS:
        return _COUNTING_HOOKS[hook]
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, compress_saved_tensors) else None


@dataclass(frozen=True)
class SavedBytes:
    """Memory between the forward and the backward pass, parameters not counted.

    Attributes
    ----------
    before, after : int
        Bytes that would have been kept, and those that were; every storage counts once and whole.
    """

    before: int
    after: int

    @property
    def ratio(self) -> float:
        """After / before; 1 where nothing was saved."""
        return self.after / self.before if self.before else 1.0


class _Entry:
    """One encoded piece of memory, shared by all who saved it."""

    __slots__ = ("__weakref__", "_decoded", "codes", "keep_sign", "storage")

    def __init__(self, codes: Codes, storage: StorageWeakRef, keep_sign: bool) -> None:
        self.codes, self.keep_sign = codes, keep_sign
        # keeps the storage's address from being used again while this is looked up by it
        self.storage = storage
        self._decoded: Callable[[], Tensor | None] = lambda: None

    def decode(self) -> Tensor:
        decoded = self._decoded()
        if decoded is None:
            decoded = self.codes.decode()
            self._decoded = weakref.ref(decoded)
        return decoded


@dataclass(frozen=True)
class _Packed:
    entry: _Entry
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _Untouched:
    tensor: Tensor
    version: int


class compress_saved_tensors(contextlib.AbstractContextManager["compress_saved_tensors", None]):
    """Context manager: what forward passes inside save for backward is kept in 8 bits or less.

    Backward passes run inside or outside. One object may be entered again and again, not twice at a time.

    Parameters
    ----------
    scheme : {"standard", "absmax"}
        Codes from the smallest to the largest value of a group, or symmetric around zero.
    group_size : int
        Consecutive elements in memory that share a scale.
    min_size : int
        Tensors with fewer elements are left as they are.

    Raises
    ------
    ValueError
        For settings that make no sense.
    RuntimeError
        If it is entered while it is active.

    Examples
    --------
    >>> compression = compress_saved_tensors()
    >>> with compression:
    ...     loss = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 1))(torch.ones(512, 64)).sum()
    >>> loss.backward()
    >>> compression.saved.ratio < 0.4
    True
    """

    def __init__(self, scheme: str = "standard", group_size: int = 512, min_size: int = 4096) -> None:
        arguments.one_of(scheme, SCHEMES, "scheme")
        for name, value, least in (("group_size", group_size, 1), ("min_size", min_size, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {arguments.shown(value)}")
        self.scheme, self.group_size, self.min_size = scheme, group_size, min_size
        self._stack: contextlib.ExitStack | None = None
        self._entries: weakref.WeakValueDictionary[Any, _Entry] = weakref.WeakValueDictionary()
        self._start_counting()

    @property
    def saved(self) -> SavedBytes:
        """What was saved since the context was last entered."""
        return SavedBytes(sum(size for _, size in self._before.values()), sum(size for _, size in self._after.values()))

    @torch.compiler.disable  # a graph of torch.compile ends here; what runs inside may be another one
    def __enter__(self) -> compress_saved_tensors:
        if self._stack is not None:
            raise RuntimeError("this compress_saved_tensors is active already")
        self._start_counting()
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.pack, _unpack))
            stack.enter_context(_Exchange(self))
            self._stack = stack.pop_all()
        return self

    @torch.compiler.disable
    def __exit__(self, *exception: object) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None  # of __enter__
        stack.close()

    # ---- counting ----

    def _start_counting(self) -> None:
        # By address, with a reference that keeps the address from being used again.
        self._before: dict[int, tuple[Any, int]] = {}
        self._after: dict[int, tuple[Any, int]] = {}

    def _count(self, counts: dict[int, tuple[Any, int]], tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in counts:
            counts[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _keep(self, tensor: Tensor) -> None:
        self._count(self._after, tensor)
        for count in _COUNTERS:
            count(tensor)

    # ---- the hooks ----

    @torch.compiler.disable
    def pack(self, tensor: Tensor, keep_sign: bool = False) -> Any:
        """What is kept in place of a tensor that an operator saves.

        Parameters
        ----------
        tensor : Tensor
        keep_sign : bool
            Whether the signs of its elements must stay.

        Returns
        -------
        object
            The tensor itself where it is not compressed.
        """
        if tensor.layout != torch.strided or not tensor.is_cpu or holds_tensors(tensor):
            return _Untouched(tensor if tensor.is_leaf else tensor.detach(), tensor._version)
        name = name_of_node(tensor)
        parameter = _is_parameter(tensor)
        if not parameter:
            self._count(self._before, tensor)
        packed = None
        if (not parameter and name is not None and tensor.is_floating_point() and tensor.numel() >= self.min_size
                and not name.startswith(_LOGARITHMS)):  # fmt: skip
            packed = self._encode(tensor, keep_sign or name.startswith(_SIGNED_RESULTS) or self._keep_sign)
        if packed is not None:
            for part in packed.entry.codes.tensors:
                self._keep(part)
            return packed
        if not parameter:
            self._keep(tensor)
        # Not the result itself, which would hold the graph that holds it.
        return _Untouched(tensor if tensor.is_leaf else tensor.detach(), tensor._version)

    #: Set while an operator runs that reads a mask from its input.
    _keep_sign = False

    def _encode(self, tensor: Tensor, keep_sign: bool) -> _Packed | None:
        flat = dense_layout(tensor.detach())
        if flat is None:
            tensor = tensor.detach().contiguous()
            flat = tensor.view(-1)
        storage = tensor.untyped_storage()
        # a negative view shares the memory of what it is the negative of
        key = (storage._cdata, tensor.storage_offset(), tensor.numel(), tensor.dtype, tensor._version, tensor.is_neg())
        entry = self._entries.get(key)
        if entry is None or (keep_sign and not entry.keep_sign):
            codes = encode(flat, self.scheme, self.group_size, keep_sign)
            if codes is None:
                return None
            entry = self._entries[key] = _Entry(codes, StorageWeakRef(storage), keep_sign)
        return _Packed(entry, tensor.shape, tensor.stride())

    def _active(self, x: Any) -> bool:
        """Whether an operator on x would save something in this context's hands."""
        if not (isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and x.is_cpu):
            return False
        if x.layout != torch.strided or not x.is_floating_point() or x.numel() < self.min_size or holds_tensors(x):
            return False
        # Not where activation checkpointing or another context has the word: it will do the same once more without us.
        return _innermost_compression() is self


@torch.compiler.disable
def _unpack(packed: _Packed | _Untouched) -> Tensor:
    if isinstance(packed, _Packed):
        return packed.entry.decode().as_strided(packed.shape, packed.stride)
    if packed.tensor._version != packed.version:
        raise RuntimeError("one of the variables needed for gradient computation has been modified by an inplace "
                           f"operation: a tensor of shape {tuple(packed.tensor.shape)}")  # fmt: skip
    return packed.tensor


def _is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is a leaf that requires a gradient, or one seen through casts and changes of shape."""
    if isinstance(tensor, nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
        return True
    return is_parameter_node(tensor.grad_fn)


# ---- operators that need only a mask ----


class _Exchange(TorchFunctionMode):
    """Runs the nodes of `autograd.masked` in place of torch's."""

    #: See `qsparseprop.nn.deferred.conditions`: blocks keep codes and bits by themselves.
    leaves_deferred_tensors = True

    def __init__(self, compression: compress_saved_tensors) -> None:
        super().__init__()
        self.compression = compression

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        exchange = None if torch.compiler.is_compiling() else _EXCHANGES.get(func)
        if exchange is None or (args and pending_of(args[0]) is not None):  # blocks keep no more
            return func(*args, **kwargs)
        return exchange(self.compression, func, *args, **kwargs)


def _relu(compression: Any, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    inplace = inplace or func in (torch.relu_, Tensor.relu_, F.relu_)
    if not compression._active(input):
        return torch.relu_(input) if inplace else torch.relu(input)
    return _exchanged(compression, BitReLU.apply(input, inplace))


def _hardtanh(compression: Any, func: Any, input: Tensor, min_val: float = -1.0, max_val: float = 1.0,
              inplace: bool = False) -> Tensor:  # fmt: skip
    inplace = inplace or func is F.hardtanh_
    if not compression._active(input) or min_val > max_val:
        return func(input, min_val, max_val, **({"inplace": True} if inplace and func is F.hardtanh else {}))
    return _exchanged(compression, BitHardtanh.apply(input, min_val, max_val, inplace))


def _relu6(compression: Any, func: Any, input: Tensor, inplace: bool = False) -> Tensor:
    if not compression._active(input):
        return func(input, inplace)
    return _exchanged(compression, BitHardtanh.apply(input, 0.0, 6.0, inplace))


def _dropout(compression: Any, func: Any, input: Tensor, p: float = 0.5, training: bool | None = None,
             inplace: bool = False, *, train: bool | None = None) -> Tensor:  # fmt: skip
    if func is torch.dropout:
        training = train if training is None else training
        settings: tuple[Any, ...] = (p, training)
    else:
        training = True if training is None else training
        settings = (p, training, inplace)
    if not training or inplace or not 0 < p < 1 or not compression._active(input):
        return func(input, *settings)
    return _exchanged(compression, BitDropout.apply(input, p))


def _max_pool2d(compression: Any, func: Any, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0,
                dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False) -> Any:  # fmt: skip
    kernel, pad, dil = _pair(kernel_size), _pair(padding), _pair(dilation)
    step = kernel if stride is None or stride == [] else _pair(stride)
    if return_indices or input.ndim != 4 or kernel[0] * kernel[1] > 256 or not compression._active(input):
        extra = {"return_indices": return_indices} if return_indices else {}
        return func(input, kernel_size, step, padding, dilation, ceil_mode, **extra)
    return _exchanged(compression, ByteMaxPool2d.apply(input, kernel, step, pad, dil, ceil_mode))


def _pair(value: Any) -> tuple[int, int]:
    return tuple(value) * (2 // len(value)) if isinstance(value, (tuple, list)) else (value, value)


def _exchanged(compression: compress_saved_tensors, result: Tensor) -> Tensor:
    # What torch's operator would have kept: its result, or something of the same size.
    compression._count(compression._before, result)
    return result


def _signed(compression: compress_saved_tensors, func: Any, *args: Any, **kwargs: Any) -> Any:
    compression._keep_sign = True
    try:
        return func(*args, **kwargs)
    finally:
        compression._keep_sign = False


_EXCHANGES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), _relu),
    **dict.fromkeys((F.hardtanh, F.hardtanh_), _hardtanh),
    F.relu6: _relu6,
    **dict.fromkeys((F.dropout, torch.dropout), _dropout),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    **dict.fromkeys((F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.celu, F.selu, F.prelu, F.threshold, F.rrelu,
                     F.hardshrink, F.softshrink, torch.celu, torch.selu, torch.prelu, torch.rrelu, torch.threshold,
                     torch.abs, Tensor.abs), _signed),
}  # fmt: skip


class CompressedModule(nn.Module):
    """A module whose forward pass runs in `compress_saved_tensors`.

    Parameters
    ----------
    module : nn.Module
        Any one.
    scheme, group_size, min_size
        As for `compress_saved_tensors`.

    Attributes
    ----------
    module : nn.Module
    compression : compress_saved_tensors
        Its `saved` tells of the last forward pass.
    """

    def __init__(
        self, module: nn.Module, scheme: str = "standard", group_size: int = 512, min_size: int = 4096
    ) -> None:
        super().__init__()
        self.module = module
        self.compression = compress_saved_tensors(scheme, group_size, min_size)

    @torch.compiler.disable
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module.

        Parameters
        ----------
        *args, **kwargs
            As the module takes them.

        Returns
        -------
        object
            What it gives.
        """
        with self.compression:
            return self.module(*args, **kwargs)
