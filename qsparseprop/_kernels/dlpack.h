/* The part of DLPack's C exchange API (version 1) that reads a tensor's description without copying or owning anything,
 * one call instead of six attributes; and the description that hands memory over. Layouts as published at
 * https://github.com/dmlc/dlpack. */
#ifndef QSPARSEPROP_DLPACK_H
#define QSPARSEPROP_DLPACK_H

#include <stdint.h>

typedef struct {
    void *data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides; /* strides in elements; NULL: contiguous */
    uint64_t byte_offset;
} qsp_dltensor;

enum { QSP_DL_CPU = 1 };

typedef struct qsp_dlmanaged {
    qsp_dltensor tensor;
    void *context;
    void (*deleter)(struct qsp_dlmanaged *);
} qsp_dlmanaged;

typedef struct {
    struct {
        uint32_t major, minor;
    } version;
    void *previous;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*describe)(void *object, qsp_dltensor *out); /* may be NULL; sets a Python error where it returns not 0 */
    void *stream;
} qsp_dlpack_api;

/* Whether the elements lie in memory one after the other, and how many there are. */
static inline int qsp_dl_contiguous(const qsp_dltensor *t, int64_t *numel)
{
    int64_t n = 1;
    int contiguous = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->strides && t->shape[i] != 1 && t->strides[i] != n)
            contiguous = 0;
        n *= t->shape[i];
    }
    *numel = n;
    return contiguous || n == 0;
}

#endif
