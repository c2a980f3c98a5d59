/* Gather-SDDMM: dvalue[row, k] = sum_lane dy[row, lane] * x[offset[row, k] + lane], at the nonzeros only.
 *
 * The gradient of a few units stays in registers while all nonzeros of its row pass. Sums are kept per slot in 64 bits
 * (codes) or in double (floats), so that no number of lanes overflows or loses digits. */

typedef struct {
    const uint8_t *x[ISA_SDDMM_UNITS], *dy[ISA_SDDMM_UNITS];
} unit_set;

#ifdef ISA_OWN_SDDMM
#include ISA_OWN_SDDMM
#else
/* `n` slots, the gradient of `units` units: both constants at every call. */
QSP_INLINE void sddmm_slots_u8(const unit_set *u, const grad *g, const int32_t *offset, int64_t *sums, const int n,
                               const int units)
{
    const int width = QSP_UNIT / ISA_UNIT_VECTORS;
    dots d[16];
    QSP_UNROLL
    for (int j = 0; j < n; j++) {
        const int64_t o = offset[j];
        dots even = dots_zero(), odd = dots_zero();
        QSP_UNROLL
        for (int v = 0; v < units * ISA_UNIT_VECTORS; v++) {
            const uint8_t *x = u->x[v / ISA_UNIT_VECTORS] + o + v % ISA_UNIT_VECTORS * width;
            if (v & 1)
                odd = dots_step(odd, x, g[v]);
            else
                even = dots_step(even, x, g[v]);
        }
        d[j] = units * ISA_UNIT_VECTORS > 1 ? dots_add(even, odd) : even;
    }
    dots_flush(sums, d, n);
}

QSP_INLINE void sddmm_row_u8(const qsp_sddmm *a, const unit_set *u, int64_t row, int64_t *sums, int64_t *dy_sum,
                             const int units)
{
    const int width = QSP_UNIT / ISA_UNIT_VECTORS;
    const int64_t plane = row * a->dy_grid.pitch;
    grad g[ISA_SDDMM_UNITS * ISA_UNIT_VECTORS];
    dots total = dots_zero();
    QSP_UNROLL
    for (int v = 0; v < units * ISA_UNIT_VECTORS; v++) {
        const uint8_t *dy = u->dy[v / ISA_UNIT_VECTORS] + plane + v % ISA_UNIT_VECTORS * width;
        g[v] = grad_load(dy);
        total = grad_sum(total, dy);
    }
    *dy_sum += dots_total(total);
    int64_t k = 4 * (int64_t)a->list.group_ptr[row];
    const int64_t end = 4 * (int64_t)a->list.group_ptr[row + 1];
    for (; k + 16 <= end; k += 16)
        sddmm_slots_u8(u, g, a->list.offset + k, sums + k, 16, units);
    if (k + 8 <= end) {
        sddmm_slots_u8(u, g, a->list.offset + k, sums + k, 8, units);
        k += 8;
    }
    if (k < end)
        sddmm_slots_u8(u, g, a->list.offset + k, sums + k, 4, units);
}
#endif

QSP_INLINE void sddmm_row_f32(const qsp_sddmm *a, const float *x, const float *dy, int64_t row, double *sums)
{
    f16x g[4];
    QSP_UNROLL
    for (int v = 0; v < 4; v++)
        g[v] = f16_load(dy + row * a->dy_grid.pitch + 16 * v);
    const int64_t end = 4 * (int64_t)a->list.group_ptr[row + 1];
    for (int64_t k = 4 * (int64_t)a->list.group_ptr[row]; k < end; k++) {
        const float *p = x + a->list.offset[k];
        f16x even = f16_mul(g[0], f16_load(p)), odd = f16_mul(g[1], f16_load(p + 16));
        even = f16_fma(g[2], f16_load(p + 32), even);
        odd = f16_fma(g[3], f16_load(p + 48), odd);
        sums[k] += (double)f16_sum(f16_add(even, odd));
    }
}

