"""The one function behind every sparse module, with its gradients."""

from __future__ import annotations

from torch import Tensor

from qsparseprop._torch_compat import is_differentiating_forward
from qsparseprop.nn._product import ProductCall, multiply
from qsparseprop.nn.autograd.graph import direct_apply, records_gradients, without_graph
from qsparseprop.nn.autograd.product import SparseProduct

_apply = direct_apply(SparseProduct)


def sparse_product(x: Tensor, weight: Tensor, bias: Tensor | None, call: ProductCall) -> Tensor:
    """Product of a sparse weight with an input, as a convolution whose geometry is in the plan.

    Parameters
    ----------
    x : Tensor
        (images, channels, height, width), float32 or bfloat16, any strides; or (images, channels), which stands for
        images of one pixel.
    weight : Tensor
        (nonzeros,) in the order of the pattern that the plan was made of.
    bias : Tensor, optional
        (out_channels,).
    call : ProductCall

    Returns
    -------
    Tensor
        (images, out_channels, out_height, out_width), channels_last where x is; or (images, out_channels); or the shape
        that `call` names. Differentiable once with respect to `x`, `weight` and `bias`.

    Raises
    ------
    NotImplementedError
        From the derivative of a derivative, and from forward-mode differentiation.
    """
    if not records_gradients() and not is_differentiating_forward():
        with without_graph():
            return call.shaped(multiply(x, bias, call, False)[0])
    return _apply(x, weight, bias, call)
