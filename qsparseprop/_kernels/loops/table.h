/* The loops, written once over the primitives of the ISA header that was included before, and the table of one
 * instruction set; with ISA_PRODUCTS_ONLY those of spmm and sddmm, with ISA_DENSE_ONLY those by dense rows, with
 * ISA_TOKENS_ONLY those of few tokens, see qsp_table. No loop has an intrinsic in it. */
#include "isa/primitives.h"

#include "loops/scale.h"

#include "loops/element.h"

#include "loops/coded.h"

#ifndef ISA_TOKENS_ONLY
#include "loops/unpack.h"

#include "loops/requantize.h"

#include "loops/bitmap.h"
#endif

#if !defined(ISA_PRODUCTS_ONLY) && !defined(ISA_DENSE_ONLY)
#include "loops/tokens.h"
#endif

#if !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
#include "loops/nonzeros.h"

#include "loops/spmm.h"

#include "loops/sddmm.h"
#endif

#ifndef ISA_TOKENS_ONLY
#include "loops/dense.h"
#endif

#if !defined(ISA_PRODUCTS_ONLY) && !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
#include "loops/norm.h"

#include "loops/activation.h"

#include "loops/epilogue.h"
#include "loops/epilogue_reduce.h"

#include "loops/rounding.h"

#include "loops/pack_plain.h"

#include "loops/pack_bands.h"

#include "loops/pack.h"

#include "loops/range.h"

#include "loops/quantize.h"

#include "loops/weights.h"

#include "loops/dense_weights.h"

#include "loops/mask.h"

#include "loops/digest.h"

#include "loops/coded_steps.h"

#include "loops/token_codes.h"
#endif

#define QSP_TEXT_(a) #a
#define QSP_TEXT(a) QSP_TEXT_(a)

const qsp_kernels QSP_PASTE(qsp_kernels_, ISA_NAME) = {
    .name = QSP_TEXT(ISA_NAME),
#ifndef ISA_TOKENS_ONLY
    .spmm_dense_u8 = spmm_dense_kernel,
    .sddmm_dense_u8 = sddmm_dense_kernel,
    .sddmm_dense_units = sddmm_dense_units_kernel,
    .grad_rows = GRAD_ROWS,
#endif
#if !defined(ISA_PRODUCTS_ONLY) && !defined(ISA_DENSE_ONLY)
    .tokens_product = tokens_product_kernel,
    .most_tokens = ISA_MOST_TOKENS,
#endif
#if !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
    .spmm_u8 = spmm_u8_kernel,
    .spmm_f32 = spmm_f32_kernel,
    .sddmm_u8 = sddmm_u8_kernel,
    .sddmm_f32 = sddmm_f32_kernel,
    .offsets = offsets_kernel,
#endif
#ifdef ISA_OWN_ROWS
    .pair = pair_kernel,
#endif
#if !defined(ISA_PRODUCTS_ONLY) && !defined(ISA_DENSE_ONLY) && !defined(ISA_TOKENS_ONLY)
    .pack_u8 = pack_u8_kernel,
    .pack_f32 = pack_f32_kernel,
    .range = range_kernel,
    .range_channels = range_channels_kernel,
    .moments = moments_kernel,
    .quantize_rows = quantize_rows_kernel,
    .dense_rows = dense_rows_kernel,
    .dense_column_max = dense_column_max_kernel,
    .dense_scales = dense_scales_kernel,
    .dense_columns = dense_columns_kernel,
    .dense_totals = dense_totals_kernel,
    .norm_moments = norm_moments_kernel,
    .epilogue = epilogue_kernel,
    .epilogue_range = epilogue_range_kernel,
    .epilogue_sums = epilogue_sums_kernel,
    .epilogue_grad = epilogue_grad_kernel,
    .extent = extent_kernel,
    .quantize = quantize_kernel,
    .dequantize = dequantize_kernel,
    .relu = relu_kernel,
    .keep = keep_kernel,
    .digest = digest_kernel,
    .tokens_quantize = tokens_quantize_kernel,
    .tokens_gather = tokens_gather_kernel,
    .coded_copy = coded_copy_kernel,
    .coded_flatten = coded_flatten_kernel,
    .coded_pool = coded_pool_kernel,
    .coded_add = coded_add_kernel,
    .coded_table = coded_table_kernel,
    .coded_unpack = coded_unpack_kernel,
#endif
};
