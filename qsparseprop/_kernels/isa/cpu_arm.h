/* What an ARM processor of 64 bits and its system offer. */
#ifndef QSPARSEPROP_CPU_ARM_H
#define QSPARSEPROP_CPU_ARM_H

#include "kernels.h"

#ifdef QSP_NEON_DOT
#if defined(__linux__)
#include <sys/auxv.h>

/* Bits of Linux' interface, which headers that are older than the extensions lack. */
static int qsp_has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
static int qsp_has_i8mm(void) { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
#include <sys/sysctl.h>

static int qsp_has_feature(const char *name)
{
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(name, &value, &size, NULL, 0) && value;
}
static int qsp_has_dotprod(void) { return qsp_has_feature("hw.optional.arm.FEAT_DotProd"); }
static int qsp_has_i8mm(void) { return qsp_has_feature("hw.optional.arm.FEAT_I8MM"); }
#else /* nobody has tried how to ask */
static int qsp_has_dotprod(void) { return 0; }
static int qsp_has_i8mm(void) { return 0; }
#endif
#endif

static int qsp_arm_supports(const qsp_kernels *k)
{
    if (k == &qsp_kernels_neon) /* whatever there is has it */
        return 1;
#ifdef QSP_NEON_DOT
    if (k == &qsp_kernels_neon_dotprod)
        return qsp_has_dotprod();
    if (k == &qsp_kernels_neon_i8mm)
        return qsp_has_i8mm();
#endif
    return 0;
}

#endif
