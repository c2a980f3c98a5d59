"""The operators in plain torch: the oracle of the tests.

Same functions, same arguments, same results: integers bit for bit, floats as well where a formula has one order of
operations. A layer's two operators, and those that pack on the way, only call others one after the other: they are not
repeated. Written to be read, not to be fast.
"""

from qsparseprop.ops.reference.epilogues import (
    activation_range,
    epilogue,
    epilogue_grad,
    epilogue_range,
    epilogue_sums,
)
from qsparseprop.ops.reference.masks import keep_masked, relu_mask, relu_mask_
from qsparseprop.ops.reference.normalisation import norm_factors, norm_statistics
from qsparseprop.ops.reference.products import pack, quantize_pack, quantize_weight, sddmm, spmm
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
    "epilogue_range",
    "epilogue_sums",
    "keep_masked",
    "limited_inverse",
    "norm_factors",
    "norm_statistics",
    "pack",
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
]
