/* The packer: a strided tensor -> planes of lanes, quantised to codes or as floats, with every gap filled.
 *
 * An epilogue or its gradient can be computed on the way, so that its result is not written and read again: what is
 * packed is an element of the tensor (PLAIN), what epilogue.h makes of it, in line (CLAMPED) or by a function for a part
 * of a row (MADE), or the gradient of that (GRADIENT). */
enum { PLAIN, CLAMPED, MADE, GRADIENT };

/* LIMITED is nearest even with codes that may leave their range. */
enum { NEAREST, LIMITED, RANDOM, LOGARITHMIC };

QSP_INLINE int rounding_of(const qsp_scheme *s)
{
    return s->kind == QSP_LUQ ? LOGARITHMIC : qsp_is_random(s) ? RANDOM : qsp_is_limited(s) ? LIMITED : NEAREST;
}

typedef struct {
    f16x inverse;
    i32x16 zero, least, most; /* minus 128; zero by another 128 less where the dither brings them along */
} quantizer;

QSP_INLINE quantizer quantizer_from(const qsp_scheme *s, f16x inverse, i32x16 zero_point, const int rounding)
{
    const int32_t levels = qsp_levels(s);
    quantizer q;
    q.inverse = rounding == LOGARITHMIC ? f16_mul(inverse, f16_set1(QSP_FIXED_ONE)) : inverse;
    q.zero = i32_sub(zero_point, i32_set1(rounding == RANDOM ? 256 : 128));
    q.least = s->kind == QSP_AFFINE ? i32_set1(-128) : i32_max(i32_sub(q.zero, i32_set1(levels)), i32_set1(-128));
    q.most = i32_set1(s->around_zero ? levels : 2 * levels + 1 - 128);
    return q;
}

/* Of channels [channel, channel + n), or for n = 0 of one channel. */
QSP_INLINE quantizer quantizer_of(const qsp_pack *a, int64_t channel, int n, const int rounding)
{
    const int64_t i = (a->view.plane + channel) * a->stride;
    return quantizer_from(&a->scheme, n && a->stride ? f16_load_n(a->inverse + i, n) : f16_set1(a->inverse[i]),
                          n && a->stride ? i32_load_n(a->zero_point + i, n) : i32_set1(a->zero_point[i]), rounding);
}

/* Between neighbouring powers of two at random, below 1 between 0 and 1; v and the result's fraction are in fixed point.
 * With 2^e <= |v| < 2^(e + 1) it is floor(|v| / 2^e + u) 2^e. */
QSP_INLINE i32x16 round_to_power(i32x16 v, i32x16 random)
{
    const i32x16 a = i32_max(v, i32_sub(i32_set1(0), v)), fixed = i32_set1(QSP_FIXED_BITS);
    const i32x16 e = i32_max(i32_sub(i32_log2(a), fixed), i32_set1(0));
    const i32x16 whole = i32_shift_right(i32_add(a, i32_shift_left(random, e)), i32_add(e, fixed));
    return i32_signed(i32_shift_left(whole, e), v);
}

/* Codes minus 128, to be saturated when they become bytes. `dither` are the bits of 128 + u: with them added everything
 * is positive, and the fraction is cut off. qsp_scale sees to it that no product is beyond the last code. */
QSP_INLINE i32x16 quantize16(f16x x, const quantizer *q, const int rounding, i32x16 dither)
{
    f16x v = f16_mul(x, q->inverse);
    if (rounding == RANDOM)
        return i32_add(i32_truncated(f16_add(v, f16_from_bits(dither))), q->zero);
    if (rounding == LIMITED) /* what does not fit into an integer would change its sign */
        v = f16_max(f16_min(v, f16_set1(1024.0f)), f16_set1(-1024.0f));
    i32x16 c = i32_nearest(v);
    if (rounding == LOGARITHMIC)
        return i32_add(round_to_power(c, i32_sub(dither, i32_set1(QSP_DITHER_BITS))), q->zero);
    c = i32_add(c, q->zero);
    return rounding == NEAREST ? c : i32_min(i32_max(c, q->least), q->most);
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
    int64_t row, row_step; /* the same in rows of channels, where something is computed on the way */
    int64_t number, number_step;
    int64_t lane, lanes;
} lane_run;

