/* What every instruction set provides: one table of functions, and the records they take.
 *
 * Vocabulary (docs/design.md has pictures):
 *   plane   all lanes of one feature (linear) or of one channel and stride phase (convolution)
 *   lane    one position that the weights do not distinguish: a batch element, or a pixel of an image
 *   grid    how (image, row, column) become lanes, and how planes and blocks of images follow each other
 *   view    a strided part of a tensor and the lanes that it occupies on a grid
 *   unit    QSP_UNIT neighbouring lanes, what one micro-kernel call works on
 */
#ifndef QSPARSEPROP_KERNELS_H
#define QSPARSEPROP_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "pattern.h"

#if defined(_MSC_VER) && !defined(__clang__)
#pragma fp_contract(off) /* what setup.py says to others by a flag */
#endif

#define QSP_UNIT 64       /* lanes of one unit */
#define QSP_DIGEST 24     /* sums of 64 bits that are a digest */
#define QSP_GROUP 4       /* nonzeros that one step of gather-SpMM takes */
#define QSP_ROW_BLOCK 64  /* rows whose sums wait in a buffer before they are unpacked */
#define QSP_DENSE_PLANES 1024 /* of a product of dense rows that are interleaved at a time */
#define QSP_GRAD_ENTRIES 256 /* of a table, in a block of the weight gradient by dense rows */
#define QSP_TOKEN_ROWS 16    /* rows of a weight that a step of a product with few tokens has slots of, four each */
#define QSP_TOKEN_COLUMNS 128 /* columns that a slot's place counts in */
#define QSP_MAX_EXACT 65536 /* u8 x s8 products that an int32 holds exactly: 255 * 127 * 65536 < 2^31 */

/* Element type of a tensor; QSP_U8 are saved codes, of what an epilogue read. */
enum { QSP_F32 = 0, QSP_BF16 = 1, QSP_U8 = 2 };

typedef struct {
    int64_t images;                 /* in one block */
    int64_t lane_b, lane_y, lane_x; /* lanes from one image, row, column to the next */
    int64_t planes, pitch, front;   /* of one block; lanes from plane to plane; lanes before a plane's first one */
    int64_t block;                  /* lanes from block to block */
} qsp_grid;

typedef struct {
    int64_t plane, channels;  /* the first plane and how many */
    int64_t origin;           /* lane of the first pixel of the first image */
    int64_t rows, cols;
    int64_t elem;             /* elements from the tensor's start to that pixel's first channel */
    int64_t elem_b, elem_c, elem_y, elem_x; /* elements from one image, channel, row, column to the next */
    int64_t index, index_b, index_c, index_y, index_x; /* the same for the element's logical number (random numbers) */
} qsp_view;

/* Lists of (offset, weight) in groups of QSP_GROUP slots: row r owns the groups group_ptr[r] .. group_ptr[r + 1]. What
 * belongs to slots may be there for some rows only. */
typedef struct {
    int64_t rows;
    const int32_t *group_ptr; /* [rows + 1] */
    int64_t base;             /* groups before the first one that offsets, weights and sums are there for */
    const int32_t *offset;    /* [slots] lanes from a block's start, the unit's own lane not included */
} qsp_list;

/* Of a row, counted from those that are there; of the one behind the last it is the end of all. */
static inline int64_t qsp_first_slot(const qsp_list *l, int64_t row) { return QSP_GROUP * (l->group_ptr[row] - l->base); }

/* How a list is kept, in two bytes a nonzero and four more where its values are not in order: nonzeros have codes, which
 * are places in tables of offsets and planes, and slots that pad a row, less than a group, are those of its last
 * nonzero, and read no value. Offsets of slots are written out where they are needed, for some rows at a time. */
typedef struct {
    int64_t rows;
    const int32_t *group_ptr; /* [rows + 1] */
    const int32_t *first;     /* [rows + 1]: the first nonzero of a row */
    const uint16_t *code;     /* [nonzeros], or NULL where 16 bits are not enough, then */
    const int32_t *wide;      /* [nonzeros]; without either a row has its whole table, in order */
    const int32_t *table;     /* [rows] where the table of a row begins, or NULL: all have the same */
    const int32_t *offset, *plane; /* of the tables: as in qsp_list; the plane that it lies in */
    int32_t step;             /* where offsets of all tables, one behind the other, are this far apart; otherwise 0 */
    const int32_t *index;     /* [nonzeros] which value, -1 for none, or NULL: each has its own, in order */
} qsp_nonzeros;

