/* The packer: a strided tensor -> planes of lanes, quantised to codes or as floats, with every gap filled. */

/* 16 neighbouring elements. */
QSP_INLINE f16x load16(const void *tensor, const int dtype, int64_t element)
{
    return dtype == QSP_F32 ? f16_load((const float *)tensor + element)
                            : f16_load_bf16((const uint16_t *)tensor + element);
}

/* n elements, `step` apart; zeros behind them. */
QSP_INLINE f16x load_n(const void *tensor, const int dtype, int64_t element, int64_t step, int n)
{
    QSP_ALIGNED(64) float line[16] = {0};
    if (dtype == QSP_F32) {
        const float *p = (const float *)tensor + element;
        if (step == 1)
            return f16_load_n(p, n);
        for (int i = 0; i < n; i++)
            line[i] = p[i * step];
    } else {
        const uint16_t *p = (const uint16_t *)tensor + element;
        if (step == 1)
            return f16_load_bf16_n(p, n);
        for (int i = 0; i < n; i++)
            line[i] = qsp_bf16_to_float(p[i * step]);
    }
    return f16_load(line);
}

enum { NEAREST, STOCHASTIC };

typedef struct {
    f16x inverse;
    i32x16 zero; /* minus 128 */
} quantizer;

/* Of channels [channel, channel + n), or for n = 0 of one channel. */
QSP_INLINE quantizer quantizer_of(const qsp_pack *a, int64_t channel, int n, const int rounding)
{
    quantizer q;
    const int64_t i = (a->view.plane + channel) * a->stride;
    q.inverse = n && a->stride ? f16_load_n(a->inverse + i, n) : f16_set1(a->inverse[i]);
    q.zero = i32_sub(n && a->stride ? i32_load_n(a->zero_point + i, n) : i32_set1(a->zero_point[i]), i32_set1(128));
    if (rounding == STOCHASTIC)
        q.inverse = f16_mul(q.inverse, f16_set1(QSP_FIXED_ONE));
    return q;
}

/* Codes minus 128, to be saturated when they become bytes. Stochastic ones never become -128: they are symmetric. */
QSP_INLINE i32x16 quantize16(f16x x, const quantizer *q, const int rounding, i32x16 random)
{
    i32x16 c = i32_nearest(f16_mul(x, q->inverse));
    if (rounding == STOCHASTIC)
        c = i32_max(i32_fixed_floor(i32_add(c, random)), i32_set1(-127));
    return i32_add(c, q->zero);
}

/* Everything of planes [first, last) that is not an element: gaps between images and rows, front, tail. */
static void fill_gaps(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last, const int codes)
{
    const qsp_grid *g = &a->grid;
    const int64_t size = codes ? 1 : (int64_t)sizeof(float);
    for (int64_t c = first; c < last; c++) {
        const int64_t plane = a->view.plane + c;
        uint8_t *p = (uint8_t *)a->planes + size * (block * g->block + plane * g->pitch);
        const uint8_t zero = codes ? (uint8_t)a->zero_point[plane * a->stride] : 0;
        /* what the taps read behind a plane's lanes is the front of the next plane, perhaps in the next block */
        const int64_t before = (plane ? plane : g->planes) - 1;
        qsp_fill(p, codes ? (uint8_t)a->zero_point[before * a->stride] : 0, size * g->front);
        int64_t done = g->front;
        for (int64_t i0 = 0; i0 < w->size[0]; i0++)
            for (int64_t i1 = 0; i1 < w->size[1]; i1++) {
                const int64_t start = g->front + a->view.origin + i0 * w->lane[0] + i1 * w->lane[1];
                qsp_fill(p + size * done, zero, size * (start - done));
                done = start + w->size[2];
            }
        /* the block's last plane also owns what lies between it and the next block */
        const int64_t end = plane + 1 == g->planes ? g->block - plane * g->pitch : g->pitch;
        qsp_fill(p + size * done, zero, size * (end - done));
    }
}

/* Where the first element of a run of lanes is, in the tensor, in its logical numbers and in the planes. */
typedef struct {
    int64_t element, element_step;
    int64_t number, number_step;
    int64_t lane, lanes;
} lane_run;

/* n channels of up to 16 lanes, transposed: channels are neighbours in memory. `whole`: sixteen of both. `even`: every
 * lane's numbers start with the first of a pair. */