QSP_INLINE int source_of(const qsp_pack *a)
{
    return a->gradient ? GRADIENT : !a->epilogue ? PLAIN : a->epilogue->kind == QSP_CLAMP ? CLAMPED : MADE;
}

/* Whether the elements of every lane, from channel `first` on, start with the first of four that share a random number. */
QSP_INLINE int has_fours(const lane_run *r, int64_t first) { return ((r->number | r->number_step | first) & 3) == 0; }

/* Random numbers of row j of a tile into dither[j % 2]. */
QSP_INLINE void next_dither(const qsp_pack *a, random_rows *random, i32x16 *dither, int64_t number, const int j,
                            const int rounding, const int fours)
{
    if (rounding >= RANDOM && fours && j % 2 == 0)
        random_rows_next(random, dither);
    else if (rounding >= RANDOM && !fours)
        dither[j % 2] = random_any(a->seed, (uint64_t)number, 1);
}

/* 16 channels of 16 lanes, transposed: channels are neighbours in memory. */
QSP_INLINE void pack_tile(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, const int dtype, const int rounding)
{
    const quantizer q = quantizer_of(a, c, 16, rounding);
    const int64_t number = r->number + k * r->number_step + c;
    random_rows random = random_rows_from(a->seed, (uint64_t)number, r->number_step);
    i32x16 dither[2] = {i32_set1(0), i32_set1(0)}, tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++) {
        const f16x x = load16(a->tensor, dtype, r->element + (k + j) * r->element_step + c);
        next_dither(a, &random, dither, number + j * r->number_step, j, rounding, 1);
        tile[j] = quantize16(x, &q, rounding, dither[j % 2]);
    }
    codes_tile_store((uint8_t *)a->planes + r->lane + (a->view.plane + c) * a->grid.pitch + k, a->grid.pitch, tile);
}

/* n channels of `lanes` lanes, sixteen of both if `whole`, otherwise at most: in a loop, since that is as fast as long as
 * not all of them stay in registers. `fours`: every lane's numbers start with the first of four that share a random
 * number. */
QSP_INLINE void pack_part(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, int lanes, const int dtype,
                          const int rounding, const int fours, const int whole)
{
    const quantizer q = quantizer_of(a, c, n, rounding);
    const int64_t pitch = a->grid.pitch, number = r->number + k * r->number_step + c;
    uint8_t *p = (uint8_t *)a->planes + r->lane + (a->view.plane + c) * pitch + k;
    random_rows random = random_rows_from(a->seed, (uint64_t)number, r->number_step);
    i32x16 dither[2] = {i32_set1(0), i32_set1(0)}, tile[16];
    for (int i = 0; i < 16; i += 2) {
        QSP_UNROLL
        for (int j = 0; j < 2; j++) {
            const int64_t lane = whole || i + j < lanes ? i + j : lanes - 1; /* those that do not exist repeat the last */
            const int64_t at = r->element + (k + lane) * r->element_step + c;
            const f16x x = whole ? load16(a->tensor, dtype, at) : load_n(a->tensor, dtype, at, 1, n);
            next_dither(a, &random, dither, number + lane * r->number_step, j, rounding, fours);
            tile[i + j] = quantize16(x, &q, rounding, dither[j]);
        }
    }
    if (whole) {
        codes_tile_store(p, pitch, tile);
        return;
    }
    QSP_ALIGNED(64) uint8_t bytes[16 * 16];
    codes_tile_store(bytes, 16, tile);
    for (int i = 0; i < n; i++)
        codes_copy_n(p + i * pitch, bytes + 16 * i, lanes);
}

