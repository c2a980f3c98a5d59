/* Which instruction sets this processor and its operating system support. */
#ifndef QSPARSEPROP_CPU_H
#define QSPARSEPROP_CPU_H

#include "kernels.h"

/* From the simplest to the widest: the order of preference is the reverse. */
static const qsp_kernels *const qsp_built[] = {
    &qsp_kernels_scalar,
#ifdef QSP_X86
    &qsp_kernels_avx512vnni,
#endif
};
enum { QSP_BUILT = sizeof qsp_built / sizeof qsp_built[0] };

static int qsp_supported(int i)
{
#if defined(QSP_X86) && defined(__GNUC__)
    if (qsp_built[i] == &qsp_kernels_avx512vnni)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return qsp_built[i] == &qsp_kernels_scalar;
}

#endif
