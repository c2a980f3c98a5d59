/* What an instruction set's header has to provide, and what each of it has to do: a new one is finished when this
 * compiles behind it without a warning and the tests pass. scalar.h says the same in portable C.
 *
 * Macros
 *   ISA_LANES        lanes of one vector of codes: 16, 32 or 64, a divisor of QSP_UNIT
 *   ISA_SDDMM_UNITS  units whose gradient stays in registers while a row's nonzeros pass: 1, 2 or 4
 *   ISA_SPMM_ACCS    independent sums of one row, for the latency of a dot product: 1 or 2
 *   ISA_DENSE_ROWS   rows whose sums stay in registers in a product of dense rows: 4 or 6
 *   ISA_DENSE_GRAD_ROWS  rows of a gradient whose sums with four planes stay in registers: 4 or 6
 *   ISA_SPMM_TILE, ISA_SDDMM_TILE   lanes x nonzeros of one step of a product on codes, for the names of the kernels
 *   ISA_OWN_ROWS     defined where the header brings whole rows (spmm_row_u8s8, sddmm_row_u8s8 and pair_kernel, as
 *                    avx2_maddubs_*.h) in place of the primitives marked so below
 *   ISA_LEFT_OUT     defined where products leave something out that does not depend on the codes, as of codes that are
 *                    taken minus 128: loops then add what the header's spmm_left_out and sddmm_acc_add_left_out give
 *                    (neon_products.h has the contract)
 *   ISA_DENSE_TILES  defined where the header brings tiles, registers that a task sets up and gives back, for products of
 *                    dense rows that are large enough (amx.h has the contract)
 * and the types f32x16, f64x16, i32x16, u32x16, u8x16, random_rows, sddmm_acc and, without ISA_OWN_ROWS, spmm_acc and
 * sddmm_grad, of any layout.
 *
 * Names are those of the elements and how many there are: f32x16 is sixteen float32, whatever registers they take.
 *
 * Memory: a pointer has the alignment of its elements and no more. What loads or stores `_n` touches the first n
 * elements only, 1 <= n <= 16, and loads zeros for the rest; everything else touches all of its elements and nothing
 * behind them, unless said otherwise. Prefetches may go anywhere.
 *
 * Exactness: integers are exact, and wrap around where they are added or subtracted. Floats are rounded to nearest
 * even once an operation, denormals kept, and a product is not fused with a sum but in `fma`: what becomes codes has
 * the same bits on every instruction set. Where a result may differ it says so. */
_Static_assert(QSP_GROUP == 4, "instructions that multiply bytes add up four neighbours, the weights of a group");
_Static_assert(QSP_UNIT % ISA_LANES == 0 && ISA_LANES % 16 == 0, "a unit is a number of whole vectors");

/* ---- sixteen float32 ---- */
static inline f32x16 f32x16_set1(float v);
static inline f32x16 f32x16_zero(void);
static inline f32x16 f32x16_load(const float *p);
static inline f32x16 f32x16_load_n(const float *p, int n);
static inline f32x16 f32x16_load_bf16(const uint16_t *p);
static inline f32x16 f32x16_load_bf16_n(const uint16_t *p, int n);
/* Integers and codes as numbers, rounded where they are beyond 2^24. */
static inline f32x16 f32x16_load_i32(const int32_t *p);
static inline f32x16 f32x16_load_u8(const uint8_t *p);
static inline f32x16 f32x16_from_i32(i32x16 v);
/* The same bits. */
static inline f32x16 f32x16_from_bits(i32x16 v);
/* base[index[i]] for i < n, zero where the index is negative and behind n. Reads n indices; of base what they name. */
static inline f32x16 f32x16_gather(const float *base, const int32_t *index, int n);
static inline void f32x16_store(float *p, f32x16 v);
static inline void f32x16_store_n(float *p, f32x16 v, int n);
/* To nearest even; a NaN becomes 0x7fc0. */
static inline void f32x16_store_bf16(uint16_t *p, f32x16 v);
static inline void f32x16_store_bf16_n(uint16_t *p, f32x16 v, int n);

