/* The packer: a strided tensor -> planes of lanes, quantised to codes or as floats, with every gap filled. */

QSP_INLINE f16x load_elements(const qsp_pack *a, int64_t element, int64_t step, int n)
{
    if (a->dtype == QSP_F32) {
        const float *p = (const float *)a->tensor + element;
        if (step == 1)
            return n == 16 ? f16_load(p) : f16_load_n(p, n);
        QSP_ALIGNED(64) float line[16] = {0};
        for (int i = 0; i < n; i++)
            line[i] = p[i * step];
        return f16_load_n(line, n);
    }
    const uint16_t *p = (const uint16_t *)a->tensor + element;
    if (step == 1)
        return f16_load_bf16_n(p, n);
    QSP_ALIGNED(64) uint16_t line[16] = {0};
    for (int i = 0; i < n; i++)
        line[i] = p[i * step];
    return f16_load_bf16_n(line, n);
}

/* Dither of n elements whose logical numbers are `step` apart. */
QSP_INLINE f16x dither(uint64_t seed, uint64_t index, int64_t step, int n)
{
    if (step == 1 && !(index & 1))
        return dither_run(seed, index);
    QSP_ALIGNED(64) float line[16] = {0};
    for (int i = 0; i < n; i++)
        line[i] = (float)qsp_random_bits(seed, index + (uint64_t)(i * step)) * QSP_DITHER_STEP + QSP_DITHER_HALF;
    return f16_load_n(line, n);
}

/* Where codes may lie before the zero point is added: -128 never appears, so a code around 128 starts at 1. */
typedef struct {
    f16x zero, low, high;
} code_range;

QSP_INLINE code_range code_range_of(f16x zero)
{
    const code_range r = {zero, f16_max(f16_sub(f16_zero(), zero), f16_set1(-127.0f)),
                          f16_sub(f16_set1(255.0f), zero)};
    return r;
}

/* q = clamp(nearest(x / scale)) + zero point, or with u in (0, 1): clamp(floor(x / scale + u)) + zero point. */
QSP_INLINE u8x16 quantize16(f16x x, f16x inverse, code_range r)
{
    return codes_from(f16_add(f16_nearest(f16_max(f16_min(f16_mul(x, inverse), r.high), r.low)), r.zero));
}

QSP_INLINE u8x16 quantize16_stochastic(f16x x, f16x inverse, code_range r, f16x u)
{
    return codes_from(f16_add(f16_max(f16_min(f16_floor(f16_add(f16_mul(x, inverse), u)), r.high), r.low), r.zero));
}