/* Dense rows: the weights of a list as a matrix, zeros included, whose rows share tables of offsets. A band are the rows
 * that have the same one: those of a group of a convolution, and in its input gradient of a phase of the stride. */
typedef struct {
    int64_t first, last;      /* rows */
    int64_t table, size;      /* first entry and how many, a multiple of QSP_GROUP; those that pad repeat the last one */
} qsp_band;

typedef struct {
    int64_t rows, pitch;      /* of the matrix: bytes from row to row, a multiple of QSP_UNIT, zeros behind a row's table */
    int64_t band_count;
    const qsp_band *bands;    /* one after the other */
    const int32_t *offset, *plane; /* of the tables' entries: as in qsp_list; the plane that it lies in */
    /* The pattern of the values, (out_channels, columns) cut into groups of rows. */
    int64_t value_rows, columns, groups;
    const int32_t *value_ptr; /* [value_rows + 1] */
    const uint64_t *bits;     /* [value_rows][qsp_words(columns)], see pattern.h; NULL: every row has all */
    /* NULL where the matrix' rows are the values' rows and its entries their columns; otherwise where a column of the
     * first group has its row, and the entry there of the group's first value row. The row of another group is further
     * on by `group_rows`, the entry of another value row by one. */
    const int32_t *row_of, *entry_of;
    int64_t group_rows;
} qsp_dense;

/* Codes of images in planes of a grid: channel c of plane `plane` + c, whose first pixel is the grid's lane 0. */
typedef struct {
    qsp_grid grid;
    uint8_t *planes;         /* of the first block */
    int64_t plane, channels;
    int64_t rows, cols;      /* of an image */
    int64_t images;
    uint8_t zero;            /* the code of 0, which stands in every gap */
} qsp_coded;

/* What becomes of a product's sums where its output is codes: nearest(sum * multiplier + offset + residual), limited
 * before it is rounded. The lanes of `out` are those of the product. */
typedef struct {
    qsp_coded out;
    const uint8_t *keep;     /* [lanes of a block, whole units]: 255 where a lane is a pixel, 0 in gaps */
    const float *multiplier, *offset, *low, *high; /* [rows] */
    const uint8_t *residual; /* the first plane's lane 0, or NULL; lanes as those of `out` */
    int64_t residual_pitch, residual_block;
    const float *residual_multiplier; /* [rows] */
    const uint8_t *table;    /* of a function of the codes, 256 bytes, or as many a row; or NULL */
    int64_t table_step;
} qsp_requantize;

typedef struct {
    qsp_grid grid;
    qsp_list list;
    const qsp_dense *dense;  /* in place of the list, for spmm_dense_u8; `weights` then is the matrix */
    const qsp_requantize *requantize; /* where the output is codes: in place of `out`, `view` and what is said of them */
    const void *planes;      /* u8 (codes) or float */
    const void *weights;     /* int8 [slots], or float [slots] */
    const float *scale;      /* [rows], codes only */
    const int64_t *correction; /* [rows], codes only: what the sums start from, before the factor below */
    int64_t correction_factor;
    float scale_factor;
    const float *bias;       /* [rows] or NULL */
    float low, high;         /* limits of the result; only read where there is a bias */
    int dtype;               /* of out */
    void *out;
    qsp_view view;           /* where row `view.plane + i` goes: channel i of the view */
    int64_t images;          /* of the whole tensor */
    int64_t row_chunks;      /* parts into which the rows are cut; tasks = units * row_chunks */
    const float *lane_scale; /* of codes with a bias, or NULL: [images of one pixel, whole units], multiplied in before it */
    const int32_t *paired;   /* [rows] or NULL: how many groups of a row, the first ones, are as qsp_kernels.pair says */
} qsp_spmm;

