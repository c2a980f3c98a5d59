/* Counting bits, in the words of each compiler. */
#ifndef QSPARSEPROP_BITS_H
#define QSPARSEPROP_BITS_H

#include <stdint.h>

#if defined(_MSC_VER) && !defined(__clang__)
#include <intrin.h>
#endif

static inline int qsp_count_bits(uint64_t word)
{
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_popcountll(word);
#elif defined(__AVX2__) /* Microsoft's says so under /arch:AVX2; processors with that count bits */
    return (int)__popcnt64(word);
#else
    word -= word >> 1 & 0x5555555555555555U;
    word = (word & 0x3333333333333333U) + (word >> 2 & 0x3333333333333333U);
    word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fU;
    return (int)(word * 0x0101010101010101U >> 56);
#endif
}

/* Place of the lowest bit that is set; there is one. */
static inline int qsp_lowest_bit(uint64_t word)
{
#if defined(__GNUC__) || defined(__clang__)
    return __builtin_ctzll(word);
#elif defined(_MSC_VER) && defined(_M_X64)
    unsigned long place;
    _BitScanForward64(&place, word);
    return (int)place;
#else
    return qsp_count_bits(~word & (word - 1));
#endif
}

#endif
