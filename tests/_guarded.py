"""Tensors that end, or begin, at the edge of memory that must not be touched; by calls of Linux."""

import ctypes
import mmap
import random

import torch

PAGE = mmap.PAGESIZE
LARGEST = 1 << 24  # bytes; what asks for more counts as refused
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class TooLarge(RuntimeError):
    pass


def guarded(shape, dtype=torch.float32, memory_format=torch.contiguous_format):
    """An uninitialised tensor whose last byte is the last one that may be touched, or whose first byte is the first."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    if any(n < 0 for n in shape):
        raise RuntimeError(f"negative size {shape}")
    numel = torch.Size(shape).numel()
    size = numel * dtype.itemsize
    if size > LARGEST:
        raise TooLarge(f"{size} bytes")
    pages = max(-(-size // PAGE), 1)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for edge in (address, address + (pages + 1) * PAGE):
        if libc.mprotect(edge, PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    if numel == 0:
        return torch.empty(shape, dtype=dtype)
    start = PAGE if random.random() < 0.3 else (pages + 1) * PAGE - size
    flat = torch.frombuffer(memory, dtype=dtype, count=numel, offset=start)
    like = torch.empty(shape, dtype=dtype, device="meta", memory_format=memory_format)
    return flat.as_strided(shape, like.stride())


def guarded_empty(shape, dtype, channels_last=False, for_now=False):
    """In place of `_memory.empty`."""
    return guarded(shape, dtype, torch.channels_last if channels_last else torch.contiguous_format)


def guarded_copy(tensor):
    """The same values and, where they do not overlap, strides."""
    dims = sorted(range(tensor.ndim), key=lambda d: -tensor.stride(d))
    out = guarded(tuple(tensor.shape[d] for d in dims), tensor.dtype)
    return out.permute(*(dims.index(d) for d in range(tensor.ndim))).copy_(tensor) if tensor.ndim else tensor.clone()


class GuardedTorch:
    """`torch` as the operators see it: what they allocate is guarded as well."""

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*shape, dtype=torch.float32, memory_format=torch.contiguous_format, device="cpu"):
        assert torch.device(device).type == "cpu"
        return guarded(shape[0] if len(shape) == 1 else shape, dtype, memory_format)
