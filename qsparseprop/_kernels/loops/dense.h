/* The two products on codes by dense rows: all rows of a band read the same planes, so these are prepared once for a
 * unit and serve every row; no offset is loaded, and no plane shuffled, for each nonzero. The sums are those of lists,
 * since what the matrix has more are zeros. */

/* Up to QSP_ROW_BLOCK rows of a band. */
QSP_INLINE void dense_spmm_rows(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                int64_t groups, int rows)
{
    for (; ISA_DENSE_ROWS == 6 && rows >= 6; rows -= 6, sums += 6 * QSP_UNIT, weights += 6 * pitch)
        dense_spmm_block(sums, quads, weights, pitch, groups, ISA_DENSE_ROWS);
    for (; rows >= 4; rows -= 4, sums += 4 * QSP_UNIT, weights += 4 * pitch)
        dense_spmm_block(sums, quads, weights, pitch, groups, 4);
    for (; rows >= 2; rows -= 2, sums += 2 * QSP_UNIT, weights += 2 * pitch)
        dense_spmm_block(sums, quads, weights, pitch, groups, 2);
    if (rows)
        dense_spmm_block(sums, quads, weights, pitch, groups, 1);
}

/* One task: rows of part `chunk` of the view's for the unit number `unit`. */
static void spmm_dense_kernel(const qsp_spmm *a, int64_t unit, int64_t chunk)
{
    QSP_ALIGNED(64) row_sums sums[QSP_ROW_BLOCK];
    QSP_ALIGNED(64) uint8_t quads[QSP_UNIT * QSP_DENSE_PLANES];
    const qsp_dense *d = a->dense;
    unit_target target;
    coded_unit coded;
    const uint8_t *x = (const uint8_t *)a->planes + locate_task(a, unit, &target, &coded);
    const int64_t origin = a->view.plane, rows = a->view.channels; /* other rows belong to other views */
    const int64_t last = rows * (chunk + 1) / a->row_chunks;
    const qsp_band *b = d->bands, *interleaved = NULL;
#ifdef ISA_DENSE_TILES
    dense_tiles tiles = {{0, 0}, 0};
#endif
    for (int64_t row = rows * chunk / a->row_chunks; row < last; row += QSP_ROW_BLOCK) {
        const int n = (int)qsp_min(QSP_ROW_BLOCK, last - row);
        for (int i = 0; i < n; i++) {
            const uint32_t start = (uint32_t)(uint64_t)(a->correction[row + i] * a->correction_factor);
            for (int p = 0; p < QSP_UNIT; p++)
                sums[i].i32[p] = (int32_t)start;
            if (target.columns && target.column[i])
                for (int k = 0; k < n; k += 16)
                    QSP_PREFETCH_WRITE(element_at(target.column[i], a->dtype, row + k));
        }
        for (int done = 0; done < n;) {
            const int64_t at = origin + row + done;
            while (at >= b->last)
                b++;
            const int m = (int)qsp_min(n - done, b->last - at);
            for (int64_t k = 0; k < b->size; k += QSP_DENSE_PLANES) {
                const int64_t size = qsp_min(QSP_DENSE_PLANES, b->size - k);
                if (interleaved != b || b->size > QSP_DENSE_PLANES)
                    for (int64_t i = 0; i < size; i += QSP_GROUP)
                        dense_interleave(quads + QSP_UNIT * i, x, d->offset + b->table + k + i);
                interleaved = b;
                const int8_t *weights = (const int8_t *)a->weights + at * d->pitch + k;
#ifdef ISA_DENSE_TILES
                if (dense_spmm_wants_tiles(size / QSP_GROUP, m)) {
                    dense_spmm_tiles(&tiles, sums[done].i32, quads, weights, d->pitch, size / QSP_GROUP, m);
                    continue;
                }
#endif
                dense_spmm_rows(sums[done].i32, quads, weights, d->pitch, size / QSP_GROUP, m);
            }
            done += m;
        }
        if (a->requantize)
            requantize_rows(a->requantize, &coded, row, n, sums);
        else
            unpack_rows(a, &target, row, n, sums, 0);
    }
#ifdef ISA_DENSE_TILES
    dense_tiles_release(&tiles);
#endif
}

/* ---- the weight gradient ---- */

static void sddmm_dense_units_kernel(const qsp_sddmm *a)
{
    const int64_t units = qsp_count_units(&a->dy_grid, &a->view, a->images);
    int64_t *x = (int64_t *)a->sums, *dy = x + units;
    for (int64_t u = 0; u < units; u++) {
        qsp_unit where;
        locate_unit(&where, &a->dy_grid, &a->view, a->images, u);
        x[u] = where.block * a->grid.block + a->view.origin + where.lane;
        dy[u] = where.block * a->dy_grid.block + a->dy_grid.front + a->view.origin + where.lane;
    }
}

enum {
#ifdef ISA_DENSE_TILES
    GRAD_ROWS = 32,    /* two tiles, for which the planes are read once */
#else
    GRAD_ROWS = 4 * ISA_DENSE_GRAD_ROWS, /* of a block */
#endif
    STRIP_UNITS = 16,  /* of which a few rows and planes stay in the first cache */
    EXACT_STRIPS = QSP_MAX_EXACT / (STRIP_UNITS * QSP_UNIT) /* whose sums fit into 32 bits */
};