/* The same as floats; `whole`: sixteen of both. */
QSP_INLINE void pack_floats(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, int lanes,
                            const int dtype, const int whole)
{
    f16x tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++) {
        const int64_t lane = whole || j < lanes ? j : lanes - 1;
        const int64_t at = r->element + (k + lane) * r->element_step + c;
        tile[j] = whole ? load16(a->tensor, dtype, at) : load_n(a->tensor, dtype, at, 1, n);
    }
    f16_transpose(tile);
    float *p = (float *)a->planes + r->lane + (a->view.plane + c) * a->grid.pitch + k;
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        if (whole)
            f16_store(p + i * a->grid.pitch, tile[i]);
        else if (i < n)
            f16_store_n(p + i * a->grid.pitch, tile[i], lanes);
}

enum { BAND = 64, BAND_AHEAD = 4 };

/* Of what is computed on the way; 1 where nothing is. */
QSP_INLINE int64_t source_channels(const qsp_pack *a)
{
    return a->epilogue ? a->epilogue->channels : a->gradient ? a->gradient->channels : 1;
}

QSP_INLINE void prefetch_row(const void *p, int64_t at, int bytes, const int write)
{
    for (int b = 0; p && b < bytes; b += 64)
        if (write)
            QSP_PREFETCH_WRITE((const char *)p + at + b);
        else
            QSP_PREFETCH_READ((const char *)p + at + b);
}

/* Ask for what n channels of a row will read and write. */
QSP_INLINE void source_prefetch(const qsp_pack *a, int64_t row, int64_t c, int n, const int dtype, const int source)
{
    const int width = dtype == QSP_F32 ? 4 : dtype == QSP_BF16 ? 2 : 1;
    const int64_t at = row * source_channels(a) + c;
    if (source == GRADIENT) {
        const qsp_epilogue_grad *g = a->gradient;
        prefetch_row(g->dy, at * width, n * width, 0);
        prefetch_row(g->g, at * width, n * width, 1);
        prefetch_row(g->codes, at, n, 0);
        if (saves_slopes(g->kind))
            prefetch_row(g->saved, at, n, 0);
        return;
    }
    const qsp_epilogue *f = a->epilogue;
    prefetch_row(f->x, at * width, n * width, 0);
    prefetch_row(f->residual, at * width, n * width, 0);
    prefetch_row(f->out, at * width, n * width, 1);
    prefetch_row(f->codes, at, n, 1);
    if (source == MADE && saves_slopes(f->kind))
        prefetch_row(f->saved, at, n, 1);
}

/* n channels from `c` on of a row, in line if they are `whole`. `variant`: of a gradient, or whether there is a scale. */
QSP_INLINE f16x source_at(const qsp_pack *a, int64_t row, int64_t c, int n, const int dtype, const int source,
                          const int variant, const int whole)
{
    const qsp_epilogue *f = a->epilogue;
    if (source == CLAMPED)
        return whole ? epilogue_at(f, row, c, 16, dtype, QSP_CLAMP, variant, f->residual != NULL, f->codes != NULL,
                                   f->saved != NULL)
                     : epilogue_any(f, row, c, n);
    return whole ? epilogue_grad_16(a->gradient, row, c, dtype, variant) : epilogue_grad_any(a->gradient, row, c, n);
}

QSP_INLINE int variant_of_source(const qsp_pack *a, const int source)
{
    return source == GRADIENT ? variant_of(a->gradient) : source == CLAMPED && a->epilogue->scale;
}

/* n channels, at most BAND, of up to 16 lanes of what is computed on the way; `sixteens`: a multiple of sixteen. A
 * lane's channels come one after the other, since codes, masks and results in floating point are read and written
 * beside: in whole cache lines, which would otherwise be gone from the first cache before their next sixteen channels
 * come, where lanes are images. */
