"""The operators: what the compiled kernels do, as functions of tensors, without knowledge of modules.

This is the contract between the modules and the kernels. What takes plain tensors and numbers is registered with
``torch.library`` (schema, shapes for tracing, CPU implementation); what takes a plan, or a part of one, is a function:
graphs and whoever else sees operators see the one that a layer is, see ``qsparseprop.nn``.
``qsparseprop.ops.reference`` has all of them in plain torch, for tests.
"""

from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._gather_list import GatherList
from qsparseprop._kernels._plan import PlaneLayout, ProductRows
from qsparseprop._kernels._statistics import Scheme
from qsparseprop._kernels._tensor import are_plain, check_storage
from qsparseprop.ops._registration import Operator, in_memory, operator, saved_tensors
from qsparseprop.ops.epilogues import (
    ACTIVATIONS,
    Activation,
    Affine,
    Kept,
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
from qsparseprop.ops.layers import (
    Quantisation,
    bias_gradient,
    is_channels_last,
    layer_backward,
    layer_forward,
    packed_backward,
)
from qsparseprop.ops.masks import keep_masked, relu_mask, relu_mask_
from qsparseprop.ops.normalisation import norm_factors, norm_statistics
from qsparseprop.ops.products import (
    Packed,
    Weights,
    empty_result,
    gather_weight,
    multiply,
    pack,
    quantize_pack,
    quantize_weight,
    sddmm,
    spmm,
)
from qsparseprop.ops.quantization import dequantize, quantize
from qsparseprop.ops.schemes import RANDOM_SCHEMES, SCHEMES, draw_seed
from qsparseprop.ops.transpose import transpose

__all__ = [
    "ACTIVATIONS",
    "RANDOM_SCHEMES",
    "SCHEMES",
    "Activation",
    "Affine",
    "DenseRows",
    "GatherList",
    "Kept",
    "Operator",
    "Packed",
    "PlaneLayout",
    "ProductRows",
    "Quantisation",
    "Scheme",
    "Weights",
    "activation_range",
    "are_plain",
    "bias_gradient",
    "check_storage",
    "codes_like",
    "dequantize",
    "draw_seed",
    "empty_result",
    "epilogue",
    "epilogue_grad",
    "epilogue_grad_pack",
    "epilogue_pack",
    "epilogue_range",
    "epilogue_sums",
    "gather_weight",
    "in_memory",
    "is_channels_last",
    "keep_masked",
    "layer_backward",
    "layer_forward",
    "multiply",
    "norm_factors",
    "norm_statistics",
    "operator",
    "pack",
    "packed_backward",
    "quantize",
    "quantize_pack",
    "quantize_weight",
    "relu_mask",
    "relu_mask_",
    "saved_like",
    "saved_tensors",
    "sddmm",
    "spmm",
    "transpose",
]
