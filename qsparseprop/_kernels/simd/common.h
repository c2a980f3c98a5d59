/* Helpers that do not depend on the instruction set. Included once by every isa_*.c, before its target is switched on. */
#ifndef QSPARSEPROP_COMMON_H
#define QSPARSEPROP_COMMON_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(_MSC_VER)
#define QSP_INLINE static __forceinline
#define QSP_ALIGNED(n) __declspec(align(n))
#define QSP_UNROLL
#define QSP_PREFETCH_WRITE(p) ((void)0)
#define QSP_PREFETCH_READ(p) ((void)0)
#else
#define QSP_INLINE static inline __attribute__((always_inline, unused))
#define QSP_ALIGNED(n) __attribute__((aligned(n)))
#define QSP_UNROLL _Pragma("GCC unroll 16")
#define QSP_PREFETCH_WRITE(p) __builtin_prefetch((p), 1, 3)
#define QSP_PREFETCH_READ(p) __builtin_prefetch((p), 0, 3)
#endif

QSP_INLINE int64_t qsp_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* Gaps are mostly a byte or two, for which a call of memset is dear. */
QSP_INLINE void qsp_fill(uint8_t *p, uint8_t value, int64_t n)
{
    if (n >= 32) {
        memset(p, value, (size_t)n);
        return;
    }
    for (; n > 0; n--)
        *p++ = value;
}

QSP_INLINE float qsp_bf16_to_float(uint16_t bits)
{
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

/* Nearest even; a NaN stays one. */
QSP_INLINE uint16_t qsp_bf16_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value)
        return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Counter-based random numbers: a multiply-xorshift mixer of two rounds (multipliers: C. Wellons, "lowbias32", public
 * domain) with the 64-bit seed entering before and between them. One result serves two neighbouring elements with 16
 * bits each: the low half where `index` is even, the high half where it is odd. */
QSP_INLINE uint32_t qsp_random_bits(uint64_t seed, uint64_t index)
{
    const uint64_t pair = index >> 1;
    uint32_t x = ((uint32_t)pair ^ (uint32_t)seed) * 0x7feb352dU;
    x ^= x >> 15 ^ (uint32_t)(seed >> 32) ^ (uint32_t)(pair >> 32);
    x *= 0x846ca68bU;
    x ^= x >> 16;
    return index & 1 ? x >> 16 : x & 0xffff;
}

/* Stochastic rounding in fixed point: floor((x / scale * 2^16 + random) / 2^16). */
#define QSP_FIXED_BITS 16
#define QSP_FIXED_ONE 65536.0f

#endif
