/* The products on codes, by lists and by dense rows, of one instruction set and of portable C: the same bits. */
#ifndef QSPARSEPROP_PRODUCTS_H
#define QSPARSEPROP_PRODUCTS_H

#include "compare.h"

enum { MOST_ROWS = 75, MOST_ENTRIES = 1100, MOST_BATCH = 700, FRONT = 128 };

typedef struct {
    int64_t rows, entries, batch, pitch;
    int32_t group_ptr[MOST_ROWS + 1], first[MOST_ROWS + 1], offset[MOST_ENTRIES], plane[MOST_ENTRIES];
    int32_t *slot_offset, zero_point;
    int8_t *slot_weight, *matrix;
    int64_t matrix_pitch, correction[MOST_ROWS];
    float scale[MOST_ROWS], bias[MOST_ROWS], one_scale;
    float *planes_f32, *dy_f32, *slot_f32;
    uint8_t *planes, *dy;
    qsp_grid grid, dy_grid;
    qsp_view view, dy_view;
    qsp_band band;
    qsp_dense dense;
} layer;

/* To the byte, so that whoever watches memory sees what lies behind its end. */
static void *allocated(size_t bytes)
{
    void *p = calloc(1, bytes);
    if (!p && bytes)
        exit(2);
    return p;
}

/* A linear layer whose lists have rows of every length, and all of whose planes a row of the matrix has. Planes are moved
 * by a few lanes, as taps of a convolution are. */
static void make_layer(layer *l, int64_t rows, int64_t entries, int64_t batch, int kind)
{
    memset(l, 0, sizeof *l);
    l->rows = rows, l->entries = (entries + QSP_GROUP - 1) / QSP_GROUP * QSP_GROUP, l->batch = batch;
    l->pitch = (batch + QSP_UNIT - 1) / QSP_UNIT * QSP_UNIT + 2 * FRONT;
    const int64_t lanes = (entries + 1) * l->pitch, dy_lanes = (rows + 1) * l->pitch;
    l->planes = allocated((size_t)lanes), l->dy = allocated((size_t)dy_lanes);
    l->planes_f32 = allocated((size_t)lanes * 4), l->dy_f32 = allocated((size_t)dy_lanes * 4);
    for (int64_t i = 0; i < lanes; i++)
        l->planes[i] = random_byte(kind), l->planes_f32[i] = random_plain();
    for (int64_t i = 0; i < dy_lanes; i++) { /* nothing behind the batch */
        const int64_t lane = i % l->pitch - FRONT;
        const int there = lane >= 0 && lane < batch;
        l->dy[i] = there ? random_byte(kind) : 128, l->dy_f32[i] = there ? random_plain() : 0.0f;
    }
    for (int64_t k = 0; k < l->entries; k++) {
        l->plane[k] = (int32_t)(k < entries ? k : entries - 1);
        l->offset[k] = (int32_t)(l->plane[k] * l->pitch + FRONT + random_below(2 * FRONT) - FRONT);
    }
    for (int64_t r = 0; r < rows; r++) {
        const int64_t groups = r % 3 == 2 ? r % 7 : random_below((int)(l->entries / QSP_GROUP) + 1);
        l->group_ptr[r + 1] = l->group_ptr[r] + (int32_t)groups;
        l->first[r + 1] = QSP_GROUP * l->group_ptr[r + 1];
        l->correction[r] = (int64_t)(int32_t)random_u64() / 3000;
        l->scale[r] = random_plain(), l->bias[r] = random_plain();
    }
    const int64_t slots = QSP_GROUP * (int64_t)l->group_ptr[rows];
    l->slot_offset = allocated((size_t)slots * 4), l->slot_weight = allocated((size_t)slots);
    l->slot_f32 = allocated((size_t)slots * 4);
    for (int64_t s = 0; s < slots; s++) {
        l->slot_offset[s] = l->offset[random_below((int)l->entries)];
        l->slot_weight[s] = (int8_t)random_byte(kind), l->slot_f32[s] = random_plain();
    }
    l->matrix_pitch = (l->entries + QSP_UNIT - 1) / QSP_UNIT * QSP_UNIT;
    l->matrix = allocated((size_t)(rows * l->matrix_pitch));
    for (int64_t i = 0; i < rows * l->matrix_pitch; i++)
        l->matrix[i] = i % l->matrix_pitch < entries ? (int8_t)random_byte(kind) : 0;
    l->zero_point = random_below(256), l->one_scale = 0.37f;
    const qsp_grid grid = {batch, 1, l->pitch, l->pitch, entries, l->pitch, 0, lanes};
    const qsp_view view = {.channels = rows, .rows = 1, .cols = 1, .elem_b = rows, .elem_c = 1};
    l->grid = grid, l->view = l->dy_view = view;
    l->dy_grid = grid, l->dy_grid.planes = rows, l->dy_grid.front = FRONT, l->dy_grid.block = dy_lanes;
    const qsp_band band = {0, rows, 0, l->entries};
    l->band = band;
    const qsp_dense dense = {.rows = rows, .pitch = l->matrix_pitch, .band_count = 1, .bands = &l->band,
                             .offset = l->offset, .plane = l->plane, .value_rows = rows, .columns = entries, .groups = 1,
                             .value_ptr = l->first};
    l->dense = dense;
}

