"""The operators in plain torch: the oracle of the tests.

Same functions, same arguments, same results: integers bit for bit, floats as well where a formula has one order of
operations. Written to be read, not to be fast.
"""

from qsparseprop.ops.reference.epilogues import (
    activation_range,
    epilogue,
    epilogue_grad,
    epilogue_grad_pack,
    epilogue_pack,
    epilogue_range,
    epilogue_sums,
)
from qsparseprop.ops.reference.layers import layer_backward, layer_forward, packed_backward
from qsparseprop.ops.reference.layout import transpose
from qsparseprop.ops.reference.masks import keep_masked, relu_mask, relu_mask_
from qsparseprop.ops.reference.normalisation import norm_factors, norm_statistics
from qsparseprop.ops.reference.products import (
    gather_weight,
    multiply,
    pack,
    quantize_pack,
    quantize_weight,
    sddmm,
    spmm,
)
from qsparseprop.ops.reference.quantization import (
    dequantize,
    limited_inverse,
    quantize,
    quantize_values,
    random_bits,
    round_to_power,
    sawb_clip,
    stochastic_round,
)

__all__ = [
    "activation_range",
    "dequantize",
    "epilogue",
    "epilogue_grad",
    "epilogue_grad_pack",
    "epilogue_pack",
    "epilogue_range",
    "epilogue_sums",
    "gather_weight",
    "keep_masked",
    "layer_backward",
    "layer_forward",
    "limited_inverse",
    "multiply",
    "norm_factors",
    "norm_statistics",
    "pack",
    "packed_backward",
    "quantize",
    "quantize_pack",
    "quantize_values",
    "quantize_weight",
    "random_bits",
    "relu_mask",
    "relu_mask_",
    "round_to_power",
    "sawb_clip",
    "sddmm",
    "spmm",
    "stochastic_round",
    "transpose",
]
