/* The unpacker: sums of up to QSP_ROW_BLOCK rows and one unit of lanes -> scale, bias -> the tensor of a view. */

/* Sums of one row: exact ones, or floats where the planes are, or where an int32 cannot hold some row of the buffer. */
typedef union {
    int32_t i32[QSP_UNIT]; /* in the order of unit_lane */
    float f32[QSP_UNIT];   /* in that of the lanes */
} row_sums;

QSP_INLINE f32x16 load_sums(const row_sums *sums, int place, const int as_float)
{
    return as_float ? f32x16_load(sums->f32 + place) : f32x16_load_i32(sums->i32 + place);
}

typedef struct {
    int64_t block, lane; /* lane counted from the view's origin in that block */
    int64_t images;      /* in that block */
    int64_t end;         /* lanes from here on belong to the next turn of the walk */
} qsp_unit;

static void locate_unit(qsp_unit *u, const qsp_grid *g, const qsp_view *v, int64_t images, int64_t unit)
{
    qsp_walk w;
    const int64_t whole = images / g->images;
    u->block = 0;
    u->images = g->images;
    if (whole) {
        qsp_walk_init(&w, g, v, g->images);
        u->block = qsp_min(unit / qsp_walk_units(&w), whole);
        unit -= u->block * qsp_walk_units(&w);
    }
    if (u->block == whole) {
        u->images = images - whole * g->images;
        qsp_walk_init(&w, g, v, u->images);
    }
    u->lane = qsp_walk_lane(&w, unit);
    u->end = w.turns == 1 ? INT64_MAX : (unit / w.units_per_turn + 1) * w.lane[0];
}

QSP_INLINE int unit_lane(int place)
{
    return place / ISA_LANES * ISA_LANES + spmm_acc_lane(place % ISA_LANES);
}

/* The runs of lanes of a unit that lie in the tensor. */
typedef struct {
    int runs, lanes;
    int columns;                  /* whether channels are neighbours in memory, and `column` is set */
    int64_t step;                 /* elements from lane to lane */
    uint8_t first[QSP_UNIT], size[QSP_UNIT];
    int64_t elem[QSP_UNIT];
    void *column[QSP_UNIT];       /* where channel 0 of a lane is, NULL where there is none */
    const float *lane_scale;      /* of the unit's lanes, or NULL */
} unit_target;

/* A result times the scale of its lane, where lanes have some. */
QSP_INLINE f32x16 at_lane(const unit_target *t, int place, f32x16 v)
{
    return t->lane_scale ? f32x16_mul(v, f32x16_set1(t->lane_scale[unit_lane(place)])) : v;
}

static void target_init(unit_target *t, const qsp_view *v, const qsp_grid *g, const qsp_unit *u, int dtype, void *out)
{
    qsp_walk w;
    qsp_walk_init(&w, g, v, u->images);
    int64_t i0 = u->lane / w.lane[0], rest = u->lane % w.lane[0], i1 = rest / w.lane[1], i2 = rest % w.lane[1];
    const int64_t base = v->elem + u->block * g->images * v->elem_b;
    const int64_t end = qsp_min(QSP_UNIT, u->end - u->lane);
    t->runs = t->lanes = 0;
    t->step = w.elem[2];
    for (int64_t place = 0; place < end && i0 < w.size[0];) {
        if (i1 < w.size[1] && i2 < w.size[2]) {
            t->first[t->runs] = (uint8_t)place;
            t->size[t->runs] = (uint8_t)qsp_min(w.size[2] - i2, end - place);
            t->lanes += t->size[t->runs];
            t->elem[t->runs++] = base + i0 * w.elem[0] + i1 * w.elem[1] + i2 * w.elem[2];
        }
        place += w.lane[1] - i2;
        i2 = 0;
        if (++i1 * w.lane[1] >= w.lane[0]) {
            i1 = 0;
            i0++;
        }
    }
    t->columns = v->elem_c == 1 && !(t->step == 1 && v->channels == 1);
    if (!t->columns)
        return;
    for (int i = 0; i < QSP_UNIT; i++)
        t->column[i] = NULL;
    for (int k = 0; k < t->runs; k++)
        for (int j = 0; j < t->size[k]; j++)
            t->column[t->first[k] + j] = element_at(out, dtype, t->elem[k] + j * t->step);
}

