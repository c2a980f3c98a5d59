/* The packer: a strided tensor, or what is computed of it on the way -> planes of lanes, quantised to codes or as
 * floats, with every gap filled. */

/* Gaps are mostly a byte or two, for which a call of memset is dear. */
QSP_INLINE void fill_bytes(uint8_t *p, uint8_t value, int64_t n)
{
    if (n >= 32) {
        memset(p, value, (size_t)n);
        return;
    }
    for (; n > 0; n--)
        *p++ = value;
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
        fill_bytes(p, codes ? (uint8_t)a->zero_point[before * a->stride] : 0, size * g->front);
        int64_t done = g->front;
        for (int64_t i0 = 0; i0 < w->size[0]; i0++)
            for (int64_t i1 = 0; i1 < w->size[1]; i1++) {
                const int64_t start = g->front + a->view.origin + i0 * w->lane[0] + i1 * w->lane[1];
                fill_bytes(p + size * done, zero, size * (start - done));
                done = start + w->size[2];
            }
        /* the block's last plane also owns what lies between it and the next block */
        const int64_t end = plane + 1 == g->planes ? g->block - plane * g->pitch : g->pitch;
        fill_bytes(p + size * done, zero, size * (end - done));
    }
}

/* Which of them packs floats, or codes of a source: lines or tiles of PLAIN, bands of the others, where epilogues are
 * rounded to nearest. `fours`: the random numbers of a run are not odd ones. */
static run_packer *packer_of(const qsp_pack *a, const int codes, const int source, const int transposed,
                             const int fours)
{
    const int wide = a->dtype == QSP_F32;
    if (!codes)
        return transposed ? (wide ? pack_tiles_f32_floats : pack_tiles_bf16_floats)
               : wide     ? pack_lines_f32_floats
                          : pack_lines_bf16_floats;
    const int rounding = rounding_of(&a->scheme);
    const int random = rounding == RANDOM && fours;
    switch (source) {
    case CLAMPED:
        if (a->epilogue->scale)
            return a->dtype == QSP_U8 ? pack_normed_u8 : wide ? pack_normed_f32 : pack_normed_bf16;
        return a->dtype == QSP_U8 ? pack_made_any : wide ? pack_clamped_f32 : pack_clamped_bf16;
    case MADE: return pack_made_any;
    case GRADIENT:
        if (!random)
            return rounding == NEAREST ? pack_grad_nearest : pack_grad_any;
        switch (variant_of(a->gradient)) {
        case GRAD_NORMED: return wide ? pack_norm_grad_f32 : pack_norm_grad_bf16;
        case GRAD_BARE: return wide ? pack_bare_grad_f32 : pack_bare_grad_bf16;
        default: return pack_grad_random;
        }
    default: break;
    }
    if (rounding != NEAREST && !random)
        return transposed ? pack_tiles_any : pack_lines_any;
    if (transposed)
        return random ? (wide ? pack_tiles_f32_random : pack_tiles_bf16_random)
               : wide ? pack_tiles_f32_nearest
                      : pack_tiles_bf16_nearest;
    return random ? (wide ? pack_lines_f32_random : pack_lines_bf16_random)
           : wide ? pack_lines_f32_nearest
                  : pack_lines_bf16_nearest;
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

static void pack_u8_kernel(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    pack_task(a, block, first, last, 1);
}

static void pack_f32_kernel(const qsp_pack *a, int64_t block, int64_t first, int64_t last)
{
    pack_task(a, block, first, last, 0);
}
