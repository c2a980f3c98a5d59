"""Operators of torch that are layers as nodes of ONNX: products, windows, normalisations, resizing, attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.inference.calls import Name, call_operator
from qsparseprop.inference.onnx_arguments import Arguments
from qsparseprop.inference.steps import Call

__all__ = ["FIRST_OF_SEVERAL", "LAYERS"]

Translation = Callable[[Arguments], str]


def _optional(call: Arguments, name: str) -> list[str]:
    return [] if call.get(name) is None else [call.tensor(name)]


# ---- products ----


def _product(call: Arguments) -> str:
    return call.add("MatMul", [call.tensor(0), call.tensor(1)])


def _linear(call: Arguments) -> str:
    out = call.add("MatMul", [call.tensor(0), call.add("Transpose", [call.tensor(1)], perm=[1, 0])])
    return out if call.get("bias") is None else call.add("Add", [out, call.tensor("bias")])


def _added_product(call: Arguments) -> str:
    """A product and something that is added, both times numbers."""
    parts = [call.add("MatMul", [call.tensor(1), call.tensor(2)]), call.tensor(0)]
    factors = [call.get("alpha"), call.get("beta")]
    scaled = [x if factor == 1 else call.op("Mul", x, factor) for x, factor in zip(parts, factors, strict=True)]
    return call.add("Add", scaled)


def _einsum(call: Arguments) -> str:
    call.ignore("path")
    equation = call.get(0).replace(" ", "")
    if not equation.replace("...", "").replace("->", "").replace(",", "").islower():
        raise call.refused("with other letters than small ones is not translated to ONNX")
    return call.add("Einsum", [call.given(each) for each in call.get(1)], equation=equation)


def _conv(count: int) -> Translation:
    def translate(call: Arguments) -> str:
        _with_batch(call, count)
        strides, dilations = call.numbers("stride", count), call.numbers("dilation", count)
        padding = call.get("padding")
        if isinstance(padding, str):
            kernel = [call.fixed(1, axis + 2) for axis in range(count)]
            sums = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilations, strict=True)]
            pads = [n // 2 for n in sums] + [n - n // 2 for n in sums]
        else:
            pads = call.numbers("padding", count) * 2
        given = [call.tensor(0), call.tensor(1), *_optional(call, "bias")]
        return call.add("Conv", given, pads=pads, strides=strides, dilations=dilations, group=call.get("groups"))

    return translate


def _with_batch(call: Arguments, count: int) -> None:
    if call.rank(0) != count + 2:
        raise call.refused("without a batch is not translated to ONNX")


def _conv_transposed(count: int) -> Translation:
    def translate(call: Arguments) -> str:
        _with_batch(call, count)
        names = ("stride", "padding", "output_padding", "dilation")
        strides, padding, more, dilations = (call.numbers(name, count) for name in names)
        given = [call.tensor(0), call.tensor(1), *_optional(call, "bias")]
        return call.add("ConvTranspose", given, strides=strides, pads=padding * 2, output_padding=more,
                        dilations=dilations, group=call.get("groups"))  # fmt: skip

    return translate


# ---- windows ----


def _on_one(call: Arguments, image: Tensor) -> Tensor:
    """What the call makes of another first argument, which has one channel and no batch."""
    rest = call.step.arguments[1:]
    found = call_operator(Call(("x",), "y", call.step.operator, (Name("x"), *rest), call.step.keywords), {"x": image})
    made: Tensor = found[0] if isinstance(found, tuple) else found
    return made


class _Window:
    """A window of pooling, with what rounding up adds behind the padding."""

    def __init__(self, call: Arguments, count: int, dilated: bool) -> None:
        _with_batch(call, count)
        self.kernel = call.numbers("kernel_size", count)
        self.stride = call.numbers("stride", count) or self.kernel
        self.padding = call.numbers("padding", count)
        self.dilation = call.numbers("dilation", count) if dilated else [1] * count
        call.ignore("ceil_mode")
        self.image = [call.fixed(0, axis + 2) for axis in range(count)]
        found = call.sizes.meta(call.step.output)
        made = (found[0] if isinstance(found, list) else found).shape[2:]
        spans = [(m - 1) * s + d * (k - 1) + 1
                 for m, s, d, k in zip(made, self.stride, self.dilation, self.kernel, strict=True)]  # fmt: skip
        self.behind = [max(p, span - n - p) for p, span, n in zip(self.padding, spans, self.image, strict=True)]

    @property
    def rounded_up(self) -> bool:
        return self.behind != self.padding

    def padded(self, call: Arguments, x: str, value: float) -> str:
        pads = [0, 0, *self.padding, 0, 0, *self.behind]
        return call.add("Pad", [x, call.ints(pads), call.constant(np.float32(value))]) if any(pads) else x


def _max_pool(count: int) -> Translation:
    def translate(call: Arguments) -> str:
        window = _Window(call, count, dilated=True)
        x, pads = call.tensor(0), [*window.padding, *window.behind]
        if bool(_on_one(call, torch.zeros(1, 1, *window.image)).isinf().any()):
            raise call.refused("with windows in the padding alone is not translated to ONNX")
        if any(p >= k for p, k in zip(pads, window.kernel * 2, strict=True)):  # more than engines take
            x, pads = window.padded(call, x, -math.inf), [0] * len(pads)
        return call.add("MaxPool", [x], kernel_shape=window.kernel, strides=window.stride, pads=pads,
                        dilations=window.dilation)  # fmt: skip

    return translate


def _avg_pool(count: int) -> Translation:
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[count - 1]

    def translate(call: Arguments) -> str:
        window, counted = _Window(call, count, dilated=False), bool(call.get("count_include_pad"))
        divisor = call.get("divisor_override") if call.has("divisor_override") else None
        settings = {"kernel_shape": window.kernel, "strides": window.stride}
        if not window.rounded_up and divisor is None:
            return call.add("AveragePool", [call.tensor(0)], pads=window.padding * 2, count_include_pad=int(counted),
                            **settings)  # fmt: skip
        # what torch divides by differs from window to window
        ones = torch.ones(1, 1, *window.image)
        rest = {} if divisor is None else {"divisor_override": divisor}
        wanted = pool(ones, window.kernel, window.stride, window.padding, bool(call.get("ceil_mode")), counted, **rest)
        sides = [n for pair in zip(window.padding[::-1], window.behind[::-1], strict=True) for n in pair]
        found = pool(F.pad(ones, sides), window.kernel, window.stride)
        if not bool((found > 0).all()):
            raise call.refused("with windows in the padding alone is not translated to ONNX")
        means = call.add("AveragePool", [window.padded(call, call.tensor(0), 0.0)], **settings)
        return call.add("Mul", [means, call.constant((wanted.double() / found.double()).float().numpy())])

    return translate


def _along(call: Arguments, x: str, matrices: Sequence[Tensor]) -> str:
    """A tensor times a matrix (outside, inside) along each of its last dimensions, two at most."""
    x = call.add("MatMul", [x, call.constant(matrices[-1].t().contiguous().numpy())])
    return x if len(matrices) == 1 else call.add("MatMul", [call.constant(matrices[0].numpy()), x])


def _adaptive(count: int, largest: bool) -> Translation:
    def translate(call: Arguments) -> str:
        _with_batch(call, count)
        sizes = call.numbers("output_size", count)
        x = call.tensor(0)
        if all(n == 1 for n in sizes):
            return call.add("GlobalMaxPool" if largest else "GlobalAveragePool", [x])
        image = [call.fixed(0, axis + 2) for axis in range(count)]
        if not any(n % m for n, m in zip(image, sizes, strict=True)):
            window = [n // m for n, m in zip(image, sizes, strict=True)]
            return call.add("MaxPool" if largest else "AveragePool", [x], kernel_shape=window, strides=window)
        if largest or count > 2:
            raise call.refused(f"from {image} to {sizes}, over windows of several sizes, is not translated to ONNX")
        return _along(call, x, [F.adaptive_avg_pool1d(torch.eye(n)[None], m)[0].t().contiguous()
                                for n, m in zip(image, sizes, strict=True)])  # fmt: skip

    return translate


# ---- resizing ----


def _scales(call: Arguments, image: Sequence[int], made: Sequence[int]) -> list[float | None]:
    """Scales that torch computes places with, where these are not those of the sizes."""
    given = call.get("scale_factors")
    call.ignore("output_size")
    if given is None:
        return [None] * len(image)
    return [None if n * scale == m else float(scale) for n, m, scale in zip(image, made, given, strict=True)]


def _nearest(count: int) -> Translation:
    """Of whole multiples a node; of others rows that torch chooses, whose places engines round otherwise."""

    def translate(call: Arguments) -> str:
        _with_batch(call, count)
        image = [call.fixed(0, axis + 2) for axis in range(count)]
        made = [n or 0 for n in call.result[2:]]
        scales, x = _scales(call, image, made), call.tensor(0)
        if not any(m % n for n, m in zip(image, made, strict=True)) and scales == [None] * count:
            factors = call.constant(np.array([1, 1, *(m // n for n, m in zip(image, made, strict=True))], np.float32))
            return call.add("Resize", [x, "", factors], mode="nearest", nearest_mode="floor",
                            coordinate_transformation_mode="asymmetric")  # fmt: skip
        for axis, n in enumerate(image):
            line = torch.arange(n, dtype=torch.float32).view(n, *[1] * (count - 1 - axis))
            found = _on_one(call, line.expand(1, 1, *image).contiguous())
            chosen = found.movedim(axis + 2, 0).flatten(1)[:, 0].long()
            x = call.add("Gather", [x, call.constant(chosen.numpy())], axis=axis + 2)
        return x

    return translate


def _interpolated(count: int, mode: str) -> Translation:
    """Sizes that are the scales' by a node; others by matrices of torch's own weights."""

    def translate(call: Arguments) -> str:
        _with_batch(call, count)
        aligned = bool(call.get("align_corners"))
        image = [call.fixed(0, axis + 2) for axis in range(count)]
        made = [n or 0 for n in call.result[2:]]
        scales, x = _scales(call, image, made), call.tensor(0)
        if (aligned or scales == [None] * count) and min(made) > 1:
            where = "align_corners" if aligned else "half_pixel"
            kind = {"mode": "cubic", "cubic_coeff_a": -0.75} if mode == "bicubic" else {"mode": "linear"}
            sizes = call.ints(made)
            if not (mode == "bicubic" and aligned):
                return call.add("Resize", [x, "", "", sizes], axes=list(range(2, count + 2)),
                                coordinate_transformation_mode=where, **kind)  # fmt: skip
        if count > 2:
            raise call.refused("of volumes by scales that are not those of the sizes is not translated to ONNX")
        return _along(call, x, [_weights(mode, *each, aligned) for each in zip(image, made, scales, strict=True)])

    return translate


def _weights(mode: str, inside: int, outside: int, scale: float | None, aligned: bool) -> Tensor:
    """How much each element of a line has of each of those before: (outside, inside)."""
    kind = "bicubic" if mode == "bicubic" else "bilinear"
    lines = torch.eye(inside).view(1, inside, 1, inside)
    size: dict[str, Any] = {"size": (1, outside)} if scale is None else {"scale_factor": (1.0, scale)}
    return F.interpolate(lines, mode=kind, align_corners=aligned, **size)[0, :, 0].t().contiguous()


# ---- normalisations and attention ----


def _softmax(operator: str) -> Translation:
    def translate(call: Arguments) -> str:
        call.ignore("half_to_float")
        return call.add(operator, [call.tensor(0)], axis=call.dim("dim"))

    return translate


def _layer_norm(call: Arguments) -> str:
    shape = call.get("normalized_shape")
    call.ignore("cudnn_enable")
    weight = call.constant(np.ones(shape, np.float32)) if call.get("weight") is None else call.tensor("weight")
    given = [call.tensor(0), weight, *_optional(call, "bias")]
    return call.add("LayerNormalization", given, axis=-len(shape), epsilon=call.get("eps"))


def _rms_norm(call: Arguments) -> str:
    x, axes = call.tensor(0), call.ints(range(-len(call.get("normalized_shape")), 0))
    epsilon = call.get("eps")
    epsilon = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    mean = call.add("ReduceMean", [call.op("Mul", x, x), axes], keepdims=1)
    out = call.op("Div", x, call.op("Sqrt", call.op("Add", mean, epsilon)))
    return out if call.get("weight") is None else call.add("Mul", [out, call.tensor("weight")])


def _group_norm(call: Arguments) -> str:
    call.ignore("cudnn_enabled")
    x, rank, groups = call.tensor(0), call.rank(0), call.get("num_groups")
    channels = call.fixed(0, 1)
    lines = call.add("Reshape", [x, call.ints([0, groups, -1])])
    ones, zeros = (call.constant(np.full(groups, value, np.float32)) for value in (1, 0))
    out = call.add("InstanceNormalization", [lines, ones, zeros], epsilon=call.get("eps"))
    out = call.add("Reshape", [out, call.add("Shape", [x])])
    for operator, name in (("Mul", "weight"), ("Add", "bias")):
        if call.get(name) is not None:
            out = call.add(operator, [out, call.reshaped(call.tensor(name), [channels, *[1] * (rank - 2)])])
    return out


def _statistics(call: Arguments, *names: str) -> list[str]:
    channels = call.fixed(0, 1)
    usual = {"weight": 1, "bias": 0}
    return [call.constant(np.full(channels, usual[name], np.float32))
            if call.get(name) is None and name in usual else call.tensor(name) for name in names]  # fmt: skip


def _batch_norm(call: Arguments) -> str:
    call.ignore("momentum", "cudnn_enabled")
    if call.get("training"):
        raise call.refused("in training is not translated to ONNX")
    given = _statistics(call, "weight", "bias", "running_mean", "running_var")
    return call.add("BatchNormalization", [call.tensor(0), *given], epsilon=call.get("eps"))


def _instance_norm(call: Arguments) -> str:
    call.ignore("momentum", "cudnn_enabled", "running_mean", "running_var")
    if not call.get("use_input_stats"):
        given = _statistics(call, "weight", "bias", "running_mean", "running_var")
        return call.add("BatchNormalization", [call.tensor(0), *given], epsilon=call.get("eps"))
    given = _statistics(call, "weight", "bias")
    return call.add("InstanceNormalization", [call.tensor(0), *given], epsilon=call.get("eps"))


def _attention(call: Arguments) -> str:
    query, key, value = (call.tensor(name) for name in ("query", "key", "value"))
    rank, mask = call.rank("query"), call.get("attn_mask")
    scale = call.get("scale")
    scale = 1 / math.sqrt(call.fixed("query", -1)) if scale is None else float(scale)
    if not rank == call.rank("key") == call.rank("value"):
        raise call.refused("of tensors of other dimensions is not translated to ONNX")
    turned = call.add("Transpose", [key], perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = call.add("MatMul", [call.op("Mul", query, scale), turned])
    if call.get("is_causal"):
        ones = torch.ones(call.fixed("query", -2), call.fixed("key", -2), dtype=torch.bool).tril()
        scores = call.op("Where", call.constant(ones.numpy()), scores, -math.inf)
    if mask is None:
        return call.add("MatMul", [call.add("Softmax", [scores], axis=-1), value])
    if call.meta("attn_mask").dtype is torch.bool:
        scores = call.op("Where", call.tensor("attn_mask"), scores, -math.inf)
    else:
        scores = call.add("Add", [scores, call.tensor("attn_mask")])
    # a token that may see nothing gets zeros
    most = call.add("ReduceMax", [scores, call.ints([-1])], keepdims=1)
    weights = call.op("Where", call.op("Equal", most, -math.inf), 0.0, call.add("Softmax", [scores], axis=-1))
    return call.add("MatMul", [weights, value])


LAYERS: dict[str, Translation] = {
    **dict.fromkeys(("matmul", "bmm", "mm", "mv"), _product),
    **dict.fromkeys(("addmm", "baddbmm"), _added_product),
    **{f"conv{n}d": _conv(n) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transposed(n) for n in (1, 2, 3)},
    **{f"max_pool{n}d": _max_pool(n) for n in (1, 2, 3)},
    **{f"avg_pool{n}d": _avg_pool(n) for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": _adaptive(n, largest=False) for n in (1, 2, 3)},
    **{f"_adaptive_avg_pool{n}d": _adaptive(n, largest=False) for n in (2, 3)},
    **{f"upsample_nearest{n}d": _nearest(n) for n in (1, 2, 3)},
    **{f"_upsample_nearest_exact{n}d": _nearest(n) for n in (1, 2)},
    "upsample_linear1d": _interpolated(1, "linear"), "upsample_bilinear2d": _interpolated(2, "bilinear"),
    "upsample_trilinear3d": _interpolated(3, "trilinear"), "upsample_bicubic2d": _interpolated(2, "bicubic"),
    "linear": _linear, "einsum": _einsum, "layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm,
    "batch_norm": _batch_norm, "instance_norm": _instance_norm, "scaled_dot_product_attention": _attention,
    "softmax": _softmax("Softmax"), "_softmax": _softmax("Softmax"), "log_softmax": _softmax("LogSoftmax"),
    "_log_softmax": _softmax("LogSoftmax"),
}  # fmt: skip
#: Pools that say where the largest elements are, too, which is not translated.
FIRST_OF_SEVERAL = {
    **{f"max_pool{n}d_with_indices": _max_pool(n) for n in (2, 3)},
    **{f"adaptive_max_pool{n}d": _adaptive(n, largest=True) for n in (1, 2, 3)},
}