/* Sums of a row -> values: minus the zero point's share, times the scales. */
QSP_INLINE void sddmm_finish_u8(const qsp_sddmm *a, int64_t row, const int64_t *sums, int64_t dy_sum)
{
    const float scale_dy = a->scale_dy[row * a->scale_dy_stride];
    const int64_t begin = 4 * (int64_t)a->list.group_ptr[row], end = 4 * (int64_t)a->list.group_ptr[row + 1];
    int64_t n = end - begin;
    while (n && a->index[begin + n - 1] < 0)
        n--;
    const int32_t *index = a->index + begin;
    sums += begin;
    if (a->zero_stride || a->scale_x_stride) {
        for (int64_t k = 0; k < n; k++) {
            const int64_t plane = a->plane[begin + k];
            const int64_t exact = sums[k] - a->zero_point[plane * a->zero_stride] * dy_sum;
            if (index[k] >= 0)
                a->out[index[k]] = (float)exact * (a->scale_x[plane * a->scale_x_stride] * scale_dy);
        }
        return;
    }
    const int64_t excess = a->zero_point[0] * dy_sum;
    const float scale = a->scale_x[0] * scale_dy;
    int ascending = n > 0 && index[0] >= 0;
    for (int64_t k = 0; k < n; k++)
        ascending &= index[k] - index[0] == k;
    if (ascending) { /* as in every list sorted by row: one run of values */
        float *out = a->out + index[0];
        for (int64_t k = 0; k < n; k++)
            out[k] = (float)(sums[k] - excess) * scale;
    } else {
        for (int64_t k = 0; k < n; k++)
            if (index[k] >= 0)
                a->out[index[k]] = (float)(sums[k] - excess) * scale;
    }
}

/* One task: all units for the rows of part `chunk`. */
QSP_INLINE void sddmm_task(const qsp_sddmm *a, int64_t chunk, const int codes)
{
    const int64_t first = qsp_cut_rows(&a->list, chunk, a->row_chunks);
    const int64_t last = qsp_cut_rows(&a->list, chunk + 1, a->row_chunks);
    const int64_t slots = 4 * (int64_t)a->list.group_ptr[a->list.rows];
    const int64_t units = qsp_count_units(&a->dy_grid, &a->view, a->images);
    int64_t *sums = (int64_t *)a->sums, *dy_sums = sums + slots; /* scratch: one for a slot, one for a row */
    for (int64_t k = 4 * (int64_t)a->list.group_ptr[first]; k < 4 * (int64_t)a->list.group_ptr[last]; k++)
        sums[k] = 0; /* all bits zero is 0.0 as well */
    for (int64_t row = first; row < last; row++)
        dy_sums[row] = 0;

    const int64_t size = codes ? 1 : (int64_t)sizeof(float);
    for (int64_t unit = 0; unit < units;) {
        unit_set u;
        const int64_t left = units - unit;
        const int n = !codes ? 1 : left >= ISA_SDDMM_UNITS ? ISA_SDDMM_UNITS : left >= 2 && ISA_SDDMM_UNITS > 2 ? 2 : 1;
        for (int i = 0; i < n; i++) {
            qsp_unit where;
            locate_unit(&where, &a->dy_grid, &a->view, a->images, unit + i);
            u.x[i] = (const uint8_t *)a->planes + size * (where.block * a->grid.block + a->view.origin + where.lane);
            u.dy[i] = (const uint8_t *)a->dy + size * (where.block * a->dy_grid.block + a->dy_grid.front + a->view.origin + where.lane);
        }
        unit += n;
        if (!codes)
            for (int64_t row = first; row < last; row++)
                sddmm_row_f32(a, (const float *)u.x[0], (const float *)u.dy[0], row, (double *)a->sums);
        else if (n == ISA_SDDMM_UNITS)
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8(a, &u, row, sums, dy_sums + row, ISA_SDDMM_UNITS);
        else if (ISA_SDDMM_UNITS > 2 && n == 2)
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8(a, &u, row, sums, dy_sums + row, 2);
        else
            for (int64_t row = first; row < last; row++)
                sddmm_row_u8(a, &u, row, sums, dy_sums + row, 1);
    }

    for (int64_t row = first; row < last; row++)
        if (codes)
            sddmm_finish_u8(a, row, sums, dy_sums[row]);
        else
            for (int64_t k = 4 * (int64_t)a->list.group_ptr[row]; k < 4 * (int64_t)a->list.group_ptr[row + 1]; k++)
                if (a->index[k] >= 0)
                    a->out[a->index[k]] = (float)((double *)a->sums)[k];
}

static void sddmm_u8(const qsp_sddmm *a, int64_t chunk) { sddmm_task(a, chunk, 1); }
static void sddmm_f32(const qsp_sddmm *a, int64_t chunk) { sddmm_task(a, chunk, 0); }