typedef struct {
    qsp_grid grid, dy_grid;
    qsp_list list;            /* without offsets a task writes its own out */
    qsp_nonzeros nonzeros;
    const uint64_t *bits;     /* of a pattern, see pattern.h, or NULL: what a task makes codes of where there are none */
    int64_t columns;
    const qsp_dense *dense;   /* in place of these, for sddmm_dense_u8 */
    const void *planes, *dy;  /* u8 and u8 around 128, or float and float */
    const int32_t *zero_point; /* per plane of x, or one value (zero_stride 0) */
    int64_t zero_stride;
    const float *scale_x;     /* one, or per plane (scale_x_stride 1) */
    int64_t scale_x_stride;
    const float *scale_dy;    /* one, or per row */
    int64_t scale_dy_stride;
    void *sums;               /* scratch of a task: int64 or double [slots], int64 [rows], int32 [slots], each of the
                               * task's own; of dense rows where each unit starts in planes, int64 [units], and in dy */
    float *out;               /* [values] */
    qsp_view view;            /* of dy: which lanes count */
    int64_t images;
    int64_t row_chunks;
} qsp_sddmm;

/* A value's gradient: a sum of products of codes, without the zero point's share, in units of the scales. */
static inline float qsp_gradient(const qsp_sddmm *a, int64_t sum, int64_t dy_sum, int64_t plane, float scale_dy)
{
    return (float)(sum - a->zero_point[plane * a->zero_stride] * dy_sum) *
           (a->scale_x[plane * a->scale_x_stride] * scale_dy);
}

/* What a scheme does with a range of values; formulas are in loops/scale.h. */
enum { QSP_ABSMAX, QSP_SYMMETRIC, QSP_AFFINE, QSP_SAWB, QSP_STOCHASTIC, QSP_DITHERED, QSP_LUQ, QSP_SCHEMES };

typedef struct {
    int kind;
    int bits;                /* 2..8 */
    int around_zero;         /* codes are int8 around 0, otherwise u8 around a zero point */
    int fixed;               /* scales are given: values may lie outside of what they can express */
    int nonzeros;            /* SAWB: statistics of those alone */
    double c1, c2;           /* SAWB */
    double step;             /* DITHERED: in standard deviations */
    int levels;              /* LUQ: how many powers of two, 1..7 */
} qsp_scheme;

typedef struct {
    float absmax, min, max;  /* absmax is NaN where any element is */
} qsp_range;

typedef struct {
    double sum, square, count, nonzeros; /* sums over the elements or their magnitudes, and how many there are */
} qsp_moments;

/* Bytes of the state of one place of a channel, in which `moments` adds up: [3][places] doubles (sum, square, nonzeros)
 * and [2][places] floats (the largest magnitude, and the minimum, zero taken in). */
enum { QSP_MOMENTS = 3 * sizeof(double) + 2 * sizeof(float) };

/* Sums of elements alone, the first doubles of a state; with squares and the largest magnitude; or of magnitudes, with nonzeros and minima too. */
enum { QSP_TOTALS, QSP_SUMS, QSP_MAGNITUDES };

/* Activations; formulas are in loops/activation.h. Of CLAMP and LEAKY a bit an element is saved, of the others the slope,
 * a byte. No activation is a CLAMP without limits. */
enum { QSP_CLAMP, QSP_LEAKY, QSP_SILU, QSP_HARDSWISH, QSP_GELU, QSP_GELU_TANH };

/* What follows a product, on rows of `channels` elements: pixels in channels_last order, or rows of a linear layer. All
 * pointers but x may be NULL, out where the result is packed. */
typedef struct {
    int64_t channels, words; /* words of 16 bits that a row has where bits are saved */
    int kind, dtype;         /* the latter of x, residual and out */
    float low, high;         /* CLAMP: limits; LEAKY: low is the slope below 0 */
    const void *x, *residual;
    void *out;
    const float *scale, *shift;  /* [channels] out = activation(x * scale + shift + residual) */
    const float *code_scale, *code_shift; /* [channels] code - 128 = x * code_scale + code_shift */
    uint8_t *codes;
    void *saved;             /* whether x is in a CLAMP's limits, or above 0, in bit i of a word; or codes of slopes */
} qsp_epilogue;

