/* Packing a tensor as it is: tiles of sixteen channels by sixteen lanes, transposed, where channels are neighbours in
 * memory, otherwise lines of lanes. */

/* Where the first element of a run of lanes is, in the tensor, in its logical numbers and in the planes. */
typedef struct {
    int64_t element, element_step;
    int64_t row, row_step; /* the same in rows of channels, where something is computed on the way */
    int64_t number, number_step;
    int64_t lane, lanes;
} lane_run;

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

/* Random numbers of row j of a tile into dither[j % 2]. */
QSP_INLINE void next_dither(const qsp_pack *a, random_rows *random, i32x16 *dither, int64_t number, const int j,
                            const int rounding, const int fours)
{
    if (rounding >= RANDOM && fours && j % 2 == 0)
        random_rows_next(random, dither);
    else if (rounding >= RANDOM && !fours)
        dither[j % 2] = i32x16_random_strided(a->seed, (uint64_t)number, 1);
}

/* 16 channels of 16 lanes, transposed: channels are neighbours in memory. */
QSP_INLINE void pack_tile(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, const int dtype,
                          const int rounding)
{
    const quantizer q = quantizer_of(a, c, 16, rounding);
    const int64_t number = r->number + k * r->number_step + c;
    random_rows random = random_rows_from(a->seed, (uint64_t)number, r->number_step);
    i32x16 dither[2] = {i32x16_set1(0), i32x16_set1(0)}, tile[16];
    QSP_UNROLL
    for (int j = 0; j < 16; j++) {
        const f32x16 x = load_elements(a->tensor, dtype, r->element + (k + j) * r->element_step + c);
        next_dither(a, &random, dither, number + j * r->number_step, j, rounding, 1);
        tile[j] = quantize_x16(x, &q, rounding, dither[j % 2]);
    }
    i32_to_code_transpose_16x16((uint8_t *)a->planes + r->lane + (a->view.plane + c) * a->grid.pitch + k, a->grid.pitch,
                                tile);
}

/* n channels of `lanes` lanes, sixteen of both if `whole`, otherwise at most: in a loop, since that is as fast as long
 * as not all of them stay in registers. `fours`: every lane's numbers start with the first of four that share a random
 * number. */
QSP_INLINE void pack_part(const qsp_pack *a, const lane_run *r, int64_t k, int64_t c, int n, int lanes, const int dtype,
                          const int rounding, const int fours, const int whole)
{
    const quantizer q = quantizer_of(a, c, n, rounding);
    const int64_t pitch = a->grid.pitch, number = r->number + k * r->number_step + c;
    uint8_t *p = (uint8_t *)a->planes + r->lane + (a->view.plane + c) * pitch + k;
    random_rows random = random_rows_from(a->seed, (uint64_t)number, r->number_step);
    i32x16 dither[2] = {i32x16_set1(0), i32x16_set1(0)}, tile[16];
    for (int i = 0; i < 16; i += 2) {
        QSP_UNROLL
        for (int j = 0; j < 2; j++) {
            const int64_t lane =
                whole || i + j < lanes ? i + j : lanes - 1; /* those that do not exist repeat the last */
            const int64_t at = r->element + (k + lane) * r->element_step + c;
            const f32x16 x = whole ? load_elements(a->tensor, dtype, at) : load_elements_n(a->tensor, dtype, at, 1, n);
            next_dither(a, &random, dither, number + lane * r->number_step, j, rounding, fours);
            tile[i + j] = quantize_x16(x, &q, rounding, dither[j]);
        }
    }
    if (whole) {
        i32_to_code_transpose_16x16(p, pitch, tile);
        return;
    }
    QSP_ALIGNED(64) uint8_t bytes[16 * 16];
    i32_to_code_transpose_16x16(bytes, 16, tile);
    for (int i = 0; i < n; i++)
        u8x16_copy_n(p + i * pitch, bytes + 16 * i, lanes);
}

/* The same as floats; `whole`: sixteen of both. */
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
QSP_APART void pack_lines_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
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

QSP_APART void pack_tiles_any(const qsp_pack *a, const lane_run *r, int64_t first, int64_t last)
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
RUN_PACKER(pack_tiles_f32_nearest, run_of_tiles, QSP_F32, NEAREST)
RUN_PACKER(pack_tiles_f32_random, run_of_tiles, QSP_F32, RANDOM)
RUN_PACKER(pack_tiles_bf16_nearest, run_of_tiles, QSP_BF16, NEAREST)
RUN_PACKER(pack_tiles_bf16_random, run_of_tiles, QSP_BF16, RANDOM)
RUN_PACKER(pack_lines_f32_floats, run_of_floats, QSP_F32, 0)
RUN_PACKER(pack_lines_bf16_floats, run_of_floats, QSP_BF16, 0)
RUN_PACKER(pack_tiles_f32_floats, run_of_floats, QSP_F32, 1)
RUN_PACKER(pack_tiles_bf16_floats, run_of_floats, QSP_BF16, 1)
