/* Values -> the matrix of dense rows: int8 codes with one scale a row, as weights.h makes them for the slots of lists. */

/* A value row as a line with zeros, up to a multiple of 16. `factor` goes with the columns; without it `common` does. */
QSP_INLINE void expand_row(const qsp_weight *a, int64_t row, float *line, const float *factor, float common)
{
    const int64_t end = (a->dense->columns + 15) / 16 * 16;
    value_row r = row_of_values(a->dense, a->values, row);
    if (factor)
        for (int64_t k = 0; k < end; k += 16)
            f32x16_store(line + k, next_values(&r, k, f32x16_load(factor + k)));
    else
        for (int64_t k = 0; k < end; k += 16)
            f32x16_store(line + k, next_values(&r, k, f32x16_set1(common)));
}

static void dense_rows_kernel(const qsp_weight *a, int64_t first, int64_t last, float *line)
{
    const qsp_dense *d = a->dense;
    const qsp_band *b = d->bands, *known = NULL;
    const int64_t end = (d->columns + 15) / 16 * 16;
    float *factor = a->factor ? line + end : NULL;
    for (int64_t row = first; row < last; row++) {
        while (row >= b->last)
            b++;
        for (int64_t k = 0; factor && known != b && k < end; k++)
            factor[k] = k < d->columns ? a->factor[d->plane[b->table + k]] : 1.0f;
        known = b;
        const float *value = a->values + d->value_ptr[row];
        if (d->bits || factor) { /* otherwise the values are the line */
            expand_row(a, row, line, factor, 1.0f);
            value = line;
        }
        u32x16 bits = u32x16_zero();
        for (int64_t k = 0; k < d->columns; k += 16)
            bits = u32x16_max_abs(bits, columns_at(value, k, d->columns));
        float per_step;
        a->scale[row] = weight_scale(a, u32x16_reduce_max(bits), &per_step) * a->scale_factor;
        const f32x16 inverse = f32x16_set1(per_step);
        const int64_t columns = d->columns;
        uint8_t *codes = (uint8_t *)a->codes + row * d->pitch;
        for (int64_t k = 0; k < columns; k += 16)
            u8x16_store(codes + k, i32x16_to_s8(weight_codes(columns_at(value, k, columns), inverse)));
        memset(codes + end, 0, (size_t)(d->pitch - end));
    }
}

static void dense_column_max_kernel(const qsp_weight *a, int64_t first, int64_t last, float *most)
{
    const qsp_dense *d = a->dense;
    const int64_t rest = d->columns % 16, whole = d->columns - rest;
    for (int64_t row = first; row < last; row++) {
        value_row r = row_of_values(d, a->values, row);
        const f32x16 factor = f32x16_set1(a->factor ? a->factor[row] : 1.0f);
        float *to = most + row / (d->value_rows / d->groups) * d->columns;
        if (d->bits) /* two loops, which do not ask which of them they are */
            for (int64_t k = 0; k < whole; k += 16)
                u32x16_store_bits(to + k, u32x16_max_abs(u32x16_load_bits(to + k), next_values(&r, k, factor)));
        else
            for (int64_t k = 0; k < whole; k += 16)
                u32x16_store_bits(to + k, u32x16_max_abs(u32x16_load_bits(to + k), next_values(&r, k, factor)));
        if (rest) { /* behind them are the columns of another group */
            float line[16] = {0};
            memcpy(line, to + whole, (size_t)rest * sizeof *line);
            u32x16_store_bits(line, u32x16_max_abs(u32x16_load_bits(line), next_values(&r, whole, factor)));
            memcpy(to + whole, line, (size_t)rest * sizeof *line);
        }
    }
}

static void dense_scales_kernel(const qsp_weight *a, float *most)
{
    /* Several columns, the taps of a kernel, share a row: what is largest of them stands in its scale's place first. */
    const qsp_dense *d = a->dense;
    memset(a->scale, 0, (size_t)d->rows * sizeof *a->scale);
    for (int64_t g = 0; g < d->groups; g++)
        for (int64_t c = 0; c < d->columns; c++) {
            float *row = a->scale + d->row_of[c] + g * d->group_rows;
            uint32_t bits, most_bits;
            memcpy(&bits, row, sizeof bits);
            memcpy(&most_bits, most + g * d->columns + c, sizeof most_bits);
            bits = most_bits > bits ? most_bits : bits;
            memcpy(row, &bits, sizeof bits);
        }
    float per_step;
    uint32_t bits;
    for (int64_t g = 0; g < d->groups; g++)
        for (int64_t c = 0; c < d->columns; c++) {
            memcpy(&bits, a->scale + d->row_of[c] + g * d->group_rows, sizeof bits);
            weight_scale(a, bits, &per_step);
            memcpy(&most[g * d->columns + c], &per_step, sizeof per_step);
        }
    for (int64_t row = 0; row < d->rows; row++) {
        memcpy(&bits, &a->scale[row], sizeof bits);
        a->scale[row] = weight_scale(a, bits, &per_step) * a->scale_factor;
    }
}

