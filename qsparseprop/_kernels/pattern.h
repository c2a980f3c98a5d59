/* The two forms of a pattern's columns, 16 bits a value or a bit an entry, and what makes and checks one of another.
 * Bit c % 64 of word c / 64 of a row says whether column c is there; those behind the last column are not set. What
 * reads bitmaps in every product is in loops/bitmap.h. */
#ifndef QSPARSEPROP_PATTERN_H
#define QSPARSEPROP_PATTERN_H

#include <stdint.h>

/* Words of a row. */
static inline int64_t qsp_words(int64_t columns) { return (columns + 63) / 64; }

/* Columns as 16 bits, those of a row ascending and below `columns`; returns the first bad one, or n. Without `column`
 * they are in `out` already. */
static inline int64_t qsp_narrow(const int32_t *column, const int32_t *ptr, int64_t rows, int64_t columns, uint16_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = ptr[r], least = 0; i < ptr[r + 1]; i++) {
            /* read once: others may be writing there */
            const int32_t c = column ? *(const volatile int32_t *)(column + i) : out[i];
            if (c < least || c >= columns)
                return i;
            least = (int64_t)c + 1;
            if (out)
                out[i] = (uint16_t)c;
        }
    return ptr[rows];
}

/* The same as a bitmap, of `column` or, without it, of columns of 16 bits. */
static inline int64_t qsp_set_bits(const int32_t *column, const uint16_t *narrow, const int32_t *ptr, int64_t rows,
                                   int64_t columns, uint64_t *bits)
{
    const int64_t words = qsp_words(columns);
    for (int64_t r = 0; r < rows; r++, bits += words) {
        for (int64_t w = 0; w < words; w++)
            bits[w] = 0;
        for (int64_t i = ptr[r], least = 0; i < ptr[r + 1]; i++) {
            const int32_t c = column ? *(const volatile int32_t *)(column + i) : narrow[i];
            if (c < least || c >= columns)
                return i;
            least = (int64_t)c + 1;
            bits[c / 64] |= (uint64_t)1 << c % 64;
        }
    }
    return ptr[rows];
}

/* The first row that has not as many bits as values, or bits behind its columns; `rows` where all are right. */
static inline int64_t qsp_check_bits(const uint64_t *bits, const int32_t *ptr, int64_t rows, int64_t columns)
{
    const int64_t words = qsp_words(columns);
    for (int64_t r = 0; r < rows; r++, bits += words) {
        int64_t count = 0;
        for (int64_t w = 0; w < words; w++)
            count += __builtin_popcountll(bits[w]);
        if (count != ptr[r + 1] - ptr[r] || (columns % 64 && bits[words - 1] >> columns % 64))
            return r;
    }
    return rows;
}

/* A bitmap as columns of 16 bits; without one every row has all. */
static inline void qsp_columns_of(const uint64_t *bits, int64_t rows, int64_t columns, uint16_t *out)
{
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += 64) {
            const int n = (int)(columns - c < 64 ? columns - c : 64);
            uint64_t word = bits ? *bits++ : ~(uint64_t)0 >> (64 - n);
            for (; word; word &= word - 1)
                *out++ = (uint16_t)(c + __builtin_ctzll(word));
        }
}

#endif
