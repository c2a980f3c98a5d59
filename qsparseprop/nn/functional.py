"""The one function behind every sparse module, with its gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop._torch_compat import dispatch_modes, is_differentiating_forward
from qsparseprop.layout.plan import Plan
from qsparseprop.nn._passes import as_dtype, backward_pass, check_finite, forward_pass, value_gradient
from qsparseprop.nn._traced import config_text, sparse_layer, sparse_layer_backward
from qsparseprop.nn._values import plain
from qsparseprop.quantization import QuantConfig

_NOTHING = contextlib.nullcontext()


def without_graph() -> Any:
    """What a backward pass is computed in: it has no graph anyway, except with create_graph=True."""
    return torch.no_grad() if torch.is_grad_enabled() else _NOTHING


def direct_apply(function: type[torch.autograd.Function]) -> Any:
    """Its `apply` where no transforms of torch.func are active, which the class's own one looks after."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # of a class in C


def records_gradients() -> bool:
    """Whether torch's operators would become nodes of a graph.

    In inference mode they do not, even under enable_grad; an autograd.Function would, and find that it cannot save.
    """
    return torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class NoGradient(torch.autograd.Function):
    """Part of a graph, for DistributedDataParallel, but gets no gradient: for tensors without elements."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """The tensor as it is."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        """No gradient."""


def _in_shape(dy: Tensor, shape: Sequence[int]) -> Tensor:
    if dy.shape == shape:
        return dy
    ops.check_storage(dy, "the gradient of the output")  # before it may be copied
    return dy.reshape(shape)


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


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether torch is to see an operator: a dispatch mode is on, or tensors are more than memory (see `are_plain`)."""
    return bool(dispatch_modes()) or not ops.are_plain(*tensors)


def _compute(x: Tensor, bias: Tensor | None, call: ProductCall, save: bool) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The product, and the packed input where it is to be saved."""
    values, plan, _, qconfig, dtype, shape = call
    if qconfig is not None and qconfig.check_finite:
        check_finite(x, "the input")
        check_finite(values, "the weight")
    # of rows, in whatever shape, torch's results are contiguous
    channels_last = False if shape is not None and len(shape) == 3 else None
    if not _is_watched(x, values, bias):
        return forward_pass(x, values, bias, plan, qconfig, dtype, channels_last, save)
    ops.check_storage(values, "the weight")
    images = x if x.ndim == 4 else x.view(*x.shape, 1, 1)
    out, *packed = sparse_layer.overload(images, values, bias, *call.as_graphs_take_it(), dtype)
    if channels_last is not None:
        out = out.contiguous()
    return out if x.ndim == 4 else out.view(out.shape[:2]).detach(), packed


def _in_its_shape(out: Tensor, call: ProductCall) -> Tensor:
    # detached: as those of torch's layers, results are no views, which in-place operations treat otherwise
    return out if call.shape is None else out.view(call.shape).detach()


class _SparseProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, call: ProductCall) -> Tensor:
        needs_x, needs_values, *_ = ctx.needs_input_grad
        out, packed = _compute(x, bias, call, needs_values)
        if needs_values:
            ctx.save_for_backward(weight, *packed)
        elif needs_x:
            ctx.save_for_backward(weight)
        ctx.call, ctx.x_shape, ctx.out_shape = call, x.shape, out.shape
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return _in_its_shape(out, call)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # as torch's layers: no gradient, rather than zeros, which optimizers would step by
            return None, None, None, None
        qconfig, grads = ctx.call.qconfig, ctx.needs_input_grad[:3]
        if qconfig is not None and qconfig.check_finite:
            check_finite(dy, "the gradient of the output")
        dx = dvalues = weight = None
        again = torch.is_grad_enabled()  # create_graph=True
        if grads[0] or grads[1]:
            weight, *packed = ctx.saved_tensors
            values = plain(weight)
            with without_graph():
                dx, dvalues, dbias = _gradients(ctx, _in_shape(dy, ctx.out_shape), values, packed, grads)
        else:
            ops.check_storage(dy, "the gradient of the output")
            dbias = ops.bias_gradient(dy.detach().reshape(ctx.out_shape))
        gradients = (
            dx if grads[0] else None,
            value_gradient(dvalues, values) if grads[1] else None,
            as_dtype(dbias, ctx.bias_dtype) if grads[2] else None,
        )
        if again:
            gradients = NoSecondDerivative.apply(dy, weight, *gradients)  # with its graph, which plain() cuts off
        return *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError("sparse modules have no forward-mode derivatives: use reverse mode (backward), or "
                                  "the dense module that to_dense() gives")


def _gradients(
    ctx: Any, dy: Tensor, values: Tensor, packed: list[Tensor], grads: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Of the input, the values and the bias, as far as they are wanted."""
    call = ctx.call
    if _is_watched(dy, values, *packed):
        images, shape = (dy, ctx.x_shape) if dy.ndim == 4 else (dy.view(*dy.shape, 1, 1), (*ctx.x_shape, 1, 1))
        dx, *others = sparse_layer_backward.overload(images, values, *(packed or (None, None, None)),
                                                     *call.as_graphs_take_it(), shape, grads, ctx.x_dtype)  # fmt: skip
        return dx.view(ctx.x_shape) if grads[0] else None, *others
    return backward_pass(dy, values, ops.Packed(*packed) if packed else None, call.plan, call.qconfig, grads,
                         ctx.x_dtype)  # fmt: skip


_apply = direct_apply(_SparseProduct)


class NoSecondDerivative(torch.autograd.Function):
    """Passes gradients through, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, values: Tensor | None, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as they are."""
        return tuple(g if g is None else g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        """Refuse."""
        raise NotImplementedError("sparse modules can be differentiated once only: for second derivatives use the "
                                  "dense module that to_dense() gives")


def link_to_inputs() -> Tensor:
    """A tensor without elements which a node of a block gives and saves beside its result.

    So gradients can be made to depend on the node's inputs, without keeping these, see `block_gradients`.
    """
    return torch.empty(0)


def block_gradients(gradients: tuple[Tensor | None, ...], dy: Tensor, link: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a block, made without a graph, which refuse to be differentiated where that is wanted.

    They depend on the gradient that was given, and on the inputs even where that does not; `link` is that of
    `link_to_inputs`.
    """
    if not torch.is_grad_enabled():  # no create_graph=True
        return gradients
    return NoSecondDerivative.apply(dy, link, *gradients)


def refuse_forward_mode() -> None:
    """What blocks do when they are asked for a derivative in forward mode."""
    raise NotImplementedError("blocks have no forward-mode derivatives: use reverse mode (backward), or the model "
                              "that swap_modules_with_dense gives")


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
            return _in_its_shape(_compute(x, bias, call, False)[0], call)
    return _apply(x, weight, bias, call)