/* Everything of planes [first, last) that is not an element: gaps between images and rows, front, tail. */
static void fill_gaps(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last, const int codes)
{
    const qsp_grid *g = &a->grid;
    const int64_t size = codes ? 1 : (int64_t)sizeof(float);
    for (int64_t c = first; c < last; c++) {
        const int64_t plane = a->view.plane + c;
        uint8_t *p = (uint8_t *)a->planes + size * (block * g->block + plane * g->pitch);
        const uint8_t zero = codes ? (uint8_t)a->zero_point[c * a->stride] : 0;
        int64_t done = 0;
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

QSP_INLINE void pack_task(const qsp_pack *a, int64_t block, int64_t first, int64_t last, const int codes,
                          const int stochastic)
{
    const qsp_grid *g = &a->grid;
    const qsp_view *v = &a->view;
    qsp_walk w;
    qsp_walk_init(&w, g, v, qsp_images_in_block(a->images, g, block));
    fill_gaps(a, &w, block, first, last, codes);
    const int batch_inner = g->lane_b < g->lane_x;
    const int64_t numbers[3] = {v->index_b, v->index_y, v->index_x};
    const int64_t number0 = numbers[batch_inner ? 1 : 0], number1 = numbers[batch_inner ? 2 : 1],
                  number2 = numbers[batch_inner ? 0 : 2];
    const int transposed = v->elem_c == 1 && w.elem[2] != 1;

    for (int64_t i0 = 0; i0 < w.size[0]; i0++)
        for (int64_t i1 = 0; i1 < w.size[1]; i1++) {
            const int64_t image = block * g->images;
            const int64_t element = v->elem + image * v->elem_b + i0 * w.elem[0] + i1 * w.elem[1];
            const int64_t number = v->index + image * v->index_b + i0 * number0 + i1 * number1;
            const int64_t lane = block * g->block + g->front + v->origin + i0 * w.lane[0] + i1 * w.lane[1];
            for (int64_t k = 0; transposed && k < w.size[2]; k += 16) {
                const int lanes = (int)qsp_min(16, w.size[2] - k);
                for (int64_t c = first; c < last; c += 16) {
                    const int n = (int)qsp_min(16, last - c);
                    const int64_t to = lane + (v->plane + c) * g->pitch + k;
                    if (codes) {
                        const f16x inverse = a->stride ? f16_load_n(a->inverse + c, n) : f16_set1(a->inverse[0]);
                        const f16x zero = a->stride ? f16_load_i32_n(a->zero_point + c, n)
                                                    : f16_set1((float)a->zero_point[0]);
                        const code_range r = code_range_of(zero);
                        u8x16 tile[16];
                        for (int j = 0; j < 16; j++) {
                            const int64_t i2 = k + (j < lanes ? j : lanes - 1);
                            const f16x x = load_elements(a, element + i2 * w.elem[2] + c, 1, n);
                            tile[j] = stochastic
                                          ? quantize16_stochastic(x, inverse, r,
                                                                  dither(a->seed, (uint64_t)(number + i2 * number2 + c),
                                                                         1, n))
                                          : quantize16(x, inverse, r);
                        }
                        codes_transpose(tile);
                        uint8_t *p = (uint8_t *)a->planes + to;
                        if (n == 16 && lanes == 16) {
                            QSP_UNROLL
                            for (int j = 0; j < 16; j++)
                                codes_store(p + j * g->pitch, tile[j]);
                        } else {
                            for (int j = 0; j < n; j++)
                                codes_store_n(p + j * g->pitch, tile[j], lanes);
                        }
                    } else {
                        f16x tile[16];
                        for (int j = 0; j < 16; j++)
                            tile[j] = load_elements(a, element + (k + (j < lanes ? j : lanes - 1)) * w.elem[2] + c, 1, n);
                        f16_transpose(tile);
                        float *p = (float *)a->planes + to;
                        for (int j = 0; j < n; j++)
                            f16_store_n(p + j * g->pitch, tile[j], lanes);
                    }
                }
            }
            for (int64_t c = first; !transposed && c < last; c++) {
                const f16x inverse = f16_set1(codes ? a->inverse[c * a->stride] : 1.0f);
                const f16x zero = f16_set1(codes ? (float)a->zero_point[c * a->stride] : 0.0f);
                const code_range r = code_range_of(zero);
                const int64_t to = lane + (v->plane + c) * g->pitch;
                for (int64_t k = 0; k < w.size[2]; k += 16) {
                    const int n = (int)qsp_min(16, w.size[2] - k);
                    const f16x x = load_elements(a, element + c * v->elem_c + k * w.elem[2], w.elem[2], n);
                    if (!codes) {
                        f16_store_n((float *)a->planes + to + k, x, n);
                        continue;
                    }
                    const u8x16 q =
                        stochastic ? quantize16_stochastic(
                                         x, inverse, r,
                                         dither(a->seed, (uint64_t)(number + c * v->index_c + k * number2), number2, n))
                                   : quantize16(x, inverse, r);
                    codes_store_n((uint8_t *)a->planes + to + k, q, n);
                }
            }
        }
}

static void pack_u8(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    if (a->stochastic)
        pack_task(a, block, first, last, 1, 1);
    else
        pack_task(a, block, first, last, 1, 0);
}

static void pack_f32(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    pack_task(a, block, first, last, 0, 0);
}

/* Range of n elements: the absolute maximum over bit patterns, so that a NaN anywhere is the result. */
static void range(const void *x, int dtype, int64_t n, int64_t step, qsp_range *out)
{
    const qsp_pack a = {.dtype = dtype, .tensor = x};
    if (n <= 0)
        return;
    u32x16 bits[4];
    f16x low[4], high[4];
    for (int i = 0; i < 4; i++) {
        bits[i] = u32_zero();
        low[i] = f16_set1(out->min);
        high[i] = f16_set1(out->max);
    }
    int64_t k = 0;
    for (; step == 1 && k + 64 <= n; k += 64) {
        QSP_UNROLL
        for (int i = 0; i < 4; i++) {
            const f16x v = load_elements(&a, k + 16 * i, 1, 16);
            bits[i] = u32_max_abs(bits[i], v);
            low[i] = f16_min(low[i], v);
            high[i] = f16_max(high[i], v);
        }
    }
    for (; k < n; k += 16) {
        const int m = (int)qsp_min(16, n - k);
        QSP_ALIGNED(64) float line[16] = {0};
        f16_store(line, load_elements(&a, k * step, step, m));
        for (int i = m; i < 16; i++) /* not zeros, which may lie outside of the range */
            line[i] = line[0];
        const f16x v = f16_load(line);
        bits[0] = u32_max_abs(bits[0], v);
        low[0] = f16_min(low[0], v);
        high[0] = f16_max(high[0], v);
    }
    for (int i = 0; i < 4; i++) {
        const uint32_t greatest = u32_greatest(bits[i]);
        float absmax;
        memcpy(&absmax, &greatest, 4);
        if (!(absmax <= out->absmax) && out->absmax == out->absmax)
            out->absmax = absmax;
        const float least = f16_least(low[i]), most = f16_greatest(high[i]);
        out->min = least < out->min ? least : out->min;
        out->max = most > out->max ? most : out->max;
    }
}
