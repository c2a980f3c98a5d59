"""The operators in plain torch: the oracle of the tests.

Same functions, same arguments, same results: integers bit for bit, floats as well where a formula has one order of
operations. A layer's two operators, and those that pack on the way, only call others one after the other: they are not
repeated. Written to be read, not to be fast.
"""

from qsparseprop.reference.epilogues import (
    activation_range,
    epilogue,
    epilogue_grad,
    epilogue_range,
    epilogue_sums,
)
from qsparseprop.reference.layout import transpose
from qsparseprop.reference.masks import keep_masked, relu_mask, relu_mask_
from qsparseprop.reference.normalisation import norm_factors, norm_statistics
from qsparseprop.reference.products import pack, quantize_pack, quantize_weight, sddmm, spmm
from qsparseprop.reference.quantization import (
    MIN_SCALE,
    dequantize,
    limited_inverse,
    mix_seed,
    quantize,
    quantize_values,
    random_bits,
    round_to_power,
    sawb_clip,
    stochastic_round,
    symmetric_scale,
)

__all__ = [
    "MIN_SCALE",
    "activation_range",
    "dequantize",
    "epilogue",
    "epilogue_grad",
    "epilogue_range",
    "epilogue_sums",
    "keep_masked",
    "limited_inverse",
    "mix_seed",
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
    "symmetric_scale",
    "transpose",
]
