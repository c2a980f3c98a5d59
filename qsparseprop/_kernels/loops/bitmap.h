/* Values of a weight's rows, sixteen columns at a time: the only one who reads which of them are there.
 *
 * A row either has all columns or a bitmap, see pattern.h. Whoever walks a row takes its columns in order, sixteens from
 * the first one on, since its values are side by side whatever columns they belong to. */

typedef struct {
    const float *value, *end; /* of the row's first column, or where there are bits the next; behind the last row's last */
    const uint64_t *bits;     /* NULL: all columns are */
    int64_t columns;
} value_row;

QSP_INLINE value_row row_of_values(const qsp_dense *d, const float *values, int64_t row)
{
    const value_row r = {values + d->value_ptr[row], values + d->value_ptr[d->value_rows],
                         d->bits ? d->bits + row * qsp_words(d->columns) : NULL, d->columns};
    return r;
}

/* Which of sixteen columns from a multiple of sixteen on are there: in the lower half. */
QSP_INLINE uint32_t bits_at(const uint64_t *bits, int64_t column)
{
    return (uint32_t)(bits[column / 64] >> column % 64) & 0xffff;
}

/* Up to sixteen floats from an end on, zeros behind it. */
QSP_INLINE f32x16 columns_at(const float *line, int64_t column, int64_t columns)
{
    return column + 16 <= columns ? f32x16_load(line + column)
                                  : f32x16_load_n(line + column, (int)(columns - column));
}

/* The row's values times `factor` in the next sixteen columns, zeros where there are none. Only what is there is
 * multiplied: a factor may be NaN. */
QSP_INLINE f32x16 next_values(value_row *r, int64_t column, f32x16 factor)
{
    if (!r->bits) {
        if (column + 16 <= r->columns) /* alone, so that it is little in a loop */
            return f32x16_mul(f32x16_load(r->value + column), factor);
        const f32x16 v = f32x16_mul(columns_at(r->value, column, r->columns), factor);
        return f32x16_keep(v, (1u << (r->columns - column)) - 1);
    }
    const uint32_t bits = bits_at(r->bits, column);
    const float *value = r->value;
    r->value += qsp_count_bits(bits);
    if (r->end - value >= 16)
        return f32x16_mul_spread(value, bits, factor);
    float line[16] = {0};
    if (value < r->end) /* a weight without values has no memory */
        memcpy(line, value, (size_t)(r->end - value) * sizeof *line);
    return f32x16_mul_spread(line, bits, factor);
}

/* How many columns of a row are there, of those from a multiple of 64 on before another one, or before the end. */
QSP_INLINE int64_t values_between(const qsp_dense *d, int64_t row, int64_t from, int64_t to)
{
    if (!d->bits)
        return to - from;
    const uint64_t *bits = d->bits + row * qsp_words(d->columns);
    int64_t count = 0;
    for (int64_t w = from / 64; w < qsp_words(to); w++)
        count += qsp_count_bits(bits[w]);
    return count;
}
