/* The loops of every path, written once over the primitives of the ISA header that was included before. */
#include "scale.h"

#include "element.h"

#include "norm.h"

#include "activation.h"

#include "unpack.h"

#include "spmm.h"

#include "sddmm.h"

#include "pack.h"

#include "range.h"

#include "quantize.h"

#include "rows.h"

#include "mask.h"

#ifndef ISA_PAIR
#define ISA_PAIR NULL
#endif

#define QSP_PASTE_(a, b) a##b
#define QSP_PASTE(a, b) QSP_PASTE_(a, b)
#define QSP_TEXT_(a) #a
#define QSP_TEXT(a) QSP_TEXT_(a)

const qsp_kernels QSP_PASTE(qsp_kernels_, ISA_NAME) = {
    QSP_TEXT(ISA_NAME), spmm_u8, spmm_f32, sddmm_u8, sddmm_f32, ISA_PAIR, pack_u8, pack_f32, range,
    range_channels, moments, quantize_rows, norm_moments, norm, norm_range, norm_sums, norm_grad, act,
    act_range, act_grad, act_sums, extent, quantize, dequantize, relu, keep,
};
