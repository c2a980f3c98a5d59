"""Sums over all but the channels of a tensor."""

import torch

from qsparseprop._kernels._statistics cimport channel_totals
from qsparseprop._kernels._tensor cimport image_pointer, pointer, strides_t

cdef object _cpu = torch.device("cpu")
cdef object _float32 = torch.float32


def channel_sums(x, int threads):
    """Sums over images and pixels of a tensor (images, channels, height, width), or (images, channels).

    `x` is float32 or bfloat16. The sums are float32, (channels,), added up in float64, the same on any number of
    threads.
    """
    cdef strides_t where
    cdef int dtype
    cdef const void *data = image_pointer(x, &where, &dtype, "x")
    if x.numel() == 0:
        return torch.zeros(where.size[1], dtype=_float32, device=_cpu)
    sums = torch.empty(where.size[1], dtype=_float32, device=_cpu)
    channel_totals(&where, data, dtype, <float *> pointer(sums, _float32, where.size[1], "sums"), max(threads, 1))
    return sums
