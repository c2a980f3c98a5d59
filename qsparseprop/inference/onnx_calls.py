"""Operators of torch, which programs call on ordinary tensors, as nodes of ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import TensorProto

from qsparseprop.inference.calls import Name, find_operator
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Call
from qsparseprop.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from qsparseprop.inference.onnx import _Export

__all__ = ["export_call", "input_dtype"]

_UNARY = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
          "abs": "Abs", "neg": "Neg", "erf": "Erf", "floor": "Floor", "ceil": "Ceil", "reciprocal": "Reciprocal",
          "sin": "Sin", "cos": "Cos", "softplus": "Softplus", "hardswish": "HardSwish", "clone": "Identity",
          "detach": "Identity", "alias": "Identity", "contiguous": "Identity", "mish": "Mish"}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "pow": "Pow",
           "matmul": "MatMul", "bmm": "MatMul", "mm": "MatMul"}  # fmt: skip


def input_dtype(program: Program, name: str) -> int:
    """What an input's elements are: whole numbers where they choose rows of a table, floats otherwise.

    Parameters
    ----------
    program : Program
    name : str

    Returns
    -------
    int
        Of onnx.TensorProto.
    """
    for step in program.users(name):
        if isinstance(step, Call) and step.operator == "aten.embedding.default" and step.arguments[1] == Name(name):
            return int(TensorProto.INT64)
    return int(TensorProto.FLOAT)


def export_call(export: _Export, step: Call) -> str:
    """Translate a call.

    Parameters
    ----------
    export : _Export
    step : Call

    Returns
    -------
    str
        The tensor that it gives.

    Raises
    ------
    ConfigurationError
        If it is not translated, with its name.
    """
    call = _Arguments(export, step)
    name = step.operator.split(".")[1] if step.operator.count(".") == 2 else step.operator
    if name in _CALLS:
        found = _CALLS[name](call)
    elif name in _UNARY:
        found = call.add(_UNARY[name], [call.tensor(0)])
    elif name in _BINARY:
        found = _binary(call, _BINARY[name])
    else:
        raise call.refused("is not translated to ONNX")
    call.close()
    return export.graph.add("Identity", [found], step.output)


class _Arguments:
    """The arguments of a call, by place or by name; those that nobody asks for must have their defaults."""

    def __init__(self, export: _Export, step: Call) -> None:
        self.export, self.step = export, step
        schema = find_operator(step.operator)._schema if step.operator != "getitem" else None
        if schema is None:
            raise self.refused("is not translated to ONNX")
        names = [argument.name for argument in schema.arguments]
        self.names = names
        self._given = {**dict(zip(names, step.arguments, strict=False)), **step.keywords}
        self._defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self._asked: set[str] = set()

    def refused(self, reason: str) -> ConfigurationError:
        return ConfigurationError(f"{self.step.operator}, of step {self.step.output!r}, {reason}")

    def get(self, place: int | str) -> Any:
        """An argument as it was given."""
        name = self.names[place] if isinstance(place, int) else place
        self._asked.add(name)
        return self._given.get(name, self._defaults.get(name))

    def has(self, name: str) -> bool:
        return name in self.names

    def tensor(self, place: int | str, dtype: Any = np.float32) -> str:
        """An argument as a tensor, numbers included."""
        found = self.get(place)
        if isinstance(found, Name):
            return self.export.real(found.name)
        if isinstance(found, bool | int | float):
            return self.constant(np.array(found, dtype))
        raise self.refused(f"with {found!r} is not translated to ONNX")

    def constant(self, value: Any) -> str:
        return self.export.graph.constant(np.asarray(value), f"{self.step.output}/constant")

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        return self.export.graph.add(operator, inputs, f"{self.step.output}/{operator.lower()}", **attributes)

    def rank(self, place: int | str) -> int:
        """Dimensions of a tensor, the batch included."""
        name = self.get(place).name
        constant = self.export.program.constants.get(name)
        return constant.ndim if constant is not None else len(self.export.program.values[name].shape) + 1

    def close(self) -> None:
        """Refuse arguments that were not looked at and change something."""
        for name, value in self._given.items():
            known = name in self._asked or value == self._defaults.get(name)
            harmless = name in ("device", "layout", "pin_memory", "memory_format")
            if not known and not harmless and not (name == "dtype" and value is torch.float32):
                raise self.refused(f"with {name}={value!r} is not translated to ONNX")


def _binary(call: _Arguments, operator: str) -> str:
    one, other = call.tensor(0), call.tensor(1)
    if call.has("alpha") and call.get("alpha") != 1:
        other = call.add("Mul", [other, call.constant(np.float32(call.get("alpha")))])
    return call.add(operator, [one, other])


def _softmax(call: _Arguments, operator: str = "Softmax") -> str:
    if call.has("half_to_float"):
        call.get("half_to_float")
    return call.add(operator, [call.tensor(0)], axis=call.get("dim"))


def _flatten(call: _Arguments) -> str:
    if (call.get("start_dim"), call.get("end_dim")) not in ((1, -1), (1, call.rank(0) - 1)):
        raise call.refused("of other dimensions than all behind the batch is not translated to ONNX")
    return call.add("Flatten", [call.tensor(0)], axis=1)


def _reshape(call: _Arguments) -> str:
    sizes = call.get(1)
    if not all(isinstance(size, int) for size in sizes):
        raise call.refused("to sizes that are computed is not translated to ONNX")
    return call.add("Reshape", [call.tensor(0), call.constant(np.array(sizes, np.int64))])


def _permute(call: _Arguments) -> str:
    rank = call.rank(0)
    return call.add("Transpose", [call.tensor(0)], perm=[d % rank for d in call.get(1)])


def _transpose(call: _Arguments) -> str:
    order = list(range(call.rank(0)))
    one, other = call.get(1), call.get(2)
    order[one], order[other] = order[other], order[one]
    return call.add("Transpose", [call.tensor(0)], perm=order)


def _axes(dims: int | Sequence[int]) -> np.ndarray:
    return np.array([dims] if isinstance(dims, int) else list(dims), np.int64)


def _mean(call: _Arguments) -> str:
    return call.add("ReduceMean", [call.tensor(0), call.constant(_axes(call.get("dim")))],
                    keepdims=int(call.get("keepdim")))  # fmt: skip


def _unsqueeze(call: _Arguments) -> str:
    return call.add("Unsqueeze", [call.tensor(0), call.constant(_axes(call.get(1)))])


def _cat(call: _Arguments) -> str:
    return call.add("Concat", [call.export.real(each.name) for each in call.get(0)], axis=call.get("dim"))


def _linear(call: _Arguments) -> str:
    turned = call.add("Transpose", [call.tensor(1)], perm=[1, 0])
    out = call.add("MatMul", [call.tensor(0), turned])
    return out if call.get("bias") is None else call.add("Add", [out, call.tensor("bias")])


def _conv2d(call: _Arguments) -> str:
    padding = call.get("padding")
    if isinstance(padding, str):
        raise call.refused(f"with padding={padding!r} is not translated to ONNX")
    bias = [] if call.get("bias") is None else [call.tensor("bias")]
    pads = [padding] * 2 if isinstance(padding, int) else list(padding) * (2 // len(padding))
    strides, dilations = (list(call.get(n)) * (2 // len(call.get(n))) for n in ("stride", "dilation"))
    return call.add("Conv", [call.tensor(0), call.tensor(1), *bias], pads=pads * 2, strides=strides,
                    dilations=dilations, group=call.get("groups"))  # fmt: skip


def _layer_norm(call: _Arguments) -> str:
    shape = call.get("normalized_shape")
    call.get("cudnn_enable")
    weight = call.constant(np.ones(shape, np.float32)) if call.get("weight") is None else call.tensor("weight")
    bias = [] if call.get("bias") is None else [call.tensor("bias")]
    return call.add("LayerNormalization", [call.tensor(0), weight, *bias], axis=-len(shape), epsilon=call.get("eps"))


def _batch_norm(call: _Arguments) -> str:
    for name in ("momentum", "cudnn_enabled"):
        call.get(name)
    if call.get("weight") is None or call.get("bias") is None or call.get("training"):
        raise call.refused("without weight and bias, or in training, is not translated to ONNX")
    names = ("weight", "bias", "running_mean", "running_var")
    return call.add("BatchNormalization", [call.tensor(0), *map(call.tensor, names)], epsilon=call.get("eps"))


def _clip(call: _Arguments) -> str:
    low, high = (call.get(1), call.get(2))
    limits = ["" if v is None else call.constant(np.float32(v)) for v in (low, high)]
    return call.add("Clip", [call.tensor(0), *limits])


def _gelu(call: _Arguments) -> str:
    x = call.tensor(0)
    if call.get("approximate") == "tanh":
        cube = call.add("Mul", [x, call.add("Mul", [x, x])])
        inner = call.add("Add", [x, call.add("Mul", [cube, call.constant(np.float32(0.044715))])])
        inner = call.add("Tanh", [call.add("Mul", [inner, call.constant(np.float32(math.sqrt(2 / math.pi)))])])
    else:
        inner = call.add("Erf", [call.add("Mul", [x, call.constant(np.float32(math.sqrt(0.5)))])])
    factor = call.add("Add", [inner, call.constant(np.float32(1))])
    return call.add("Mul", [call.add("Mul", [x, factor]), call.constant(np.float32(0.5))])


def _silu(call: _Arguments) -> str:
    x = call.tensor(0)
    return call.add("Mul", [x, call.add("Sigmoid", [x])])


def _hardsigmoid(call: _Arguments) -> str:
    return call.add("HardSigmoid", [call.tensor(0)], alpha=1 / 6, beta=0.5)


def _leaky_relu(call: _Arguments) -> str:
    return call.add("LeakyRelu", [call.tensor(0)], alpha=float(call.get("negative_slope")))


def _embedding(call: _Arguments) -> str:
    for name in ("padding_idx", "scale_grad_by_freq", "sparse"):
        call.get(name)
    return call.add("Gather", [call.tensor(0), call.tensor(1)], axis=0)


def _global_pool(call: _Arguments) -> str:
    if any(size != 1 for size in call.get("output_size")):
        raise call.refused("to more than one pixel is not translated to ONNX")
    return call.add("GlobalAveragePool", [call.tensor(0)])


_CALLS: dict[str, Callable[[_Arguments], str]] = {
    "softmax": _softmax, "_softmax": _softmax, "log_softmax": lambda call: _softmax(call, "LogSoftmax"),
    "_log_softmax": lambda call: _softmax(call, "LogSoftmax"), "flatten": _flatten, "reshape": _reshape, "view":
    _reshape, "_unsafe_view": _reshape, "permute": _permute, "transpose": _transpose, "mean": _mean, "cat": _cat,
    "unsqueeze": _unsqueeze, "linear": _linear, "conv2d": _conv2d, "layer_norm": _layer_norm, "batch_norm":
    _batch_norm, "clamp": _clip, "hardtanh": _clip, "gelu": _gelu, "silu": _silu, "hardsigmoid": _hardsigmoid,
    "leaky_relu": _leaky_relu, "embedding": _embedding, "adaptive_avg_pool2d": _global_pool,
}  # fmt: skip
