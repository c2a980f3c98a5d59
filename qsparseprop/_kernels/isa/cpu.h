/* Which instruction sets this processor and its operating system support. */
#ifndef QSPARSEPROP_CPU_H
#define QSPARSEPROP_CPU_H

#include "kernels.h"

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
};
enum { QSP_BUILT = sizeof qsp_built / sizeof qsp_built[0] };

/* Whose functions one has beside its own: AVX-VNNI has but an instruction for products that AVX2 has not, VBMI one for
 * products of few tokens, AMX those for products of dense rows. NULL: all are its own. */
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

#if defined(QSP_X86) && defined(__GNUC__)
#include <cpuid.h>

/* AVX-VNNI is one that __builtin_cpu_supports of older compilers does not know: leaf 7.1, EAX, bit 4. */
static int qsp_has_avxvnni(void)
{
    unsigned int eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}
#endif

#if defined(QSP_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* AMX-TILE and AMX-INT8: leaf 7, EDX, bits 24 and 25. The system saves tiles where XCR0 has bits 17 and 18, and Linux lets
 * a process use them that has asked: all its threads, those that come later too, and forked ones. It refuses where a
 * thread has a stack for signals on which tiles have no room. */
static int qsp_ask_for_amx(void)
{
    enum { OSXSAVE = 1 << 27, ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned int eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & OSXSAVE))
        return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx >> 24 & 3) != 3)
        return 0;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return (eax >> 17 & 3) == 3 && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

static int qsp_has_amx(void)
{
    static int known, answer;
    if (!known) {
        answer = qsp_ask_for_amx();
        known = 1;
    }
    return answer;
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
    const int avx512vnni = avx512vl && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (k == &qsp_kernels_avx2)
        return avx2;
#ifdef QSP_AVXVNNI
    if (k == &qsp_kernels_avxvnni)
        return avx2 && qsp_has_avxvnni();
#endif
    if (k == &qsp_kernels_avx512vl)
        return avx512vl;
    const int avx512vbmi = avx512vnni && __builtin_cpu_supports("avx512vbmi");
    if (k == &qsp_kernels_avx512vnni)
        return avx512vnni;
    if (k == &qsp_kernels_avx512vbmi)
        return avx512vbmi;
#ifdef QSP_AMX
    if (k == &qsp_kernels_amx_model)
        return avx512vnni;
#ifdef __linux__
    if (k == &qsp_kernels_amx)
        return avx512vbmi && qsp_has_amx();
#endif
#endif
#endif
    return 0;
}

#endif