/* A result with its bias, inside of its limits; in this order a NaN stays one. */
QSP_INLINE f32x16 with_bias(const qsp_spmm *a, f32x16 v, f32x16 bias)
{
    return f32x16_min(f32x16_set1(a->high), f32x16_max(f32x16_set1(a->low), f32x16_add(v, bias)));
}

/* 16 lanes of 16 rows, transposed. With `gaps` what belongs to no element of the tensor is stored as well, where nobody reads
 * it: a branch for each lane, which the processor mispredicts at every gap, would cost more. */
QSP_INLINE void unpack_tile(const qsp_spmm *a, const unit_target *t, int64_t row, const row_sums *sums, int place,
                            f32x16 scale, f32x16 bias, const int as_float, const int has_bias, const int dtype,
                            const int gaps)
{
    QSP_ALIGNED(64) float nowhere[16];
    f32x16 tile[16];
    QSP_UNROLL
    for (int i = 0; i < 16; i++)
        tile[i] = load_sums(sums + i, place, as_float);
    f32_transpose_16x16(tile);
    QSP_UNROLL
    for (int i = 0; i < 16; i++) {
        f32x16 v = as_float ? tile[i] : f32x16_mul(tile[i], scale);
        if (has_bias && !as_float)
            v = at_lane(t, place + i, v);
        void *to = t->column[as_float ? place + i : unit_lane(place + i)];
        store_elements(to || !gaps ? element_at(to, dtype, row) : nowhere, dtype,
                       has_bias ? with_bias(a, v, bias) : v);
    }
}

/* The same of at most 16 rows. */
QSP_INLINE void unpack_part(const qsp_spmm *a, const unit_target *t, int64_t row, int rows, const row_sums *sums,
                            int place, f32x16 scale, f32x16 bias, const int as_float, const int has_bias,
                            const int dtype)
{
    QSP_ALIGNED(64) float nowhere[16];
    f32x16 tile[16];
    QSP_UNROLL
    for (int i = 0; i < 16; i++) /* rows that do not exist repeat the first one; their columns are not stored */
        tile[i] = load_sums(sums + (i < rows ? i : 0), place, as_float);
    f32_transpose_16x16(tile);
    QSP_UNROLL
    for (int i = 0; i < 16; i++) {
        f32x16 v = as_float ? tile[i] : f32x16_mul(tile[i], scale);
        if (has_bias && !as_float)
            v = at_lane(t, place + i, v);
        void *to = t->column[as_float ? place + i : unit_lane(place + i)];
        store_elements_n(to ? element_at(to, dtype, row) : nowhere, dtype, has_bias ? with_bias(a, v, bias) : v, rows);
    }
}

/* A unit of `n` rows, sixteen of them by sixteen lanes at a time. Rows are the inner loop: what it writes of a lane is one
 * piece of memory, whose lines the processor then fetches ahead, and a few lanes that lie a power of two apart do not push
 * each other out of the first cache. `scale`: of these rows. */
QSP_INLINE void unpack_unit(const qsp_spmm *a, const unit_target *t, int64_t row, int n, const row_sums *sums,
                            const float *scale, const int as_float, const int has_bias, const int dtype,
                            const int whole)
{
    for (int p = 0; p < QSP_UNIT; p += 16)
        for (int r = 0; r < n; r += 16) {
            const int rows = whole ? 16 : (int)qsp_min(16, n - r);
            const f32x16 s = f32x16_load(scale + r);
            const f32x16 b = has_bias ? f32x16_load_n(a->bias + row + r, rows) : f32x16_zero();
            if (rows == 16)
                unpack_tile(a, t, row + r, sums + r, p, s, b, as_float, has_bias, dtype, !whole);
            else
                unpack_part(a, t, row + r, rows, sums + r, p, s, b, as_float, has_bias, dtype);
        }
}

/* The rest of all kinds; codes to float32 have copies of their own. */
QSP_APART void unpack_rest(const qsp_spmm *a, const unit_target *t, int64_t row, int n, const row_sums *sums,
                           const float *scale, int as_float)
{
    if (a->dtype != QSP_F32 || as_float)
        unpack_unit(a, t, row, n, sums, scale, as_float, a->bias != NULL, a->dtype, 0);
    else if (a->bias)
        unpack_unit(a, t, row, n, sums, scale, 0, 1, QSP_F32, 0);
    else
        unpack_unit(a, t, row, n, sums, scale, 0, 0, QSP_F32, 0);
}

