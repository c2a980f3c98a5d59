/* Dense rows in tiles, AMX-TILE and AMX-INT8; everything else is as in 512-bit vectors.
 *
 * A product of two tiles takes a processor 16 cycles, its result about 50, and a tile is loaded in 8 from the first cache
 * and in some 20 from the second. So blocks have four sums, which stay in their tiles while planes or lanes pass; two
 * tiles of either operand are loaded for the four products, and those of one operand come from the first cache. The
 * numbers of the tiles: sums 0 to 3, the left operand 4 and 5, the right one 6 and 7. */
#include "isa/avx512vnni.h"

#include "isa/amx_tiles.h"

#define ISA_DENSE_TILES

/* What the tiles of a task are configured for: rows of the left operand's two tiles and of their sums, and how many
 * groups of four bytes these have. Zeros: they are not. */
typedef struct {
    int rows[2], groups;
} dense_tiles;

/* Other shapes, not copies with zeros, where rows or groups do not fill a tile: what is not there is not read, and smaller
 * products are no slower. It empties all tiles. */
QSP_INLINE void dense_tiles_configure(dense_tiles *d, int64_t rows, int64_t more_rows, int64_t groups)
{
    if (d->rows[0] == rows && d->rows[1] == more_rows && d->groups == groups)
        return;
    d->rows[0] = (int)rows;
    d->rows[1] = (int)more_rows;
    d->groups = (int)groups;
    QSP_ALIGNED(64) tile_config c;
    memset(&c, 0, sizeof c);
    c.palette = 1;
    for (int i = 0; i < TILES; i++) {
        const int left = i == 4 || i == 5, right = i >= 6;
        c.rows[i] = (uint8_t)(right ? groups : d->rows[left ? i - 4 : i / 2]);
        c.bytes[i] = (uint16_t)(left ? QSP_GROUP * groups : TILE_BYTES);
    }
    TILE_CONFIG(&c);
}

/* At a task's end: other code must find no tiles in use, which the system would have to save at every switch. */
QSP_INLINE void dense_tiles_release(dense_tiles *d)
{
    if (d->groups)
        TILE_RELEASE();
}

/* ---- SpMM: weights (s8) are the left operand, sixteen lanes of the quads (u8) the right one ---- */

/* Steps whose quads of 32 lanes, in every second pair of lines of the first cache, stay there while rows pass. */
enum { DENSE_TILE_STEPS = 8 };

/* Whether tiles are worth it: below that, as in depthwise convolutions, they are all but empty. */
QSP_INLINE int dense_spmm_wants_tiles(int64_t groups, int rows) { return rows >= 4 && groups >= 4; }

/* Two tiles of rows and 32 lanes, and one of rows and all lanes; `groups` in each step. */
QSP_INLINE void dense_spmm_tiles_2x2(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                     int64_t groups, int64_t steps)
{
    const int64_t line = QSP_UNIT * sizeof *sums, quad = QSP_GROUP * QSP_UNIT;
    int32_t *more = sums + TILE_ROWS * QSP_UNIT;
    TILE_LOAD(0, sums, line);
    TILE_LOAD(1, sums + 16, line);
    TILE_LOAD(2, more, line);
    TILE_LOAD(3, more + 16, line);
    for (; steps; steps--, weights += QSP_GROUP * groups, quads += quad * groups) {
        TILE_LOAD(4, weights, pitch);
        TILE_LOAD(6, quads, quad);
        TILE_DPBSUD(0, 4, 6);
        TILE_LOAD(7, quads + TILE_BYTES, quad);
        TILE_DPBSUD(1, 4, 7);
        TILE_LOAD(5, weights + TILE_ROWS * pitch, pitch);
        TILE_DPBSUD(2, 5, 6);
        TILE_DPBSUD(3, 5, 7);
    }
    TILE_STORE(sums, line, 0);
    TILE_STORE(sums + 16, line, 1);
    TILE_STORE(more, line, 2);
    TILE_STORE(more + 16, line, 3);
}

QSP_INLINE void dense_spmm_tiles_1x4(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                     int64_t groups, int64_t steps)
{
    const int64_t line = QSP_UNIT * sizeof *sums, quad = QSP_GROUP * QSP_UNIT;
    TILE_LOAD(0, sums, line);
    TILE_LOAD(1, sums + 16, line);
    TILE_LOAD(2, sums + 32, line);
    TILE_LOAD(3, sums + 48, line);
    for (; steps; steps--, weights += QSP_GROUP * groups, quads += quad * groups) {
        TILE_LOAD(4, weights, pitch);
        TILE_LOAD(6, quads, quad);
        TILE_DPBSUD(0, 4, 6);
        TILE_LOAD(7, quads + TILE_BYTES, quad);
        TILE_DPBSUD(1, 4, 7);
        TILE_LOAD(6, quads + 2 * TILE_BYTES, quad);
        TILE_DPBSUD(2, 4, 6);
        TILE_LOAD(7, quads + 3 * TILE_BYTES, quad);
        TILE_DPBSUD(3, 4, 7);
    }
    TILE_STORE(sums, line, 0);
    TILE_STORE(sums + 16, line, 1);
    TILE_STORE(sums + 32, line, 2);
    TILE_STORE(sums + 48, line, 3);
}

