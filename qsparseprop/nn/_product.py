"""A module's product and its gradients: by the kernels, or as one operator where torch is to see it.

Nothing here knows of autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop._torch_compat import dispatch_modes
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._passes import check_finite, gradient_quantisation, input_quantisation, of_kernel_dtype
from qsparseprop.nn._traced import config_text, sparse_layer, sparse_layer_backward
from qsparseprop.ops.layers import layer_backward_plain, layer_forward_plain
from qsparseprop.quantization import QuantConfig


class ProductCall(NamedTuple):
    """What a product needs besides its tensors.

    Attributes
    ----------
    values : Tensor
        The weight as a plain tensor, see `plain`.
    plan : Plan
    pattern : tuple of Tensor
        What the plan was made of: crow_indices and col_indices.
    qconfig : QuantConfig or None
        Without one the computation is in float32.
    dtype : torch.dtype
        Of the result, float32 or bfloat16.
    shape : sequence of int or None
        Of the result, in place of that of its images.
    """

    values: Tensor
    plan: Plan
    pattern: tuple[Tensor, Tensor]
    qconfig: QuantConfig | None
    dtype: torch.dtype
    shape: Sequence[int] | None = None

    def as_graphs_take_it(self) -> tuple[Any, ...]:
        """Pattern, geometry, groups and QuantConfig, as `traced.sparse_layer` takes them."""
        return *self.pattern, self.plan.geometry.numbers, self.plan.groups, config_text(self.qconfig)

    def shaped(self, out: Tensor) -> Tensor:
        """The result in its shape."""
        # detached: as those of torch's layers, results are no views, which in-place operations treat otherwise
        return out if self.shape is None else out.view(self.shape).detach()


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether torch is to see an operator: a dispatch mode is on, or tensors are more than memory (see `are_plain`)."""
    return bool(dispatch_modes()) or not ops.are_plain(*tensors)


def multiply(x: Tensor, bias: Tensor | None, call: ProductCall, save: bool) -> tuple[Tensor, ops.Packed | None]:
    """The product, and the packed input where it is to be saved."""
    values, plan, _, qconfig, dtype, shape = call
    if qconfig is not None and qconfig.check_finite:
        check_finite(x, "the input")
        check_finite(values, "the weight")
    # of rows, in whatever shape, torch's results are contiguous
    channels_last = False if shape is not None and len(shape) == 3 else None
    if not _is_watched(x, values, bias):
        quantisation = input_quantisation(values, plan, qconfig)
        return layer_forward_plain(x, values, bias, plan, quantisation, dtype, channels_last, save)
    ops.check_storage(values, "the weight")
    images = x if x.ndim == 4 else x.view(*x.shape, 1, 1)
    out, *packed = sparse_layer.overload(images, values, bias, *call.as_graphs_take_it(), dtype)
    if channels_last is not None:
        out = out.contiguous()
    return out if x.ndim == 4 else out.view(out.shape[:2]).detach(), ops.Packed(*packed) if save else None


def product_gradients(
    dy: Tensor,
    values: Tensor,
    packed: ops.Packed | None,
    call: ProductCall,
    grads: Sequence[bool],
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of the input, the values and the bias, as far as they are wanted; `dy` is of the shape that `multiply` gave."""
    if not _is_watched(dy, values, *(packed or ())):
        quantisation = gradient_quantisation(values, call.plan, call.qconfig)
        return layer_backward_plain(of_kernel_dtype(dy), values, packed, call.plan, quantisation, grads, x_dtype)
    images, shape = (dy, x_shape) if dy.ndim == 4 else (dy.view(*dy.shape, 1, 1), (*x_shape, 1, 1))
    dx, dvalues, dbias = sparse_layer_backward.overload(images, values, *(packed or (None, None, None)),
                                                        *call.as_graphs_take_it(), shape, grads, x_dtype)  # fmt: skip
    return dx.view(x_shape) if grads[0] else None, dvalues if grads[1] else None, dbias if grads[2] else None
