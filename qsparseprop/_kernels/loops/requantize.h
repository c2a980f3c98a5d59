/* The end of a product whose output is codes: sums of up to QSP_ROW_BLOCK rows and one unit of lanes -> codes in planes. */

typedef struct {
    int64_t block, lane; /* of the planes */
    int64_t size;        /* lanes of the unit up to the last pixel */
    int64_t end;         /* lanes of the block up to there */
} coded_unit;

static void locate_coded(coded_unit *u, const qsp_coded *c, int64_t unit)
{
    const int64_t units = (coded_lanes(c, c->grid.images) + QSP_UNIT - 1) / QSP_UNIT;
    u->block = unit / units;
    u->lane = unit % units * QSP_UNIT;
    u->end = coded_lanes(c, coded_images(c, u->block));
    u->size = qsp_min(QSP_UNIT, u->end - u->lane);
}

/* One row of a unit: codes in the order of the lanes. */
QSP_INLINE void requantize_unit(const qsp_requantize *q, int64_t row, const row_sums *sums, const uint8_t *residual,
                                uint8_t *codes)
{
    const f32x16 multiplier = f32x16_set1(q->multiplier[row]), offset = f32x16_set1(q->offset[row]);
    const f32x16 low = f32x16_set1(q->low[row]), high = f32x16_set1(q->high[row]);
    i32x16 v[QSP_UNIT / 16], r[QSP_UNIT / 16];
    if (residual)
        spmm_unit_from_codes(r, residual);
    QSP_UNROLL
    for (int i = 0; i < QSP_UNIT / 16; i++) {
        const f32x16 product = f32x16_mul(f32x16_load_i32(sums->i32 + 16 * i), multiplier);
        f32x16 other = offset;
        if (residual)
            other = f32x16_mul(f32x16_from_i32(r[i]), f32x16_set1(q->residual_multiplier[row]));
        v[i] = i32x16_nearest(coded_result(product, offset, residual ? &other : NULL, low, high));
    }
    spmm_unit_to_codes(codes, v);
    if (q->table)
        spmm_unit_look_up(codes, codes, q->table + row * q->table_step);
}

/* Whether all lanes of a unit are pixels. */
QSP_INLINE int has_no_gaps(const uint8_t *keep)
{
    uint8_t all = 255;
    for (int k = 0; k < QSP_UNIT; k++)
        all &= keep[k];
    return all == 255;
}

/* Rows [row, row + n) of a unit, with the gaps between pixels; the first unit of a block brings the ends of its planes. */
static void requantize_rows(const qsp_requantize *q, const coded_unit *u, int64_t row, int n, const row_sums *sums)
{
    const qsp_grid *g = &q->out.grid;
    const uint8_t *keep = q->keep + u->lane;
    const int gaps = !has_no_gaps(keep);
    const int64_t at = u->block * g->block + (q->out.plane + row) * g->pitch + g->front + u->lane;
    const int64_t other = u->block * q->residual_block + row * q->residual_pitch + u->lane;
    QSP_ALIGNED(64) uint8_t part[QSP_UNIT];
    for (int i = 0; i < n; i++) {
        uint8_t *to = q->out.planes + at + i * g->pitch;
        uint8_t *codes = u->size == QSP_UNIT ? to : part;
        requantize_unit(q, row + i, sums + i, q->residual ? q->residual + other + i * q->residual_pitch : NULL, codes);
        for (int k = 0; gaps && k < QSP_UNIT; k++)
            codes[k] = (uint8_t)((codes[k] & keep[k]) | (q->out.zero & ~keep[k]));
        if (codes == part)
            memcpy(to, part, (size_t)u->size);
        if (u->lane == 0)
            coded_ends(&q->out, u->block, row + i, u->end);
    }
}

/* Where a task's results go; returns the first lane of its unit in the planes that it reads. */
static int64_t locate_task(const qsp_spmm *a, int64_t unit, unit_target *target, coded_unit *coded)
{
    const coded_unit none = {0, 0, 0, 0};
    qsp_unit where;
    *coded = none;
    if (a->requantize) {
        target->columns = 0;
        target->lane_scale = NULL;
        locate_coded(coded, &a->requantize->out, unit);
        return coded->block * a->grid.block + coded->lane;
    }
    locate_unit(&where, &a->grid, &a->view, a->images, unit);
    target_init(target, &a->view, &a->grid, &where, a->dtype, a->out);
    target->lane_scale = a->lane_scale ? a->lane_scale + where.block * a->grid.images + where.lane : NULL;
    return where.block * a->grid.block + a->view.origin + where.lane;
}
