/* Steps on codes of images that lie in planes: copies, pools, sums, tables, and the way back to floats. Rows of an image are
 * runs of bytes, or, of images of one pixel, the images of a block are. */

/* n elements `step` apart, to places `to_step` apart; may read QSP_UNIT bytes on. */
QSP_INLINE void copy_run(uint8_t *to, int64_t to_step, const uint8_t *from, int64_t step, int64_t n)
{
    uint8_t part[32];
    int64_t i = 0;
    if (to_step == 1 && step == 1) {
        memcpy(to, from, (size_t)n);
        return;
    }
    if (to_step == 1 && step == 2) {
        for (; i + 32 <= n; i += 32)
            u8x32_copy_even(to + i, from + 2 * i);
        if (i < n) {
            u8x32_copy_even(part, from + 2 * i);
            memcpy(to + i, part, (size_t)(n - i));
        }
        return;
    }
    for (; i < n; i++)
        to[i * to_step] = from[i * step];
}

/* Every row_step-th row and col_step-th column from (row, col) on: a phase of a stride, or all of them. */
static void coded_copy_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const qsp_coded *out = &s->out;
    const int64_t images = coded_images(out, block), start = block * out->grid.images;
    const int64_t down = s->row_step * s->in.grid.lane_y, across = s->col_step * s->in.grid.lane_x;
    for (int64_t c = first; c < last; c++) {
        coded_clear(out, block, c);
        if (out->cols == 1 && out->rows == 1 && out->grid.lane_b == 1 && s->in.grid.lane_b == 1 &&
            s->in.grid.images == out->grid.images) {
            memcpy(coded_plane(out, block, c), coded_plane(&s->in, block, c), (size_t)images);
            continue;
        }
        for (int64_t b = 0; b < images; b++) {
            uint8_t *to = coded_row(out, start + b, c, 0);
            const uint8_t *from = coded_row(&s->in, start + b, c, s->row) + s->col * s->in.grid.lane_x;
            for (int64_t y = 0; y < out->rows; y++)
                copy_run(to + y * out->grid.lane_y, out->grid.lane_x, from + y * down, across, out->cols);
        }
    }
}

/* Pixels become channels: those of an image's channel follow each other. Channels are the input's. */
static void coded_flatten_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const int64_t pixels = s->in.rows * s->in.cols, start = block * s->out.grid.images;
    const int64_t images = coded_images(&s->out, block);
    for (int64_t c = first; c < last; c++)
        for (int64_t p = 0; p < pixels; p++) {
            const int64_t y = p / s->in.cols, x = p % s->in.cols * s->in.grid.lane_x;
            uint8_t *to = coded_plane(&s->out, block, c * pixels + p);
            coded_clear(&s->out, block, c * pixels + p);
            for (int64_t b = 0; b < images; b++)
                to[b * s->out.grid.lane_b] = coded_row(&s->in, start + b, c, y)[x];
        }
}

/* sum * multiplier + offset + other * other_multiplier, within its limits, as a code. */
QSP_INLINE i32x16 coded_finish(const qsp_coded_step *s, int64_t c, f32x16 sums, const uint8_t *other)
{
    const f32x16 product = f32x16_mul(sums, f32x16_set1(s->multiplier[c])), offset = f32x16_set1(s->offset[c]);
    f32x16 more = offset;
    if (other)
        more = f32x16_mul(f32x16_load_u8(other), f32x16_set1(s->other_multiplier[c]));
    return i32x16_nearest(coded_result(product, offset, other ? &more : NULL, f32x16_set1(s->low[c]),
                                       f32x16_set1(s->high[c])));
}

QSP_INLINE void coded_store(uint8_t *to, i32x16 v, int64_t n)
{
    const u8x16 codes = i32x16_to_code(i32x16_sub(v, i32x16_set1(128)));
    if (n >= 16)
        u8x16_store(to, codes);
    else
        u8x16_store_n(to, codes, (int)n);
}

/* One run of bytes for each row of the images of a block, or for all of them where they have one pixel; all operands lie
 * on the same lanes. */
typedef struct {
    int64_t count, rows, size;
} coded_runs;

QSP_INLINE coded_runs runs_of(const qsp_coded *c, int64_t block)
{
    const int64_t images = coded_images(c, block);
    const coded_runs one = {1, 1, images}, rows = {images * c->rows, c->rows, c->cols};
    return c->grid.lane_b == 1 ? one : rows;
}

QSP_INLINE int64_t run_lane(const qsp_coded *c, const coded_runs *r, int64_t run)
{
    return run / r->rows * c->grid.lane_b + run % r->rows * c->grid.lane_y;
}

