/* What an x86-64 processor and its operating system support, asked in the same way whoever compiles this. */
#ifndef QSPARSEPROP_CPU_X86_H
#define QSPARSEPROP_CPU_X86_H

#include <string.h>

#include "kernels.h"

#if defined(__GNUC__) || defined(__clang__)
#include <cpuid.h>
#else
#include <intrin.h>
#endif

typedef struct {
    uint32_t eax, ebx, ecx, edx;
} qsp_leaf;

/* Zeros where the processor has no such leaf. */
static qsp_leaf qsp_cpuid(uint32_t leaf, uint32_t part)
{
    qsp_leaf found = {0, 0, 0, 0};
#if defined(__GNUC__) || defined(__clang__)
    (void)__get_cpuid_count(leaf, part, &found.eax, &found.ebx, &found.ecx, &found.edx);
#else
    int registers[4];
    __cpuid(registers, 0);
    if ((uint32_t)registers[0] >= leaf) {
        __cpuidex(registers, (int)leaf, (int)part);
        memcpy(&found, registers, sizeof found);
    }
#endif
    return found;
}

/* Registers that the system saves, a bit each kind; none where it does not tell. */
static uint32_t qsp_saved_registers(void)
{
    enum { OSXSAVE = 1 << 27 };
    if (!(qsp_cpuid(1, 0).ecx & OSXSAVE))
        return 0;
#if defined(__GNUC__) || defined(__clang__)
    uint32_t eax, edx;
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
#else
    return (uint32_t)_xgetbv(0);
#endif
}

#if defined(QSP_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* Linux lets a process use tiles that has asked: all its threads, those that come later too, and forked ones. It
 * refuses where a thread has a stack for signals on which tiles have no room. */
static int qsp_ask_for_amx(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int known, answer;
    if (!known) {
        answer = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
        known = 1;
    }
    return answer;
}
#endif

/* Whether it has exactly the features that a file switches on: leaves 1 and 7 of Intel's manual, and the registers (XMM
 * and YMM; the masks and ZMM, of three kinds; tiles, of two). */
static int qsp_x86_supports(const qsp_kernels *k)
{
    enum { FMA = 1 << 12, AVX2 = 1 << 5, AVXVNNI = 1 << 4, AVX512VBMI = 1 << 1, AVX512VNNI = 1 << 11, AMX = 3 << 24 };
    const uint32_t avx512f_vl = 1u << 16 | 1u << 31, avx512bw_dq = 1u << 30 | 1u << 17;
    const uint32_t vectors = 0x06, wide = 0xe6, tiles = 0x60000, saved = qsp_saved_registers();
    const qsp_leaf first = qsp_cpuid(1, 0), more = qsp_cpuid(7, 0);
    const int avx2 = (saved & vectors) == vectors && first.ecx & FMA && more.ebx & AVX2;
    const int avx512f = avx2 && (saved & wide) == wide && (more.ebx & avx512f_vl) == avx512f_vl;
    const int avx512vl = avx512f && more.ecx & AVX512VNNI;
    const int avx512vnni = avx512vl && (more.ebx & avx512bw_dq) == avx512bw_dq;
    if (k == &qsp_kernels_avx2)
        return avx2;
#ifdef QSP_AVXVNNI
    if (k == &qsp_kernels_avxvnni)
        return avx2 && qsp_cpuid(7, 1).eax & AVXVNNI;
#endif
    if (k == &qsp_kernels_avx512vl)
        return avx512vl;
    const int avx512vbmi = avx512vnni && more.ecx & AVX512VBMI;
    if (k == &qsp_kernels_avx512vnni)
        return avx512vnni;
    if (k == &qsp_kernels_avx512vbmi)
        return avx512vbmi;
#ifdef QSP_AMX
    if (k == &qsp_kernels_amx_model)
        return avx512vnni;
#ifdef __linux__
    if (k == &qsp_kernels_amx)
        return avx512vbmi && (more.edx & AMX) == AMX && (saved & tiles) == tiles && qsp_ask_for_amx();
#endif
#endif
    (void)tiles;
    return 0;
}

#endif
