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

/* Gaps between the images and rows of a plane. */
static void fill_between(uint8_t *plane, const qsp_pack *a, const qsp_walk *w, uint8_t zero, int64_t size)
{
    int64_t done = a->grid.front;
    for (int64_t i0 = 0; i0 < w->size[0]; i0++)
        for (int64_t i1 = 0; i1 < w->size[1]; i1++) {
            const int64_t start = a->grid.front + a->view.origin + i0 * w->lane[0] + i1 * w->lane[1];
            fill_bytes(plane + size * done, zero, size * (start - done));
            done = start + w->size[2];
        }
}

/* Everything of planes [first, last) that is not an element: front, tail, and `between` images and rows, which bands
 * bring themselves. */
static void fill_gaps(const qsp_pack *a, const qsp_walk *w, int64_t block, int64_t first, int64_t last, const int codes,
                      int between)
{
    const qsp_grid *g = &a->grid;
    const int64_t size = codes ? 1 : (int64_t)sizeof(float);
    const int some = w->size[0] > 0 && w->size[1] > 0;
    const int64_t elements_end = some ? a->view.origin + (w->size[0] - 1) * w->lane[0] + (w->size[1] - 1) * w->lane[1] +
                                            w->size[2]
                                      : 0;
    const int64_t done = g->front + elements_end;
    for (int64_t plane = a->view.plane + first; plane < a->view.plane + last; plane++) {
        /* the block's last plane also owns what lies between it and the next block */
        const int64_t end = plane + 1 == g->planes ? g->block - plane * g->pitch : g->pitch;
        if (!between && g->front == 0 && end == done)
            continue;
        uint8_t *p = (uint8_t *)a->planes + size * (block * g->block + plane * g->pitch);
        const uint8_t zero = codes ? (uint8_t)a->zero_point[plane * a->stride] : 0;
        /* what the taps read behind a plane's lanes is the front of the next plane, perhaps in the next block */
        const int64_t before = (plane ? plane : g->planes) - 1;
        fill_bytes(p, codes ? (uint8_t)a->zero_point[before * a->stride] : 0, size * g->front);
        if (between)
            fill_between(p, a, w, zero, size);
        fill_bytes(p + size * done, zero, size * (end - done));
    }
}

/* Which of them packs floats, or codes where channels are no neighbours. `fours`: the random numbers of a run are not
 * odd ones. */
static run_packer *run_packer_of(const qsp_pack *a, const int codes, int transposed, int fours)
{
    const int wide = a->dtype == QSP_F32, rounding = rounding_of(&a->scheme);
    if (!codes)
        return transposed ? (wide ? pack_tiles_f32_floats : pack_tiles_bf16_floats)
               : wide     ? pack_lines_f32_floats
                          : pack_lines_bf16_floats;
    if (rounding == NEAREST)
        return wide ? pack_lines_f32_nearest : pack_lines_bf16_nearest;
    if (rounding == RANDOM && fours)
        return wide ? pack_lines_f32_random : pack_lines_bf16_random;
    return pack_lines_any;
}

/* Which of them packs bands of a source, where epilogues are rounded to nearest. */
static band_packer *band_packer_of(const qsp_pack *a, int source, int fours)
{
    const int wide = a->dtype == QSP_F32, rounding = rounding_of(&a->scheme);
    const int random = rounding == RANDOM && fours;
    switch (source) {
    case CLAMPED:
        if (a->epilogue->scale)
            return a->dtype == QSP_U8 ? pack_normed_u8 : wide ? pack_normed_f32 : pack_normed_bf16;
        return a->dtype == QSP_U8 ? pack_made_any : wide ? pack_clamped_f32 : pack_clamped_bf16;
    case MADE: return pack_made_any;
    case GRADIENT:
        if (!random)
            return rounding == NEAREST ? pack_grad_nearest : pack_bands_any;
        switch (variant_of(a->gradient)) {
        case GRAD_NORMED: return wide ? pack_norm_grad_f32 : pack_norm_grad_bf16;
        case GRAD_BARE: return wide ? pack_bare_grad_f32 : pack_bare_grad_bf16;
        default: return pack_grad_random;
        }
    default: break;
    }
    if (rounding == NEAREST)
        return wide ? pack_f32_nearest : pack_bf16_nearest;
    return !random ? pack_bands_any : wide ? pack_f32_random : pack_bf16_random;
}

static void pack_task(const qsp_pack *a, int64_t block, int64_t first, int64_t last, const int codes)
{
    const int source = source_of(a);
    qsp_walk w;
    qsp_walk_init(&w, &a->grid, &a->view, qsp_images_in_block(a->images, &a->grid, block));
    /* the caller sees to it that channels are neighbours where there is a `source` */
    const int transposed = source != PLAIN || (a->view.elem_c == 1 && w.elem[2] != 1);
    if (!a->filled)
        fill_gaps(a, &w, block, first, last, codes, !codes || !transposed);
    if (codes && transposed) {
        band_packer_of(a, source, band_has_fours(a, first))(a, &w, block, first, last);
        return;
    }
    for (int64_t i0 = 0; i0 < w.size[0]; i0++)
        for (int64_t i1 = 0; i1 < w.size[1]; i1++) {
            const lane_run r = run_at(a, &w, block, i0, i1, 1);
            run_packer_of(a, codes, transposed, has_fours(&r, first))(a, &r, first, last);
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