QSP_INLINE void pack_band(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, const int dtype,
                          const int rounding, const int source, const int variant, const int fours, const int sixteens)
{
    QSP_ALIGNED(64) uint8_t rows[16][BAND];
    QSP_ALIGNED(64) float line[BAND];
    row_maker *make = source == MADE ? row_maker_of(a->epilogue) : NULL;
    const int lanes = (int)qsp_min(16, r->lanes - k), vectors = (n + 15) / 16;
    /* neighbours need no help where rows are short */
    const int far = r->row_step > 1 || source_channels(a) >= 8 * BAND;
    const int64_t pitch = a->grid.pitch, number = r->number + k * r->number_step + c;
    uint8_t *to = (uint8_t *)a->planes + r->lane + (a->view.plane + c) * pitch + k;
    quantizer q[BAND / 16];
    random_rows random[BAND / 16];
    i32x16 dither[BAND / 16][2];
    if (lanes < 16)
        memset(rows, 0, sizeof(rows));
    for (int v = 0; v < vectors; v++) {
        q[v] = quantizer_of(a, c + 16 * v, sixteens ? 16 : (int)qsp_min(16, n - 16 * v), rounding);
        random[v] = random_rows_from(a->seed, (uint64_t)(number + 16 * v), r->number_step);
        dither[v][0] = dither[v][1] = i32_set1(0);
    }
    for (int j = 0; j < lanes; j++) {
        const int64_t row = r->row + (k + j) * r->row_step;
        if (far && k + j + BAND_AHEAD < r->lanes)
            source_prefetch(a, row + BAND_AHEAD * r->row_step, c, n, dtype, source);
        if (source == MADE)
            make(a->epilogue, row, c, n, line);
        QSP_UNROLL /* loads of their own, whose strides the processor learns */
        for (int v = 0; v < vectors; v++) {
            const int width = sixteens ? 16 : (int)qsp_min(16, n - 16 * v);
            const f16x x = source == MADE ? f16_load(line + 16 * v)
                                          : source_at(a, row, c + 16 * v, width, dtype, source, variant, sixteens);
            next_dither(a, &random[v], dither[v], number + 16 * v + j * r->number_step, j, rounding, fours);
            codes_store(rows[j] + 16 * v, codes_from(quantize16(x, &q[v], rounding, dither[v][j % 2])));
        }
    }
    for (int v = 0; v < vectors; v++) {
        u8x16 tile[16];
        for (int j = 0; j < 16; j++)
            tile[j] = u8_load(rows[j] + 16 * v);
        codes_transpose(tile);
        for (int i = 0; i < 16 && 16 * v + i < n; i++)
            if (lanes == 16)
                codes_store(to + (16 * v + i) * pitch, tile[i]);
            else
                codes_store_n(to + (16 * v + i) * pitch, tile[i], lanes);
    }
}

/* All lanes of a run for n channels, not neighbours in memory: one, or the four that share random numbers. */
QSP_INLINE void pack_lines(const qsp_pack *a, const lane_run *r, int64_t first, const int n, const int codes,
                           const int dtype, const int rounding)
{
    quantizer q[4];
    for (int i = 0; i < n; i++)
        q[i] = codes ? quantizer_of(a, first + i, 0, rounding) : (quantizer){0};
    const int64_t pitch = a->grid.pitch, to = r->lane + (a->view.plane + first) * pitch;
    const int64_t element = r->element + first * a->view.elem_c;
    const uint64_t number = (uint64_t)(r->number + first * a->view.index_c);
    i32x16 dither[4] = {i32_set1(0)};
    for (int64_t k = 0; k < r->lanes; k += 16) {
        const int lanes = (int)qsp_min(16, r->lanes - k);
        const uint64_t index = number + (uint64_t)(k * r->number_step);
        if (codes && rounding >= RANDOM && n == 4)
            random_fours(a->seed, index, r->number_step, dither);
        else if (codes && rounding >= RANDOM)
            dither[0] = random_any(a->seed, index, r->number_step);
        QSP_UNROLL
        for (int i = 0; i < n; i++) {
            const int64_t at = element + i * a->view.elem_c + k * r->element_step;
            const f16x x = lanes == 16 && r->element_step == 1 ? load16(a->tensor, dtype, at)
                                                               : load_n(a->tensor, dtype, at, r->element_step, lanes);
            if (codes)
                codes_store_n((uint8_t *)a->planes + to + i * pitch + k,
                              codes_from(quantize16(x, &q[i], rounding, dither[i])), lanes);
            else
                f16_store_n((float *)a->planes + to + i * pitch + k, x, lanes);
        }
    }
}