enum { COLUMN_STRIP = 4 }; /* times sixteen columns of a value row, neighbours in memory, that are read together */

/* Codes of `count` columns from `first` on of n lines, as u8_transpose_unit reads them. */
QSP_INLINE void column_codes(const float *const *line, const float *factor, int n, const float *inverse, int64_t first,
                             const int count, uint8_t codes[][16 * QSP_UNIT])
{
    f32x16 per_step[COLUMN_STRIP];
    for (int v = 0; 16 * v < count; v++)
        per_step[v] = columns_at(inverse + first, 16 * v, count);
    for (int i = 0; i < n; i++) {
        const f32x16 common = f32x16_set1(factor[i]);
        for (int v = 0; v < COLUMN_STRIP && 16 * v < count; v++) {
            const f32x16 x = f32x16_mul(columns_at(line[i] + first, 16 * v, count), common);
            u8x16_store(codes[v] + QSP_UNIT * (i % 16) + 16 * (i / 16), i32x16_to_s8(weight_codes(x, per_step[v])));
        }
    }
}

/* A unit of value rows of a group, or what is left of them. */
static void dense_columns_kernel(const qsp_weight *a, int64_t tile, const float *inverse, float *lines)
{
    const qsp_dense *d = a->dense;
    const int64_t in_group = d->value_rows / d->groups, tiles = (in_group + QSP_UNIT - 1) / QSP_UNIT;
    const int64_t group = tile / tiles, row = tile % tiles * QSP_UNIT; /* in the group */
    const int64_t columns = d->columns, pitch = (columns + 15) / 16 * 16;
    const int n = (int)qsp_min(QSP_UNIT, in_group - row);
    const float *line[QSP_UNIT];
    float factor[QSP_UNIT];
    for (int i = 0; i < n; i++) {
        const int64_t r = group * in_group + row + i;
        line[i] = a->values + d->value_ptr[r];
        factor[i] = a->factor ? a->factor[r] : 1.0f;
        if (d->bits) {
            expand_row(a, r, lines + i * pitch, NULL, factor[i]);
            line[i] = lines + i * pitch;
            factor[i] = 1.0f;
        }
    }
    for (int64_t first = 0; first < columns; first += 16 * COLUMN_STRIP) {
        QSP_ALIGNED(64) uint8_t codes[COLUMN_STRIP][16 * QSP_UNIT], turned[16 * QSP_UNIT];
        if (first + 16 * COLUMN_STRIP <= columns)
            column_codes(line, factor, n, inverse + group * columns, first, 16 * COLUMN_STRIP, codes);
        else
            column_codes(line, factor, n, inverse + group * columns, first, (int)(columns - first), codes);
        for (int64_t c = first; c < qsp_min(first + 16 * COLUMN_STRIP, columns); c++) {
            const int64_t k = (c - first) % 16;
            if (k == 0)
                u8_transpose_unit(turned, QSP_UNIT, codes[(c - first) / 16], n, (int)qsp_min(16, columns - c));
            int8_t *to = a->codes + (d->row_of[c] + group * d->group_rows) * d->pitch + d->entry_of[c] + row;
            if (n == QSP_UNIT) /* without a call */
                memcpy(to, turned + QSP_UNIT * k, QSP_UNIT);
            else
                memcpy(to, turned + QSP_UNIT * k, (size_t)n);
        }
    }
}

/* Of each row the sum of its codes times the zero points. */
static void dense_totals_kernel(const qsp_weight *a, int64_t first, int64_t last)
{
    const qsp_dense *d = a->dense;
    const qsp_band *b = d->bands;
    for (int64_t row = first; row < last; row++) {
        while (row >= b->last)
            b++;
        const int8_t *codes = a->codes + row * d->pitch;
        if (a->zero_point) {
            const int32_t *plane = d->plane + b->table;
            int64_t sum = 0;
            for (int64_t k = 0; k < b->size; k++)
                sum += codes[k] * a->zero_point[plane[k]];
            a->total[row] = sum;
            continue;
        }
        i32x16 total = i32x16_set1(0);
        for (int64_t k = 0; k < d->pitch; k += 16)
            total = i32x16_add(total, i32x16_load_s8((const uint8_t *)codes + k));
        a->total[row] = i32x16_reduce_add(total) * a->zero_factor;
    }
}