/* As dense_spmm_block, of rows and groups that want tiles, the latter at most QSP_DENSE_PLANES planes. They are cut into
 * steps of the same size, for which there may be a few groups too many: zeros in the matrix, written to the quads. */
QSP_INLINE void dense_spmm_tiles(dense_tiles *d, int32_t *sums, uint8_t *quads, const int8_t *weights, int64_t pitch,
                                 int64_t groups, int rows)
{
    const int64_t steps = (groups + TILE_ROWS - 1) / TILE_ROWS, step = (groups + steps - 1) / steps;
    const int64_t quad = QSP_GROUP * QSP_UNIT, parts = (steps + DENSE_TILE_STEPS - 1) / DENSE_TILE_STEPS;
    memset(quads + quad * groups, 0, (size_t)(quad * (steps * step - groups)));
    const int whole = rows / (2 * TILE_ROWS) * (2 * TILE_ROWS), rest = rows - whole;
    if (whole)
        dense_tiles_configure(d, TILE_ROWS, TILE_ROWS, step);
    for (int64_t part = 0; whole && part < parts; part++) {
        const int64_t first = steps * part / parts, last = steps * (part + 1) / parts;
        for (int lane = 0; lane < QSP_UNIT; lane += 32)
            for (int r = 0; r < whole; r += 2 * TILE_ROWS)
                dense_spmm_tiles_2x2(sums + r * QSP_UNIT + lane, quads + quad * step * first + QSP_GROUP * lane,
                                     weights + r * pitch + QSP_GROUP * step * first, pitch, step, last - first);
    }
    sums += whole * QSP_UNIT;
    weights += whole * pitch;
    if (rest > TILE_ROWS) {
        dense_tiles_configure(d, TILE_ROWS, rest - TILE_ROWS, step);
        for (int lane = 0; lane < QSP_UNIT; lane += 32)
            dense_spmm_tiles_2x2(sums + lane, quads + QSP_GROUP * lane, weights, pitch, step, steps);
    } else if (rest) {
        dense_tiles_configure(d, rest, rest, step);
        dense_spmm_tiles_1x4(sums, quads, weights, pitch, step, steps);
    }
}

/* ---- SDDMM: sixteen planes of x (u8) are the left operand, sixteen rows of dy (s8), transposed, the right one ---- */

/* Units whose dy stays in the first cache while the planes pass. */
enum { DENSE_TILE_UNITS = 8 };

QSP_INLINE int dense_sddmm_wants_tiles(int64_t size, int rows) { return rows >= 8 && size >= 32; }

/* Sixteen rows of dy, codes minus 128, from fours of lanes to fours of rows. */
QSP_INLINE void dense_tile_of_dy(uint8_t *tile, const uint8_t *const *dy, int64_t lane)
{
    f32x16 v[TILE_ROWS];
    QSP_UNROLL
    for (int j = 0; j < TILE_ROWS; j++)
        v[j] = _mm512_castsi512_ps(sddmm_grad_load(dy[j] + lane));
    f32_transpose_16x16(v);
    QSP_UNROLL
    for (int i = 0; i < TILE_ROWS; i++)
        _mm512_store_ps((float *)(tile + TILE_BYTES * i), v[i]);
}

/* Up to sixteen planes: where they lie if each is as far from the one before, as in linear layers and 1 x 1 convolutions,
 * otherwise a copy. */
typedef struct {
    const int32_t *offset;
    int64_t rows, stride; /* a stride of 0: none is known */
} dense_tile_planes;

QSP_INLINE dense_tile_planes dense_tile_planes_of(const int32_t *offset, int64_t rows)
{
    dense_tile_planes t = {offset, rows, (int64_t)offset[1] - offset[0]};
    for (int64_t i = 2; i < rows; i++)
        if (offset[i] - (int64_t)offset[i - 1] != t.stride)
            t.stride = 0;
    return t;
}

QSP_INLINE const uint8_t *dense_tile_of_x(const dense_tile_planes *t, const uint8_t *x, uint8_t *copy)
{
    if (t->stride)
        return x + t->offset[0];
    for (int64_t i = 0; i < t->rows; i++)
        _mm512_store_si512(copy + TILE_BYTES * i, _mm512_loadu_si512(x + t->offset[i]));
    return copy;
}