static void coded_add_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const coded_runs runs = runs_of(&s->out, block);
    for (int64_t c = first; c < last; c++) {
        coded_clear(&s->out, block, c);
        for (int64_t r = 0; r < runs.count; r++) {
            const int64_t lane = run_lane(&s->out, &runs, r);
            const uint8_t *x = coded_plane(&s->in, block, c) + lane, *other = coded_plane(&s->other, block, c) + lane;
            uint8_t *to = coded_plane(&s->out, block, c) + lane;
            for (int64_t i = 0; i < runs.size; i += 16)
                coded_store(to + i, coded_finish(s, c, f32x16_load_u8(x + i), other + i), runs.size - i);
        }
    }
}

static void coded_table_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const coded_runs runs = runs_of(&s->out, block);
    for (int64_t c = first; c < last; c++) {
        const uint8_t *table = s->table + c * s->table_step;
        coded_clear(&s->out, block, c);
        for (int64_t r = 0; r < runs.count; r++) {
            const int64_t lane = run_lane(&s->out, &runs, r);
            const uint8_t *x = coded_plane(&s->in, block, c) + lane;
            uint8_t *to = coded_plane(&s->out, block, c) + lane;
            int64_t i = 0;
            for (; i + QSP_UNIT <= runs.size; i += QSP_UNIT)
                spmm_unit_look_up(to + i, x + i, table);
            if (i < runs.size) { /* behind the last plane there is a unit more */
                QSP_ALIGNED(64) uint8_t part[QSP_UNIT];
                spmm_unit_look_up(part, x + i, table);
                memcpy(to + i, part, (size_t)(runs.size - i));
            }
        }
    }
}

/* ---- pools ---- */

/* The part of `n` outputs whose window position `at` + i * step lies in [0, size). */
QSP_INLINE void inside(int64_t at, int64_t step, int64_t size, int64_t n, int64_t *first, int64_t *last)
{
    *first = at < 0 ? (-at + step - 1) / step : 0;
    *last = qsp_min(n, size > at ? (size - at + step - 1) / step : 0);
}

/* Whole vectors, up to QSP_UNIT bytes more than n. */
QSP_INLINE void max_run(uint8_t *to, const uint8_t *x, int64_t n)
{
    for (int64_t i = 0; i < n; i += QSP_UNIT)
        for (int k = 0; k < QSP_UNIT; k++)
            to[i + k] = x[i + k] > to[i + k] ? x[i + k] : to[i + k];
}

enum { POOL_COLUMNS = 512 }; /* of the input at a time */

/* Outputs [start, start + n) of a row, whose windows have up to POOL_COLUMNS columns together: the largest of each column,
 * then of neighbouring columns, then those at which a window begins. `from` is the image's first row. */
static void pool_max_part(const qsp_coded_step *s, const uint8_t *from, int64_t y, int64_t start, int64_t n, uint8_t *to)
{
    QSP_ALIGNED(64) uint8_t column[POOL_COLUMNS + 2 * QSP_UNIT], across[POOL_COLUMNS + 2 * QSP_UNIT];
    const int64_t at = start * s->col_step - s->left, begins = (n - 1) * s->col_step + 1;
    const int64_t size = begins + (s->kernel_x - 1) * s->dilation_x;
    const int64_t first = at < 0 ? -at : 0, last = qsp_min(size, s->in.cols - at);
    for (int64_t i = 0; i < size; i += QSP_UNIT)
        memset(column + i, 0, QSP_UNIT);
    for (int64_t ky = 0; ky < s->kernel_y; ky++) {
        const int64_t row = y * s->row_step - s->top + ky * s->dilation_y;
        if (row >= 0 && row < s->in.rows && last > first)
            max_run(column + first, from + row * s->in.grid.lane_y + at + first, last - first);
    }
    for (int64_t i = last > first ? last : first; i < size; i++) /* where whole vectors have gone too far */
        column[i] = 0;
    for (int64_t i = 0; i < begins; i += QSP_UNIT)
        memcpy(across + i, column + i, QSP_UNIT);
    for (int64_t kx = 1; kx < s->kernel_x; kx++)
        max_run(across, column + kx * s->dilation_x, begins);
    copy_run(to, 1, across, s->col_step, n);
}

static void pool_max_image(const qsp_coded_step *s, const uint8_t *from, uint8_t *to)
{
    const int64_t most = (POOL_COLUMNS - (s->kernel_x - 1) * s->dilation_x - 1) / s->col_step + 1;
    for (int64_t y = 0; y < s->out.rows; y++)
        for (int64_t x = 0; x < s->out.cols; x += most)
            pool_max_part(s, from, y, x, qsp_min(most, s->out.cols - x), to + y * s->out.grid.lane_y + x);
}

