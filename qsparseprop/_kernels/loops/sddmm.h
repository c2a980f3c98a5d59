/* Gather-SDDMM: dvalue[row, k] = sum_lane dy[row, lane] * x[offset[row, k] + lane], at the nonzeros only.
 *
 * The gradient of a few units stays in registers while all nonzeros of its row pass. Sums are kept per slot in 64 bits
 * (codes) or in double (floats), so that no number of lanes overflows or loses digits. */

#ifndef ISA_OWN_ROWS
enum { UNIT_VECTORS = QSP_UNIT / ISA_LANES };

/* `n` slots, the gradient of `units` units: both constants at every call. Each sum starts from `start`. */
QSP_INLINE void sddmm_slots_u8s8(const uint8_t *const *from, const sddmm_grad *g, const int32_t *offset, int64_t *sums,
                                 sddmm_acc start, const int n, const int units)
{
    sddmm_acc d[16];
    QSP_UNROLL
    for (int j = 0; j < n; j++) {
        const int64_t o = offset[j];
        sddmm_acc even = start, odd = sddmm_acc_zero();
        QSP_UNROLL
        for (int v = 0; v < units * UNIT_VECTORS; v++) {
            const uint8_t *x = from[v / UNIT_VECTORS] + o + v % UNIT_VECTORS * ISA_LANES;
            if (v & 1)
                odd = sddmm_acc_dot(odd, x, g[v]);
            else
                even = sddmm_acc_dot(even, x, g[v]);
        }
        d[j] = units * UNIT_VECTORS > 1 ? sddmm_acc_add(even, odd) : even;
    }
    sddmm_acc_flush(sums, d, n);
}

/* A row's products with the gradient of `units` units, added to `sums`, and that gradient to `dy_sum`. */
QSP_INLINE void sddmm_row_u8s8(const qsp_sddmm *a, const uint8_t *const *x, const uint8_t *const *dy, int64_t row,
                               int64_t *sums, int64_t *dy_sum, const int units)
{
    const int64_t plane = row * a->dy_grid.pitch;
    sddmm_grad g[ISA_SDDMM_UNITS * UNIT_VECTORS];
    sddmm_acc total = sddmm_acc_zero(), start = sddmm_acc_zero();
    QSP_UNROLL
    for (int v = 0; v < units * UNIT_VECTORS; v++) {
        const uint8_t *p = dy[v / UNIT_VECTORS] + plane + v % UNIT_VECTORS * ISA_LANES;
        g[v] = sddmm_grad_load(p);
        total = sddmm_acc_add_grad(total, p);
#ifdef ISA_LEFT_OUT
        start = sddmm_acc_add_left_out(start, p);
#endif
    }
    *dy_sum += sddmm_acc_reduce_add(total);
    int64_t k = qsp_first_slot(&a->list, row);
    const int64_t end = qsp_first_slot(&a->list, row + 1);
    for (; k + 4 * QSP_GROUP <= end; k += 4 * QSP_GROUP)
        sddmm_slots_u8s8(x, g, a->list.offset + k, sums + k, start, 4 * QSP_GROUP, units);
    if (k + 2 * QSP_GROUP <= end) {
        sddmm_slots_u8s8(x, g, a->list.offset + k, sums + k, start, 2 * QSP_GROUP, units);
        k += 2 * QSP_GROUP;
    }
    if (k < end)
        sddmm_slots_u8s8(x, g, a->list.offset + k, sums + k, start, QSP_GROUP, units);
}
#endif

QSP_INLINE void sddmm_row_f32(const qsp_sddmm *a, const float *x, const float *dy, int64_t row, double *sums)
{
    f32x16 g[QSP_UNIT / 16];
    QSP_UNROLL
    for (int v = 0; v < QSP_UNIT / 16; v++)
        g[v] = f32x16_load(dy + row * a->dy_grid.pitch + 16 * v);
    const int64_t end = qsp_first_slot(&a->list, row + 1);
    for (int64_t k = qsp_first_slot(&a->list, row); k < end; k++) {
        const float *p = x + a->list.offset[k];
        f32x16 even = f32x16_mul(g[0], f32x16_load(p)), odd = f32x16_mul(g[1], f32x16_load(p + 16));
        even = f32x16_fma(g[2], f32x16_load(p + 32), even);
        odd = f32x16_fma(g[3], f32x16_load(p + 48), odd);
        sums[k] += (double)f32x16_reduce_add(f32x16_add(even, odd));
    }
}

