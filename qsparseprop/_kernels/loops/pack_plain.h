/* Packing a tensor whose channels are no neighbours in memory: lines of lanes; and any tensor as floats. */

/* Where the first element of a run of lanes is, in the tensor, in its logical numbers and in the planes. */
typedef struct {
    int64_t element, element_step;
    int64_t row, row_step; /* the same in rows of channels, where something is computed on the way */
    int64_t number, number_step;
    int64_t lane, lanes;
} lane_run;

/* Run (i0, i1) of a block; `channels`: of a row where something is computed on the way. */
QSP_INLINE lane_run run_at(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t i0, int64_t i1,
                           int64_t channels)
{
    const qsp_grid *g = &a->grid;
    const qsp_view *v = &a->view;
    const int batch_inner = g->lane_b < g->lane_x;
    const int64_t number0 = batch_inner ? v->index_y : v->index_b, number1 = batch_inner ? v->index_x : v->index_y,
                  number2 = batch_inner ? v->index_b : v->index_x;
    const int64_t image = block * g->images;
    const int64_t element = v->elem + image * v->elem_b + i0 * w->elem[0] + i1 * w->elem[1];
    const lane_run r = {
        .element = element,
        .element_step = w->elem[2],
        .row = element / channels,
        .row_step = w->elem[2] / channels,
        .number = v->index + image * v->index_b + i0 * number0 + i1 * number1,
        .number_step = number2,
        .lane = block * g->block + g->front + v->origin + i0 * w->lane[0] + i1 * w->lane[1],
        .lanes = w->size[2],
    };
    return r;
}

/* Channels [first, last) of a run of lanes. */
typedef void run_packer(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last);

/* Of channels [channel, channel + n), or for n = 0 of one channel. */
QSP_INLINE quantizer quantizer_of(const qsp_pack *a, int64_t channel, int n, const int rounding)
{
    const int64_t i = (a->view.plane + channel) * a->stride;
    return quantizer_from(&a->scheme, n && a->stride ? f32x16_load_n(a->inverse + i, n) : f32x16_set1(a->inverse[i]),
                          n && a->stride ? i32x16_load_n(a->zero_point + i, n) : i32x16_set1(a->zero_point[i]),
                          rounding);
}

/* Whether the elements of every lane, from channel `first` on, start with the first of four that share a random
 * number. */
QSP_INLINE int has_fours(const lane_run *r, int64_t first) { return ((r->number | r->number_step | first) & 3) == 0; }

/* n channels of `lanes` lanes as floats, transposed: channels are neighbours in memory; `whole`: sixteen of both. */
QSP_INLINE void pack_floats(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, int lanes,
                            const int dtype, const int whole)
{
    f32x16 tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++) {
        const int64_t lane = whole || j < lanes ? j : lanes - 1;
        const int64_t at = r->element + (k + lane) * r->element_step + c;
        tile[j] = whole ? load_elements(a->tensor, dtype, at) : load_elements_n(a->tensor, dtype, at, 1, n);
    }
    f32_transpose_16x16(tile);
    float *p = (float *)a->planes + r->lane + (a->view.plane + c) * a->grid.pitch + k;
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        if (whole)
            f32x16_store(p + i * a->grid.pitch, tile[i]);
        else if (i < n)
            f32x16_store_n(p + i * a->grid.pitch, tile[i], lanes);
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
    i32x16 dither[4] = {i32x16_set1(0)};
    for (int64_t k = 0; k < r->lanes; k += 16) {
        const int lanes = (int)qsp_min(16, r->lanes - k);
        const uint64_t index = number + (uint64_t)(k * r->number_step);
        if (codes && rounding >= RANDOM && n == 4)
            i32x16_random_fours(a->seed, index, r->number_step, dither);
        else if (codes && rounding >= RANDOM)
            dither[0] = i32x16_random_strided(a->seed, index, r->number_step);
        QSP_UNROLL
        for (int i = 0; i < n; i++) {
            const int64_t at = element + i * a->view.elem_c + k * r->element_step;
            const f32x16 x = lanes == 16 && r->element_step == 1
                                 ? load_elements(a->tensor, dtype, at)
                                 : load_elements_n(a->tensor, dtype, at, r->element_step, lanes);
            if (codes)
                u8x16_store_n((uint8_t *)a->planes + to + i * pitch + k,
                              i32x16_to_code(quantize_x16(x, &q[i], rounding, dither[i])), lanes);
            else
                f32x16_store_n((float *)a->planes + to + i * pitch + k, x, lanes);
        }
    }
}

/* The same for all channels of a run; `fours`: every lane's numbers start with the first of four that share a random
 * number. */
QSP_COPIED void run_of_lines(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last, const int dtype,
                             const int rounding, const int fours)
{
    int64_t c = first;
    for (; rounding >= RANDOM && fours && c + 4 <= last; c += 4)
        pack_lines(a, r, c, 4, 1, dtype, rounding);
    for (; c < last; c++)
        pack_lines(a, r, c, 1, 1, dtype, rounding);
}

/* What has no copy of its own below: other roundings, and runs without `fours`. */
QSP_APART void pack_lines_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
{
    const int rounding = rounding_of(&a->scheme);
    if (rounding == LOGARITHMIC && has_fours(r, first))
        run_of_lines(a, r, first, last, a->dtype, LOGARITHMIC, 1);
    else
        run_of_lines(a, r, first, last, a->dtype, rounding, 0);
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

/* Of what layers use by default, the compiler makes copies of the loops: these arguments are constants. */
#define RUN_PACKER(name, run, ...)                                                                 \
    QSP_APART void name(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)         \
    {                                                                                              \
        run(a, r, first, last, __VA_ARGS__);                                                       \
    }
RUN_PACKER(pack_lines_f32_nearest, run_of_lines, QSP_F32, NEAREST, 1)
RUN_PACKER(pack_lines_f32_random, run_of_lines, QSP_F32, RANDOM, 1)
RUN_PACKER(pack_lines_bf16_nearest, run_of_lines, QSP_BF16, NEAREST, 1)
RUN_PACKER(pack_lines_bf16_random, run_of_lines, QSP_BF16, RANDOM, 1)
RUN_PACKER(pack_lines_f32_floats, run_of_floats, QSP_F32, 0)
RUN_PACKER(pack_lines_bf16_floats, run_of_floats, QSP_BF16, 0)
RUN_PACKER(pack_tiles_f32_floats, run_of_floats, QSP_F32, 1)
RUN_PACKER(pack_tiles_bf16_floats, run_of_floats, QSP_BF16, 1)
#undef RUN_PACKER
