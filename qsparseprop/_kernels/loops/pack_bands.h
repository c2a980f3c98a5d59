/* Packing a tensor whose channels are neighbours in memory (PLAIN), or what is computed of it on the way, so that it
 * is not written and read again: what epilogue.h makes of an element, in line (CLAMPED) or by a function for a part of
 * a row (MADE), or the gradient of that (GRADIENT). */
enum { PLAIN, CLAMPED, MADE, GRADIENT };

QSP_INLINE int source_of(const qsp_pack *a)
{
    return a->gradient ? GRADIENT : !a->epilogue ? PLAIN : a->epilogue->kind == QSP_CLAMP ? CLAMPED : MADE;
}

enum {
    BAND = QSP_CACHE_LINE, /* channels that are packed together: a line of codes */
    BANDS = 4,             /* at a time */
    BAND_AHEAD = 4,        /* rows, of what is computed */
    PLAIN_AHEAD = 16,      /* rows, perhaps of the next run: where they follow each other, in the next page */
};

/* Codes on their way into the planes of a band of channels. Lanes follow each other, gaps between runs included, until
 * there is a unit of them: planes are written in whole cache lines, and a gap of a lane or two costs no call for each
 * plane. Lane j has its channels in sixteens, as u8_transpose_unit reads them. */
typedef struct {
    QSP_ALIGNED(64) uint8_t codes[BAND / 16][16 * QSP_UNIT];
    uint8_t gap[BAND]; /* the zero points */
    uint8_t *to;       /* the first lane of them in the first channel's plane */
    int64_t pitch;
    int channels, lanes;
} band;

QSP_INLINE uint8_t *band_at(band *b, int sixteen, int lane)
{
    return b->codes[sixteen] + QSP_UNIT * (lane % 16) + 16 * (lane / 16);
}

QSP_APART void band_write(band *b)
{
    for (int c = 0; b->lanes && c < b->channels; c += 16)
        u8_transpose_unit(b->to + c * b->pitch, b->pitch, b->codes[c / 16], b->lanes,
                          b->channels - c < 16 ? b->channels - c : 16);
    b->to += b->lanes;
    b->lanes = 0;
}

/* The next n lanes are a gap; `filled`: which is there already. */
QSP_APART void band_gap(band *b, int64_t n, int filled)
{
    if (filled) {
        band_write(b);
        b->to += n;
        return;
    }
    for (; n > 0; n--) {
        for (int c = 0; c < b->channels; c += 16)
            memcpy(band_at(b, c / 16, b->lanes), b->gap + c, 16);
        if (++b->lanes == QSP_UNIT)
            band_write(b);
    }
}

/* For n channels from `first` on of a block, behind the front. */
static void band_init(band *b, const qsp_pack *a, int64_t block, int64_t first, int n)
{
    const int64_t plane = a->view.plane + first;
    memset(b->gap, (uint8_t)a->zero_point[plane * a->stride], sizeof b->gap);
    for (int c = 1; a->stride && c < n; c++)
        b->gap[c] = (uint8_t)a->zero_point[plane + c];
    b->to = (uint8_t *)a->planes + block * a->grid.block + a->grid.front + plane * a->grid.pitch;
    b->pitch = a->grid.pitch;
    b->channels = n;
    b->lanes = 0;
}

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

