/* The loops of every path, written once over the primitives of the ISA header that was included before; with
 * ISA_PRODUCTS_ONLY those of spmm and sddmm, see qsp_table. */
#include "scale.h"

#include "element.h"

#include "unpack.h"

#include "spmm.h"

#include "sddmm.h"

#ifndef ISA_PRODUCTS_ONLY
#include "norm.h"

#include "activation.h"

#include "epilogue.h"

#include "pack.h"

#include "range.h"

#include "quantize.h"

#include "rows.h"

#include "mask.h"
#endif

#ifndef ISA_PAIR
#define ISA_PAIR NULL
#endif

#define QSP_PASTE_(a, b) a##b
#define QSP_PASTE(a, b) QSP_PASTE_(a, b)
#define QSP_TEXT_(a) #a
#define QSP_TEXT(a) QSP_TEXT_(a)

const qsp_kernels QSP_PASTE(qsp_kernels_, ISA_NAME) = {
    .name = QSP_TEXT(ISA_NAME),
    .spmm_u8 = spmm_u8,
    .spmm_f32 = spmm_f32,
    .sddmm_u8 = sddmm_u8,
    .sddmm_f32 = sddmm_f32,
    .pair = ISA_PAIR,
#ifndef ISA_PRODUCTS_ONLY
    .pack_u8 = pack_u8,
    .pack_f32 = pack_f32,
    .range = range,
    .range_channels = range_channels,
    .moments = moments,
    .quantize_rows = quantize_rows,
    .norm_moments = norm_moments,
    .epilogue = epilogue,
    .epilogue_range = epilogue_range,
    .epilogue_sums = epilogue_sums,
    .epilogue_grad = epilogue_grad,
    .extent = extent,
    .quantize = quantize,
    .dequantize = dequantize,
    .relu = relu,
    .keep = keep,
#endif
};
