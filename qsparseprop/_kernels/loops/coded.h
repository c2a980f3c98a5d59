/* Where codes of images lie in planes. */

/* What becomes of a product: plus an offset, and a residual where there is one, within limits; in this order a NaN stays
 * one. */
QSP_INLINE f32x16 coded_result(f32x16 product, f32x16 offset, const f32x16 *residual, f32x16 low, f32x16 high)
{
    f32x16 v = f32x16_add(product, offset);
    if (residual)
        v = f32x16_add(v, *residual);
    return f32x16_min(high, f32x16_max(low, v));
}

/* Lanes of so many images from the first pixel to behind the last. */
QSP_INLINE int64_t coded_lanes(const qsp_coded *c, int64_t images)
{
    return (images - 1) * c->grid.lane_b + (c->rows - 1) * c->grid.lane_y + (c->cols - 1) * c->grid.lane_x + 1;
}

QSP_INLINE int64_t coded_images(const qsp_coded *c, int64_t block)
{
    return qsp_min(c->grid.images, c->images - block * c->grid.images);
}

QSP_INLINE uint8_t *coded_plane(const qsp_coded *c, int64_t block, int64_t channel)
{
    return c->planes + block * c->grid.block + (c->plane + channel) * c->grid.pitch + c->grid.front;
}

QSP_INLINE uint8_t *coded_row(const qsp_coded *c, int64_t image, int64_t channel, int64_t row)
{
    const qsp_grid *g = &c->grid;
    return coded_plane(c, image / g->images, channel) + image % g->images * g->lane_b + row * g->lane_y;
}

/* What lies around the lanes of a plane: its front, and everything behind the last pixel; the last plane's up to the next
 * block. */
static void coded_ends(const qsp_coded *c, int64_t block, int64_t channel, int64_t end)
{
    const qsp_grid *g = &c->grid;
    const int64_t plane = c->plane + channel;
    uint8_t *p = c->planes + block * g->block + plane * g->pitch;
    const int64_t all = plane + 1 == g->planes ? g->block - plane * g->pitch : g->pitch;
    memset(p, c->zero, (size_t)g->front);
    memset(p + g->front + end, c->zero, (size_t)(all - g->front - end));
}

/* Zeros all over a plane, and in what lies around it. */
QSP_INLINE void coded_clear(const qsp_coded *c, int64_t block, int64_t channel) { coded_ends(c, block, channel, 0); }