/* Channels [first, last) of a run of lanes. */
typedef void run_packer(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last);

/* The same for all channels of a run; `fours` as in pack_part, here of channels that are not neighbours. */
QSP_COPIED void run_of_lines(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                             const int rounding, const int fours)
{
    int64_t c = first;
    for (; rounding >= RANDOM && fours && c + 4 <= last; c += 4)
        pack_lines(a, r, c, 4, 1, dtype, rounding);
    for (; c < last; c++)
        pack_lines(a, r, c, 1, 1, dtype, rounding);
}

QSP_COPIED void run_of_tiles(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                             const int rounding)
{
    for (int64_t k = 0; k < r->lanes; k += 16) {
        const int lanes = (int)qsp_min(16, r->lanes - k);
        int64_t c = first;
        for (; lanes == 16 && c + 16 <= last; c += 16)
            pack_tile(a, r, k, c, dtype, rounding);
        for (; c < last; c += 16)
            pack_part(a, r, k, c, (int)qsp_min(16, last - c), lanes, dtype, rounding, 1, 0);
    }
}

/* What has no copy of its own below: other roundings, and runs without `fours`. */
QSP_APART void lines_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
{
    const int rounding = rounding_of(&a->scheme);
    if (rounding == LOGARITHMIC && has_fours(r, first))
        run_of_lines(a, r, first, last, a->dtype, LOGARITHMIC, 1);
    else
        run_of_lines(a, r, first, last, a->dtype, rounding, 0);
}

QSP_COPIED void run_of_any_tiles(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                                 const int rounding, const int fours)
{
    for (int64_t k = 0; k < r->lanes; k += 16) {
        const int lanes = (int)qsp_min(16, r->lanes - k);
        int64_t c = first;
        for (; lanes == 16 && c + 16 <= last; c += 16)
            pack_part(a, r, k, c, 16, 16, dtype, rounding, fours, 1);
        for (; c < last; c += 16)
            pack_part(a, r, k, c, (int)qsp_min(16, last - c), lanes, dtype, rounding, fours, 0);
    }
}

QSP_APART void tiles_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
{
    const int rounding = rounding_of(&a->scheme);
    if (rounding == RANDOM)
        run_of_any_tiles(a, r, first, last, a->dtype, RANDOM, 0);
    else
        run_of_any_tiles(a, r, first, last, a->dtype, rounding, has_fours(r, first));
}

/* All channels of a run as floats. */
QSP_COPIED void run_of_floats(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                              const int transposed)
{
    for (int64_t c = first; !transposed && c < last; c++)
        pack_lines(a, r, c, 1, 0, dtype, NEAREST);
    for (int64_t k = 0; transposed && k < r->lanes; k += 16) {
        const int lanes = (int)qsp_min(16, r->lanes - k);
        int64_t c = first;
        for (; lanes == 16 && c + 16 <= last; c += 16)
            pack_floats(a, r, k, c, 16, 16, dtype, 1);
        for (; c < last; c += 16)
            pack_floats(a, r, k, c, (int)qsp_min(16, last - c), lanes, dtype, 0);
    }
}

