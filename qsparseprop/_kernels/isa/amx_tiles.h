/* The tile instructions that amx.h is written in, operands in the order of Intel's manual, what is written first; and a
 * model of them in C, by the manual's pseudocode, for tests on processors that have none. What raises an exception there
 * ends the process here as well.
 *
 * A tile is up to sixteen rows of up to 64 bytes. In a product C += A x B row k of B has, for each column of C, the four
 * bytes that go with bytes 4 k .. 4 k + 3 of a row of A. A tile's number is a literal. */
#ifndef QSPARSEPROP_AMX_TILES_H
#define QSPARSEPROP_AMX_TILES_H

#include "isa/common.h"

enum { TILES = 8, TILE_ROWS = 16, TILE_BYTES = 64 };

/* The operand of ldtilecfg: palette 1 are the tiles above, of which each has its own shape. */
typedef struct {
    uint8_t palette, start_row, zeros_2[14];
    uint16_t bytes[TILES]; /* of a row */
    uint8_t zeros_32[16], rows[TILES], zeros_56[8];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "the operand of ldtilecfg");

#ifndef ISA_TILE_MODEL
/* Not the compilers' intrinsics: those of gcc 12 do not say that a load reads memory, so that stores to what is loaded
 * next may be moved behind it. */
#define TILE_CONFIG(p) __asm__ volatile("ldtilecfg %0" : : "m"(*(const tile_config *)(p)))
#define TILE_RELEASE() __asm__ volatile("tilerelease" : : : "memory")
#define TILE_ZERO(c) __asm__ volatile("tilezero %%tmm" #c : :)
#define TILE_LOAD(c, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #c : : "r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_STORE(p, stride, c) \
    __asm__ volatile("tilestored %%tmm" #c ", (%0,%1,1)" : : "r"(p), "r"((int64_t)(stride)) : "memory")
#define TILE_DPBSUD(c, a, b) __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define TILE_DPBUSD(c, a, b) __asm__ volatile("tdpbusd %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#else
#define TILE_CONFIG(p) tile_model_config(p)
#define TILE_RELEASE() tile_model_release()
#define TILE_ZERO(c) tile_model_zero(c)
#define TILE_LOAD(c, p, stride) tile_model_load(c, p, stride)
#define TILE_STORE(p, stride, c) tile_model_store(p, stride, c)
#define TILE_DPBSUD(c, a, b) tile_model_dot(c, a, b, 1)
#define TILE_DPBUSD(c, a, b) tile_model_dot(c, a, b, 0)

/* What a processor, too, has once a thread. Beyond its shape a tile is zero. */
static _Thread_local struct {
    tile_config config;
    uint8_t tile[TILES][TILE_ROWS][TILE_BYTES];
} tile_model;

QSP_INLINE void tile_model_require(int condition)
{
    if (!condition)
        __builtin_trap();
}

QSP_APART void tile_model_release(void) { memset(&tile_model, 0, sizeof tile_model); }

QSP_APART void tile_model_config(const tile_config *c)
{
    const tile_config none = {0};
    tile_model_require(c->palette == 1 && c->start_row == 0);
    tile_model_require(!memcmp(c->zeros_2, none.zeros_2, sizeof none.zeros_2));
    tile_model_require(!memcmp(c->zeros_32, none.zeros_32, sizeof none.zeros_32));
    tile_model_require(!memcmp(c->zeros_56, none.zeros_56, sizeof none.zeros_56));
    for (int i = 0; i < TILES; i++)
        tile_model_require(c->rows[i] <= TILE_ROWS && c->bytes[i] <= TILE_BYTES && !c->rows[i] == !c->bytes[i]);
    tile_model_release();
    tile_model.config = *c;
}

/* Of a tile that has a shape, in a register file that is configured. */
QSP_INLINE uint8_t *tile_model_of(int i)
{
    tile_model_require(tile_model.config.palette == 1 && i >= 0 && i < TILES && tile_model.config.rows[i]);
    return tile_model.tile[i][0];
}

QSP_APART void tile_model_zero(int c) { memset(tile_model_of(c), 0, TILE_ROWS * TILE_BYTES); }

QSP_APART void tile_model_load(int c, const void *p, int64_t stride)
{
    uint8_t *to = tile_model_of(c);
    memset(to, 0, TILE_ROWS * TILE_BYTES);
    for (int r = 0; r < tile_model.config.rows[c]; r++)
        memcpy(to + TILE_BYTES * r, (const uint8_t *)p + stride * r, tile_model.config.bytes[c]);
}

QSP_APART void tile_model_store(void *p, int64_t stride, int c)
{
    const uint8_t *from = tile_model_of(c);
    for (int r = 0; r < tile_model.config.rows[c]; r++)
        memcpy((uint8_t *)p + stride * r, from + TILE_BYTES * r, tile_model.config.bytes[c]);
}

/* Bytes of `a` with a sign and of `b` without, or the other way round. */
QSP_APART void tile_model_dot(int c, int a, int b, int a_signed)
{
    const tile_config *t = &tile_model.config;
    uint8_t *sums = tile_model_of(c);
    const uint8_t *left = tile_model_of(a), *right = tile_model_of(b);
    tile_model_require(c != a && c != b && a != b);
    tile_model_require(t->bytes[c] % 4 == 0 && t->bytes[a] % 4 == 0 && t->bytes[b] % 4 == 0);
    tile_model_require(t->rows[c] == t->rows[a] && t->bytes[c] == t->bytes[b] && t->bytes[a] / 4 == t->rows[b]);
    for (int m = 0; m < TILE_ROWS; m++) {
        int32_t row[TILE_BYTES / 4] = {0};
        if (m < t->rows[c]) {
            memcpy(row, sums + TILE_BYTES * m, t->bytes[c]);
            for (int k = 0; k < t->bytes[a]; k++) {
                const int x = a_signed ? (int8_t)left[TILE_BYTES * m + k] : left[TILE_BYTES * m + k];
                for (int n = 0; n < t->bytes[c] / 4; n++) {
                    const uint8_t y = right[TILE_BYTES * (k / 4) + 4 * n + k % 4];
                    row[n] = (int32_t)((uint32_t)row[n] + (uint32_t)(x * (a_signed ? y : (int8_t)y)));
                }
            }
        }
        memcpy(sums + TILE_BYTES * m, row, sizeof row);
    }
}
#endif

#endif