static inline f32x16 f32x16_add(f32x16 a, f32x16 b);
static inline f32x16 f32x16_sub(f32x16 a, f32x16 b);
static inline f32x16 f32x16_mul(f32x16 a, f32x16 b);
static inline f32x16 f32x16_div(f32x16 a, f32x16 b);
/* a * b + c, rounded once or twice: for sums that nothing exact follows from. */
static inline f32x16 f32x16_fma(f32x16 a, f32x16 b, f32x16 c);
/* a < b ? a : b and a > b ? a : b: b where either is NaN, and of two zeros. */
static inline f32x16 f32x16_min(f32x16 a, f32x16 b);
static inline f32x16 f32x16_max(f32x16 a, f32x16 b);
/* On bits, those of a NaN too: the magnitude; the magnitude of v with the sign of another. */
static inline f32x16 f32x16_abs(f32x16 v);
static inline f32x16 f32x16_copysign(f32x16 v, f32x16 sign);
/* 1 where v is not zero, a NaN included, otherwise 0. */
static inline f32x16 f32x16_is_nonzero(f32x16 v);
/* Bit i: low < v < high at place i; not of a NaN. The upper sixteen bits are zero. */
static inline uint32_t f32x16_between(f32x16 v, f32x16 low, f32x16 high);
/* v at the places whose bit is set, zero elsewhere; the upper sixteen bits may be anything. */
static inline f32x16 f32x16_keep(f32x16 v, uint32_t bits);
/* What follows p, in order, at the places whose bit is set, times what `factor` has there; zero elsewhere, whatever factor
 * has. The upper sixteen bits are zero. Sixteen elements may be read. */
static inline f32x16 f32x16_mul_spread(const float *p, uint32_t bits, f32x16 factor);
/* The other way round: what is at places whose bit is set, side by side, and behind that anything: sixteen elements may
 * be written. The upper sixteen bits are zero. */
static inline void f32x16_store_side(float *p, f32x16 v, uint32_t bits);
/* In any order of additions: the last bits may differ. */
static inline float f32x16_reduce_add(f32x16 v);
/* Any of them where there is a NaN. */
static inline float f32x16_reduce_min(f32x16 v);
static inline float f32x16_reduce_max(f32x16 v);
/* Sixteen rows of a tile in place. */
static inline void f32_transpose_16x16(f32x16 *rows);

/* ---- sixteen float64: sums of float32 ---- */
static inline f64x16 f64x16_load(const double *p);
static inline f64x16 f64x16_load_f32(const float *p);
static inline f64x16 f64x16_from_f32(f32x16 v);
static inline void f64x16_store(double *p, f64x16 v);
static inline f64x16 f64x16_add(f64x16 a, f64x16 b);
/* sum + v^2 of a v that is a float32, whose square is exact: fused or not, the result is the same. */
static inline f64x16 f64x16_add_square(f64x16 sum, f64x16 v);

/* ---- sixteen magnitudes as the integers of their bits, which lets a NaN win every comparison ---- */
static inline u32x16 u32x16_zero(void);
/* The bits of floats in memory. */
static inline u32x16 u32x16_load_bits(const float *p);
static inline void u32x16_store_bits(float *p, u32x16 v);
static inline u32x16 u32x16_max_abs(u32x16 most, f32x16 v);
static inline uint32_t u32x16_reduce_max(u32x16 v);

