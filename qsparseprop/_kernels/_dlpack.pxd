"""DLPack's structures, see ``dlpack.h``."""

from libc.stdint cimport int64_t


cdef extern from "dlpack.h":
    ctypedef struct qsp_device "struct { int32_t type, id; }":
        int type
        int id
    ctypedef struct qsp_dtype "struct { uint8_t code, bits; uint16_t lanes; }":
        int code
        int bits
        int lanes
    ctypedef struct qsp_dltensor:
        void *data
        qsp_device device
        int ndim
        qsp_dtype dtype
        int64_t *shape
        int64_t *strides
        unsigned long long byte_offset
    ctypedef struct qsp_dlmanaged:
        qsp_dltensor tensor
        void *context
        void (*deleter)(qsp_dlmanaged *) noexcept nogil
    ctypedef struct qsp_version "struct { uint32_t major, minor; }":
        int major
    ctypedef struct qsp_dlpack_api:
        qsp_version version
        int (*describe)(void *, qsp_dltensor *) noexcept
    int QSP_DL_CPU
    int qsp_dl_contiguous(const qsp_dltensor *tensor, int64_t *numel) noexcept
