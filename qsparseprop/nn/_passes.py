"""A layer's passes as its `QuantConfig` wants them: what the operators are given. Nothing here knows of autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._values import plain
from qsparseprop.quantization import QuantConfig

_IN_FLOATS = ops.Quantisation()


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and Inf."""
    ops.check_storage(tensor, name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or Inf (check_finite is on)")


def as_dtype(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """The tensor, if there is one, in a dtype; a call of `to` costs as much where it does nothing."""
    return tensor if tensor is None or tensor.dtype is dtype else tensor.to(dtype)


def value_gradient(gradient: Tensor | None, values: Tensor) -> Tensor | None:
    """Gradient of the values, if wanted; none where there are none: optimizers may divide by the number of elements."""
    return as_dtype(gradient, values.dtype) if values.numel() else None


def input_quantisation(values: Tensor, plan: Plan, qconfig: QuantConfig | None) -> ops.Quantisation:
    """How a forward pass quantises; `values` are those of the weight, see `plain`."""
    if qconfig is None:
        return _IN_FLOATS
    return ops.Quantisation(qconfig.input_scheme, qconfig.weight_clip(values, plan.entries), None,
                            qconfig.grad_weight == "float32")  # fmt: skip


def gradient_quantisation(values: Tensor, plan: Plan, qconfig: QuantConfig | None) -> ops.Quantisation:
    """How a backward pass quantises, with a seed of its own where it rounds at random."""
    if qconfig is None:
        return _IN_FLOATS
    scheme = qconfig.grad_scheme
    return ops.Quantisation(scheme, qconfig.weight_clip(values, plan.entries),
                            ops.draw_seed() if scheme.random else None)  # fmt: skip


def of_kernel_dtype(dy: Tensor) -> Tensor:
    """A gradient in a dtype that the kernels read."""
    if dy.dtype in (torch.float32, torch.bfloat16):
        return dy
    ops.check_storage(dy, "the gradient of the output")
    return dy.to(torch.float32)


def forward_pass(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    qconfig: QuantConfig | None,
    dtype: torch.dtype,
    channels_last: bool | None = None,
    save: bool = True,
) -> tuple[Tensor, ops.Packed | None]:
    """The product, and the packed input; see `ops.layer_forward`."""
    values = plain(values)
    quantisation = input_quantisation(values, plan, qconfig)
    return ops.layer_forward(x, values, bias, plan, quantisation, dtype, channels_last, save)


def backward_pass(
    dy: Tensor,
    values: Tensor,
    packed: ops.Packed | None,
    plan: Plan,
    qconfig: QuantConfig | None,
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the input, the values and the bias, as far as `grads` wants them; see `ops.layer_backward`."""
    values, dy = plain(values), of_kernel_dtype(dy)
    quantisation = gradient_quantisation(values, plan, qconfig)
    return ops.layer_backward(dy, values, packed, plan, quantisation, grads, x_dtype, channels_last)


def common_range(ranges: Tensor, scheme: ops.Scheme) -> Tensor:
    """Ranges (channels, 2) as a scheme wants them: those of all channels together, where they share a scale."""
    if scheme.per_channel:
        return ranges
    return torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