/* What belongs to the entries of a block, and of one row its gradients without scales. */
typedef struct {
    int32_t zero[QSP_GRAD_ENTRIES];
    float scale[QSP_GRAD_ENTRIES], value[QSP_GRAD_ENTRIES];
} dense_entries;

QSP_INLINE void dense_entries_init(dense_entries *e, const qsp_sddmm *a, const int32_t *plane, int64_t size)
{
    for (int64_t k = 0; k < size; k++) {
        e->zero[k] = a->zero_point[plane[k] * a->zero_stride];
        e->scale[k] = a->scale_x[plane[k] * a->scale_x_stride];
    }
}

/* A row's sums, of up to QSP_MAX_EXACT lanes -> without the zero points' share, which 32 bits hold as well, whatever
 * wraps on the way: 255 * 128 * QSP_MAX_EXACT < 2^31. */
QSP_INLINE void dense_entries_exact(dense_entries *e, const int32_t *sums, int64_t size, int64_t dy_sum)
{
    const uint32_t dy = (uint32_t)(uint64_t)dy_sum;
    for (int64_t k = 0; k < size; k++)
        e->value[k] = (float)(int32_t)((uint32_t)sums[k] - (uint32_t)e->zero[k] * dy);
}

QSP_INLINE void dense_entries_wide(dense_entries *e, const int64_t *sums, int64_t size, int64_t dy_sum)
{
    for (int64_t k = 0; k < size; k++)
        e->value[k] = (float)(sums[k] - e->zero[k] * dy_sum);
}

/* Gradients of a row for the entries [first, first + size) of its table -> the values that are there. */
QSP_INLINE void sddmm_dense_finish(const qsp_sddmm *a, int64_t row, int64_t first, int64_t size, const dense_entries *e)
{
    const qsp_dense *d = a->dense;
    const float scale_dy = a->scale_dy[row * a->scale_dy_stride];
    const int64_t n = qsp_min(size, d->columns - first); /* the table may have padding */
    float *out = a->out + d->value_ptr[row] + values_between(d, row, 0, first);
    if (!d->bits) {
        for (int64_t k = 0; k < n; k++)
            out[k] = e->value[k] * (e->scale[k] * scale_dy);
        return;
    }
    const uint64_t *row_bits = d->bits + row * qsp_words(d->columns);
    const float *end = out + values_between(d, row, first, first + n);
    for (int64_t k = 0; out < end; k += 16) {
        const uint32_t bits = bits_at(row_bits, first + k);
        const int there_are = qsp_count_bits(bits);
        const f32x16 scale = f32x16_mul(columns_at(e->scale, k, size), f32x16_set1(scale_dy));
        const f32x16 value = f32x16_mul(columns_at(e->value, k, size), scale);
        if (end - out >= 16) { /* what is written too much is written again */
            f32x16_store_side(out, value, bits);
        } else {
            float line[16];
            f32x16_store_side(line, value, bits);
            memcpy(out, line, (size_t)there_are * sizeof *line);
        }
        out += there_are;
    }
}

/* part[j][k] += sum over units of dy[j] times x at offset[k]. Rows are padded to fours or sixes, whose sums nobody reads.
 * The gradient of a strip is written out side by side: all of the strip's planes pass it, and would have to turn its codes
 * into signed ones, and find its rows, once more each. */
QSP_INLINE void sddmm_dense_part(int32_t (*part)[QSP_GRAD_ENTRIES], const uint8_t *x, const int64_t *x_lane,
                                 const int32_t *offset, int64_t size, const uint8_t *const *dy, const int64_t *dy_lane,
                                 int64_t units, int rows)
{
    QSP_ALIGNED(64) int8_t grad[STRIP_UNITS][GRAD_ROWS][QSP_UNIT];
    const int padded = (int)qsp_min(rows + 3, GRAD_ROWS);
    for (int64_t u = 0; u < units; u += STRIP_UNITS) {
        const int64_t n = qsp_min(STRIP_UNITS, units - u);
        for (int64_t i = 0; i < n; i++)
            for (int j = 0; j < padded; j++)
                for (int v = 0; v < QSP_UNIT; v++)
                    grad[i][j][v] = (int8_t)(dy[j][dy_lane[u + i] + v] ^ 0x80);
        for (int64_t k = 0; k < size; k += 4)
            for (int j = 0; j < rows;) {
                const int left = rows - j;
                if (ISA_DENSE_GRAD_ROWS == 6 && (left > 8 || left == 5 || left == 6)) {
                    dense_sddmm_block(part[j] + k, QSP_GRAD_ENTRIES, x, x_lane + u, offset + k, grad[0][j], GRAD_ROWS,
                                      n, ISA_DENSE_GRAD_ROWS);
                    j += ISA_DENSE_GRAD_ROWS;
                } else {
                    dense_sddmm_block(part[j] + k, QSP_GRAD_ENTRIES, x, x_lane + u, offset + k, grad[0][j], GRAD_ROWS,
                                      n, 4);
                    j += 4;
                }
            }
    }
}

