/* Values -> the matrix of dense rows: int8 codes with one scale a row, as weights.h makes them for the slots of lists. */

/* How many of a value row there are, and which: all columns where `column` is NULL. */
QSP_INLINE int64_t values_of_row(const qsp_weight *a, int64_t row, const float **value, const uint16_t **column)
{
    const qsp_dense *d = a->dense;
    const int64_t first = d->value_ptr[row];
    *value = a->values + first;
    *column = d->column ? d->column + first : NULL;
    return d->value_ptr[row + 1] - first;
}

/* A value row as a line with zeros, up to a multiple of 16. `factor` goes with the columns; without it `common` does. Only
 * what is there is multiplied: a factor may be NaN. */
QSP_INLINE void expand_row(const qsp_weight *a, int64_t row, float *line, const float *factor, float common)
{
    const float *value;
    const uint16_t *column;
    const int64_t n = values_of_row(a, row, &value, &column), end = (a->dense->columns + 15) / 16 * 16;
    if (column)
        memset(line, 0, (size_t)end * sizeof *line);
    for (int64_t i = 0; column && factor && i < n; i++)
        line[column[i]] = value[i] * factor[column[i]];
    for (int64_t i = 0; column && !factor && i < n; i++)
        line[column[i]] = value[i] * common;
    for (int64_t k = 0; !column && k < end; k += 16) {
        const int m = (int)qsp_min(16, n - k);
        const f32x16 f = factor ? f32x16_load(factor + k) : f32x16_set1(common);
        f32x16_store(line + k, f32x16_mul(f32x16_load_n(value + k, m), f));
    }
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
        expand_row(a, row, line, factor, 1.0f);
        u32x16 bits = u32x16_zero();
        for (int64_t k = 0; k < d->columns; k += 16)
            bits = u32x16_max_abs(bits, f32x16_load(line + k));
        float per_step;
        a->scale[row] = weight_scale(a, u32x16_reduce_max(bits), &per_step) * a->scale_factor;
        const f32x16 inverse = f32x16_set1(per_step);
        int8_t *codes = a->codes + row * d->pitch;
        for (int64_t k = 0; k < d->columns; k += 16)
            u8x16_store((uint8_t *)codes + k, i32x16_to_s8(weight_codes(f32x16_load(line + k), inverse)));
        memset(codes + end, 0, (size_t)(d->pitch - end));
    }
}

static void dense_column_max_kernel(const qsp_weight *a, int64_t first, int64_t last, uint32_t *most)
{
    const qsp_dense *d = a->dense;
    for (int64_t row = first; row < last; row++) {
        const float *value;
        const uint16_t *column;
        const int64_t n = values_of_row(a, row, &value, &column);
        const float factor = a->factor ? a->factor[row] : 1.0f;
        uint32_t *to = most + row / (d->value_rows / d->groups) * d->columns;
        for (int64_t i = 0; i < n; i++) {
            const float v = value[i] * factor;
            const int64_t c = column ? column[i] : i;
            uint32_t bits;
            memcpy(&bits, &v, sizeof bits);
            bits &= 0x7fffffff;
            to[c] = bits > to[c] ? bits : to[c];
        }
    }
}

static void dense_scales_kernel(const qsp_weight *a, uint32_t *most)
{
    /* Several columns, the taps of a kernel, share a row: what is largest of them stands in its scale's place first. */
    const qsp_dense *d = a->dense;
    memset(a->scale, 0, (size_t)d->rows * sizeof *a->scale);
    for (int64_t g = 0; g < d->groups; g++)
        for (int64_t c = 0; c < d->columns; c++) {
            float *row = a->scale + d->row_of[c] + g * d->group_rows;
            uint32_t bits;
            memcpy(&bits, row, sizeof bits);
            bits = most[g * d->columns + c] > bits ? most[g * d->columns + c] : bits;
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

/* Sixteen value rows of a group, or what is left of them. */
static void dense_columns_kernel(const qsp_weight *a, int64_t tile, const float *inverse, float *lines)
{
    const qsp_dense *d = a->dense;
    const int64_t in_group = d->value_rows / d->groups, tiles = (in_group + 15) / 16, group = tile / tiles;
    const int64_t row = tile % tiles * 16; /* in the group */
    const int64_t pitch = (d->columns + 15) / 16 * 16;
    const int n = (int)qsp_min(16, in_group - row);
    for (int i = 0; i < n; i++) {
        const int64_t r = group * in_group + row + i;
        expand_row(a, r, lines + i * pitch, NULL, a->factor ? a->factor[r] : 1.0f);
    }
    for (int64_t c = 0; c < d->columns; c += 16) {
        const int m = (int)qsp_min(16, d->columns - c);
        const f32x16 factor = f32x16_load_n(inverse + group * d->columns + c, m);
        u8x16 codes[16];
        QSP_UNROLL
        for (int i = 0; i < 16; i++)
            codes[i] = i32x16_to_s8(weight_codes(f32x16_load(lines + (i < n ? i : 0) * pitch + c), factor));
        u8_transpose_16x16(codes);
        for (int k = 0; k < m; k++) {
            uint8_t *to = (uint8_t *)a->codes + (d->row_of[c + k] + group * d->group_rows) * d->pitch +
                          d->entry_of[c + k] + row;
            if (n == 16)
                u8x16_store(to, codes[k]);
            else
                u8x16_store_n(to, codes[k], n);
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
