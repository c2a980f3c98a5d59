/* The two forms of a pattern's columns, 16 bits a value or a bit an entry, and what makes and checks one of another.
 * Bit c % 64 of word c / 64 of a row says whether column c is there; those behind the last column are not set. What
 * reads bitmaps in every product is in loops/bitmap.h. */
#ifndef QSPARSEPROP_PATTERN_H
#define QSPARSEPROP_PATTERN_H

#include <stdint.h>

#include "bits.h"

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
            count += qsp_count_bits(bits[w]);
        if (count != ptr[r + 1] - ptr[r] || (columns % 64 && bits[words - 1] >> columns % 64))
            return r;
    }
    return rows;
}

/* Four columns, of the set bits of a nibble, as 16 bits each; what is behind the last of them is of no use. */
static const uint64_t QSP_NIBBLE[16] = {
    0, 0, 1, 1ull << 16, 2, 2ull << 16, 2ull << 16 | 1, 2ull << 32 | 1ull << 16,
    3, 3ull << 16, 3ull << 16 | 1, 3ull << 32 | 1ull << 16, 3ull << 16 | 2, 3ull << 32 | 2ull << 16,
    3ull << 32 | 2ull << 16 | 1, 3ull << 48 | 2ull << 32 | 1ull << 16,
};

/* A bitmap of `rows` rows as so many columns of 16 bits; without one every row has all. Four are written at once where
 * four are left: one at a time would take as long as a product of a small batch. */
static inline void qsp_columns_of(const uint64_t *bits, int64_t rows, int64_t columns, uint16_t *out, int64_t count)
{
    const uint16_t *const end = out + count;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c += 64) {
            const int n = (int)(columns - c < 64 ? columns - c : 64);
            uint64_t word = bits ? *bits++ : ~(uint64_t)0 >> (64 - n);
            int64_t from = c;
            for (; word && end - out >= 4; word >>= 4, from += 4) {
                const uint64_t four = QSP_NIBBLE[word & 15] + (uint64_t)from * 0x0001000100010001u;
                for (int i = 0; i < 4; i++) /* one store where the first is the lowest */
                    out[i] = (uint16_t)(four >> 16 * i);
                out += qsp_count_bits(word & 15);
            }
            for (; word; word &= word - 1)
                *out++ = (uint16_t)(from + qsp_lowest_bit(word));
        }
}

#endif
