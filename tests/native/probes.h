/* A function of plain memory around each primitive of the instruction set that was included before, and their table. */
#include "operands.h"

#define NAME(primitive) QSP_NAMED(probe_##primitive)
#define PROBE(primitive, ...) static void NAME(primitive)(const operands *o, result *r) { (void)o; __VA_ARGS__ }
#define A f32x16_load(o->any[0])
#define B f32x16_load(o->any[1])
#define C f32x16_load(o->any[2])
#define I load_integers(o->integers[0])
#define J load_integers(o->integers[1])
/* Exactly as many bytes as are to be touched, before memory that is not there. */
#define ENDS(type, count) ((const type *)(const void *)(o->end - sizeof(type) * (size_t)(count)))
#define OUT_ENDS(type, count) ((type *)(void *)(o->out_end - sizeof(type) * (size_t)(count)))

#define load_integers QSP_NAMED(load_integers)
#define store_integers QSP_NAMED(store_integers)
#define written QSP_NAMED(written)
QSP_INLINE i32x16 load_integers(const int32_t *p) { return i32x16_load_n(p, 16); }
QSP_INLINE void store_integers(int32_t *p, i32x16 v) { f32x16_store((float *)p, f32x16_from_bits(v)); }
QSP_INLINE void written(const operands *o, result *r, size_t bytes) { memcpy(r, o->out_end - bytes, bytes); }

#define GIVES_F32(primitive, v) PROBE(primitive, f32x16_store(r->f32, v);)
#define GIVES_I32(primitive, v) PROBE(primitive, store_integers(r->i32, v);)
#define GIVES_F64(primitive, v) PROBE(primitive, f64x16_store(r->f64, v);)

GIVES_F32(f32x16_set1, f32x16_set1(o->any[0][0]))
GIVES_F32(f32x16_zero, f32x16_zero())
GIVES_F32(f32x16_load, f32x16_load(ENDS(float, 16)))
GIVES_F32(f32x16_load_n, f32x16_load_n(ENDS(float, o->n), o->n))
GIVES_F32(f32x16_load_bf16, f32x16_load_bf16(ENDS(uint16_t, 16)))
GIVES_F32(f32x16_load_bf16_n, f32x16_load_bf16_n(ENDS(uint16_t, o->n), o->n))
GIVES_F32(f32x16_load_i32, f32x16_load_i32(ENDS(int32_t, 16)))
GIVES_F32(f32x16_load_u8, f32x16_load_u8(ENDS(uint8_t, 16)))
GIVES_F32(f32x16_from_i32, f32x16_from_i32(I))
GIVES_F32(f32x16_from_bits, f32x16_from_bits(I))
GIVES_F32(f32x16_gather, f32x16_gather(o->rows[0], o->index + 16 - o->n, o->n))
PROBE(f32x16_store, f32x16_store(OUT_ENDS(float, 16), A); written(o, r, 64);)
PROBE(f32x16_store_n, f32x16_store_n(OUT_ENDS(float, o->n), A, o->n); written(o, r, 128);)
PROBE(f32x16_store_bf16, f32x16_store_bf16(OUT_ENDS(uint16_t, 16), A); written(o, r, 32);)
PROBE(f32x16_store_bf16_n, f32x16_store_bf16_n(OUT_ENDS(uint16_t, o->n), A, o->n); written(o, r, 64);)
GIVES_F32(f32x16_add, f32x16_add(A, B))
GIVES_F32(f32x16_sub, f32x16_sub(A, B))
GIVES_F32(f32x16_mul, f32x16_mul(A, B))
GIVES_F32(f32x16_div, f32x16_div(A, B))
GIVES_F32(f32x16_fma, f32x16_fma(f32x16_load(o->plain[0]), f32x16_load(o->plain[1]), f32x16_load(o->plain[2])))
GIVES_F32(f32x16_min, f32x16_min(A, B))
GIVES_F32(f32x16_max, f32x16_max(A, B))
GIVES_F32(f32x16_abs, f32x16_abs(A))
GIVES_F32(f32x16_copysign, f32x16_copysign(A, B))
GIVES_F32(f32x16_is_nonzero, f32x16_is_nonzero(A))
PROBE(f32x16_between, r->u32 = f32x16_between(A, B, C);)
GIVES_F32(f32x16_keep, f32x16_keep(A, o->more_bits))
GIVES_F32(f32x16_mul_spread, f32x16_mul_spread(ENDS(float, 16), o->bits, A))
PROBE(f32x16_store_side, f32x16_store_side(OUT_ENDS(float, 16), A, o->bits); written(o, r, 128);
      memset(r->f32 + 16 + __builtin_popcount(o->bits), 0, (size_t)(16 - __builtin_popcount(o->bits)) * sizeof(float));)