typedef struct {
    int64_t channels, words;
    int kind, dtype;         /* the latter of dy, dx and g */
    float slope;             /* LEAKY: below 0 */
    const void *dy;
    const uint8_t *codes;
    const void *saved;       /* NULL: there was no activation */
    const float *factor;     /* [3][channels] dx = g * f0 + code * f1 + f2 with g = dy * slope; NULL: dx = g */
    void *dx, *g;
} qsp_epilogue_grad;

typedef struct {
    qsp_grid grid;
    qsp_view view;
    int filled;              /* whether the gaps are written: a view before has the same planes */
    int64_t images;
    int dtype;
    const void *tensor;
    void *planes;            /* u8 or float */
    const float *inverse;    /* 1 / scale, one or per plane */
    const int32_t *zero_point;
    int64_t stride;          /* 0: one scale for the tensor; 1: one per plane */
    qsp_scheme scheme;
    uint64_t seed;
    /* At most one of them: what is packed in place of the tensor; channels are neighbours then. */
    const qsp_epilogue *epilogue;
    const qsp_epilogue_grad *gradient;
} qsp_pack;

/* What of a range is wanted: each includes the one before. */
enum { QSP_NEED_ABSMAX = 0, QSP_NEED_MIN = 1, QSP_NEED_MAX = 2 };

typedef struct {
    qsp_nonzeros nonzeros;
    const qsp_dense *dense;  /* in place of them */
    int64_t base;            /* of a list: as in qsp_list, of the slots that are written */
    const float *values;
    const float *factor;     /* multiplied into the weights, or NULL: per plane, of a list per entry of its tables */
    const int32_t *zero_point; /* likewise, or NULL: zero_factor for all */
    int64_t zero_factor;
    float clip;              /* magnitude that the largest code stands for in every row; 0: a row's own largest */
    float scale_factor;      /* of the scale that is written */
    int8_t *codes;           /* [slots], or the matrix */
    int32_t *offset;         /* [slots] or NULL: the list's, too */
    float *scale;            /* [rows] */
    int64_t *total;          /* [rows]: sum of code * zero point */
} qsp_weight;

typedef struct {
    qsp_scheme scheme;
    int dtype;               /* of x or out */
    int own;                 /* find each line's scale first */
    int each;                /* every element of a line has its own scale, the same ones in all lines */
    int64_t count, length, scales; /* elements, of one line, and scales: line i has number i % scales */
    const void *x;
    void *out, *codes;       /* u8 or int8 */
    float *scale, *inverse;
    int32_t *zero_point;     /* of int8 codes counted from -128 when quantising */
    uint64_t seed;
} qsp_quantize;

/* Steps on codes, see loops/coded.h. */
typedef struct {
    qsp_coded in, out;
    /* copy: the pixels that are taken */
    int64_t row, col, row_step, col_step;
    /* pool: window, and what is above and to the left of the first one */
    int64_t kernel_y, kernel_x, dilation_y, dilation_x, top, left;
    int mean, count_padding;
    /* add, mean: nearest(x * multiplier + offset + other * other_multiplier), within [low, high]; [channels] each */
    qsp_coded other;
    const float *multiplier, *offset, *other_multiplier, *low, *high;
    const uint8_t *table;    /* table: 256 bytes, or as many a channel */
    int64_t table_step;
    /* unpack: to a tensor of float32, (code - zero) * multiplier */
    float *to;
    int64_t to_b, to_c, to_y, to_x;
} qsp_coded_step;

/* A linear layer on few rows of features (tokens), where planes would have no lanes: a weight in slots of a column within
 * a block of columns, and a code. A step has QSP_GROUP slots of each of QSP_TOKEN_ROWS rows; steps of the same rows and
 * block of columns follow each other. Slots without a nonzero have code 0. */