/* ---- sixteen int32 ---- */
static inline i32x16 i32x16_set1(int32_t v);
static inline i32x16 i32x16_load_n(const int32_t *p, int n);
static inline i32x16 i32x16_load_u8(const uint8_t *p);
static inline i32x16 i32x16_load_s8(const uint8_t *p);
/* Nearest even, and towards zero, of |v| < 2^31; of a NaN INT32_MIN. */
static inline i32x16 i32x16_nearest(f32x16 v);
static inline i32x16 i32x16_truncated(f32x16 v);
static inline i32x16 i32x16_add(i32x16 a, i32x16 b);
static inline i32x16 i32x16_sub(i32x16 a, i32x16 b);
static inline i32x16 i32x16_min(i32x16 a, i32x16 b);
static inline i32x16 i32x16_max(i32x16 a, i32x16 b);
/* By 0 to 31 bits each, zeros from either side. */
static inline i32x16 i32x16_shift_left(i32x16 v, i32x16 bits);
static inline i32x16 i32x16_shift_right(i32x16 v, i32x16 bits);
/* Position of the highest bit of 0 < v < 2^24; negative for 0. */
static inline i32x16 i32x16_log2(i32x16 v);
/* v, negated where `sign` is negative, zero where that is. */
static inline i32x16 i32x16_apply_sign(i32x16 v, i32x16 sign);
static inline int32_t i32x16_reduce_add(i32x16 v);

/* ---- eight sums of 64 bits; v are pairs of neighbours (low, high) ---- */
static inline u64x8 u64x8_zero(void);
static inline u64x8 u64x8_add_pairs(u64x8 sum, i32x16 v);
/* Of low times high, both without a sign. */
static inline u64x8 u64x8_add_products(u64x8 sum, i32x16 v);
static inline void u64x8_store(uint64_t *p, u64x8 v);

/* ---- sixteen bytes ---- */
static inline void u8x16_store(uint8_t *p, u8x16 v);
static inline void u8x16_store_n(uint8_t *p, u8x16 v, int n);
/* v saturated to [-128, 127], as bytes; and with 128 added behind that: a code, where v is the code minus 128. */
static inline u8x16 i32x16_to_s8(i32x16 v);
static inline u8x16 i32x16_to_code(i32x16 v);
/* Lanes of sixteen channels -> `channels` planes, 1 to 16 of them, of the first 1 <= lanes <= QSP_UNIT lanes each, those
 * of channel c at p + c * pitch. The channels of lane j are at codes + QSP_UNIT * (j % 16) + 16 * (j / 16), so that lanes
 * sixteen apart are neighbours; those of all QSP_UNIT lanes are read. */
static inline void u8_transpose_unit(uint8_t *p, int64_t pitch, const uint8_t *codes, int lanes, int channels);

/* 32 bytes: every second one of the 64 at `from`. */
static inline void u8x32_copy_even(uint8_t *to, const uint8_t *from);

/* ---- random numbers: QSP_DITHER_BITS | qsp_random_bits(seed, an element's number), the bits of 128 + u ---- */
/* Of 16 elements whose numbers are `step` apart. */
static i32x16 i32x16_random_strided(uint64_t seed, uint64_t index, int64_t step);
/* Of 16 elements whose numbers follow each other from a multiple of four on. */
static inline i32x16 i32x16_random_run(uint64_t seed, uint64_t index);
/* Of rows of 16 elements, the first from `index` on and each `step` behind the one before, both multiples of four; the
 * next call gives the next two rows. */
static inline random_rows random_rows_from(uint64_t seed, uint64_t index, int64_t step);
static inline void random_rows_next(random_rows *r, i32x16 *two);
/* Of 16 times four neighbours, which start at `index` and then `step` apart, both multiples of four: four[i] has the
 * sixteen that come as number i. */
static inline void i32x16_random_fours(uint64_t seed, uint64_t index, int64_t step, i32x16 *four);

/* ---- gather-SpMM on codes ---- */
/* Where interleaving puts a lane: the lane, of ISA_LANES, whose sum is at this place of what spmm_acc_store writes.
 * With ISA_OWN_ROWS of what spmm_row_u8s8 writes. */
