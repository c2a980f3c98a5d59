from libc.stdint cimport uint8_t, uint16_t, uint32_t, int8_t, int32_t, int64_t, uint64_t


cdef extern from "kernels.h" nogil:
    enum:
        QSP_UNIT
        QSP_GROUP
        QSP_TOKEN_ROWS
        QSP_TOKEN_COLUMNS
        QSP_DIGEST
        QSP_ROW_BLOCK
        QSP_MAX_EXACT
        QSP_F32
        QSP_U8
        QSP_BF16
        QSP_NEED_ABSMAX
        QSP_NEED_MIN
        QSP_NEED_MAX
        QSP_MOMENTS
        QSP_TOTALS
        QSP_SUMS
        QSP_MAGNITUDES
        QSP_ABSMAX
        QSP_SYMMETRIC
        QSP_AFFINE
        QSP_SAWB
        QSP_STOCHASTIC
        QSP_DITHERED
        QSP_LUQ
        QSP_SCHEMES
        QSP_CLAMP
        QSP_LEAKY
        QSP_SILU
        QSP_HARDSWISH
        QSP_GELU
        QSP_GELU_TANH

    ctypedef struct qsp_grid:
        int64_t images
        int64_t lane_b
        int64_t lane_y
        int64_t lane_x
        int64_t planes
        int64_t pitch
        int64_t front
        int64_t block

    ctypedef struct qsp_view:
        int64_t plane
        int64_t channels
        int64_t origin
        int64_t rows
        int64_t cols
        int64_t elem
        int64_t elem_b
        int64_t elem_c
        int64_t elem_y
        int64_t elem_x
        int64_t index
        int64_t index_b
        int64_t index_c
        int64_t index_y
        int64_t index_x

    ctypedef struct qsp_list:
        int64_t rows
        const int32_t *group_ptr
        int64_t base
        const int32_t *offset

    ctypedef struct qsp_nonzeros:
        int64_t rows
        const int32_t *group_ptr
        const int32_t *first
        const uint16_t *code
        const int32_t *wide
        const int32_t *table
        const int32_t *offset
        const int32_t *plane
        int32_t step
        const int32_t *index

    ctypedef struct qsp_band:
        int64_t first
        int64_t last
        int64_t table
        int64_t size

    ctypedef struct qsp_dense:
        int64_t rows
        int64_t pitch
        int64_t band_count
        const qsp_band *bands
        const int32_t *offset
        const int32_t *plane
        int64_t value_rows
        int64_t columns
        int64_t groups
        const int32_t *value_ptr
        const uint64_t *bits
        const int32_t *row_of
        const int32_t *entry_of
        int64_t group_rows

    ctypedef struct qsp_coded:
        qsp_grid grid
        uint8_t *planes
        int64_t plane
        int64_t channels
        int64_t rows
        int64_t cols
        int64_t images
        uint8_t zero

    ctypedef struct qsp_requantize:
        qsp_coded out
        const uint8_t *keep
        const float *multiplier
        const float *offset
        const float *low
        const float *high
        const uint8_t *residual
        int64_t residual_pitch
        int64_t residual_block
        const float *residual_multiplier
        const uint8_t *table
        int64_t table_step

    ctypedef struct qsp_coded_step:
        qsp_coded input "in"
        qsp_coded out
        int64_t row
        int64_t col
        int64_t row_step
        int64_t col_step
        int64_t kernel_y
        int64_t kernel_x
        int64_t dilation_y
        int64_t dilation_x
        int64_t top
        int64_t left
        int mean
        int count_padding
        qsp_coded other
        const float *multiplier
        const float *offset
        const float *other_multiplier
        const float *low
        const float *high
        const uint8_t *table
        int64_t table_step
        float *to
        int64_t to_b
        int64_t to_c
        int64_t to_y
        int64_t to_x

    ctypedef struct qsp_tokens:
        int64_t rows
        int64_t row_blocks
        int64_t column_blocks
        const int32_t *step_ptr
        const uint8_t *place
        const int8_t *code
        const int32_t *start
        const uint8_t *x
        int64_t tokens
        int64_t pitch
        const float *multiplier
        const float *offset
        const float *low
        const float *high
        float *out
        qsp_coded codes
        const qsp_coded *residual
        const float *residual_multiplier
        const float *scale

    ctypedef struct qsp_token_codes:
        const float *x
        int64_t columns
        int64_t pitch
        const float *inverse
        int32_t zero
        uint8_t *codes
        float *scale
        float *scaled

    ctypedef struct qsp_spmm:
        qsp_grid grid
        qsp_list list
        const qsp_dense *dense
        const qsp_requantize *requantize
        const void *planes
        const void *weights
        const float *scale
        const int64_t *correction
        int64_t correction_factor
        float scale_factor
        const float *bias
        float low
        float high
        int dtype
        void *out
        qsp_view view
        int64_t images
        int64_t row_chunks
        const float *lane_scale
        const int32_t *paired

    ctypedef struct qsp_sddmm:
        qsp_grid grid
        qsp_grid dy_grid
        qsp_list list
        qsp_nonzeros nonzeros
        const uint64_t *bits
        int64_t columns
        const qsp_dense *dense
        const void *planes
        const void *dy
        const int32_t *zero_point
        int64_t zero_stride
        const float *scale_x
        int64_t scale_x_stride
        const float *scale_dy
        int64_t scale_dy_stride
        void *sums
        float *out
        qsp_view view
        int64_t images
        int64_t row_chunks

    ctypedef struct qsp_scheme:
        int kind
        int bits
        int around_zero
        int fixed
        int nonzeros
        double c1
        double c2
        double step
        int levels

    ctypedef struct qsp_moments:
        double sum
        double square
        double count
        double nonzeros

    ctypedef struct qsp_epilogue:
        int64_t channels
        int64_t words
        int kind
        int dtype
        float low
        float high
        const void *x
        const void *residual
        void *out
        const float *scale
        const float *shift
        const float *code_scale
        const float *code_shift
        uint8_t *codes
        void *saved

    ctypedef struct qsp_epilogue_grad:
        int64_t channels
        int64_t words
        int kind
        int dtype
        float slope
        const void *dy
        const uint8_t *codes
        const void *saved
        const float *factor
        void *dx
        void *g

    ctypedef struct qsp_pack:
        qsp_grid grid
        qsp_view view
        int filled
        int64_t images
        int dtype
        const void *tensor
        void *planes
        const float *inverse
        const int32_t *zero_point
        int64_t stride
        qsp_scheme scheme
        uint64_t seed
        const qsp_epilogue *epilogue
        const qsp_epilogue_grad *gradient

    ctypedef struct qsp_range:
        float absmax
        float min
        float max

    ctypedef struct qsp_weight:
        qsp_nonzeros nonzeros
        const qsp_dense *dense
        int64_t base
        const float *values
        const float *factor
        const int32_t *zero_point
        int64_t zero_factor
        float clip
        float scale_factor
        int8_t *codes
        int32_t *offset
        float *scale
        int64_t *total

    ctypedef struct qsp_quantize:
        qsp_scheme scheme
        int dtype
        int own
        int each
        int64_t count
        int64_t length
        int64_t scales
        const void *x
        void *out
        void *codes
        float *scale
        float *inverse
        int32_t *zero_point
        uint64_t seed

    ctypedef struct qsp_kernels:
        const char *name
        void (*spmm_u8)(const qsp_spmm *, int64_t, int64_t) noexcept nogil
        void (*spmm_f32)(const qsp_spmm *, int64_t, int64_t) noexcept nogil
        void (*sddmm_u8)(const qsp_sddmm *, int64_t) noexcept nogil
        void (*sddmm_f32)(const qsp_sddmm *, int64_t) noexcept nogil
        void (*offsets)(const qsp_nonzeros *, int64_t, int64_t, int32_t *) noexcept nogil
        void (*pair)(const qsp_list *, const int8_t *, int64_t, int64_t, int32_t *, int32_t *, int8_t *) noexcept nogil
        void (*spmm_dense_u8)(const qsp_spmm *, int64_t, int64_t) noexcept nogil
        void (*sddmm_dense_u8)(const qsp_sddmm *, int64_t) noexcept nogil
        void (*sddmm_dense_units)(const qsp_sddmm *) noexcept nogil
        int64_t grad_rows
        void (*dense_rows)(const qsp_weight *, int64_t, int64_t, float *) noexcept nogil
        void (*dense_column_max)(const qsp_weight *, int64_t, int64_t, float *) noexcept nogil
        void (*dense_scales)(const qsp_weight *, float *) noexcept nogil
        void (*dense_columns)(const qsp_weight *, int64_t, const float *, float *) noexcept nogil
        void (*dense_totals)(const qsp_weight *, int64_t, int64_t) noexcept nogil
        void (*pack_u8)(const qsp_pack *, int64_t, int64_t, int64_t) noexcept nogil
        void (*pack_f32)(const qsp_pack *, int64_t, int64_t, int64_t) noexcept nogil
        void (*range)(const void *, int, int64_t, int64_t, int, qsp_range *) noexcept nogil
        void (*range_channels)(const void *, int, int64_t, int64_t, int64_t, int, float *) noexcept nogil
        void (*moments)(const void *, int, int64_t, int64_t, int64_t, int, void *) noexcept nogil
        void (*quantize_rows)(const qsp_weight *, int64_t, int64_t) noexcept nogil
        void (*norm_moments)(const void *, int, int64_t, int64_t, double *) noexcept nogil
        void (*epilogue)(const qsp_epilogue *, int64_t, int64_t) noexcept nogil
        void (*epilogue_range)(const qsp_epilogue *, int64_t, int64_t, float *) noexcept nogil
        void (*epilogue_grad)(const qsp_epilogue_grad *, int64_t, int64_t) noexcept nogil
        void (*epilogue_sums)(const qsp_epilogue_grad *, int64_t, int64_t, double *) noexcept nogil
        void (*extent)(const int32_t *, int64_t, int32_t *, int32_t *) noexcept nogil
        void (*quantize)(const qsp_quantize *, int64_t, int64_t) noexcept nogil
        void (*dequantize)(const qsp_quantize *, int64_t, int64_t) noexcept nogil
        void (*relu)(const void *, int, int64_t, int64_t, void *, uint16_t *) noexcept nogil
        void (*keep)(const void *, int, int64_t, int64_t, const uint16_t *, void *) noexcept nogil
        void (*coded_copy)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*coded_flatten)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*coded_pool)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*coded_add)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*coded_table)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*coded_unpack)(const qsp_coded_step *, int64_t, int64_t, int64_t) noexcept nogil
        void (*tokens_product)(const qsp_tokens *, int64_t) noexcept nogil
        void (*tokens_quantize)(const qsp_token_codes *, int64_t) noexcept nogil
        void (*tokens_gather)(const qsp_coded *, int64_t, uint8_t *, int64_t) noexcept nogil
        int64_t most_tokens
        void (*digest)(const void *, int64_t, int64_t, int64_t, uint64_t *) noexcept nogil

    int64_t qsp_grad_blocks(const qsp_band *, int64_t)
    int64_t qsp_count_units(const qsp_grid *, const qsp_view *, int64_t)
    int64_t qsp_cut_rows(const qsp_list *, int64_t, int64_t)


cdef const qsp_kernels *active_kernels() noexcept nogil