typedef struct {
    int64_t rows, row_blocks, column_blocks;
    const int32_t *step_ptr; /* [row_blocks * column_blocks + 1] */
    const uint8_t *place;    /* [steps][64] */
    const int8_t *code;      /* [steps][64] */
    const int32_t *start;    /* [rows, whole blocks]: what sums start from */
    const uint8_t *x;        /* [tokens][pitch], codes of whole blocks of columns */
    int64_t tokens, pitch;
    const float *multiplier, *offset, *low, *high; /* [rows, whole blocks], as in qsp_requantize */
    float *out;              /* [tokens][rows], or NULL: codes, of images of one pixel */
    qsp_coded codes;
    const qsp_coded *residual; /* of `codes`, or NULL */
    const float *residual_multiplier;
    const float *scale;      /* [tokens] of each token, multiplied in before the offset, or NULL */
} qsp_tokens;

/* Rows of features to codes: nearest(x / scale) + zero, one scale a column, and where `scale` is given one a token, which
 * is found first. */
typedef struct {
    const float *x;          /* [tokens][columns] */
    int64_t columns, pitch;  /* codes of a row take `pitch` bytes, those behind its columns are `zero` */
    const float *inverse;    /* [columns] */
    int32_t zero;
    uint8_t *codes;
    float *scale;            /* [tokens] or NULL */
    float *scaled;           /* [tokens][columns]: in place of codes, what is only to be rounded; or NULL */
} qsp_token_codes;

