"""The operators: what the compiled kernels do, as functions of tensors, without knowledge of modules.

This is the contract between the modules and the kernels. Every operator is registered with ``torch.library`` (schema,
shapes for tracing, CPU implementation); ``qsparseprop.ops.reference`` has the same functions in plain torch, for tests.
"""

from qsparseprop._kernels._tensor import are_plain, check_storage
from qsparseprop.ops._registration import saved_tensors, shortcut
from qsparseprop.ops.epilogues import (
    ACTIVATIONS,
    activation_range,
    codes_like,
    epilogue,
    epilogue_grad,
    epilogue_grad_pack,
    epilogue_pack,
    epilogue_range,
    epilogue_sums,
    saved_like,
)
from qsparseprop.ops.layers import is_channels_last, layer_backward, layer_forward, packed_backward, packed_forward
from qsparseprop.ops.masks import keep_masked, relu_mask, relu_mask_
from qsparseprop.ops.normalisation import norm_factors, norm_statistics
from qsparseprop.ops.products import pack, quantize_pack, quantize_weight, sddmm, spmm
from qsparseprop.ops.quantization import dequantize, quantize
from qsparseprop.ops.schemes import RANDOM_SCHEMES, SCHEMES, draw_seed
from qsparseprop.ops.transposed import transposed_backward, transposed_forward

__all__ = [
    "ACTIVATIONS",
    "RANDOM_SCHEMES",
    "SCHEMES",
    "activation_range",
    "are_plain",
    "check_storage",
    "codes_like",
    "dequantize",
    "draw_seed",
    "epilogue",
    "epilogue_grad",
    "epilogue_grad_pack",
    "epilogue_pack",
    "epilogue_range",
    "epilogue_sums",
    "is_channels_last",
    "keep_masked",
    "layer_backward",
    "layer_forward",
    "norm_factors",
    "norm_statistics",
    "pack",
    "packed_backward",
    "packed_forward",
    "quantize",
    "quantize_pack",
    "quantize_weight",
    "relu_mask",
    "relu_mask_",
    "saved_like",
    "saved_tensors",
    "sddmm",
    "shortcut",
    "spmm",
    "transposed_backward",
    "transposed_forward",
]