/* Sums of a row -> values: minus the zero point's share, times the scales. */
QSP_INLINE void sddmm_finish_u8(const qsp_sddmm *a, int64_t row, const int64_t *sums, int64_t dy_sum)
{
    const qsp_nonzeros *l = &a->nonzeros;
    const float scale_dy = a->scale_dy[row * a->scale_dy_stride];
    const int64_t first = l->first[row], n = nonzeros_of_row(l, row);
    const int32_t *index = l->index ? l->index + first : NULL;
    if (a->zero_stride || a->scale_x_stride) {
        int32_t planes[64];
        for (int64_t k = 0; k < n; k += 64) {
            const int64_t m = qsp_min(64, n - k);
            look_up(l, row, l->plane, k, m, planes);
            for (int64_t i = 0; i < m; i++) {
                const int64_t value = index ? index[k + i] : first + k + i;
                if (value >= 0)
                    a->out[value] = qsp_gradient(a, sums[k + i], dy_sum, planes[i], scale_dy);
            }
        }
        return;
    }
    const int64_t excess = a->zero_point[0] * dy_sum;
    const float scale = a->scale_x[0] * scale_dy;
    if (!index) {
        float *out = a->out + first;
        for (int64_t k = 0; k < n; k++)
            out[k] = (float)(sums[k] - excess) * scale;
    } else {
        for (int64_t k = 0; k < n; k++)
            if (index[k] >= 0)
                a->out[index[k]] = (float)(sums[k] - excess) * scale;
    }
}

QSP_INLINE void sddmm_finish_f32(const qsp_sddmm *a, int64_t row, const double *sums)
{
    const qsp_nonzeros *l = &a->nonzeros;
    const int64_t first = l->first[row], n = nonzeros_of_row(l, row);
    for (int64_t k = 0; k < n; k++) {
        const int64_t value = l->index ? l->index[first + k] : first + k;
        if (value >= 0)
            a->out[value] = (float)sums[k];
    }
}

/* One task: all units for the rows of part `chunk`. */
QSP_INLINE void sddmm_task(const qsp_sddmm *given, int64_t chunk, const int codes)
{
    qsp_sddmm one = *given;
    const qsp_sddmm *a = &one;
    const int64_t first = qsp_cut_rows(&given->list, chunk, a->row_chunks);
    const int64_t last = qsp_cut_rows(&given->list, chunk + 1, a->row_chunks);
    one.list.rows = last;
    one.list.base = one.list.group_ptr[first];
    const int64_t slots = qsp_first_slot(&a->list, last);
    const int64_t units = qsp_count_units(&a->dy_grid, &a->view, a->images);
    /* of codes one for a slot, and behind them one for a row; of floats one for a slot */
    int64_t *sums = (int64_t *)a->sums, *dy_sums = sums + slots;
    double *float_sums = (double *)a->sums;
    int32_t *offset = (int32_t *)(dy_sums + (last - first));
    if (given->bits) {
        const int64_t before = given->nonzeros.first[first], n = given->nonzeros.first[last] - before;
        uint16_t *column = (uint16_t *)(offset + slots);
        qsp_columns_of(given->bits + first * qsp_words(given->columns), last - first, given->columns, column, n);
        one.nonzeros.code = (const uint16_t *)((uintptr_t)column - (uintptr_t)before * sizeof *column);
    }
    if (given->list.offset) {
        one.list.offset = given->list.offset + QSP_GROUP * one.list.base;
    } else {
        offsets_kernel(&a->nonzeros, first, last, offset);
        one.list.offset = offset;
    }
    for (int64_t k = 0; k < slots; k++)
        if (codes)
            sums[k] = 0;
        else
            float_sums[k] = 0.0;
    for (int64_t i = 0; codes && i < last - first; i++)
        dy_sums[i] = 0;

    const int64_t size = codes ? 1 : (int64_t)sizeof(float);
    for (int64_t unit = 0; unit < units;) {
        const uint8_t *x[ISA_SDDMM_UNITS], *dy[ISA_SDDMM_UNITS];
        const int64_t left = units - unit;
        const int n = !codes ? 1 : left >= ISA_SDDMM_UNITS ? ISA_SDDMM_UNITS : left >= 2 && ISA_SDDMM_UNITS > 2 ? 2 : 1;
        for (int i = 0; i < n; i++) {
            qsp_unit where;
            locate_unit(&where, &a->dy_grid, &a->view, a->images, unit + i);
            x[i] = (const uint8_t *)a->planes + size * (where.block * a->grid.block + a->view.origin + where.lane);
            dy[i] = (const uint8_t *)a->dy +
                    size * (where.block * a->dy_grid.block + a->dy_grid.front + a->view.origin + where.lane);
        }
        unit += n;
        if (!codes)
            for (int64_t row = first; row < last; row++)
                sddmm_row_f32(a, (const float *)x[0], (const float *)dy[0], row, float_sums);
        else if (n == ISA_SDDMM_UNITS)
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8s8(a, x, dy, row, sums, dy_sums + (row - first), ISA_SDDMM_UNITS);
        else if (ISA_SDDMM_UNITS > 2 && n == 2)
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8s8(a, x, dy, row, sums, dy_sums + (row - first), 2);
        else
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8s8(a, x, dy, row, sums, dy_sums + (row - first), 1);
    }

    for (int64_t row = first; row < last; row++)
        if (codes)
            sddmm_finish_u8(a, row, sums + qsp_first_slot(&a->list, row), dy_sums[row - first]);
        else
            sddmm_finish_f32(a, row, float_sums + qsp_first_slot(&a->list, row));
}

static void sddmm_u8_kernel(const qsp_sddmm *a, int64_t chunk) { sddmm_task(a, chunk, 1); }
static void sddmm_f32_kernel(const qsp_sddmm *a, int64_t chunk) { sddmm_task(a, chunk, 0); }
