/* What every instruction set's header builds on, and the loops too: words of the compiler, bfloat16, random numbers.
 * Included by the source file of each before its target is switched on. */
#ifndef QSPARSEPROP_COMMON_H
#define QSPARSEPROP_COMMON_H

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels.h"

#if defined(_MSC_VER)
#define QSP_INLINE static __forceinline
#define QSP_APART static __declspec(noinline)
#define QSP_COPIED QSP_INLINE
#define QSP_ALIGNED(n) __declspec(align(n))
#define QSP_UNROLL
#define QSP_PREFETCH_WRITE(p) ((void)(p))
#define QSP_PREFETCH_READ(p) ((void)(p))
#else
#define QSP_INLINE static inline __attribute__((always_inline, unused))
#define QSP_APART static __attribute__((noinline, unused)) /* would make their callers huge */
#define QSP_COPIED QSP_INLINE /* into functions that are apart, with constants in place of arguments */
#define QSP_ALIGNED(n) __attribute__((aligned(n)))
#define QSP_UNROLL _Pragma("GCC unroll 16")
#define QSP_PREFETCH_WRITE(p) __builtin_prefetch((p), 1, 3)
#define QSP_PREFETCH_READ(p) __builtin_prefetch((p), 0, 3)
#endif

/* Bytes that come into the cache together. */
#define QSP_CACHE_LINE 64

QSP_INLINE int64_t qsp_min(int64_t a, int64_t b) { return a < b ? a : b; }

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

/* Counter-based random numbers: three rounds of x ^= low half * multiplier on 64 bits, halves exchanged between them
 * (the multiplications of Philox, Salmon et al. 2011). With even multipliers a round can be undone: bit i of the
 * product's low half depends on lower bits alone. What enters are multiples of 2^64 / golden ratio, counted from the
 * seed. One result serves four neighbouring elements with 16 bits each, the lowest bits first. */
#define QSP_RANDOM_STEP 0x9e3779b97f4a7c15U
#define QSP_RANDOM_1 0xd2511f52U
#define QSP_RANDOM_2 0xcd9e8d56U
#define QSP_RANDOM_3 0x846ca68aU

QSP_INLINE uint64_t qsp_random_counter(uint64_t seed, uint64_t index) { return (index >> 2) * QSP_RANDOM_STEP + seed; }
QSP_INLINE uint32_t qsp_random_bits(uint64_t seed, uint64_t index)
{
    uint64_t x = qsp_random_counter(seed, index);
    x ^= (x & 0xffffffff) * QSP_RANDOM_1;
    x = x >> 32 | x << 32;
    x ^= (x & 0xffffffff) * QSP_RANDOM_2;
    x = x >> 32 | x << 32;
    x ^= (x & 0xffffffff) * QSP_RANDOM_3;
    return (uint32_t)(x >> 16 * (index & 3)) & 0xffff;
}

/* Random numbers u in [0, 1) reach the rounding as 128 + u, whose bits are these with the 16 random ones below. */
#define QSP_DITHER_BITS 0x43000000

#endif