#ifdef ISA_LEFT_OUT
/* What the products above leave out, the same for all entries of a row. */
QSP_INLINE void sddmm_dense_add_left_out(int32_t (*part)[QSP_GRAD_ENTRIES], int64_t size, const uint8_t *const *dy,
                                         const int64_t *dy_lane, int64_t units, int rows)
{
    for (int j = 0; j < rows; j++) {
        sddmm_acc total = sddmm_acc_zero();
        for (int64_t u = 0; u < units; u++)
            for (int v = 0; v < QSP_UNIT; v += ISA_LANES)
                total = sddmm_acc_add_left_out(total, dy[j] + dy_lane[u] + v);
        const uint32_t left_out = (uint32_t)sddmm_acc_reduce_add(total);
        for (int64_t k = 0; k < size; k++)
            part[j][k] = (int32_t)((uint32_t)part[j][k] + left_out);
    }
}
#endif

/* One task: a block of rows and entries of their table, all units. */
static void sddmm_dense_kernel(const qsp_sddmm *a, int64_t task)
{
    QSP_ALIGNED(64) int32_t part[GRAD_ROWS][QSP_GRAD_ENTRIES];
    QSP_ALIGNED(64) int64_t sums[GRAD_ROWS][QSP_GRAD_ENTRIES];
    dense_entries entries;
    int64_t dy_sum[GRAD_ROWS] = {0};
    const qsp_dense *d = a->dense;
    const qsp_band *b = d->bands;
    for (; task >= qsp_grad_blocks(b, GRAD_ROWS); b++)
        task -= qsp_grad_blocks(b, GRAD_ROWS);
    /* the planes of some entries, which are more than the gradient of some rows, stay in the second cache meanwhile */
    const int64_t row_blocks = (b->last - b->first + GRAD_ROWS - 1) / GRAD_ROWS;
    const int64_t row = b->first + task % row_blocks * GRAD_ROWS, entry = task / row_blocks * QSP_GRAD_ENTRIES;
    const int64_t size = qsp_min(QSP_GRAD_ENTRIES, b->size - entry);
    const int rows = (int)qsp_min(GRAD_ROWS, b->last - row);
    const int64_t units = qsp_count_units(&a->dy_grid, &a->view, a->images);
    const int64_t *x_lane = (const int64_t *)a->sums, *dy_lane = x_lane + units;
    const int32_t *offset = d->offset + b->table + entry;
    const uint8_t *dy[GRAD_ROWS];
    for (int j = 0; j < GRAD_ROWS; j++) /* rows that do not exist repeat the last one */
        dy[j] = (const uint8_t *)a->dy + (row + qsp_min(j, rows - 1)) * a->dy_grid.pitch;
#ifdef ISA_DENSE_TILES
    dense_tiles tiles = {{0, 0}, 0};
#endif
    const int parts = units > EXACT_STRIPS * STRIP_UNITS; /* otherwise 64 bits are not needed, which fill the cache */
    for (int j = 0; parts && j < rows; j++)
        for (int64_t k = 0; k < size; k++)
            sums[j][k] = 0;
    memset(part, 0, sizeof part);
    for (int64_t from = 0; from < units; from += EXACT_STRIPS * STRIP_UNITS) {
        const int64_t to = qsp_min(units, from + EXACT_STRIPS * STRIP_UNITS);
        for (int j = 0; j < rows; j++) {
            sddmm_acc total = sddmm_acc_zero();
            for (int64_t u = from; u < to; u++)
                for (int v = 0; v < QSP_UNIT; v += ISA_LANES)
                    total = sddmm_acc_add_grad(total, dy[j] + dy_lane[u] + v);
            dy_sum[j] += sddmm_acc_reduce_add(total);
        }
#ifdef ISA_DENSE_TILES
        if (dense_sddmm_wants_tiles(size, rows))
            dense_sddmm_tiles(&tiles, part[0], QSP_GRAD_ENTRIES, (const uint8_t *)a->planes, x_lane + from, offset,
                              size, dy, dy_lane + from, to - from, rows);
        else
#endif
            sddmm_dense_part(part, (const uint8_t *)a->planes, x_lane + from, offset, size, dy, dy_lane + from,
                             to - from, rows);
#ifdef ISA_LEFT_OUT
        sddmm_dense_add_left_out(part, size, dy, dy_lane + from, to - from, rows);
#endif
        if (!parts)
            break;
        for (int j = 0; j < rows; j++)
            for (int64_t k = 0; k < size; k++)
                sums[j][k] += part[j][k];
        memset(part, 0, sizeof part);
    }
#ifdef ISA_DENSE_TILES
    dense_tiles_release(&tiles);
#endif
    dense_entries_init(&entries, a, d->plane + b->table + entry, size);
    for (int j = 0; j < rows; j++) {
        if (parts)
            dense_entries_wide(&entries, sums[j], size, dy_sum[j]);
        else
            dense_entries_exact(&entries, part[j], size, dy_sum[j]);
        sddmm_dense_finish(a, row + j, entry, size, &entries);
    }
}
