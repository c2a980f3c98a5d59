"""The one function behind every sparse module, with its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop.layout.geometry import Geometry
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._values import plain
from qsparseprop.quantization import QuantConfig


def check_finite(tensor: Tensor, name: str) -> None:
    """Refuse NaN and Inf."""
    ops.check_storage(tensor, name)
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or Inf (check_finite is on)")


def forward_pass(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    qconfig: QuantConfig | None,
    dtype: torch.dtype,
    channels_last: bool | None = None,
    save: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The product, and the packed input with its scale and zero point; see `ops.layer_forward`.

    Transposed layers only have the latter three where `save` says so: they may have to be made for the purpose.
    """
    g, values = plan.geometry, plain(values)
    quantisation = (None, False, (), None, False)
    if qconfig is not None:
        quantisation = (qconfig.input, qconfig.granularity == "channel", qconfig.input_options,
                        qconfig.weight_clip(values, plan.entries), qconfig.grad_weight == "float32")
    scheme, *rest = quantisation
    if g.transposed:
        return ops.shortcut("transposed_forward", x, values, bias)(
            x, values, bias, plan.backward, g.output_grid.numbers, g.output_views, g.input_views,
            (x.shape[0], g.in_channels, *g.input_image), scheme, dtype, *rest, save, channels_last,
        )  # fmt: skip
    return ops.shortcut("layer_forward", x, values, bias)(
        x, values, bias, plan.forward, g.input_grid.numbers, g.input_views, g.output_views,
        (x.shape[0], g.output_grid.planes, *g.output_image), scheme, None, dtype, *rest, channels_last,
    )  # fmt: skip


def backward_pass(
    dy: Tensor,
    values: Tensor,
    packed: Sequence[Tensor | None],
    plan: Plan,
    qconfig: QuantConfig | None,
    x_shape: Sequence[int],
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the values and the bias, as far as `grads` wants them; see `ops.layer_backward`."""
    g, values = plan.geometry, plain(values)
    if dy.dtype not in (torch.float32, torch.bfloat16):
        ops.check_storage(dy, "the gradient of the output")
        dy = dy.to(torch.float32)
    scheme, rest = None, (False, (), None)
    if qconfig is not None:
        scheme = qconfig.grad
        rest = (qconfig.granularity == "channel", qconfig.grad_options, qconfig.weight_clip(values, plan.entries))
    if g.transposed:
        return ops.shortcut("transposed_backward", dy, values, *packed[:2])(
            dy, values, *packed[:2], plan.forward, g.output_grid.numbers, g.input_grid.numbers, g.output_views,
            g.input_views, x_shape, scheme, ops.draw_seed() if scheme in ops.RANDOM_SCHEMES else None, grads, x_dtype,
            *rest, channels_last,
        )  # fmt: skip
    return ops.shortcut("layer_backward", dy, values, *packed)(
        dy, values, *packed, plan.forward, plan.backward, g.input_grid.numbers, g.output_grid.numbers, g.input_views,
        g.output_views, x_shape, g.covers_input, scheme, ops.draw_seed() if scheme in ops.RANDOM_SCHEMES else None,
        grads, x_dtype, *rest, channels_last,
    )  # fmt: skip


def packed_forward_pass(
    packed: Sequence[Tensor],
    batch: int,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    qconfig: QuantConfig,
    dtype: torch.dtype,
) -> Tensor:
    """The channels_last product with an input that is packed already; see `ops.packed_forward`."""
    g, values = plan.geometry, plain(values)
    return ops.shortcut("packed_forward", *packed, values, bias)(
        *packed, values, bias, plan.forward, g.input_grid.numbers, g.output_views,
        (batch, g.output_grid.planes, *g.output_size), dtype, qconfig.weight_clip(values, plan.entries), True,
    )  # fmt: skip


def output_packing(ranges: Tensor, batch: int, geometry: Geometry, qconfig: QuantConfig) -> tuple[Any, ...]:
    """How the input of a layer is packed: the arguments of `ops.epilogue_pack` from `ranges` to `per_channel`.

    `ranges` (channels, 2) are the least and the greatest element of each channel.
    """
    per_channel, grid = qconfig.granularity == "channel", geometry.input_grid
    if not per_channel:
        ranges = torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
    return ranges, grid.numbers, geometry.input_views, grid.lanes(batch), qconfig.input, per_channel


def gradient_packing(ranges: Tensor, batch: int, geometry: Geometry, qconfig: QuantConfig) -> tuple[Any, ...]:
    """The same of the gradient of its output: arguments of `ops.epilogue_grad_pack` from `ranges` on.

    `ranges` (channels, 2) are of the same magnitude below and above.
    """
    per_channel, grid = qconfig.granularity == "channel", geometry.output_grid
    if not per_channel:
        most = ranges[:, 1].amax()
        ranges = torch.stack([-most, most])[None]
    scheme = "symmetric" if qconfig.grad == "absmax" else qconfig.grad
    seed = ops.draw_seed() if scheme in ops.RANDOM_SCHEMES else None
    return (ranges, grid.numbers, geometry.output_views, grid.lanes(batch), scheme, seed, per_channel,
            qconfig.grad_options)  # fmt: skip


def packed_backward_pass(
    dy: Sequence[Tensor],
    values: Tensor,
    packed: Sequence[Tensor | None],
    plan: Plan,
    qconfig: QuantConfig,
    x_shape: Sequence[int],
    dy_shape: Sequence[int],
    grads: Sequence[bool],
    x_dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and the values from a packed one; see `ops.packed_backward`."""
    g, values = plan.geometry, plain(values)
    return ops.shortcut("packed_backward", *dy, values, *packed)(
        *dy, values, *packed, plan.forward, plan.backward, g.input_grid.numbers, g.output_grid.numbers, g.input_views,
        g.output_views, x_shape, dy_shape, g.covers_input, grads, x_dtype, qconfig.weight_clip(values, plan.entries),
        channels_last,
    )  # fmt: skip


_NOTHING = contextlib.nullcontext()


def without_graph() -> Any:
    """What a backward pass is computed in: it has no graph anyway, except with create_graph=True."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def direct_apply(function: type[torch.autograd.Function]) -> Any:
    """Its `apply` where no transforms of torch.func are active, which the class's own one looks after."""
    return super(torch.autograd.Function, function).apply


def _as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)  # a call of `to` costs as much where it does nothing