enum { POOL_PART = 256 }; /* outputs of a row at a time */

/* Outputs [start, start + n) of a row: means, n <= POOL_PART. */
static void pool_mean_part(const qsp_coded_step *s, int64_t image, int64_t c, int64_t y, int64_t start, int64_t n,
                           uint8_t *to)
{
    int32_t sums[POOL_PART] = {0}, count[POOL_PART] = {0};
    const int64_t step = s->col_step;
    for (int64_t ky = 0; ky < s->kernel_y; ky++) {
        const int64_t row = y * s->row_step - s->top + ky * s->dilation_y;
        if (row < 0 || row >= s->in.rows)
            continue;
        const uint8_t *from = coded_row(&s->in, image, c, row);
        for (int64_t kx = 0; kx < s->kernel_x; kx++) {
            const int64_t at = start * step + kx * s->dilation_x - s->left;
            int64_t i, last;
            inside(at, step, s->in.cols, n, &i, &last);
            for (; i < last; i++) {
                sums[i] += from[at + step * i];
                count[i]++;
            }
        }
    }
    const int32_t all = (int32_t)(s->kernel_y * s->kernel_x);
    for (int64_t i = 0; i < n; i++) {
        sums[i] -= s->in.zero * count[i];
        count[i] = s->count_padding ? all : count[i];
    }
    for (int64_t i = n; i < (n + 15) / 16 * 16; i++)
        count[i] = 1;
    for (int64_t i = 0; i < n; i += 16)
        coded_store(to + i, coded_finish(s, c, f32x16_div(f32x16_load_i32(sums + i), f32x16_load_i32(count + i)), NULL),
                    n - i);
}

/* The mean of a whole image of one channel. */
QSP_INLINE uint8_t pool_mean_image(const qsp_coded_step *s, int64_t image, int64_t c)
{
    int32_t sum = 0, quotient[16] = {0};
    uint8_t code;
    for (int64_t y = 0; y < s->in.rows; y++) {
        const uint8_t *x = coded_row(&s->in, image, c, y);
        for (int64_t i = 0; i < s->in.cols; i++)
            sum += x[i];
    }
    const int32_t pixels = (int32_t)(s->in.rows * s->in.cols);
    quotient[0] = sum - s->in.zero * pixels;
    const f32x16 mean = f32x16_div(f32x16_load_i32(quotient), f32x16_set1((float)pixels));
    u8x16_store_n(&code, i32x16_to_code(i32x16_sub(coded_finish(s, c, mean, NULL), i32x16_set1(128))), 1);
    return code;
}

static void coded_pool_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const qsp_coded *out = &s->out;
    const int64_t images = coded_images(out, block), start = block * out->grid.images;
    const int whole = s->mean && s->kernel_y == s->in.rows && s->kernel_x == s->in.cols && out->rows == 1 &&
                      out->cols == 1 && !s->top && !s->left && s->dilation_y == 1 && s->dilation_x == 1;
    uint8_t part[POOL_PART];
    for (int64_t c = first; c < last; c++) {
        coded_clear(out, block, c);
        for (int64_t b = 0; b < images; b++) {
            if (whole) {
                *coded_row(out, start + b, c, 0) = pool_mean_image(s, start + b, c);
                continue;
            }
            uint8_t *to = coded_row(out, start + b, c, 0);
            if (!s->mean) {
                pool_max_image(s, coded_row(&s->in, start + b, c, 0), to);
                continue;
            }
            for (int64_t y = 0; y < out->rows; y++)
                for (int64_t x = 0; x < out->cols; x += POOL_PART) {
                    const int64_t n = qsp_min(POOL_PART, out->cols - x);
                    pool_mean_part(s, start + b, c, y, x, n, part);
                    memcpy(to + y * out->grid.lane_y + x, part, (size_t)n);
                }
        }
    }
}

/* Codes of one block of the input -> a tensor. */
static void coded_unpack_kernel(const qsp_coded_step *s, int64_t block, int64_t first, int64_t last)
{
    const qsp_coded *in = &s->in;
    const coded_runs runs = runs_of(in, block);
    const int64_t step = in->grid.lane_b == 1 ? s->to_b : s->to_x, start = block * in->grid.images * s->to_b;
    for (int64_t c = first; c < last; c++)
        for (int64_t r = 0; r < runs.count; r++) {
            const uint8_t *x = coded_plane(in, block, c) + run_lane(in, &runs, r);
            float *to = s->to + start + c * s->to_c + r / runs.rows * s->to_b + r % runs.rows * s->to_y;
            for (int64_t i = 0; i < runs.size; i++)
                to[i * step] = (float)(x[i] - in->zero) * s->multiplier[c];
        }
}