/* A band of any kind, for those that are not a multiple of sixteen channels, and for roundings without a copy below. */
QSP_APART void band_any(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n)
{
    const int source = source_of(a), variant = variant_of_source(a, source);
    pack_band(a, r, k, c, n, a->dtype, rounding_of(&a->scheme), source, variant, has_fours(r, c), 0);
}

QSP_COPIED void run_of_bands(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                             const int rounding, const int source, const int variant)
{
    for (int64_t k = 0; k < r->lanes; k += 16)
        for (int64_t c = first; c < last; c += BAND) {
            const int n = (int)qsp_min(BAND, last - c);
            if (n % 16 == 0)
                pack_band(a, r, k, c, n, dtype, rounding, source, variant, 1, 1);
            else
                band_any(a, r, k, c, n);
        }
}

QSP_APART void grad_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
{
    for (int64_t k = 0; k < r->lanes; k += 16)
        for (int64_t c = first; c < last; c += BAND)
            band_any(a, r, k, c, (int)qsp_min(BAND, last - c));
}

/* Of what layers use by default, the compiler makes copies of the loops: these arguments are constants. */
#define RUN_PACKER(name, run, ...)                                                                 \
    QSP_APART void name(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)         \
    {                                                                                              \
        run(a, r, first, last, __VA_ARGS__);                                                       \
    }
RUN_PACKER(lines_f32_nearest, run_of_lines, QSP_F32, NEAREST, 1)
RUN_PACKER(lines_f32_random, run_of_lines, QSP_F32, RANDOM, 1)
RUN_PACKER(lines_bf16_nearest, run_of_lines, QSP_BF16, NEAREST, 1)
RUN_PACKER(lines_bf16_random, run_of_lines, QSP_BF16, RANDOM, 1)
RUN_PACKER(tiles_f32_nearest, run_of_tiles, QSP_F32, NEAREST)
RUN_PACKER(tiles_f32_random, run_of_tiles, QSP_F32, RANDOM)
RUN_PACKER(tiles_bf16_nearest, run_of_tiles, QSP_BF16, NEAREST)
RUN_PACKER(tiles_bf16_random, run_of_tiles, QSP_BF16, RANDOM)
RUN_PACKER(lines_f32_floats, run_of_floats, QSP_F32, 0)
RUN_PACKER(lines_bf16_floats, run_of_floats, QSP_BF16, 0)
RUN_PACKER(tiles_f32_floats, run_of_floats, QSP_F32, 1)
RUN_PACKER(tiles_bf16_floats, run_of_floats, QSP_BF16, 1)
RUN_PACKER(normed_u8, run_of_bands, QSP_U8, NEAREST, CLAMPED, 1)
RUN_PACKER(normed_f32, run_of_bands, QSP_F32, NEAREST, CLAMPED, 1)
RUN_PACKER(normed_bf16, run_of_bands, QSP_BF16, NEAREST, CLAMPED, 1)
RUN_PACKER(clamped_f32, run_of_bands, QSP_F32, NEAREST, CLAMPED, 0)
RUN_PACKER(clamped_bf16, run_of_bands, QSP_BF16, NEAREST, CLAMPED, 0)
RUN_PACKER(made_any, run_of_bands, a->dtype, NEAREST, MADE, 0)
RUN_PACKER(norm_grad_f32, run_of_bands, QSP_F32, RANDOM, GRADIENT, GRAD_NORMED)
RUN_PACKER(norm_grad_bf16, run_of_bands, QSP_BF16, RANDOM, GRADIENT, GRAD_NORMED)
RUN_PACKER(bare_grad_f32, run_of_bands, QSP_F32, RANDOM, GRADIENT, GRAD_BARE)
RUN_PACKER(bare_grad_bf16, run_of_bands, QSP_BF16, RANDOM, GRADIENT, GRAD_BARE)
RUN_PACKER(grad_random, run_of_bands, a->dtype, RANDOM, GRADIENT, GRAD_ANY)
RUN_PACKER(grad_nearest, run_of_bands, a->dtype, NEAREST, GRADIENT, GRAD_ANY)
#undef RUN_PACKER