static inline int spmm_acc_lane(int place);
/* Sums of a unit, in that order, as floats in the order of the lanes: sum * scale + bias. */
static inline void spmm_unit_to_f32(float *out, const int32_t *sums, float scale, float bias);
/* Codes of a unit in the order of the lanes -> sixteen times four integers in that of the sums, and back, of integers in
 * [0, 255]. */
static inline void spmm_unit_from_codes(i32x16 *v, const uint8_t *codes);
static inline void spmm_unit_to_codes(uint8_t *codes, const i32x16 *v);
/* A unit's codes -> what a table of 256 has for each. */
static inline void spmm_unit_look_up(uint8_t *out, const uint8_t *codes, const uint8_t *table);
#ifndef ISA_OWN_ROWS
/* All ISA_LANES sums. */
static inline void spmm_acc_set1(spmm_acc *acc, int32_t v);
/* acc[lane] += sum of x[offset[k] + lane] * weight[k] over a group, codes (u8) times s8; exact also where two products
 * do not fit into 16 bits, but for what ISA_LEFT_OUT says. Reads ISA_LANES bytes at each offset. */
static inline void spmm_acc_dot(spmm_acc *acc, const uint8_t *x, const int32_t *offset, const int8_t *weight);
/* ISA_LANES sums: even + odd, or `even` where ISA_SPMM_ACCS is 1. */
static inline void spmm_acc_store(int32_t *p, const spmm_acc *even, const spmm_acc *odd);
#endif

/* ---- gather-SDDMM on codes ---- */
/* An accumulator holds any partial sums of one dot product; only their total, modulo 2^32, counts. */
static inline sddmm_acc sddmm_acc_zero(void);
static inline sddmm_acc sddmm_acc_add(sddmm_acc a, sddmm_acc b);
static inline int32_t sddmm_acc_reduce_add(sddmm_acc v);
/* sums[j] += total of acc[j] for j < n; n is QSP_GROUP, twice, three or four times that. */
static inline void sddmm_acc_flush(int64_t *sums, const sddmm_acc *acc, int n);
/* Plus the ISA_LANES codes of a gradient at p, each minus 128. */
static inline sddmm_acc sddmm_acc_add_grad(sddmm_acc sum, const uint8_t *p);
#ifndef ISA_OWN_ROWS
/* ISA_LANES codes of a gradient, each minus 128. */
static inline sddmm_grad sddmm_grad_load(const uint8_t *p);
/* Plus the products of ISA_LANES codes (u8) at x with a gradient (s8), exact as above. */
static inline sddmm_acc sddmm_acc_dot(sddmm_acc sum, const uint8_t *x, sddmm_grad g);
#endif

/* ---- dense rows on codes ---- */
/* Four planes of a unit, codes at x + offset[0..3], as QSP_GROUP * QSP_UNIT bytes in whatever order the next one wants;
 * `quad` is aligned to a unit. */
static inline void dense_interleave(uint8_t *quad, const uint8_t *x, const int32_t *offset);
/* sums[r * QSP_UNIT + place] += quads times the weights of row r, `pitch` bytes from one row to the next, in the order
 * of spmm_acc_lane, for a constant number of rows, 1 <= rows <= ISA_DENSE_ROWS; exact, modulo 2^32. */
static inline void dense_spmm_block(int32_t *sums, const uint8_t *quads, const int8_t *weights, int64_t pitch,
                                    int64_t groups, const int rows);
/* sums[j * pitch + k] += sum over units of gradient j (s8) times x at offset[k], for j < rows and k < 4, rows a constant, 4
 * or ISA_DENSE_GRAD_ROWS. Unit u starts at x_lane[u], and of gradient j at grad + (u * step + j) * QSP_UNIT, aligned to a
 * unit. */
static inline void dense_sddmm_block(int32_t *sums, int64_t pitch, const uint8_t *x, const int64_t *x_lane,
                                     const int32_t *offset, const int8_t *grad, int64_t step, int64_t units,
                                     const int rows);