/* sums[k * 2 * TILE_ROWS + j] (+)= of one or two tiles of planes and of rows. */
QSP_INLINE void dense_sddmm_tiles_block(int32_t *sums, const int begin, const uint8_t *x, const int64_t *x_lane,
                                        const int32_t *offset, int64_t planes, const uint8_t *dy, int64_t units,
                                        const int more_planes, const int more_rows)
{
    QSP_ALIGNED(64) uint8_t copy[2][TILE_ROWS * TILE_BYTES];
    const int64_t line = 2 * TILE_ROWS * sizeof *sums;
    int32_t *more = sums + 2 * TILE_ROWS * TILE_ROWS;
    const dense_tile_planes t0 = dense_tile_planes_of(offset, more_planes ? TILE_ROWS : planes);
    dense_tile_planes t1 = {0};
    if (more_planes)
        t1 = dense_tile_planes_of(offset + TILE_ROWS, planes - TILE_ROWS);
    if (begin) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, sums, line);
        if (more_rows)
            TILE_LOAD(1, sums + TILE_ROWS, line);
        if (more_planes)
            TILE_LOAD(2, more, line);
        if (more_planes && more_rows)
            TILE_LOAD(3, more + TILE_ROWS, line);
    }
    for (int64_t u = 0; u < units; u++, dy += 2 * TILE_ROWS * TILE_BYTES) {
        const uint8_t *p = dense_tile_of_x(&t0, x + x_lane[u], copy[0]);
        TILE_LOAD(4, p, t0.stride ? t0.stride : TILE_BYTES);
        TILE_LOAD(6, dy, TILE_BYTES);
        TILE_DPBUSD(0, 4, 6);
        if (more_rows) {
            TILE_LOAD(7, dy + TILE_ROWS * TILE_BYTES, TILE_BYTES);
            TILE_DPBUSD(1, 4, 7);
        }
        if (more_planes) {
            p = dense_tile_of_x(&t1, x + x_lane[u], copy[1]);
            TILE_LOAD(5, p, t1.stride ? t1.stride : TILE_BYTES);
            TILE_DPBUSD(2, 5, 6);
        }
        if (more_planes && more_rows)
            TILE_DPBUSD(3, 5, 7);
    }
    TILE_STORE(sums, line, 0);
    if (more_rows)
        TILE_STORE(sums + TILE_ROWS, line, 1);
    if (more_planes)
        TILE_STORE(more, line, 2);
    if (more_planes && more_rows)
        TILE_STORE(more + TILE_ROWS, line, 3);
}

/* sums[j * pitch + k] += sum over units, as of dense_sddmm_block, for all of up to QSP_GRAD_ENTRIES entries and two tiles
 * of rows, of which dy has pointers. */
QSP_INLINE void dense_sddmm_tiles(dense_tiles *d, int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                  const int32_t *offset, int64_t size, const uint8_t *const *dy,
                                  const int64_t *dy_lane, int64_t units, int rows)
{
    QSP_ALIGNED(64) int32_t total[QSP_GRAD_ENTRIES][2 * TILE_ROWS];
    QSP_ALIGNED(64) uint8_t right[DENSE_TILE_UNITS][2][TILE_ROWS * TILE_BYTES];
    const int more_rows = rows > TILE_ROWS;
    for (int64_t u = 0; u < units; u += DENSE_TILE_UNITS) {
        const int64_t n = qsp_min(DENSE_TILE_UNITS, units - u);
        for (int64_t i = 0; i < n; i++)
            for (int b = 0; b <= more_rows; b++)
                dense_tile_of_dy(right[i][b], dy + TILE_ROWS * b, dy_lane[u + i]);
        for (int64_t k = 0; k < size; k += 2 * TILE_ROWS) {
            const int64_t planes = qsp_min(2 * TILE_ROWS, size - k), more = planes - TILE_ROWS;
            const int32_t *o = offset + k;
            dense_tiles_configure(d, more > 0 ? TILE_ROWS : planes, more > 0 ? more : planes, TILE_ROWS);
            if (more > 0 && more_rows)
                dense_sddmm_tiles_block(total[k], !u, x, x_lane + u, o, planes, right[0][0], n, 1, 1);
            else if (more > 0)
                dense_sddmm_tiles_block(total[k], !u, x, x_lane + u, o, planes, right[0][0], n, 1, 0);
            else if (more_rows)
                dense_sddmm_tiles_block(total[k], !u, x, x_lane + u, o, planes, right[0][0], n, 0, 1);
            else
                dense_sddmm_tiles_block(total[k], !u, x, x_lane + u, o, planes, right[0][0], n, 0, 0);
        }
    }
    for (int j = 0; j < rows; j++)
        for (int64_t k = 0; k < size; k++)
            sums[j * pitch + k] += total[k][j];
}
