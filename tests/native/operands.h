/* What is given to a primitive, and what it gives: the same memory for every instruction set. */
#ifndef QSPARSEPROP_OPERANDS_H
#define QSPARSEPROP_OPERANDS_H

#include "kernels.h"

enum { LINES = 16, GROUPS = 9, GIVEN = 4096 };

typedef struct {
    float any[3][16];       /* any bits */
    float plain[3][16];     /* of magnitudes around 1 */
    float small[16];        /* |v| < 2^31, or NaN */
    float rows[LINES][16];
    double sums[16];
    int32_t integers[2][16], shift[16], below_2_24[16], code[QSP_UNIT], index[16];
    uint32_t bits;          /* the lower sixteen */
    uint32_t more_bits;     /* the same, with anything above them */
    int n;                  /* 1 to 16 */
    int lanes, channels;    /* 1 to QSP_UNIT, 1 to 16 */
    uint64_t seed, number;  /* the latter a multiple of four */
    int64_t step;           /* likewise */
    uint64_t odd_number;
    int64_t odd_step;
    int8_t weights[QSP_GROUP * GROUPS];
    int groups;             /* 0 to GROUPS */
    const uint8_t *end;     /* GIVEN bytes lie before it, behind it nothing may be read */
    uint8_t *out_end;       /* likewise, to be written */
} operands;

typedef union {
    float f32[16 * 16];
    double f64[16];
    int32_t i32[16 * 16];
    int64_t i64[16];
    uint64_t u64[16];
    uint32_t u32;
    uint8_t u8[16 * QSP_UNIT];
} result;

/* How results are compared: bit by bit; floats of which NaNs are alike; sums of floats in any order. */
enum { BITS, FLOATS, DOUBLES, NEARLY };

typedef struct {
    const char *name;
    int compared, size; /* bytes */
    void (*call)(const operands *, result *);
} probe;

typedef struct {
    const char *isa;
    int count;
    const probe *probes;
} probe_table;

#endif
