/* Gather-SpMM: out[row, lane] = sum_k weight[row, k] * x[offset[row, k] + lane], for one unit of lanes. */

#ifndef ISA_OWN_ROWS
/* Sums of one row on codes, in the order of spmm_acc_lane. `last`, the list's last group, and `paired`, see qsp_spmm,
 * are for instruction sets that have rows of their own. */
QSP_INLINE void spmm_row_u8s8(const uint8_t *x, const int32_t *offset, const int32_t *last, const int8_t *weight,
                              int64_t groups, int64_t paired, int32_t start, int32_t *out)
{
    (void)last, (void)paired;
#ifdef ISA_LEFT_OUT
    start = (int32_t)((uint32_t)start + (uint32_t)spmm_left_out(weight, groups));
#endif
    for (int v = 0; v < QSP_UNIT; v += ISA_LANES) {
        const uint8_t *lane = x + v;
        spmm_acc even, odd;
        spmm_acc_set1(&even, start);
        spmm_acc_set1(&odd, 0);
        int64_t g = 0;
        for (; ISA_SPMM_ACCS == 2 && g + 2 <= groups; g += 2) {
            spmm_acc_dot(&even, lane, offset + QSP_GROUP * g, weight + QSP_GROUP * g);
            spmm_acc_dot(&odd, lane, offset + QSP_GROUP * (g + 1), weight + QSP_GROUP * (g + 1));
        }
        for (; g < groups; g++)
            spmm_acc_dot(&even, lane, offset + QSP_GROUP * g, weight + QSP_GROUP * g);
        spmm_acc_store(out + v, &even, &odd);
    }
}
#endif

QSP_INLINE void spmm_row_f32(const float *x, const int32_t *offset, const float *weight, int64_t groups, float *out)
{
    /* Two nonzeros at a time in eight sums: enough independent chains for the latency of an FMA. */
    enum { VECTORS = QSP_UNIT / 16 };
    f32x16 sum[2 * VECTORS];
    QSP_UNROLL
    for (int i = 0; i < 2 * VECTORS; i++)
        sum[i] = f32x16_zero();
    for (int64_t k = 0; k < QSP_GROUP * groups; k += 2) {
        const float *p = x + offset[k], *q = x + offset[k + 1];
        const f32x16 w = f32x16_set1(weight[k]), u = f32x16_set1(weight[k + 1]);
        QSP_UNROLL
        for (int i = 0; i < VECTORS; i++)
            sum[i] = f32x16_fma(w, f32x16_load(p + 16 * i), sum[i]);
        QSP_UNROLL
        for (int i = 0; i < VECTORS; i++)
            sum[VECTORS + i] = f32x16_fma(u, f32x16_load(q + 16 * i), sum[VECTORS + i]);
    }
    QSP_UNROLL
    for (int i = 0; i < VECTORS; i++)
        f32x16_store(out + 16 * i, f32x16_add(sum[i], sum[VECTORS + i]));
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
        spmm_row_u8s8(x, offset + QSP_GROUP * g, last, weight + QSP_GROUP * g, n,
                      qsp_min(n, paired > g ? paired - g : 0), 0, piece);
        for (int i = 0; i < QSP_UNIT; i++)
            total[unit_lane(i)] += piece[i];
    }
    for (int i = 0; i < QSP_UNIT; i++)
        out[i] = (float)total[i];
}

/* One task: rows of part `chunk` for the unit number `unit`, codes or floats by a constant that the compiler sees. */
QSP_INLINE void spmm_task(const qsp_spmm *a, int64_t unit, int64_t chunk, const int codes)
{
    QSP_ALIGNED(64) row_sums sums[QSP_ROW_BLOCK];
    unit_target target;
    coded_unit coded;
    const int64_t lane = locate_task(a, unit, &target, &coded);
    const int64_t last = qsp_cut_rows(&a->list, chunk + 1, a->row_chunks);
    const int64_t all = qsp_first_slot(&a->list, a->list.rows);
    const int32_t *last_group = a->list.offset + (all ? all - QSP_GROUP : 0);
    for (int64_t row = qsp_cut_rows(&a->list, chunk, a->row_chunks); row < last; row += QSP_ROW_BLOCK) {
        const int n = (int)qsp_min(QSP_ROW_BLOCK, last - row);
        int as_float = !codes;
        if (codes) /* one order for all rows of the buffer */
            for (int i = 0; i < n; i++)
                as_float |= a->list.group_ptr[row + i + 1] - a->list.group_ptr[row + i] > QSP_MAX_EXACT / QSP_GROUP;
        for (int i = 0; i < n; i++) {
            const int64_t groups = a->list.group_ptr[row + i + 1] - a->list.group_ptr[row + i];
            const int64_t slot = qsp_first_slot(&a->list, row + i);
            const int32_t *offset = a->list.offset + slot;
            /* what the unpacker will write: fetched while the products are computed */
            if (target.columns && target.column[i])
                for (int k = 0; k < n; k += 16)
                    QSP_PREFETCH_WRITE(element_at(target.column[i], a->dtype, row + k));
            if (!codes) {
                spmm_row_f32((const float *)a->planes + lane, offset, (const float *)a->weights + slot, groups,
                             sums[i].f32);
                continue;
            }
            const uint8_t *x = (const uint8_t *)a->planes + lane;
            const int8_t *weight = (const int8_t *)a->weights + slot;
            const int64_t paired = a->paired ? a->paired[row + i] : 0;
            const int64_t start = a->correction[row + i] * a->correction_factor;
            if (as_float)
                spmm_long_row(x, offset, last_group, weight, groups, paired, start, sums[i].f32);
            else /* may wrap on the way; the final sum fits */
                spmm_row_u8s8(x, offset, last_group, weight, groups, paired, (int32_t)(uint32_t)(uint64_t)start,
                              sums[i].i32);
        }
        if (codes && a->requantize)
            requantize_rows(a->requantize, &coded, row, n, sums);
        else
            unpack_rows(a, &target, row, n, sums, as_float);
    }
}

static void spmm_u8_kernel(const qsp_spmm *a, int64_t unit, int64_t chunk) { spmm_task(a, unit, chunk, 1); }
static void spmm_f32_kernel(const qsp_spmm *a, int64_t unit, int64_t chunk) { spmm_task(a, unit, chunk, 0); }