def records_gradients() -> bool:
    """Whether torch's operators would become nodes of a graph.

    In inference mode they do not, even under enable_grad; an autograd.Function would, and find that it cannot save.
    """
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def value_gradient(gradient: Tensor, values: Tensor) -> Tensor | None:
    """Gradient of the values; none where there are none, since optimizers may divide by the number of elements."""
    return _as_dtype(gradient, values.dtype) if values.numel() else None


class NoGradient(torch.autograd.Function):
    """Part of a graph, for DistributedDataParallel, but gets no gradient: for tensors without elements."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        """The tensor as it is."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> None:
        """No gradient."""


def _in_shape(dy: Tensor, shape: Sequence[int]) -> Tensor:
    if dy.shape == shape:
        return dy
    ops.check_storage(dy, "the gradient of the output")  # before it may be copied
    return dy.reshape(shape)


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, values: Tensor, bias: Tensor | None, plan: Plan, qconfig: QuantConfig | None,
        dtype: torch.dtype, save: bool, shape: Sequence[int] | None
    ) -> Tensor:  # fmt: skip
        if qconfig is not None and qconfig.check_finite:
            check_finite(x, "the input")
            check_finite(values, "the weight")
        images = x if x.ndim == 4 else x.view(*x.shape, 1, 1)
        # of rows, in whatever shape, torch's results are contiguous
        channels_last = False if shape is not None and len(shape) == 3 else None
        out, *packed = forward_pass(images, values, bias, plan, qconfig, dtype, channels_last, save)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(values, *packed)
        elif ctx.needs_input_grad[0]:
            ctx.save_for_backward(values, None, None, None)
        ctx.plan, ctx.qconfig = plan, qconfig
        ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.in_shape, ctx.out_shape = images.shape, out.shape
        ctx.set_materialize_grads(False)
        if images is x and shape is None:
            return out
        # detached: as those of torch's layers, results are no views, which in-place operations treat otherwise
        return out.view(out.shape[:2] if shape is None else shape).detach()

    @staticmethod
    def backward(ctx, dy: Tensor | None):
        if dy is None:  # as torch's layers: no gradient, rather than zeros, which optimizers would step by
            return (None,) * 8
        qconfig = ctx.qconfig
        grads = ctx.needs_input_grad[:3]
        if qconfig is not None and qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        dx = dvalues = weight = None
        again = torch.is_grad_enabled()  # create_graph=True
        if grads[0] or grads[1]:
            weight, *packed = ctx.saved_tensors
            values = plain(weight)
            with without_graph():
                dx, dvalues, dbias = backward_pass(
                    _in_shape(dy, ctx.out_shape), values, packed, ctx.plan, qconfig, ctx.in_shape, grads, ctx.x_dtype
                )
                if grads[0] and dx.shape != ctx.x_shape:
                    dx = dx.view(ctx.x_shape)
        else:
            ops.check_storage(dy, "the gradient of the output")
            dbias = dy.detach().reshape(ctx.out_shape).sum((0, 2, 3), dtype=torch.float32)
        gradients = (
            dx if grads[0] else None,
            value_gradient(dvalues, values) if grads[1] else None,
            _as_dtype(dbias, ctx.bias_dtype) if grads[2] else None,
        )
        if again:
            gradients = NoSecondDerivative.apply(dy, weight, *gradients)  # with its graph, which plain() cuts off
        return *gradients, None, None, None, None, None

    @staticmethod
    def jvp(ctx, *tangents: Tensor | None):
        raise NotImplementedError("sparse modules have no forward-mode derivatives: use reverse mode (backward), or "
                                  "the dense module that to_dense() gives")


class NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx, dy: Tensor, values: Tensor | None, *gradients: Tensor | None):
        """The gradients as they are."""
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_: Tensor):
        """Refuse."""
        raise NotImplementedError("sparse modules can be differentiated once only: for second derivatives use the "
                                  "dense module that to_dense() gives")


def link_to_inputs() -> Tensor:
    """A tensor without elements which a node of a block gives and saves beside its result.

    So gradients can be made to depend on the node's inputs, without keeping these, see `block_gradients`.
    """
    return torch.empty(0)


def block_gradients(gradients: tuple[Tensor | None, ...], link: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a block, made without a graph, which refuse to be differentiated where that is wanted.

    They depend on the inputs even where the gradient that was given does not; `link` is that of `link_to_inputs`.
    """
    if not torch.is_grad_enabled():  # no create_graph=True
        return gradients
    return NoSecondDerivative.apply(link, None, *gradients)


def refuse_forward_mode() -> None:
    """What blocks do when they are asked for a derivative in forward mode."""
    raise NotImplementedError("blocks have no forward-mode derivatives: use reverse mode (backward), or the model "
                              "that swap_modules_with_dense gives")


def sparse_product(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    plan: Plan,
    qconfig: QuantConfig | None = None,
    dtype: torch.dtype | None = None,
    shape: Sequence[int] | None = None,
) -> Tensor:
    """Product of a sparse weight with an input, as a convolution whose geometry is in the plan.

    Parameters
    ----------
    x : Tensor
        (images, channels, height, width), float32 or bfloat16, any strides; or (images, channels), which stands for
        images of one pixel.
    values : Tensor
        (nonzeros,) in the order of the pattern that the plan was made of.
    bias : Tensor, optional
        (out_channels,).
    plan : Plan
    qconfig : QuantConfig, optional
        Without one the computation is in float32.
    dtype : torch.dtype, optional
        Of the result, float32 or bfloat16; x's without one.
    shape : sequence of int, optional
        Of the result, in place of that of its images.

    Returns
    -------
    Tensor
        (images, out_channels, out_height, out_width), channels_last where x is; or (images, out_channels); or `shape`.
        Differentiable once with respect to `x`, `values` and `bias`.

    Raises
    ------
    NotImplementedError
        From the derivative of a derivative, and from forward-mode differentiation.
    """
    if torch.is_grad_enabled() and not records_gradients():
        with torch.no_grad():
            return sparse_product(x, values, bias, plan, qconfig, dtype, shape)
    save = torch.is_grad_enabled() and values.requires_grad
    return _SparseProduct.apply(x, values, bias, plan, qconfig, x.dtype if dtype is None else dtype, save, shape)