PROBE(f32x16_reduce_add, r->f32[0] = f32x16_reduce_add(f32x16_load(o->plain[0]));)
PROBE(f32x16_reduce_min, r->f32[0] = f32x16_reduce_min(f32x16_load(o->plain[0]));)
PROBE(f32x16_reduce_max, r->f32[0] = f32x16_reduce_max(f32x16_load(o->plain[0]));)
PROBE(f32_transpose_16x16, f32x16 rows[16]; for (int i = 0; i < 16; i++) rows[i] = f32x16_load(o->rows[i]);
      f32_transpose_16x16(rows); for (int i = 0; i < 16; i++) f32x16_store(r->f32 + 16 * i, rows[i]);)

GIVES_F64(f64x16_load, f64x16_load(o->sums))
GIVES_F64(f64x16_load_f32, f64x16_load_f32(ENDS(float, 16)))
GIVES_F64(f64x16_from_f32, f64x16_from_f32(A))
PROBE(f64x16_store, f64x16_store(OUT_ENDS(double, 16), f64x16_load(o->sums)); written(o, r, 128);)
GIVES_F64(f64x16_add, f64x16_add(f64x16_load(o->sums), f64x16_from_f32(A)))
GIVES_F64(f64x16_add_square, f64x16_add_square(f64x16_load(o->sums), f64x16_from_f32(A)))

PROBE(u32x16_zero, u32x16_store_bits(r->f32, u32x16_zero());)
PROBE(u32x16_load_bits, u32x16_store_bits(r->f32, u32x16_load_bits(ENDS(float, 16)));)
PROBE(u32x16_store_bits, u32x16_store_bits(OUT_ENDS(float, 16), u32x16_load_bits(o->any[0])); written(o, r, 64);)
PROBE(u32x16_max_abs, u32x16_store_bits(r->f32, u32x16_max_abs(u32x16_load_bits(o->any[0]), B));)
PROBE(u32x16_reduce_max, r->u32 = u32x16_reduce_max(u32x16_load_bits(o->any[0]));)

GIVES_I32(i32x16_set1, i32x16_set1(o->integers[0][0]))
GIVES_I32(i32x16_load_n, i32x16_load_n(ENDS(int32_t, o->n), o->n))
GIVES_I32(i32x16_load_u8, i32x16_load_u8(ENDS(uint8_t, 16)))
GIVES_I32(i32x16_load_s8, i32x16_load_s8(ENDS(uint8_t, 16)))
GIVES_I32(i32x16_nearest, i32x16_nearest(f32x16_load(o->small)))
GIVES_I32(i32x16_truncated, i32x16_truncated(f32x16_load(o->small)))
GIVES_I32(i32x16_add, i32x16_add(I, J))
GIVES_I32(i32x16_sub, i32x16_sub(I, J))
GIVES_I32(i32x16_min, i32x16_min(I, J))
GIVES_I32(i32x16_max, i32x16_max(I, J))
GIVES_I32(i32x16_shift_left, i32x16_shift_left(I, load_integers(o->shift)))
GIVES_I32(i32x16_shift_right, i32x16_shift_right(I, load_integers(o->shift)))
/* only the sign counts of what a zero gives */
GIVES_I32(i32x16_log2, i32x16_max(i32x16_log2(load_integers(o->below_2_24)), i32x16_set1(-1)))
GIVES_I32(i32x16_apply_sign, i32x16_apply_sign(load_integers(o->below_2_24), J))
PROBE(i32x16_reduce_add, r->i32[0] = i32x16_reduce_add(load_integers(o->below_2_24));)

PROBE(u64x8_zero, u64x8_store(r->u64, u64x8_zero());)
PROBE(u64x8_add_pairs, u64x8_store(r->u64, u64x8_add_pairs(u64x8_add_pairs(u64x8_zero(), I), J));)
PROBE(u64x8_add_products, u64x8_store(r->u64, u64x8_add_products(u64x8_add_products(u64x8_zero(), I), J));)
PROBE(u64x8_store, u64x8_store(OUT_ENDS(uint64_t, 8), u64x8_add_pairs(u64x8_zero(), I)); written(o, r, 64);)

