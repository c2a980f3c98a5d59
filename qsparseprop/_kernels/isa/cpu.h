/* Which instruction sets this processor and its operating system support. */
#ifndef QSPARSEPROP_CPU_H
#define QSPARSEPROP_CPU_H

#include "kernels.h"

#ifdef QSP_X86
#include "isa/cpu_x86.h"
#endif
#ifdef QSP_NEON
#include "isa/cpu_arm.h"
#endif

/* From the simplest to the widest: the order of preference is the reverse. The model of AMX, slower than all others, is
 * before one that is supported wherever it is, so that it is never preferred. */
static const qsp_kernels *const qsp_built[] = {
    &qsp_kernels_scalar,
#ifdef QSP_X86
    &qsp_kernels_avx2,
#ifdef QSP_AVXVNNI
    &qsp_kernels_avxvnni,
#endif
    &qsp_kernels_avx512vl,
#ifdef QSP_AMX
    &qsp_kernels_amx_model,
#endif
    &qsp_kernels_avx512vnni,
    &qsp_kernels_avx512vbmi,
#ifdef QSP_AMX
    &qsp_kernels_amx,
#endif
#endif
#ifdef QSP_NEON
    &qsp_kernels_neon,
#ifdef QSP_NEON_DOT
    &qsp_kernels_neon_dotprod,
    &qsp_kernels_neon_i8mm,
#endif
#endif
};
enum { QSP_BUILT = sizeof qsp_built / sizeof qsp_built[0] };

/* Whose functions one has beside its own: AVX-VNNI has but an instruction for products that AVX2 has not, as two
 * extensions of ARM's have, VBMI one for products of few tokens, AMX those for products of dense rows. NULL: all are its
 * own. */
static const qsp_kernels *qsp_base(const qsp_kernels *own)
{
#ifdef QSP_AVXVNNI
    if (own == &qsp_kernels_avxvnni)
        return &qsp_kernels_avx2;
#endif
#ifdef QSP_X86
    if (own == &qsp_kernels_avx512vbmi)
        return &qsp_kernels_avx512vnni;
#endif
#ifdef QSP_AMX
    if (own == &qsp_kernels_amx) /* of processors that have all of these */
        return &qsp_kernels_avx512vbmi;
    if (own == &qsp_kernels_amx_model)
        return &qsp_kernels_avx512vnni;
#endif
#ifdef QSP_NEON_DOT
    if (own == &qsp_kernels_neon_dotprod || own == &qsp_kernels_neon_i8mm)
        return &qsp_kernels_neon;
#endif
    (void)own;
    return NULL;
}

/* The functions that one has of its own, in place of others. */
static void qsp_take_own(qsp_kernels *all, const qsp_kernels *own)
{
    if (own->spmm_u8) {
        all->spmm_u8 = own->spmm_u8;
        all->spmm_f32 = own->spmm_f32;
        all->sddmm_u8 = own->sddmm_u8;
        all->sddmm_f32 = own->sddmm_f32;
        all->pair = own->pair;
    }
    if (own->spmm_dense_u8) {
        all->spmm_dense_u8 = own->spmm_dense_u8;
        all->sddmm_dense_u8 = own->sddmm_dense_u8;
        all->grad_rows = own->grad_rows;
    }
    if (own->tokens_product) {
        all->tokens_product = own->tokens_product;
        all->most_tokens = own->most_tokens;
    }
}

/* The functions of the i-th. */
static const qsp_kernels *qsp_table(int i)
{
    static qsp_kernels shared[QSP_BUILT];
    const qsp_kernels *const own = qsp_built[i], *const base = qsp_base(own), *const first = base ? qsp_base(base) : NULL;
    qsp_kernels *const all = &shared[i];
    if (!base)
        return own;
    if (!all->name) { /* once: it may be in use already */
        *all = first ? *first : *base;
        if (first)
            qsp_take_own(all, base);
        qsp_take_own(all, own);
        all->name = own->name;
    }
    return all;
}

/* Whether this machine runs the i-th, by exactly the features that its file switches on. */
static int qsp_supported(int i)
{
    const qsp_kernels *const k = qsp_built[i];
    if (k == &qsp_kernels_scalar)
        return 1;
#ifdef QSP_X86
    if (qsp_x86_supports(k))
        return 1;
#endif
#ifdef QSP_NEON
    if (qsp_arm_supports(k))
        return 1;
#endif
    return 0;
}

#endif