/* Which of them packs floats, or codes of a source: lines or tiles of PLAIN, bands of the others, where epilogues are
 * rounded to nearest. `fours`: the random numbers of a run are not odd ones. */
static run_packer *packer_of(const qsp_pack *a, const int codes, const int source, const int transposed, const int fours)
{
    const int wide = a->dtype == QSP_F32;
    if (!codes)
        return transposed ? (wide ? tiles_f32_floats : tiles_bf16_floats) : wide ? lines_f32_floats : lines_bf16_floats;
    const int rounding = rounding_of(&a->scheme);
    const int random = rounding == RANDOM && fours;
    switch (source) {
    case CLAMPED:
        if (a->epilogue->scale)
            return a->dtype == QSP_U8 ? normed_u8 : wide ? normed_f32 : normed_bf16;
        return a->dtype == QSP_U8 ? made_any : wide ? clamped_f32 : clamped_bf16;
    case MADE: return made_any;
    case GRADIENT:
        if (!random)
            return rounding == NEAREST ? grad_nearest : grad_any;
        switch (variant_of(a->gradient)) {
        case GRAD_NORMED: return wide ? norm_grad_f32 : norm_grad_bf16;
        case GRAD_BARE: return wide ? bare_grad_f32 : bare_grad_bf16;
        default: return grad_random;
        }
    default: break;
    }
    if (rounding != NEAREST && !random)
        return transposed ? tiles_any : lines_any;
    if (transposed)
        return random ? (wide ? tiles_f32_random : tiles_bf16_random) : wide ? tiles_f32_nearest : tiles_bf16_nearest;
    return random ? (wide ? lines_f32_random : lines_bf16_random) : wide ? lines_f32_nearest : lines_bf16_nearest;
}

static void pack_task(const qsp_pack *a, int64_t block, int64_t first, int64_t last, const int codes)
{
    const qsp_grid *g = &a->grid;
    const qsp_view *v = &a->view;
    qsp_walk w;
    qsp_walk_init(&w, g, v, qsp_images_in_block(a->images, g, block));
    if (!a->filled)
        fill_gaps(a, &w, block, first, last, codes);
    const int batch_inner = g->lane_b < g->lane_x;
    const int64_t number0 = batch_inner ? v->index_y : v->index_b, number1 = batch_inner ? v->index_x : v->index_y,
                  number2 = batch_inner ? v->index_b : v->index_x;
    const int64_t image = block * g->images;
    const int source = source_of(a);
    /* the caller sees to it that channels are neighbours where there is a `source` */
    const int transposed = source != PLAIN || (v->elem_c == 1 && w.elem[2] != 1);
    const int64_t channels = source_channels(a);
    run_packer *pack[2]; /* of runs without and with `fours` */
    for (int fours = 0; fours < 2; fours++)
        pack[fours] = packer_of(a, codes, source, transposed, fours);

    for (int64_t i0 = 0; i0 < w.size[0]; i0++)
        for (int64_t i1 = 0; i1 < w.size[1]; i1++) {
            const int64_t element = v->elem + image * v->elem_b + i0 * w.elem[0] + i1 * w.elem[1];
            const lane_run r = {
                .element = element,
                .element_step = w.elem[2],
                .row = element / channels,
                .row_step = w.elem[2] / channels,
                .number = v->index + image * v->index_b + i0 * number0 + i1 * number1,
                .number_step = number2,
                .lane = block * g->block + g->front + v->origin + i0 * w.lane[0] + i1 * w.lane[1],
                .lanes = w.size[2],
            };
            pack[has_fours(&r, first)](a, &r, first, last);
        }
}

static void pack_u8(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    pack_task(a, block, first, last, 1);
}

static void pack_f32(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    pack_task(a, block, first, last, 0);
}