PROBE(u8x16_store, u8x16_store(OUT_ENDS(uint8_t, 16), i32x16_to_s8(I)); written(o, r, 16);)
PROBE(u8x16_store_n, u8x16_store_n(OUT_ENDS(uint8_t, o->n), i32x16_to_s8(I), o->n); written(o, r, 32);)
PROBE(i32x16_to_s8, u8x16_store(r->u8, i32x16_to_s8(I)); u8x16_store(r->u8 + 16, i32x16_to_s8(load_integers(o->code)));)
PROBE(i32x16_to_code, u8x16_store(r->u8, i32x16_to_code(I)); u8x16_store(r->u8 + 16, i32x16_to_code(load_integers(o->code)));)
PROBE(u8_transpose_unit, u8_transpose_unit(r->u8, QSP_UNIT, ENDS(uint8_t, 16 * QSP_UNIT), o->lanes, o->channels);)
PROBE(u8x32_copy_even, u8x32_copy_even(OUT_ENDS(uint8_t, 32), ENDS(uint8_t, 64)); written(o, r, 32);)

GIVES_I32(i32x16_random_strided, i32x16_random_strided(o->seed, o->odd_number, o->odd_step))
GIVES_I32(i32x16_random_run, i32x16_random_run(o->seed, o->number))
PROBE(random_rows, random_rows rows = random_rows_from(o->seed, o->number, o->step); for (int k = 0; k < 4; k += 2) {
          i32x16 two[2]; random_rows_next(&rows, two); store_integers(r->i32 + 16 * k, two[0]);
          store_integers(r->i32 + 16 * k + 16, two[1]); })
PROBE(i32x16_random_fours, i32x16 four[4]; i32x16_random_fours(o->seed, o->number, o->step, four);
      for (int k = 0; k < 4; k++) store_integers(r->i32 + 16 * k, four[k]);)

#ifndef ISA_TOKENS_ONLY
PROBE(spmm_unit_to_f32, int32_t sums[QSP_UNIT]; for (int i = 0; i < QSP_UNIT; i++) sums[i] = o->integers[0][unit_lane(i) % 16];
      spmm_unit_to_f32(OUT_ENDS(float, QSP_UNIT), sums, o->plain[0][0], o->plain[0][1]); written(o, r, 4 * QSP_UNIT);)
PROBE(spmm_unit_codes, i32x16 v[4]; spmm_unit_from_codes(v, ENDS(uint8_t, QSP_UNIT)); int32_t sums[QSP_UNIT];
      for (int i = 0; i < 4; i++) store_integers(sums + 16 * i, v[i]);
      for (int i = 0; i < QSP_UNIT; i++) r->i32[unit_lane(i)] = sums[i];
      spmm_unit_to_codes(OUT_ENDS(uint8_t, QSP_UNIT), v); memcpy(r->i32 + QSP_UNIT, o->out_end - QSP_UNIT, QSP_UNIT);)
PROBE(spmm_unit_look_up, spmm_unit_look_up(OUT_ENDS(uint8_t, QSP_UNIT), ENDS(uint8_t, QSP_UNIT), o->end - GIVEN);
      written(o, r, QSP_UNIT);)
PROBE(dense_spmm_block, QSP_ALIGNED(64) uint8_t quads[GROUPS * QSP_GROUP * QSP_UNIT]; int32_t sums[4 * QSP_UNIT];
      int8_t weights[4][QSP_GROUP * GROUPS];
      for (int g = 0; g < o->groups; g++) {
          const int32_t offset[4] = {g, 7 * g, 2 * QSP_UNIT + g, GIVEN - QSP_UNIT};
          dense_interleave(quads + g * QSP_GROUP * QSP_UNIT, o->end - GIVEN, offset);
      }
      for (int j = 0; j < 4; j++)
          for (int i = 0; i < QSP_GROUP * GROUPS; i++) weights[j][i] = o->weights[(i + 5 * j) % (QSP_GROUP * GROUPS)];
      for (int i = 0; i < 4 * QSP_UNIT; i++) sums[i] = o->integers[0][i / QSP_UNIT];
      dense_spmm_block(sums, quads, weights[0], QSP_GROUP * GROUPS, o->groups, 4);
      for (int i = 0; i < 4 * QSP_UNIT; i++) r->i32[i / QSP_UNIT * QSP_UNIT + unit_lane(i % QSP_UNIT)] = sums[i];)
