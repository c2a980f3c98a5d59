/* Random and extreme numbers, memory that ends where a page does, and how results are compared. */
#ifndef QSPARSEPROP_COMPARE_H
#define QSPARSEPROP_COMPARE_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "operands.h"

static uint64_t random_state = 1;

static uint64_t random_u64(void)
{
    uint64_t x = random_state += 0x9e3779b97f4a7c15U;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9U;
    x = (x ^ x >> 27) * 0x94d049bb133111ebU;
    return x ^ x >> 31;
}
static int random_below(int n) { return (int)(random_u64() % (uint64_t)n); }
static float random_plain(void) { return (float)((double)random_u64() * 0x1p-63 - 1.0); }

/* Any bits, and often what is special among floats. */
static float random_float(void)
{
    static const uint32_t special[] = {0x00000000, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000,
                                       0xffc00001, 0x00000001, 0x807fffff, 0x00800000, 0x7f7fffff, 0xff7fffff, 0x3f000000,
                                       0x3fc00000, 0xc0200000, 0x4effffff, 0x4b7fffff, 0x7f800001, 0x3f7fffff};
    uint32_t bits = (uint32_t)random_u64();
    if (random_below(3) == 0)
        bits = special[random_below(sizeof special / sizeof special[0])];
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* |v| < 2^31 or NaN: halves, which are rounded to even, and anything else. */
static float random_small(void)
{
    switch (random_below(4)) {
    case 0: return (float)(random_below(4001) - 2000) * 0.5f;
    case 1: return (float)random_below(1 << 24) * (random_below(2) ? 127.99999f : -127.99999f);
    case 2: return random_plain() * 300.0f;
    default: {
        const float v = random_float();
        return v < 0x1p31f && v > -0x1p31f ? v : NAN;
    }
    }
}

static int32_t random_integer(void)
{
    static const int32_t special[] = {0, 1, -1, 127, 128, -128, -129, 255, 256, INT32_MAX, INT32_MIN, INT32_MIN + 1, 1 << 24};
    return random_below(3) ? (int32_t)random_u64() : special[random_below(sizeof special / sizeof special[0])];
}

enum { KINDS = 5 };

/* Bytes of a kind: anything, extremes, or one and the same. */
static uint8_t random_byte(int kind)
{
    static const uint8_t extreme[] = {0, 1, 127, 128, 129, 255};
    return kind == 0 ? (uint8_t)random_u64() : kind == 1 ? extreme[random_below(6)] : kind == 2 ? 0 : kind == 3 ? 255 : 128;
}

/* Behind the memory that is given back there is none; its size is a number of pages. */
static uint8_t *memory_that_ends(size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uint8_t *p = mmap(NULL, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || size % page || mprotect(p + size, page, PROT_NONE)) {
        perror("guarded memory");
        exit(2);
    }
    return p;
}

static int same_floats(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && !(a[i] != a[i] && b[i] != b[i]))
            return 0;
    return 1;
}
static int same_doubles(const double *a, const double *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && !(a[i] != a[i] && b[i] != b[i]))
            return 0;
    return 1;
}
/* Sums of a few products of magnitudes around 1. */
static int near_floats(const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabsf(a[i] - b[i]) <= 1e-5f))
            return 0;
    return 1;
}

static int same_results(const probe *p, const result *a, const result *b)
{
    const size_t size = (size_t)p->size;
    switch (p->compared) {
    case FLOATS: return same_floats(a->f32, b->f32, size / sizeof(float));
    case DOUBLES: return same_doubles(a->f64, b->f64, size / sizeof(double));
    case NEARLY: return near_floats(a->f32, b->f32, size / sizeof(float));
    default: return !memcmp(a, b, size);
    }
}

#endif
