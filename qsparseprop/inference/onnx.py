"""Frozen models for other engines: ONNX files with int8 weights, zeros included, and quantisation as QDQ nodes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import (
    Add,
    Call,
    Concat,
    Dequantize,
    Flatten,
    Pool,
    Product,
    Quantize,
    Step,
    Table,
    Value,
)
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import replacing

if TYPE_CHECKING:
    import onnx

    from qsparseprop.inference.capture import Signature

__all__ = ["export_onnx", "onnx_model"]

#: Scales below that mean that there is nothing to scale; float32 has smaller ones, with fewer bits.
_SMALLEST = 1e-37


def export_onnx(frozen: Any, path: str | os.PathLike[str], coded_sums: bool = False) -> None:
    """Write a frozen model as an ONNX file, for engines such as ONNX Runtime and OpenVINO.

    Weights are int8 tensors with their zeros, a scale a row, and biases int32; values between layers are 8 bits, by
    pairs of QuantizeLinear and DequantizeLinear, which engines fuse into layers of integers. Where channels have scales
    of their own (``freeze(..., per_channel=True)``), these go into the weights before and behind, so that every pair
    has one scale; a ReLU6 is then one more node. Results differ from the frozen model's by a code in each layer at
    most, since engines round in other places.

    Parameters
    ----------
    frozen : FrozenModule or Program
        Of `qsparseprop.inference.freeze`, which takes dense and swapped models.
    path : path-like
        Appears whole or not at all.
    coded_sums : bool
        Round a product to 8 bits before a residual is added to it. ONNX Runtime computes such a layer in floats
        otherwise, and OpenVINO does not need it. It costs up to half a code of the output and half a code of the
        residual; nothing is cut off that could show in the sum.

    Raises
    ------
    ConfigurationError
        (a ValueError) If the model is not frozen, or calls an operator of torch that is not translated, by its name.
    ImportError
        If onnx is not installed.
    OSError
        If the file cannot be written.
    """
    program = frozen if isinstance(frozen, Program) else getattr(frozen, "program", None)
    if not isinstance(program, Program):
        kind = type(frozen).__name__
        raise ConfigurationError(f"a {kind} is not frozen as a whole; see qsparseprop.inference.freeze")
    model = onnx_model(program, coded_sums, getattr(frozen, "signature", None))
    size = model.ByteSize()
    if size >= 1 << 31:
        raise ConfigurationError(f"the model takes {size / 1e9:.1f} GB, and ONNX files at most 2.1")
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))


def onnx_model(program: Program, coded_sums: bool = False, signature: Signature | None = None) -> onnx.ModelProto:
    """A program as a model of ONNX.

    Parameters
    ----------
    program : Program
    coded_sums : bool
        See `export_onnx`.
    signature : Signature, optional
        What the model takes; otherwise inputs are floats, or rows of tables that are whole numbers, with the batch in
        front.

    Returns
    -------
    onnx.ModelProto

    Raises
    ------
    ConfigurationError
        If a step is not translated.
    ImportError
        If onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("writing ONNX files needs onnx: pip install 'qsparseprop[onnx]'") from error
    del onnx
    return _Export(program, coded_sums, signature).model()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


