/* Gather-SpMM: out[row, lane] = sum_k weight[row, k] * x[offset[row, k] + lane], for one unit of lanes. */

#ifdef ISA_OWN_SPMM
#include ISA_OWN_SPMM
#else
/* Sums of one row on codes, in the order of quad_lane. `last`, the list's last group, and `paired`, see qsp_spmm, are
 * for maddubs_spmm.h. */
QSP_INLINE void spmm_row_u8(const uint8_t *x, const int32_t *offset, const int32_t *last, const int8_t *weight,
                            int64_t groups, int64_t paired, int32_t start, int32_t *out)
{
    (void)last, (void)paired;
    for (int v = 0; v < ISA_UNIT_VECTORS; v++) {
        const uint8_t *lane = x + v * (QSP_UNIT / ISA_UNIT_VECTORS);
        quad even, odd;
        quad_set(&even, start);
        quad_set(&odd, 0);
        int64_t g = 0;
        for (; ISA_QUADS == 2 && g + 2 <= groups; g += 2) {
            quad_dot(&even, lane, offset + 4 * g, weight + 4 * g);
            quad_dot(&odd, lane, offset + 4 * g + 4, weight + 4 * g + 4);
        }
        for (; g < groups; g++)
            quad_dot(&even, lane, offset + 4 * g, weight + 4 * g);
        quad_store(out + v * (QSP_UNIT / ISA_UNIT_VECTORS), &even, &odd);
    }
}
#endif

QSP_INLINE void spmm_row_f32(const float *x, const int32_t *offset, const float *weight, int64_t groups, float *out)
{
    /* Two nonzeros at a time in eight sums: enough independent chains for the latency of an FMA. */
    f16x sum[8];
    QSP_UNROLL
    for (int i = 0; i < 8; i++)
        sum[i] = f16_zero();
    for (int64_t k = 0; k < 4 * groups; k += 2) {
        const float *p = x + offset[k], *q = x + offset[k + 1];
        const f16x w = f16_set1(weight[k]), u = f16_set1(weight[k + 1]);
        QSP_UNROLL
        for (int i = 0; i < 4; i++)
            sum[i] = f16_fma(w, f16_load(p + 16 * i), sum[i]);
        QSP_UNROLL
        for (int i = 0; i < 4; i++)
            sum[4 + i] = f16_fma(u, f16_load(q + 16 * i), sum[4 + i]);
    }
    QSP_UNROLL
    for (int i = 0; i < 4; i++)
        f16_store(out + 16 * i, f16_add(sum[i], sum[4 + i]));
}

/* A row of more nonzeros than an int32 can sum: piece by piece, the total as floats in the order of the lanes. */
static void spmm_long_row(const uint8_t *x, const int32_t *offset, const int32_t *last, const int8_t *weight,
                          int64_t groups, int64_t paired, int64_t start, float *out)
{
    int64_t total[QSP_UNIT];
    int32_t piece[QSP_UNIT];
    for (int i = 0; i < QSP_UNIT; i++)
        total[i] = start;
    for (int64_t g = 0; g < groups; g += QSP_MAX_EXACT / QSP_GROUP) {
        const int64_t n = qsp_min(groups - g, QSP_MAX_EXACT / QSP_GROUP);
        spmm_row_u8(x, offset + 4 * g, last, weight + 4 * g, n, qsp_min(n, paired > g ? paired - g : 0), 0, piece);
        for (int i = 0; i < QSP_UNIT; i++)
            total[unit_lane(i)] += piece[i];
    }
    for (int i = 0; i < QSP_UNIT; i++)
        out[i] = (float)total[i];
}

/* One task: rows of part `chunk` for the unit number `unit`, codes or floats by a constant that the compiler sees. */
QSP_INLINE void spmm_task(const qsp_spmm *a, int64_t unit, int64_t chunk, const int codes)
{
    QSP_ALIGNED(64) int32_t sums[QSP_ROW_BLOCK * QSP_UNIT]; /* or as many floats */
    unit_target target;
    qsp_unit where;
    locate_unit(&where, &a->grid, &a->view, a->images, unit);
    target_init(&target, &a->view, &a->grid, &where, a->dtype, a->out);
    const int64_t lane = where.block * a->grid.block + a->view.origin + where.lane;
    const int64_t last = qsp_cut_rows(&a->list, chunk + 1, a->row_chunks);
    const int64_t all = a->list.group_ptr[a->list.rows];
    const int32_t *last_group = a->list.offset + (all ? 4 * (all - 1) : 0);
    for (int64_t row = qsp_cut_rows(&a->list, chunk, a->row_chunks); row < last; row += QSP_ROW_BLOCK) {
        const int n = (int)qsp_min(QSP_ROW_BLOCK, last - row);
        int as_float = !codes;
        if (codes) /* one order for all rows of the buffer */
            for (int i = 0; i < n; i++)
                as_float |= a->list.group_ptr[row + i + 1] - a->list.group_ptr[row + i] > QSP_MAX_EXACT / QSP_GROUP;
        for (int i = 0; i < n; i++) {
            const int64_t first = a->list.group_ptr[row + i], groups = a->list.group_ptr[row + i + 1] - first;
            const int32_t *offset = a->list.offset + 4 * first;
            int32_t *out = sums + i * QSP_UNIT;
            /* what the unpacker will write: fetched while the products are computed */
            if (target.columns && target.column[i])
                for (int k = 0; k < n; k += 16)
                    QSP_PREFETCH_WRITE(element_at(target.column[i], a->dtype, row + k));
            if (!codes) {
                spmm_row_f32((const float *)a->planes + lane, offset, (const float *)a->weights + 4 * first, groups,
                             (float *)out);
                continue;
            }
            const uint8_t *x = (const uint8_t *)a->planes + lane;
            const int8_t *weight = (const int8_t *)a->weights + 4 * first;
            const int64_t paired = a->paired ? a->paired[row + i] : 0;
            const int64_t start = a->correction[row + i] * a->correction_factor;
            if (as_float)
                spmm_long_row(x, offset, last_group, weight, groups, paired, start, (float *)out);
            else /* may wrap on the way; the final sum fits */
                spmm_row_u8(x, offset, last_group, weight, groups, paired, (int32_t)(uint32_t)(uint64_t)start, out);
        }
        unpack_rows(a, &target, row, n, sums, as_float);
    }
}

static void spmm_u8(const qsp_spmm *a, int64_t unit, int64_t chunk) { spmm_task(a, unit, chunk, 1); }
static void spmm_f32(const qsp_spmm *a, int64_t unit, int64_t chunk) { spmm_task(a, unit, chunk, 0); }
