"""Sums over all but the channels of a small tensor: torch's reduction has more to set up than there is to add."""

import torch

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.string cimport memset

from qsparseprop._kernels._dispatch cimport QSP_F32
from qsparseprop._kernels._tensor cimport image_pointer, pointer, strides_t

cdef object _cpu = torch.device("cpu")
cdef object _float32 = torch.float32


def channel_sums(x):
    """Sums over images and pixels of a float32 tensor (images, channels, height, width), or (images, channels).

    They are float32, (channels,), added up in float64 by one thread.
    """
    cdef strides_t where
    cdef int dtype
    cdef int64_t image, row, column, channel, channels
    cdef const float *data = <const float *> image_pointer(x, &where, &dtype, "x")
    cdef const float *pixel
    if dtype != QSP_F32:
        raise TypeError(f"x must be of dtype torch.float32, got {x.dtype}")
    channels = where.size[1]
    sums = torch.empty(channels, dtype=_float32, device=_cpu)
    cdef float *out = <float *> pointer(sums, _float32, channels, "sums")
    cdef bytes scratch = PyBytes_FromStringAndSize(NULL, channels * sizeof(double))
    cdef double *total = <double *> PyBytes_AS_STRING(scratch)
    with nogil:
        memset(total, 0, channels * sizeof(double))
        for image in range(where.size[0]):
            for row in range(where.size[2]):
                for column in range(where.size[3]):
                    pixel = data + image * where.step[0] + row * where.step[2] + column * where.step[3]
                    for channel in range(channels):
                        total[channel] += pixel[channel * where.step[1]]
        for channel in range(channels):
            out[channel] = <float> total[channel]
    return sums