class _Export:
    """A program step by step.

    Coded values are uint8 tensors. A value whose channels share a scale means what it says; of one with more scales the
    graph computes the codes without their scales, `unit` times smaller, which products before and behind make up for.
    """

    def __init__(self, program: Program, coded_sums: bool, signature: Signature | None) -> None:
        from qsparseprop.inference.onnx_arguments import Sizes
        from qsparseprop.inference.onnx_calls import described_inputs
        from qsparseprop.inference.onnx_graph import Graph

        self.inputs = described_inputs(program, signature)
        self.sizes = Sizes(program, self.inputs)
        #: Values that depend on no input, and so are computed here.
        self.known: dict[str, Any] = dict(program.constants)
        #: Of calls with several results, these.
        self.several: dict[str, list[str]] = {}
        self.program, self.coded_sums = program, coded_sums
        self.graph = Graph()
        self._codes: dict[str, str] = {}
        self._real: dict[str, str] = {}
        self._tokens: dict[str, str] = {}

    def model(self) -> onnx.ModelProto:
        from qsparseprop.inference.onnx_arguments import onnx_dtype
        from qsparseprop.inference.onnx_calls import export_call

        for name, (shape, dtype) in self.inputs.items():
            self._real[name] = self.graph.add_input(name, shape, onnx_dtype(dtype))
        for step in self.program.steps:
            if isinstance(step, Call):
                found = export_call(self, step)
                if isinstance(found, list):
                    self.several[step.output] = found
                elif found is not None:
                    self._real[step.output] = found
            else:
                self.sizes.add(step)
                _STEPS[type(step)](self, step)
        return self.graph.model(self._outputs())

    def _outputs(self) -> list[str]:
        """The results, under names of their own where one is an input, a constant or another result, too."""
        outputs: list[str] = []
        for name in self.program.outputs:
            found = self.real(name)
            if name in outputs or name in self.program.inputs or name in self.known:
                found = self.graph.add("Identity", [found], f"{name}/result")
            outputs.append(found)
        return outputs

    # ---- values ----

    def real(self, name: str) -> str:
        """The float tensor of a value: codes without their zero point, times their scale where there is one."""
        if name not in self._real and name in self.known:
            self._real[name] = self.graph.constant(_constant(self.known[name], name), name)
        if name not in self._real:
            given = [self._codes[name], *self._coding(self.program.values[name])]
            self._real[name] = self.graph.add("DequantizeLinear", given, f"{name}/real")
        return self._real[name]

    def _coding(self, value: Value) -> list[str]:
        """Scale and zero point of pairs of nodes."""
        scale = np.float32(_scale(value))
        return [self.graph.constant(scale, "scale"), self.graph.constant(np.uint8(value.coded.zero_point), "zero")]

    def _to_codes(self, real: str, name: str) -> None:
        given = [real, *self._coding(self.program.values[name])]
        self._codes[name] = self.graph.add("QuantizeLinear", given, name)

    def _times(self, real: str, factor: np.ndarray, value: Value, name: str) -> str:
        """A tensor times a factor for each channel, or the same one if these are all 1."""
        if (factor == 1).all():
            return real
        shaped = factor.astype(np.float32).reshape(-1, *[1] * (len(value.shape) - 1))
        return self.graph.add("Mul", [real, self.graph.constant(shaped, f"{name}/factor")], name)

    def _limited(self, real: str, step: Product | Add, value: Value) -> str:
        """Within the limits of a step, where these are narrower than what its codes can say."""
        rank = len(value.shape)
        low, high = np.full(1, step.low), np.full(1, step.high)
        if value.codes is not None:
            low, high, zero, scale = low / _unit(value), high / _unit(value), value.coded.zero_point, _scale(value)
            low[low <= -zero * scale] = -np.inf
            high[high >= (255 - zero) * scale] = np.inf
        if (low == 0).all() and (high == np.inf).all():
            return self.graph.add("Relu", [real], f"{step.output}/relu")
        for operator, limit in (("Max", low), ("Min", high)):
            if np.isfinite(limit).any():
                least = np.finfo(np.float32)
                shaped = limit.clip(least.min, least.max).astype(np.float32).reshape(-1, *[1] * (rank - 1))
                name = f"{step.output}/{operator.lower()}"
                if (limit == limit[0]).all():
                    given = [self.graph.constant(shaped.reshape(-1)[0], "limit"), ""][:: 1 if operator == "Max" else -1]
                    real = self.graph.add("Clip", [real, *given], name)
                else:
                    real = self.graph.add(operator, [real, self.graph.constant(shaped, "limit")], name)
        return real

    # ---- steps ----

    def _quantize(self, step: Quantize) -> None:
        value, name = self.program.values[step.output], step.output
        real = self._times(self.real(step.inputs[0]), 1 / _unit(value), value, f"{name}/scaled")
        if step.dynamic:
            real = self._over_token_scales(real, name, value)
        self._to_codes(real, name)

    def _over_token_scales(self, real: str, name: str, value: Value) -> str:
        """Tokens over scales of their own, which make the largest magnitude that of code 127."""
        g = self.graph
        largest = g.add("ReduceMax", [g.add("Abs", [real], f"{name}/abs"), g.constant(np.array([1]), "axes")],
                        f"{name}/largest", keepdims=1)  # fmt: skip
        scale = g.add("Div", [largest, g.constant(np.float32(127 * _scale(value)), "most")], f"{name}/scale")
        least = g.constant(np.float32(2.0**-111 / _scale(value)), "least")
        self._tokens[name] = g.add("Max", [scale, least], f"{name}/token_scale")
        return g.add("Div", [real, self._tokens[name]], f"{name}/token")

    def _dequantize(self, step: Dequantize) -> None:
        value = self.program.values[step.inputs[0]]
        real = self.real(step.inputs[0])
        if (_unit(value) == 1).all():
            self._real[step.output] = self.graph.add("Identity", [real], step.output)
        else:
            self._real[step.output] = self._times(real, _unit(value), value, step.output)

    def _product(self, step: Product) -> None:
        source, target = (self.program.values[name] for name in (step.inputs[0], step.output))
        tokens = self._tokens.get(step.inputs[0])
        bias = step.bias if tokens is None else torch.zeros_like(step.bias)
        given = [self.real(step.inputs[0]), *self._weight(step, bias, source, target)]
        real = self._sums(step, given, source)
        if tokens is not None:
            real = self.graph.add("Mul", [real, tokens], f"{step.output}/real")
            real = self.graph.add("Add", [real, self.graph.constant(_array(step.bias), "bias")], f"{step.output}/sum")
        if len(step.inputs) == 2:
            if self.coded_sums:
                real = self._coded_sum(real, step, target)
            real = self.graph.add("Add", [real, self._summand(step.inputs[1], target)], f"{step.output}/added")
        real = self._limited(real, step, target)
        if target.codes is not None:
            self._to_codes(real, step.output)
        else:
            self._real[step.output] = self.graph.add("Identity", [real], step.output)

    def _sums(self, step: Product, given: list[str], source: Value) -> str:
        """A product of input, weight and bias."""
        name = f"{step.output}/product"
        if len(source.shape) == 1 and step.groups == 1:
            return self.graph.add("Gemm", given, name, transB=1)
        top, bottom, left, right = step.window.padding
        window = {"kernel_shape": step.window.kernel, "strides": step.window.stride, "group": step.groups,
                  "pads": (top, left, bottom, right), "dilations": step.window.dilation}  # fmt: skip
        if len(source.shape) == 3:
            return self.graph.add("Conv", given, name, **window)
        shape = self.graph.constant(np.array([0, source.shape[0], 1, 1]), "shape")
        given = [self.graph.add("Reshape", [given[0], shape], f"{step.output}/image"), *given[1:]]
        pixel = self.graph.add("Conv", given, f"{step.output}/pixel", **window)
        return self.graph.add("Flatten", [pixel], name, axis=1)

    def _summand(self, name: str, target: Value) -> str:
        """A value as it is added to one whose channels may have other units."""
        value = self.program.values[name]
        return self._times(self.real(name), _unit(value) / _unit(target), value, f"{name}/added")

    def _coded_sum(self, real: str, step: Product, target: Value) -> str:
        """A product in 8 bits: from what gives the lowest code with the largest residual to the opposite."""
        other = self.program.values[step.inputs[1]]
        largest = _scale(other) * float((_unit(other) / _unit(target)).max())
        out, other_zero, scale = target.coded.zero_point, other.coded.zero_point, _scale(target)
        low = -out * scale - (255 - other_zero) * largest
        high = (255 - out) * scale + other_zero * largest
        step_size = (high - low) / 255
        zero = min(max(round(-low / step_size), 0), 255)
        given = [self.graph.constant(np.float32(step_size), "scale"), self.graph.constant(np.uint8(zero), "zero")]
        codes = self.graph.add("QuantizeLinear", [real, *given], f"{step.output}/sum_codes")
        return self.graph.add("DequantizeLinear", [codes, *given], f"{step.output}/sum_real")

    def _weight(self, step: Product, given_bias: Tensor, source: Value, target: Value) -> tuple[str, ...]:
        """Weight and bias, if there is one, as float tensors made of int8 and int32."""
        weight, window, g = step.weight, step.window, self.graph
        unit = np.ones(weight.rows) if target.codes is None else _unit(target)
        bias, real_scale = given_bias.double().numpy() / unit, weight.scale.double().numpy() / _scale(source) / unit
        dense = _array(weight.dense())
        # rows without weights have any scale, and biases, which engines round to theirs, need a fine one
        real_scale[~dense.any(axis=1)] = 0.0
        # sums of products are added to biases in 32 bits: of a row with a far larger one, codes become smaller
        scale = np.maximum(np.abs(real_scale), np.abs(bias) / _scale(source) / (1 << 30))
        scale = np.where(scale < _SMALLEST, 1.0, scale).astype(np.float32)
        codes = np.rint(dense * (real_scale / scale)[:, None]).astype(np.int8)
        if len(source.shape) == 3 or step.groups > 1:
            codes = codes.reshape(weight.rows, -1, *window.kernel)
        name = step.output
        given = [g.constant(codes, f"{name}/weight"), g.constant(scale, f"{name}/weight_scale"),
                 g.constant(np.zeros(weight.rows, np.int8), "zeros")]  # fmt: skip
        real = g.add("DequantizeLinear", given, f"{name}/weight_real", axis=0)
        if not bias.any():
            return (real,)
        unit_of_sums = np.float32(_scale(source)) * scale
        rounded = np.rint(bias / unit_of_sums.astype(np.float64))
        if target.codes is not None and (unit_of_sums > _scale(target) / 16)[bias != 0].any():
            # rounded, it would be another code of the output
            return real, g.constant(bias.astype(np.float32), f"{name}/bias")
        given = [g.constant(rounded.astype(np.int32), f"{name}/bias"), g.constant(unit_of_sums, f"{name}/bias_scale"),
                 g.constant(np.zeros(weight.rows, np.int32), "zeros")]  # fmt: skip
        return real, g.add("DequantizeLinear", given, f"{name}/bias_real", axis=0)

    def _pool(self, step: Pool) -> None:
        source, target = (self.program.values[name] for name in (step.inputs[0], step.output))
        window, real = step.window, self.real(step.inputs[0])
        top, bottom, left, right = window.padding
        wide = max(top, bottom) >= window.kernel[0] or max(left, right) >= window.kernel[1]
        if wide:  # more than engines take
            real = self._padded(step, real, source)
            top = bottom = left = right = 0
        given = {"kernel_shape": window.kernel, "strides": window.stride, "pads": (top, left, bottom, right)}
        name = f"{step.output}/pooled"
        if step.kind == "max":
            real = self.graph.add("MaxPool", [real], name, dilations=window.dilation, **given)
        elif window.dilation != (1, 1):
            raise ConfigurationError(f"step {step.output!r}: means over windows with dilation are not translated to "
                                     "ONNX")  # fmt: skip
        elif window.kernel == source.image and not any(window.padding):
            real = self.graph.add("GlobalAveragePool", [real], name)
        else:
            real = self.graph.add("AveragePool", [real], name, count_include_pad=int(step.count_padding), **given)
        factor = _unit(source) / _unit(target)
        self._to_codes(self._times(real, factor, target, f"{step.output}/scaled"), step.output)

    def _padded(self, step: Pool, real: str, source: Value) -> str:
        if step.kind == "mean" and not step.count_padding:
            raise ConfigurationError(f"step {step.output!r}: means over windows with more padding than pixels, which "
                                     "does not count, are not translated to ONNX")  # fmt: skip
        top, bottom, left, right = step.window.padding
        # what the smallest code means is never larger than anything
        value = -source.coded.zero_point * _scale(source) if step.kind == "max" else 0.0
        pads = self.graph.constant(np.array([0, 0, top, left, 0, 0, bottom, right]), "pads")
        given = [real, pads, self.graph.constant(np.float32(value), "padding")]
        return self.graph.add("Pad", given, f"{step.output}/padded")

    def _table(self, step: Table) -> None:
        index = self.graph.add("Cast", [self._codes[step.inputs[0]]], f"{step.output}/index", to=6)  # int32
        if step.table.ndim == 2:
            rank = len(self.program.values[step.output].shape)
            first = np.arange(step.table.shape[0], dtype=np.int32).reshape(-1, *[1] * (rank - 1)) * np.int32(256)
            index = self.graph.add("Add", [index, self.graph.constant(first, "first")], f"{step.output}/place")
        table = self.graph.constant(_array(step.table.reshape(-1)), f"{step.output}/table")
        self._codes[step.output] = self.graph.add("Gather", [table, index], step.output)

    def _add(self, step: Add) -> None:
        target = self.program.values[step.output]
        real = self.graph.add("Add", [self._summand(name, target) for name in step.inputs], f"{step.output}/sum")
        self._to_codes(self._limited(real, step, target), step.output)

    def _concat(self, step: Concat) -> None:
        values = [self.program.values[name] for name in (*step.inputs, step.output)]
        if all((_unit(v) == 1).all() and _scale(v) == _scale(values[-1]) for v in values):
            real = self.graph.add("Concat", [self.real(name) for name in step.inputs], f"{step.output}/all", axis=1)
            self._to_codes(real, step.output)
        else:
            codes = [self._codes[name] for name in step.inputs]
            self._codes[step.output] = self.graph.add("Concat", codes, step.output, axis=1)

    def _flatten(self, step: Flatten) -> None:
        if (_unit(self.program.values[step.output]) == 1).all():
            real = self.graph.add("Flatten", [self.real(step.inputs[0])], f"{step.output}/flat", axis=1)
            self._to_codes(real, step.output)
        else:
            self._codes[step.output] = self.graph.add("Flatten", [self._codes[step.inputs[0]]], step.output, axis=1)


def _scale(value: Value) -> float:
    """The scale that nodes have for a value: its own, or 1 where channels have others."""
    scale = value.coded.scale
    return float(scale[0]) if bool((scale == scale[0]).all()) else 1.0


def _unit(value: Value) -> np.ndarray:
    """How much larger each channel is than what nodes compute; ones where they compute the value."""
    scale = value.coded.scale
    if bool((scale == scale[0]).all()):
        return np.ones(scale.shape[0])
    found: np.ndarray = scale.double().numpy()
    return found


def _constant(tensor: Any, name: str) -> np.ndarray:
    if not isinstance(tensor, Tensor):
        return np.array(tensor)
    if tensor.dtype is torch.bfloat16 or tensor.is_complex():
        raise ConfigurationError(f"the constant {name!r} is of {tensor.dtype}, which is not translated to ONNX")
    return _array(tensor)


_STEPS: dict[type[Step], Callable[[_Export, Any], None]] = {
    Quantize: _Export._quantize,
    Dequantize: _Export._dequantize,
    Product: _Export._product,
    Pool: _Export._pool,
    Table: _Export._table,
    Add: _Export._add,
    Concat: _Export._concat,
    Flatten: _Export._flatten,
}