typedef struct {
    const char *name;
    void (*spmm_u8)(const qsp_spmm *, int64_t unit, int64_t chunk);
    void (*spmm_f32)(const qsp_spmm *, int64_t unit, int64_t chunk);
    void (*sddmm_u8)(const qsp_sddmm *, int64_t chunk);
    void (*sddmm_f32)(const qsp_sddmm *, int64_t chunk);
    /* Offsets of the slots of rows [first, last), from the first one's on. */
    void (*offsets)(const qsp_nonzeros *, int64_t first, int64_t last, int32_t *out);
    /* Rows [first, last) of a list with a row's nonzeros in another order, offsets and weights at the list's places: in
     * the first `paired[row]` groups the codes' products with the first two weights, and those with the last two, have
     * sums of 16 bits. NULL where that does not make spmm_u8 faster. */
    void (*pair)(const qsp_list *, const int8_t *weights, int64_t first, int64_t last, int32_t *paired,
                 int32_t *offset_out, int8_t *weights_out);
    /* The same products by dense rows. Part `chunk` of `chunks` of the rows of a unit; block `task` of the weight
     * gradient, after `sddmm_dense_units` has found the units. */
    void (*spmm_dense_u8)(const qsp_spmm *, int64_t unit, int64_t chunk);
    void (*sddmm_dense_u8)(const qsp_sddmm *, int64_t task);
    void (*sddmm_dense_units)(const qsp_sddmm *);
    int64_t grad_rows; /* of a block */
    /* Weights of dense rows. Where a matrix' rows are the values' rows: rows [first, last), with two lines of floats, of
     * the columns in sixteens, as scratch. Elsewhere first what is the largest of each column, as bits, in value rows
     * [first, last), added to most [groups][columns]; then scales, and what each column is multiplied by in the place of
     * its largest; then the codes of QSP_UNIT value rows of a group, with as many lines of scratch. Then `total`. */
    void (*dense_rows)(const qsp_weight *, int64_t first, int64_t last, float *line);
    void (*dense_column_max)(const qsp_weight *, int64_t first, int64_t last, float *most);
    void (*dense_scales)(const qsp_weight *, float *most);
    void (*dense_columns)(const qsp_weight *, int64_t tile, const float *inverse, float *lines);
    void (*dense_totals)(const qsp_weight *, int64_t first, int64_t last);
    /* Planes [first, last) of one block, gaps included. */
    void (*pack_u8)(const qsp_pack *, int64_t block, int64_t first, int64_t last);
    void (*pack_f32)(const qsp_pack *, int64_t block, int64_t first, int64_t last);
    /* n elements `step` apart, added to *out; its maximum only if `whole`. */
    void (*range)(const void *x, int dtype, int64_t n, int64_t step, int whole, qsp_range *out);
    /* Ranges of channels, added to `state`: n elements of one channel, or with channels > 0 n rows of so many. */
    void (*range_channels)(const void *x, int dtype, int64_t n, int64_t step, int64_t channels, int need, float *state);
    /* The same with moments, see qsp_add_moments for what is in `state` and the enumeration for `what` of it is found. */
    void (*moments)(const void *x, int dtype, int64_t n, int64_t step, int64_t channels, int what, void *state);
    /* Quantise the slots of rows [first, last): nearest even, symmetric, one scale a row. */
    void (*quantize_rows)(const qsp_weight *, int64_t first, int64_t last);
    /* Of each channel of some rows: mean, sum of the squared distances from it, least and greatest. */
    void (*norm_moments)(const void *x, int dtype, int64_t rows, int64_t channels, double *out);
    /* Rows [first, last); of each channel the least and the greatest element before the activation, a CLAMP's limited,
     * NaN where one is not finite; gradients, and of each channel the sums of g and g * code and g's greatest
     * magnitude. */
    void (*epilogue)(const qsp_epilogue *, int64_t first, int64_t last);
    void (*epilogue_range)(const qsp_epilogue *, int64_t first, int64_t last, float *out);
    void (*epilogue_grad)(const qsp_epilogue_grad *, int64_t first, int64_t last);
    void (*epilogue_sums)(const qsp_epilogue_grad *, int64_t first, int64_t last, double *out);
    void (*extent)(const int32_t *, int64_t n, int32_t *least, int32_t *most);
    /* Lines [first, last) of a tensor. */
    void (*quantize)(const qsp_quantize *, int64_t first, int64_t last);
    void (*dequantize)(const qsp_quantize *, int64_t first, int64_t last);
    /* Elements [first, last), first a multiple of 16: max(x, 0) and which elements are above 0, or NaN. */
    void (*relu)(const void *x, int dtype, int64_t first, int64_t last, void *out, uint16_t *mask);
    /* x where the mask says so, 0 elsewhere. */
    void (*keep)(const void *x, int dtype, int64_t first, int64_t last, const uint16_t *mask, void *out);
    /* Steps on codes: channels [first, last) of one block of the output; of the input for `coded_flatten` and
     * `coded_unpack`. */
    void (*coded_copy)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    void (*coded_flatten)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    void (*coded_pool)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    void (*coded_add)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    void (*coded_table)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    void (*coded_unpack)(const qsp_coded_step *, int64_t block, int64_t first, int64_t last);
    /* Rows of block `block`, for all tokens; token `token`; and codes of images of one pixel as tokens. */
    void (*tokens_product)(const qsp_tokens *, int64_t block);
    void (*tokens_quantize)(const qsp_token_codes *, int64_t token);
    void (*tokens_gather)(const qsp_coded *, int64_t token, uint8_t *codes, int64_t pitch);
    int64_t most_tokens; /* up to which that is faster than planes, which have QSP_UNIT lanes */
    /* What tells whether words of 32 bits, `size` in all, are still the same: of the sixteens [first, last), the last one
     * of which may be shorter. Those of parts are to be added up. */
    void (*digest)(const void *words, int64_t size, int64_t first, int64_t last, uint64_t *out);
} qsp_kernels;

extern const qsp_kernels qsp_kernels_scalar;
#if defined(__x86_64__) || defined(_M_X64)
#define QSP_X86 1
extern const qsp_kernels qsp_kernels_avx2;
extern const qsp_kernels qsp_kernels_avx512vl;
extern const qsp_kernels qsp_kernels_avx512vnni;
extern const qsp_kernels qsp_kernels_avx512vbmi;
#if defined(__clang__) ? __clang_major__ >= 12 : !defined(__GNUC__) || __GNUC__ >= 11
#define QSP_AVXVNNI 1 /* older compilers and assemblers do not know it */
extern const qsp_kernels qsp_kernels_avxvnni;
#endif
#if defined(QSP_AVXVNNI) && defined(__GNUC__)
#define QSP_AMX 1 /* nor that */
extern const qsp_kernels qsp_kernels_amx;
extern const qsp_kernels qsp_kernels_amx_model;
#endif
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#define QSP_NEON 1
extern const qsp_kernels qsp_kernels_neon;
#if defined(__clang__) ? __clang_major__ >= 11 : __GNUC__ >= 10
#define QSP_NEON_DOT 1 /* older compilers and assemblers do not know usdot */
extern const qsp_kernels qsp_kernels_neon_dotprod;
extern const qsp_kernels qsp_kernels_neon_i8mm;
#endif
#endif

