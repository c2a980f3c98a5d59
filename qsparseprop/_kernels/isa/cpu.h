/* Which instruction sets this processor and its operating system support. */
#ifndef QSPARSEPROP_CPU_H
#define QSPARSEPROP_CPU_H

#include "kernels.h"

/* From the simplest to the widest: the order of preference is the reverse. */
static const qsp_kernels *const qsp_built[] = {
    &qsp_kernels_scalar,
#ifdef QSP_X86
    &qsp_kernels_avx2,
#ifdef QSP_AVXVNNI
    &qsp_kernels_avxvnni,
#endif
    &qsp_kernels_avx512vl,
    &qsp_kernels_avx512vnni,
#endif
};
enum { QSP_BUILT = sizeof qsp_built / sizeof qsp_built[0] };

/* The functions of the i-th. AVX-VNNI has but an instruction for products that AVX2 has not: the others are shared. */
static const qsp_kernels *qsp_table(int i)
{
#ifdef QSP_AVXVNNI
    static qsp_kernels shared;
    if (qsp_built[i] == &qsp_kernels_avxvnni) {
        if (!shared.name) { /* once: it may be in use already */
            const qsp_kernels *const own = qsp_built[i];
            shared = qsp_kernels_avx2;
            shared.spmm_u8 = own->spmm_u8;
            shared.spmm_f32 = own->spmm_f32;
            shared.sddmm_u8 = own->sddmm_u8;
            shared.sddmm_f32 = own->sddmm_f32;
            shared.spmm_dense_u8 = own->spmm_dense_u8;
            shared.sddmm_dense_u8 = own->sddmm_dense_u8;
            shared.pair = own->pair;
            shared.name = own->name;
        }
        return &shared;
    }
#endif
    return qsp_built[i];
}

/* AVX-VNNI is the one that __builtin_cpu_supports of older compilers does not know: leaf 7.1, EAX, bit 4. */
#if defined(QSP_X86) && defined(__GNUC__)
#include <cpuid.h>

static int qsp_has_avxvnni(void)
{
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}
#endif

/* Whether this machine runs the i-th, by exactly the features that its file switches on. */
static int qsp_supported(int i)
{
    const qsp_kernels *const k = qsp_built[i];
    if (k == &qsp_kernels_scalar)
        return 1;
#if defined(QSP_X86) && defined(__GNUC__)
    const int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const int avx512vl = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                         __builtin_cpu_supports("avx512vnni");
    if (k == &qsp_kernels_avx2)
        return avx2;
#ifdef QSP_AVXVNNI
    if (k == &qsp_kernels_avxvnni)
        return avx2 && qsp_has_avxvnni();
#endif
    if (k == &qsp_kernels_avx512vl)
        return avx512vl;
    if (k == &qsp_kernels_avx512vnni)
        return avx512vl && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#endif
    return 0;
}

#endif