PROBE(dense_sddmm_block, QSP_ALIGNED(64) int8_t grad[2][4][QSP_UNIT]; uint8_t codes[2][4][QSP_UNIT];
      const int64_t lane[2] = {3, 5 * QSP_UNIT}; const int32_t offset[4] = {0, 1, 9 * QSP_UNIT, 7};
      memcpy(codes, o->end - sizeof codes, sizeof codes);
      for (int u = 0; u < 2; u++)
          for (int j = 0; j < 4; j++)
              for (int i = 0; i < QSP_UNIT; i++) grad[u][j][i] = (int8_t)(codes[u][j][i] ^ 128);
      memset(r->i32, 1, 16 * sizeof(int32_t));
      dense_sddmm_block(r->i32, 4, o->end - GIVEN, lane, offset, grad[0][0], 4, 2, 4);
      for (int j = 0; j < 4; j++) {
          sddmm_acc total = sddmm_acc_zero(), rest = total;
          for (int i = 0; i < 2 * QSP_UNIT; i += ISA_LANES) {
              total = sddmm_acc_add_grad(total, codes[i / QSP_UNIT][j] + i % QSP_UNIT);
#ifdef ISA_LEFT_OUT
              rest = sddmm_acc_add_left_out(rest, codes[i / QSP_UNIT][j] + i % QSP_UNIT);
#endif
          }
          r->i32[16 + j] = sddmm_acc_reduce_add(total);
          for (int k = 0; k < 4; k++)
              r->i32[4 * j + k] = (int32_t)((uint32_t)r->i32[4 * j + k] + (uint32_t)sddmm_acc_reduce_add(rest));
      })
PROBE(sddmm_acc_flush, sddmm_acc d[16]; for (int i = 0; i < 16; i++) {
          d[i] = sddmm_acc_zero(); r->i64[i] = o->integers[1][i];
          for (int k = 0; k <= i; k++) d[i] = sddmm_acc_add(d[i], sddmm_acc_add_grad(sddmm_acc_zero(), o->end - QSP_UNIT * (k + 1)));
#if ISA_LANES < 64
          for (int v = ISA_LANES; v < QSP_UNIT; v += ISA_LANES)
              for (int k = 0; k <= i; k++)
                  d[i] = sddmm_acc_add_grad(d[i], o->end - QSP_UNIT * (k + 1) + v);
#endif
      }
      sddmm_acc_flush(r->i64, d, o->n > 8 ? 16 : o->n > 4 ? 12 : o->n > 2 ? 8 : 4);)
#endif

#if !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
/* A row of a list, which ends where memory does. */
PROBE(spmm_row_u8s8, int32_t offset[QSP_GROUP * GROUPS + QSP_GROUP]; int32_t sums[QSP_UNIT];
      for (int i = 0; i < QSP_GROUP * GROUPS + QSP_GROUP; i++) offset[i] = GIVEN - QSP_UNIT - (i * 61) % (GIVEN - 2 * QSP_UNIT);
      spmm_row_u8s8(o->end - GIVEN, offset, offset + QSP_GROUP * GROUPS, o->weights, o->groups, 0, o->integers[0][0], sums);
      for (int i = 0; i < QSP_UNIT; i++) r->i32[unit_lane(i)] = sums[i];)
#endif