QSP_INLINE void pack_tile(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, const int codes,
                          const int dtype, const int rounding, const int even, const int whole)
{
    const int lanes = whole ? 16 : (int)qsp_min(16, r->lanes - k);
    const int64_t pitch = a->grid.pitch, to = r->lane + (a->view.plane + c) * pitch + k;
    const int64_t element = r->element + k * r->element_step + c, number = r->number + k * r->number_step + c;
    const quantizer q = codes ? quantizer_of(a, c, n, rounding) : (quantizer){0};
    f16x floats[16];
    i32x16 tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++) {
        const int64_t lane = whole || j < lanes ? j : lanes - 1; /* lanes that do not exist repeat the last one */
        const int64_t at = element + lane * r->element_step;
        const f16x x = whole ? load16(a->tensor, dtype, at) : load_n(a->tensor, dtype, at, 1, n);
        if (!codes) {
            floats[j] = x;
            continue;
        }
        const uint64_t index = (uint64_t)(number + lane * r->number_step);
        tile[j] = quantize16(x, &q, rounding,
                             rounding == NEAREST ? i32_set1(0)
                             : even              ? random_run(a->seed, index)
                                                 : random_any(a->seed, index, 1));
    }
    if (!codes) {
        f16_transpose(floats);
        float *p = (float *)a->planes + to;
        QSP_UNROLL
        for (int j = 0; j < 16; j++)
            if (whole)
                f16_store(p + j * pitch, floats[j]);
            else if (j < n)
                f16_store_n(p + j * pitch, floats[j], lanes);
        return;
    }
    uint8_t *p = (uint8_t *)a->planes + to;
    if (whole) {
        codes_tile_store(p, pitch, tile);
        return;
    }
    QSP_ALIGNED(64) uint8_t bytes[16 * 16];
    codes_tile_store(bytes, 16, tile);
    for (int j = 0; j < n; j++)
        codes_copy_n(p + j * pitch, bytes + 16 * j, lanes);
}

/* All lanes of a run for one channel. */
QSP_INLINE void pack_line(const qsp_pack *a, const lane_run *r, int64_t c, const int codes, const int dtype,
                          const int rounding)
{
    const quantizer q = codes ? quantizer_of(a, c, 0, rounding) : (quantizer){0};
    const int64_t to = r->lane + (a->view.plane + c) * a->grid.pitch;
    const int64_t element = r->element + c * a->view.elem_c;
    const uint64_t number = (uint64_t)(r->number + c * a->view.index_c);
    for (int64_t k = 0; k < r->lanes; k += 16) {
        const int n = (int)qsp_min(16, r->lanes - k);
        const f16x x = n == 16 && r->element_step == 1
                           ? load16(a->tensor, dtype, element + k)
                           : load_n(a->tensor, dtype, element + k * r->element_step, r->element_step, n);
        if (!codes) {
            f16_store_n((float *)a->planes + to + k, x, n);
            continue;
        }
        const i32x16 random =
            rounding == NEAREST ? i32_set1(0)
                                : random_any(a->seed, number + (uint64_t)(k * r->number_step), r->number_step);
        codes_store_n((uint8_t *)a->planes + to + k, codes_from(quantize16(x, &q, rounding, random)), n);
    }
}

QSP_INLINE void pack_run(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int codes,
                         const int dtype, const int rounding, const int even)
{
    for (int64_t k = 0; k < r->lanes; k += 16) {
        int64_t c = first;
        for (; r->lanes - k >= 16 && c + 16 <= last; c += 16)
            pack_tile(a, r, k, c, 16, codes, dtype, rounding, even, 1);
        for (; c < last; c += 16)
            pack_tile(a, r, k, c, (int)qsp_min(16, last - c), codes, dtype, rounding, even, 0);
    }
}

QSP_INLINE void pack_task(const qsp_pack *a, int64_t block, int64_t first, int64_t last, const int codes,
                          const int dtype, const int rounding)
{
    const qsp_grid *g = &a->grid;
    const qsp_view *v = &a->view;
    qsp_walk w;
    qsp_walk_init(&w, g, v, qsp_images_in_block(a->images, g, block));
    fill_gaps(a, &w, block, first, last, codes);
    const int batch_inner = g->lane_b < g->lane_x;
    const int64_t number0 = batch_inner ? v->index_y : v->index_b, number1 = batch_inner ? v->index_x : v->index_y,
                  number2 = batch_inner ? v->index_b : v->index_x;
    const int64_t image = block * g->images;
    const int transposed = v->elem_c == 1 && w.elem[2] != 1;

    for (int64_t i0 = 0; i0 < w.size[0]; i0++)
        for (int64_t i1 = 0; i1 < w.size[1]; i1++) {
            const lane_run r = {
                .element = v->elem + image * v->elem_b + i0 * w.elem[0] + i1 * w.elem[1],
                .element_step = w.elem[2],
                .number = v->index + image * v->index_b + i0 * number0 + i1 * number1,
                .number_step = number2,
                .lane = block * g->block + g->front + v->origin + i0 * w.lane[0] + i1 * w.lane[1],
                .lanes = w.size[2],
            };
            if (!transposed)
                for (int64_t c = first; c < last; c++)
                    pack_line(a, &r, c, codes, dtype, rounding);
            else if ((r.number | r.number_step | first) & 1)
                pack_run(a, &r, first, last, codes, dtype, rounding, 0);
            else
                pack_run(a, &r, first, last, codes, dtype, rounding, 1);
        }
}

static void pack_u8(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32 && a->stochastic)
        pack_task(a, block, first, last, 1, QSP_F32, STOCHASTIC);
    else if (a->dtype == QSP_F32)
        pack_task(a, block, first, last, 1, QSP_F32, NEAREST);
    else if (a->stochastic)
        pack_task(a, block, first, last, 1, QSP_BF16, STOCHASTIC);
    else
        pack_task(a, block, first, last, 1, QSP_BF16, NEAREST);
}

static void pack_f32(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    if (a->dtype == QSP_F32)
        pack_task(a, block, first, last, 0, QSP_F32, NEAREST);
    else
        pack_task(a, block, first, last, 0, QSP_BF16, NEAREST);
}
