"""The passes of a quantised layer, each in one call: in a small layer what lies between the kernels takes as long."""

from qsparseprop._kernels._kept cimport multiply
from qsparseprop._kernels._plan cimport ProductRows
from qsparseprop._kernels._statistics cimport Scheme

from qsparseprop._kernels._matmul import sddmm
from qsparseprop._kernels._pack import quantize_pack


def forward(x, values, bias, ProductRows rows not None, Scheme scheme not None, seed, clip, out, bint trained,
            int threads):
    """Pack the input, quantise the weight, and multiply into `out`: the planes of the input, scale and zero point.

    `trained` says that the weight wants a gradient.
    """
    planes, scale, zero_point = packed = quantize_pack(x, rows.source, scheme, seed, threads)
    multiply(values, rows, scale, zero_point, clip, planes, bias, out, threads, trained)
    return packed


def backward(dy, values, packed, ProductRows rows not None, ProductRows differentiated, Scheme scheme not None,
             seed, clip, dx, bint swapped, int threads):
    """Pack the gradient of the output, once for both products: the input's gradient goes into `dx` where that is given,
    that of the values is returned where rows to differentiate are. `packed` is the input, as `forward` gave it;
    `swapped` says that the operands of the weight gradient change places, as in transposed layers.
    """
    planes, scale, zero_point = gradient = quantize_pack(dy, rows.source, scheme, seed, threads)
    if dx is not None:
        multiply(values, rows, scale, zero_point, clip, planes, None, dx, threads, differentiated is not None)
    if differentiated is None:
        return None
    x_planes, x_scale, x_zero_point = packed
    images, count = dy.shape[0], values.shape[0]
    if swapped:
        return sddmm(planes, x_planes, scale, zero_point, x_scale, differentiated, images, count, threads)
    return sddmm(x_planes, planes, x_scale, x_zero_point, scale, differentiated, images, count, threads)
