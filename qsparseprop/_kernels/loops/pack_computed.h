/* Packing what is computed on the way, so that it is not written and read again: of an element of the tensor what
 * epilogue.h makes of it, in line (CLAMPED) or by a function for a part of a row (MADE), or the gradient of that
 * (GRADIENT). PLAIN is the tensor as it is. */
enum { PLAIN, CLAMPED, MADE, GRADIENT };

QSP_INLINE int source_of(const qsp_pack *a)
{
    return a->gradient ? GRADIENT : !a->epilogue ? PLAIN : a->epilogue->kind == QSP_CLAMP ? CLAMPED : MADE;
}

enum {
    BAND = QSP_CACHE_LINE, /* channels that are computed together: a line of codes */
    BAND_AHEAD = 10,        /* rows */
};

/* Of what is computed on the way; 1 where nothing is. */
QSP_INLINE int64_t source_channels(const qsp_pack *a)
{
    return a->epilogue ? a->epilogue->channels : a->gradient ? a->gradient->channels : 1;
}

QSP_INLINE void prefetch_row(const void *p, int64_t at, int bytes, const int write)
{
    for (int b = 0; p && b < bytes; b += QSP_CACHE_LINE)
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

/* n channels from `c` on of a row of the one of both that is the source, in line if they are `whole`. `variant`: of a
 * gradient, or whether there is a scale. */
QSP_INLINE f32x16 source_at(const qsp_epilogue *f, const qsp_epilogue_grad *g, int64_t row, int64_t c, int n,
                            const int dtype, const int source, const int variant, const int whole)
{
    if (source == CLAMPED)
        return whole ? epilogue_at(f, row, c, 16, dtype, QSP_CLAMP, variant, f->residual != NULL, f->codes != NULL,
                                   f->saved != NULL)
                     : epilogue_any(f, row, c, n);
    return whole ? epilogue_grad_16(g, row, c, dtype, variant) : epilogue_grad_any(g, row, c, n);
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
    /* Copies that nobody else can reach: codes and masks are stored as bytes, which might change anything else. */
    const qsp_epilogue f = source == CLAMPED ? *a->epilogue : (qsp_epilogue){0};
    const qsp_epilogue_grad g = source == GRADIENT ? *a->gradient : (qsp_epilogue_grad){0};
    i32x16 tile[BAND / 16][16];
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
    for (int v = 0; v < vectors; v++) {
        for (int j = lanes; j < 16; j++)
            tile[v][j] = i32x16_set1(0);
        q[v] = quantizer_of(a, c + 16 * v, sixteens ? 16 : (int)qsp_min(16, n - 16 * v), rounding);
        random[v] = random_rows_from(a->seed, (uint64_t)(number + 16 * v), r->number_step);
        dither[v][0] = dither[v][1] = i32x16_set1(0);
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
            const f32x16 x = source == MADE ? f32x16_load(line + 16 * v)
                                            : source_at(&f, &g, row, c + 16 * v, width, dtype, source, variant, sixteens);
            next_dither(a, &random[v], dither[v], number + 16 * v + j * r->number_step, j, rounding, fours);
            tile[v][j] = quantize_x16(x, &q[v], rounding, dither[v][j % 2]);
        }
    }
    for (int v = 0; v < vectors; v++) {
        if (sixteens && lanes == 16) {
            i32_to_code_transpose_16x16(to + 16 * v * pitch, pitch, tile[v]);
            continue;
        }
        QSP_ALIGNED(64) uint8_t bytes[16 * 16];
        i32_to_code_transpose_16x16(bytes, 16, tile[v]);
        for (int i = 0; i < 16 && 16 * v + i < n; i++)
            u8x16_copy_n(to + (16 * v + i) * pitch, bytes + 16 * i, lanes);
    }
}

/* A band of any kind, for those that are not a multiple of sixteen channels, and for roundings without a copy below. */
QSP_APART void pack_band_any(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n)
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
                pack_band_any(a, r, k, c, n);
        }
}

QSP_APART void pack_grad_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
{
    for (int64_t k = 0; k < r->lanes; k += 16)
        for (int64_t c = first; c < last; c += BAND)
            pack_band_any(a, r, k, c, (int)qsp_min(BAND, last - c));
}

RUN_PACKER(pack_normed_u8, run_of_bands, QSP_U8, NEAREST, CLAMPED, 1)
RUN_PACKER(pack_normed_f32, run_of_bands, QSP_F32, NEAREST, CLAMPED, 1)
RUN_PACKER(pack_normed_bf16, run_of_bands, QSP_BF16, NEAREST, CLAMPED, 1)
RUN_PACKER(pack_clamped_f32, run_of_bands, QSP_F32, NEAREST, CLAMPED, 0)
RUN_PACKER(pack_clamped_bf16, run_of_bands, QSP_BF16, NEAREST, CLAMPED, 0)
RUN_PACKER(pack_made_any, run_of_bands, a->dtype, NEAREST, MADE, 0)
RUN_PACKER(pack_norm_grad_f32, run_of_bands, QSP_F32, RANDOM, GRADIENT, GRAD_NORMED)
RUN_PACKER(pack_norm_grad_bf16, run_of_bands, QSP_BF16, RANDOM, GRADIENT, GRAD_NORMED)
RUN_PACKER(pack_bare_grad_f32, run_of_bands, QSP_F32, RANDOM, GRADIENT, GRAD_BARE)
RUN_PACKER(pack_bare_grad_bf16, run_of_bands, QSP_BF16, RANDOM, GRADIENT, GRAD_BARE)
RUN_PACKER(pack_grad_random, run_of_bands, a->dtype, RANDOM, GRADIENT, GRAD_ANY)
RUN_PACKER(pack_grad_nearest, run_of_bands, a->dtype, NEAREST, GRADIENT, GRAD_ANY)
#undef RUN_PACKER