#define LISTED(primitive, compared, bytes) {#primitive, compared, bytes, NAME(primitive)},
#define probes_of QSP_NAMED(probes_of)
static const probe probes_of[] = {
    LISTED(f32x16_set1, BITS, 64) LISTED(f32x16_zero, BITS, 64) LISTED(f32x16_load, BITS, 64)
    LISTED(f32x16_load_n, BITS, 64) LISTED(f32x16_load_bf16, BITS, 64) LISTED(f32x16_load_bf16_n, BITS, 64)
    LISTED(f32x16_load_i32, BITS, 64) LISTED(f32x16_load_u8, BITS, 64) LISTED(f32x16_from_i32, BITS, 64)
    LISTED(f32x16_from_bits, BITS, 64) LISTED(f32x16_gather, BITS, 64) LISTED(f32x16_store, BITS, 64)
    LISTED(f32x16_store_n, BITS, 128) LISTED(f32x16_store_bf16, BITS, 32) LISTED(f32x16_store_bf16_n, BITS, 64)
    LISTED(f32x16_add, FLOATS, 64) LISTED(f32x16_sub, FLOATS, 64) LISTED(f32x16_mul, FLOATS, 64)
    LISTED(f32x16_div, FLOATS, 64) LISTED(f32x16_fma, NEARLY, 64) LISTED(f32x16_min, BITS, 64)
    LISTED(f32x16_max, BITS, 64) LISTED(f32x16_abs, BITS, 64) LISTED(f32x16_copysign, BITS, 64)
    LISTED(f32x16_is_nonzero, BITS, 64) LISTED(f32x16_between, BITS, 4) LISTED(f32x16_keep, BITS, 64)
    LISTED(f32x16_mul_spread, FLOATS, 64) LISTED(f32x16_store_side, BITS, 128) LISTED(f32x16_reduce_add, NEARLY, 4)
    LISTED(f32x16_reduce_min, BITS, 4) LISTED(f32x16_reduce_max, BITS, 4) LISTED(f32_transpose_16x16, BITS, 1024)
    LISTED(f64x16_load, DOUBLES, 128) LISTED(f64x16_load_f32, DOUBLES, 128) LISTED(f64x16_from_f32, DOUBLES, 128)
    LISTED(f64x16_store, BITS, 128) LISTED(f64x16_add, DOUBLES, 128) LISTED(f64x16_add_square, DOUBLES, 128)
    LISTED(u32x16_zero, BITS, 64) LISTED(u32x16_load_bits, BITS, 64) LISTED(u32x16_store_bits, BITS, 64)
    LISTED(u32x16_max_abs, BITS, 64) LISTED(u32x16_reduce_max, BITS, 4)
    LISTED(i32x16_set1, BITS, 64) LISTED(i32x16_load_n, BITS, 64) LISTED(i32x16_load_u8, BITS, 64)
    LISTED(i32x16_load_s8, BITS, 64) LISTED(i32x16_nearest, BITS, 64) LISTED(i32x16_truncated, BITS, 64)
    LISTED(i32x16_add, BITS, 64) LISTED(i32x16_sub, BITS, 64) LISTED(i32x16_min, BITS, 64) LISTED(i32x16_max, BITS, 64)
    LISTED(i32x16_shift_left, BITS, 64) LISTED(i32x16_shift_right, BITS, 64) LISTED(i32x16_log2, BITS, 64)
    LISTED(i32x16_apply_sign, BITS, 64) LISTED(i32x16_reduce_add, BITS, 4)
    LISTED(u64x8_zero, BITS, 64) LISTED(u64x8_add_pairs, BITS, 64) LISTED(u64x8_add_products, BITS, 64)
    LISTED(u64x8_store, BITS, 64)
    LISTED(u8x16_store, BITS, 16) LISTED(u8x16_store_n, BITS, 32) LISTED(i32x16_to_s8, BITS, 32)
    LISTED(i32x16_to_code, BITS, 32) LISTED(u8_transpose_unit, BITS, 1024) LISTED(u8x32_copy_even, BITS, 32)
    LISTED(i32x16_random_strided, BITS, 64) LISTED(i32x16_random_run, BITS, 64) LISTED(random_rows, BITS, 256)
    LISTED(i32x16_random_fours, BITS, 256)
#ifndef ISA_TOKENS_ONLY
    LISTED(spmm_unit_to_f32, BITS, 256) LISTED(spmm_unit_codes, BITS, 320)
    LISTED(spmm_unit_look_up, BITS, 64) LISTED(dense_spmm_block, BITS, 1024)
    LISTED(dense_sddmm_block, BITS, 80) LISTED(sddmm_acc_flush, BITS, 128)
#endif
#if !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
    LISTED(spmm_row_u8s8, BITS, 256)
#endif
};

extern const probe_table QSP_NAMED(probe_table);
const probe_table QSP_NAMED(probe_table) = {QSP_TEXT(ISA_NAME), sizeof probes_of / sizeof probes_of[0], probes_of};