/* n channels from `c` on of a row of what is computed, in line if they are `whole`. */
QSP_INLINE f32x16 source_at(const qsp_pack *a, int64_t row, int64_t c, int n, const int dtype, const int source,
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

/* How a band is packed: constants where there is a copy of the loops. */
typedef struct {
    int dtype, rounding, source;
    int variant; /* of a gradient, or of what is CLAMPED whether there is a scale */
    int fours;   /* random numbers of a lane start with the first of four that share one */
    int whole;   /* 2: all of BAND channels; 1: sixteens; 0: any */
} band_kind;

/* A run of the lanes of a band. */
typedef struct {
    lane_run run;
    int64_t channel; /* the first */
    int far;         /* whether rows need help to be in the cache in time */
    quantizer q[BAND / 16];
} band_run;

/* n channels, in line if they are `whole`, of lane k of a run, from the band's `at`-th on. */
QSP_INLINE f32x16 band_load(const qsp_pack *a, const band_run *s, int64_t k, int at, int n, const band_kind kind)
{
    const int64_t channel = s->channel + at;
    if (kind.source != PLAIN)
        return source_at(a, s->run.row + k * s->run.row_step, channel, n, kind.dtype, kind.source, kind.variant,
                         kind.whole);
    const int64_t element = s->run.element + k * s->run.element_step + channel;
    return kind.whole || n == 16 ? load_elements(a->tensor, kind.dtype, element)
                                 : load_elements_n(a->tensor, kind.dtype, element, 1, n);
}

/* One lane or two of a run, from the k-th on, as lanes from `lane` on of the band. A lane's channels come one after
 * the other: in whole cache lines, which would otherwise be gone from the first cache before their next sixteen
 * channels come, where lanes are images. Codes, masks and results in floating point are read and written beside. */
QSP_INLINE void pack_lanes(const qsp_pack *a, band *b, const band_run *s, random_rows *random, int64_t k, int lane,
                           const int count, const band_kind kind)
{
    QSP_ALIGNED(64) float line[BAND];
    const lane_run *r = &s->run;
    const int width = kind.dtype == QSP_F32 ? 4 : 2; /* PLAIN */
    const int sixteens = kind.whole == 2 ? BAND / 16 : (b->channels + 15) / 16;
    i32x16 dither[BAND / 16][2];
    for (int v = 0; v < BAND / 16; v++)
        dither[v][0] = dither[v][1] = i32x16_set1(0);
    QSP_UNROLL
    for (int j = 0; j < count; j++) {
        const int64_t row = r->row + (k + j) * r->row_step;
        /* the planes' lines are asked for one by one: all of them are written at once */
        if (lane + j < b->channels)
            QSP_PREFETCH_WRITE(b->to + (lane + j) * b->pitch);
        if (kind.source == PLAIN && s->far)
            prefetch_row(a->tensor, (r->element + (k + j + PLAIN_AHEAD) * r->element_step + s->channel) * width,
                         b->channels * width, 0);
        if (kind.source != PLAIN && s->far && k + j + BAND_AHEAD < r->lanes)
            source_prefetch(a, row + BAND_AHEAD * r->row_step, s->channel, b->channels, kind.dtype, kind.source);
        if (kind.source == MADE)
            row_maker_of(a->epilogue)(a->epilogue, row, s->channel, b->channels, line);
        QSP_UNROLL /* loads of their own, whose strides the processor learns */
        for (int v = 0; v < BAND / 16 && v < sixteens; v++) {
            const int n = kind.whole ? 16 : (int)qsp_min(16, b->channels - 16 * v);
            const f32x16 x = kind.source == MADE ? f32x16_load(line + 16 * v)
                                                 : band_load(a, s, k + j, 16 * v, n, kind);
            if (kind.rounding >= RANDOM && kind.fours && j == 0)
                random_rows_next(&random[v], dither[v]);
            else if (kind.rounding >= RANDOM && !kind.fours)
                dither[v][j] = i32x16_random_strided(
                    a->seed, (uint64_t)(r->number + (k + j) * r->number_step + s->channel + 16 * v), 1);
            u8x16_store(band_at(b, v, lane + j),
                        i32x16_to_code(quantize_x16(x, &s->q[v], kind.rounding, dither[v][j])));
        }
    }
}

QSP_INLINE void pack_run(const qsp_pack *a, band *b, const band_run *s, const band_kind kind)
{
    const lane_run *r = &s->run;
    for (int64_t k = 0; k < r->lanes;) {
        const int n = (int)qsp_min(QSP_UNIT - b->lanes, r->lanes - k);
        random_rows random[BAND / 16];
        for (int v = 0; v < BAND / 16; v++)
            random[v] = random_rows_from(a->seed, (uint64_t)(r->number + k * r->number_step + s->channel + 16 * v),
                                         r->number_step);
        int j = 0;
        for (; j + 2 <= n; j += 2)
            pack_lanes(a, b, s, random, k + j, b->lanes + j, 2, kind);
        if (j < n)
            pack_lanes(a, b, s, random, k + j, b->lanes + j, 1, kind);
        k += n;
        b->lanes += n;
        if (b->lanes == QSP_UNIT)
            band_write(b);
    }
}

/* `count` bands of n channels each, from `first` on, all lanes of a block: run by run, so that a lane's channels are read
 * soon after each other. */
QSP_INLINE void pack_band(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int n, int count,
                          const band_kind kind)
{
    band bands[BANDS];
    band_run s[BANDS];
    for (int i = 0; i < count; i++) {
        s[i].channel = first + i * BAND;
        band_init(&bands[i], a, block, s[i].channel, n);
        for (int v = 0; 16 * v < n; v++)
            s[i].q[v] = quantizer_of(a, s[i].channel + 16 * v, (int)qsp_min(16, n - 16 * v), kind.rounding);
    }
    int64_t lane = 0;
    for (int64_t i0 = 0; i0 < w->size[0]; i0++)
        for (int64_t i1 = 0; i1 < w->size[1]; i1++) {
            const int64_t start = a->view.origin + i0 * w->lane[0] + i1 * w->lane[1];
            const lane_run r = run_at(a, w, block, i0, i1, source_channels(a));
            const int far = kind.source == PLAIN ? r.element_step < 8 * BAND
                                                 : r.row_step > 1 || source_channels(a) >= 8 * BAND;
            for (int i = 0; i < count; i++) {
                s[i].run = r;
                s[i].far = far;
                band_gap(&bands[i], start - lane, a->filled);
                pack_run(a, &bands[i], &s[i], kind);
            }
            lane = start + w->size[2];
        }
    for (int i = 0; i < count; i++)
        band_write(&bands[i]);
}

/* Whether the random numbers of every lane, from channel `first` on, start with the first of four that share one. */
static int band_has_fours(const qsp_pack *a, int64_t first)
{
    const qsp_view *v = &a->view;
    return ((v->index | v->index_b | v->index_y | v->index_x | first) & 3) == 0;
}

/* What has no copy below: other roundings, and channels that are no sixteens where something is computed. */
QSP_APART void pack_band_any(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int n)
{
    const int source = source_of(a);
    const band_kind kind = {a->dtype, rounding_of(&a->scheme), source, variant_of_source(a, source),
                            band_has_fours(a, first), 0};
    pack_band(a, w, block, first, n, 1, kind);
}

/* Channels [first, last), which have `fours` if their numbers are random. */
QSP_COPIED void pack_bands(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last,
                           const int dtype, const int rounding, const int source, const int variant)
{
    const band_kind any = {dtype, rounding, source, variant, 1, 0}, sixteens = {dtype, rounding, source, variant, 1, 1},
                    all = {dtype, rounding, source, variant, 1, 2};
    int64_t c = first;
    for (; source == PLAIN && c + BAND <= last;) {
        const int count = (int)qsp_min(BANDS, (last - c) / BAND);
        pack_band(a, w, block, c, BAND, count, all);
        c += count * BAND;
    }
    for (; c < last; c += BAND) {
        const int n = (int)qsp_min(BAND, last - c);
        if (source == PLAIN)
            pack_band(a, w, block, c, n, 1, any);
        else if (n % 16 == 0)
            pack_band(a, w, block, c, n, 1, sixteens);
        else
            pack_band_any(a, w, block, c, n);
    }
}

typedef void band_packer(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last);

QSP_APART void pack_bands_any(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last)
{
    for (int64_t c = first; c < last; c += BAND)
        pack_band_any(a, w, block, c, (int)qsp_min(BAND, last - c));
}

#define BAND_PACKER(name, ...)                                                                                   \
    QSP_APART void name(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last)        \
    {                                                                                                            \
        pack_bands(a, w, block, first, last, __VA_ARGS__);                                                       \
    }
BAND_PACKER(pack_f32_nearest, QSP_F32, NEAREST, PLAIN, 0)
BAND_PACKER(pack_f32_random, QSP_F32, RANDOM, PLAIN, 0)
BAND_PACKER(pack_bf16_nearest, QSP_BF16, NEAREST, PLAIN, 0)
BAND_PACKER(pack_bf16_random, QSP_BF16, RANDOM, PLAIN, 0)
BAND_PACKER(pack_normed_u8, QSP_U8, NEAREST, CLAMPED, 1)
BAND_PACKER(pack_normed_f32, QSP_F32, NEAREST, CLAMPED, 1)
BAND_PACKER(pack_normed_bf16, QSP_BF16, NEAREST, CLAMPED, 1)
BAND_PACKER(pack_clamped_f32, QSP_F32, NEAREST, CLAMPED, 0)
BAND_PACKER(pack_clamped_bf16, QSP_BF16, NEAREST, CLAMPED, 0)
BAND_PACKER(pack_made_any, a->dtype, NEAREST, MADE, 0)
BAND_PACKER(pack_norm_grad_f32, QSP_F32, RANDOM, GRADIENT, GRAD_NORMED)
BAND_PACKER(pack_norm_grad_bf16, QSP_BF16, RANDOM, GRADIENT, GRAD_NORMED)
BAND_PACKER(pack_bare_grad_f32, QSP_F32, RANDOM, GRADIENT, GRAD_BARE)
BAND_PACKER(pack_bare_grad_bf16, QSP_BF16, RANDOM, GRADIENT, GRAD_BARE)
BAND_PACKER(pack_grad_random, a->dtype, RANDOM, GRADIENT, GRAD_ANY)
BAND_PACKER(pack_grad_nearest, a->dtype, NEAREST, GRADIENT, GRAD_ANY)
#undef BAND_PACKER