QSP_INLINE void unpack_columns_of(const qsp_spmm *a, const unit_target *t, int64_t row, int n, const row_sums *sums,
                                  const int as_float, const int has_bias, const int dtype)
{
    QSP_ALIGNED(64) float scale[QSP_ROW_BLOCK] = {0};
    for (int i = 0; i < n && !as_float; i++)
        scale[i] = a->scale[row + i] * a->scale_factor;
    const int whole = t->lanes == QSP_UNIT ? n / 16 * 16 : 0;
    unpack_unit(a, t, row, whole, sums, scale, as_float, has_bias, dtype, 1);
    if (whole < n)
        unpack_rest(a, t, row + whole, n - whole, sums + whole, scale + whole, as_float);
}

/* Channels are neighbours in memory. */
static void unpack_columns(const qsp_spmm *a, const unit_target *t, int64_t row, int n, row_sums *sums, int as_float)
{
    if (as_float && a->scale) /* long rows: floats that still want their scale */
        for (int i = 0; i < n; i++)
            for (int p = 0; p < QSP_UNIT; p++)
                sums[i].f32[p] *= a->scale[row + i] * a->scale_factor;
    const int has_bias = a->bias != NULL;
    if (a->dtype == QSP_BF16)
        unpack_columns_of(a, t, row, n, sums, as_float, has_bias, QSP_BF16);
    else if (as_float)
        unpack_columns_of(a, t, row, n, sums, 1, has_bias, QSP_F32);
    else if (has_bias)
        unpack_columns_of(a, t, row, n, sums, 0, 1, QSP_F32);
    else
        unpack_columns_of(a, t, row, n, sums, 0, 0, QSP_F32);
}

static void unpack_rows(const qsp_spmm *a, const unit_target *t, int64_t row, int n, row_sums *sums, int as_float)
{
    if (t->columns) {
        unpack_columns(a, t, row, n, sums, as_float);
        return;
    }
    QSP_ALIGNED(64) float line[QSP_UNIT];
    for (int i = 0; i < n; i++) {
        void *to = element_at(a->out, a->dtype, (row + i) * a->view.elem_c);
        const float scale = a->scale ? a->scale[row + i] * a->scale_factor : 1.0f;
        const float bias = a->bias ? a->bias[row + i] : 0.0f;
        const int direct = a->dtype == QSP_F32 && t->step == 1 && t->runs == 1 && t->size[0] == QSP_UNIT;
        float *values = direct ? (float *)to + t->elem[0] : line;
        if (as_float)
            for (int p = 0; p < QSP_UNIT; p += 16)
                f32x16_store(values + p, f32x16_add(f32x16_mul(f32x16_load(sums[i].f32 + p), f32x16_set1(scale)),
                                                    f32x16_set1(bias)));
        else if (t->lane_scale) {
            spmm_unit_to_f32(values, sums[i].i32, scale, 0.0f);
            for (int p = 0; p < QSP_UNIT; p += 16)
                f32x16_store(values + p, f32x16_add(f32x16_mul(f32x16_load(values + p), f32x16_load(t->lane_scale + p)),
                                                    f32x16_set1(bias)));
        } else
            spmm_unit_to_f32(values, sums[i].i32, scale, bias);
        for (int p = 0; a->bias && p < QSP_UNIT; p += 16)
            f32x16_store(values + p, with_bias(a, f32x16_load(values + p), f32x16_zero()));
        for (int k = 0; !direct && k < t->runs; k++) {
            const float *q = line + t->first[k];
            const int size = t->size[k];
            if (t->step != 1) {
                for (int j = 0; j < size; j++) {
                    void *p = element_at(to, a->dtype, t->elem[k] + j * t->step);
                    if (a->dtype == QSP_F32)
                        *(float *)p = q[j];
                    else
                        *(uint16_t *)p = qsp_bf16_from_float(q[j]);
                }
                continue;
            }
            for (int j = 0; j < size; j += 16) {
                void *p = element_at(to, a->dtype, t->elem[k] + j);
                if (size - j >= 16)
                    store_elements(p, a->dtype, f32x16_load(q + j));
                else
                    store_elements_n(p, a->dtype, f32x16_load_n(q + j, size - j), size - j);
            }
        }
    }
}