static void free_layer(layer *l)
{
    void *const all[] = {l->planes, l->dy, l->planes_f32, l->dy_f32, l->slot_offset, l->slot_weight, l->slot_f32, l->matrix};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
        free(all[i]);
}

static void spmm(const qsp_kernels *k, const layer *l, int codes, int dense, int bf16, int biased, void *out)
{
    const qsp_list list = {l->rows, l->group_ptr, 0, l->slot_offset};
    const qsp_spmm a = {
        .grid = l->grid, .list = list, .dense = dense ? &l->dense : NULL,
        .planes = codes ? (const void *)l->planes : (const void *)l->planes_f32,
        .weights = dense ? (const void *)l->matrix : codes ? (const void *)l->slot_weight : (const void *)l->slot_f32,
        .scale = codes ? l->scale : NULL, .correction = l->correction, .correction_factor = -1, .scale_factor = 0.25f,
        .bias = biased ? l->bias : NULL, .low = -1.0f, .high = INFINITY, .dtype = bf16 ? QSP_BF16 : QSP_F32, .out = out,
        .view = l->view, .images = l->batch, .row_chunks = 3};
    const int64_t units = qsp_count_units(&a.grid, &a.view, a.images);
    for (int64_t unit = 0; unit < units; unit++)
        for (int64_t chunk = 0; chunk < 3; chunk++)
            (dense ? k->spmm_dense_u8 : codes ? k->spmm_u8 : k->spmm_f32)(&a, unit, chunk);
}

static void sddmm(const qsp_kernels *k, const layer *l, int codes, int dense, float *out)
{
    int32_t *first = allocated(((size_t)l->rows + 1) * 4);
    for (int64_t r = 0; r <= l->rows; r++)
        first[r] = dense ? (int32_t)(r * l->dense.columns) : l->first[r];
    qsp_dense matrix = l->dense;
    matrix.value_ptr = first;
    const int64_t units = qsp_count_units(&l->dy_grid, &l->dy_view, l->batch);
    int64_t *scratch = allocated((size_t)(8 * (2 * units + 2 * QSP_GROUP * (int64_t)l->group_ptr[l->rows] + l->rows)));
    const qsp_sddmm a = {
        .grid = l->grid, .dy_grid = l->dy_grid, .list = {l->rows, l->group_ptr, 0, l->slot_offset},
        .nonzeros = {.rows = l->rows, .group_ptr = l->group_ptr, .first = first}, .dense = dense ? &matrix : NULL,
        .planes = codes ? (const void *)l->planes : (const void *)l->planes_f32,
        .dy = codes ? (const void *)l->dy : (const void *)l->dy_f32, .zero_point = &l->zero_point,
        .scale_x = &l->one_scale, .scale_dy = l->scale, .scale_dy_stride = 1, .sums = scratch, .out = out,
        .view = l->dy_view, .images = l->batch, .row_chunks = 3};
    if (dense) {
        k->sddmm_dense_units(&a);
        for (int64_t task = 0; task < qsp_grad_blocks(&l->band, k->grad_rows); task++)
            k->sddmm_dense_u8(&a, task);
    } else {
        for (int64_t chunk = 0; chunk < 3; chunk++)
            (codes ? k->sddmm_u8 : k->sddmm_f32)(&a, chunk);
    }
    free(scratch), free(first);
}

/* What is different, or NULL. */
static const char *compare_products(const qsp_kernels *scalar, const qsp_kernels *k, const layer *l)
{
    const size_t size = (size_t)(l->rows * l->batch);
    const size_t values = (size_t)(l->rows * l->entries + QSP_GROUP * (int64_t)l->group_ptr[l->rows]);
    float *expected = allocated(4 * (size + values)), *found = allocated(4 * (size + values));
    const char *wrong = NULL;
    for (int way = 0; way < 12 && !wrong; way++) {
        const int codes = way < 8, dense = codes && way & 1, bf16 = way >> 1 & 1, biased = way >> 2 & 1;
        memset(expected, 1, 4 * size), memset(found, 1, 4 * size);
        spmm(scalar, l, codes, dense, bf16, biased, expected);
        spmm(k, l, codes, dense, bf16, biased, found);
        if (codes && memcmp(expected, found, 4 * size))
            wrong = dense ? "spmm by dense rows" : "spmm by lists";
        for (size_t i = 0; !codes && !bf16 && i < size; i++)
            if (!(fabsf(expected[i] - found[i]) <= 1e-4f))
                wrong = "spmm of floats";
    }
    for (int way = 0; way < 3 && !wrong; way++) {
        memset(expected, 1, 4 * values), memset(found, 1, 4 * values);
        sddmm(scalar, l, way < 2, way == 1, expected);
        sddmm(k, l, way < 2, way == 1, found);
        if (way < 2 && memcmp(expected, found, 4 * values))
            wrong = way ? "sddmm by dense rows" : "sddmm by lists";
        for (size_t i = 0; way == 2 && i < values; i++)
            if (memcmp(expected + i, found + i, 4) && !(fabsf(expected[i] - found[i]) <= 1e-4f))
                wrong = "sddmm of floats";
    }
    free(expected), free(found);
    return wrong;
}

#endif