/* Where the units of a view lie. A plane's lanes are three nested loops; where whole units fit into the outermost
 * one's stride and skipping the gaps between its turns saves units, they are walked turn by turn. */
typedef struct {
    int64_t size[3], lane[3], elem[3]; /* outermost first; lane[2] is the smallest */
    int64_t turns, units_per_turn;     /* units of one block = turns * units_per_turn */
} qsp_walk;

static inline void qsp_walk_init(qsp_walk *w, const qsp_grid *g, const qsp_view *v, int64_t images)
{
    const int batch_inner = g->lane_b < g->lane_x;
    const int64_t n[3] = {images, v->rows, v->cols}, l[3] = {g->lane_b, g->lane_y, g->lane_x},
                  e[3] = {v->elem_b, v->elem_y, v->elem_x};
    for (int i = 0; i < 3; i++) {
        const int j = batch_inner ? (i + 1) % 3 : i;
        w->size[i] = n[j];
        w->lane[i] = l[j];
        w->elem[i] = e[j];
    }
    const int64_t run = (w->size[1] - 1) * w->lane[1] + (w->size[2] - 1) * w->lane[2] + 1;
    const int64_t span = (w->size[0] - 1) * w->lane[0] + run;
    const int64_t run_units = (run + QSP_UNIT - 1) / QSP_UNIT, span_units = (span + QSP_UNIT - 1) / QSP_UNIT;
    if (run_units * QSP_UNIT <= w->lane[0] && run_units * w->size[0] < span_units) {
        w->turns = w->size[0];
        w->units_per_turn = run_units;
    } else {
        w->turns = 1;
        w->units_per_turn = span_units;
    }
}

static inline int64_t qsp_walk_units(const qsp_walk *w) { return w->turns * w->units_per_turn; }

static inline int64_t qsp_walk_lane(const qsp_walk *w, int64_t unit)
{
    return w->turns == 1 ? unit * QSP_UNIT
                         : unit / w->units_per_turn * w->lane[0] + unit % w->units_per_turn * QSP_UNIT;
}

static inline int64_t qsp_images_in_block(int64_t images, const qsp_grid *g, int64_t block)
{
    const int64_t left = images - block * g->images;
    return left < g->images ? left : g->images;
}

/* Units of all blocks: whole ones first, then the last, perhaps shorter one. */
static inline int64_t qsp_count_units(const qsp_grid *g, const qsp_view *v, int64_t images)
{
    if (images <= 0 || v->rows <= 0 || v->cols <= 0)
        return 0;
    qsp_walk w;
    const int64_t whole = images / g->images, rest = images % g->images;
    int64_t units = 0;
    if (whole) {
        qsp_walk_init(&w, g, v, g->images);
        units = whole * qsp_walk_units(&w);
    }
    if (rest) {
        qsp_walk_init(&w, g, v, rest);
        units += qsp_walk_units(&w);
    }
    return units;
}

/* The rows of part `chunk` of `chunks`, cut where the work (groups, and a little for every row) is equal. */
static inline int64_t qsp_cut_rows(const qsp_list *l, int64_t chunk, int64_t chunks)
{
    const int64_t per_row = 2;
    if (chunk <= 0)
        return 0;
    if (chunk >= chunks)
        return l->rows;
    const int64_t before = l->group_ptr[0];
    const int64_t total = l->group_ptr[l->rows] - before + per_row * l->rows, goal = total * chunk / chunks;
    int64_t low = 0, high = l->rows;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (l->group_ptr[middle] - before + per_row * middle < goal)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Blocks of the weight gradient by dense rows, of a band. */
static inline int64_t qsp_grad_blocks(const qsp_band *b, int64_t grad_rows)
{
    return (b->last - b->first + grad_rows - 1) / grad_rows * ((b->size + QSP_GRAD_ENTRIES - 1) / QSP_GRAD_ENTRIES);
}

#endif
