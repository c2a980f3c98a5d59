"""Operators of torch on single elements as nodes of ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from qsparseprop.inference.calls import Name
from qsparseprop.inference.onnx_arguments import Arguments

__all__ = ["ELEMENTWISE"]

Translation = Callable[[Arguments], str]

#: One node each.
_UNARY = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "log": "Log", "sqrt": "Sqrt",
          "abs": "Abs", "neg": "Neg", "erf": "Erf", "floor": "Floor", "ceil": "Ceil", "reciprocal": "Reciprocal",
          "sin": "Sin", "cos": "Cos", "tan": "Tan", "hardswish": "HardSwish", "mish": "Mish", "round": "Round",
          "sign": "Sign", "sgn": "Sign", "atan": "Atan", "asin": "Asin", "acos": "Acos", "sinh": "Sinh",
          "cosh": "Cosh", "softsign": "Softsign", "clone": "Identity", "detach": "Identity", "alias": "Identity",
          "contiguous": "Identity", "lift_fresh_copy": "Identity", "positive": "Identity", "type_as": "Identity",
          "_to_copy": "Identity", "to": "Identity"}  # fmt: skip
_BINARY = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "maximum": "Max", "minimum": "Min", "pow": "Pow",
           "multiply": "Mul", "subtract": "Sub", "true_divide": "Div"}  # fmt: skip
#: A node, and whether its opposite is meant.
_COMPARISONS = {"eq": ("Equal", False), "ne": ("Equal", True), "lt": ("Less", False), "le": ("LessOrEqual", False),
                "gt": ("Greater", False), "ge": ("GreaterOrEqual", False)}  # fmt: skip
#: Nodes for values that are true or false, and for whole numbers.
_BITWISE = {"bitwise_and": ("And", "BitwiseAnd"), "bitwise_or": ("Or", "BitwiseOr"),
            "bitwise_xor": ("Xor", "BitwiseXor"), "bitwise_not": ("Not", "BitwiseNot")}  # fmt: skip
_LOGICAL = {"logical_and": "And", "logical_or": "Or", "logical_xor": "Xor"}


def _unary(operator: str) -> Translation:
    def translate(call: Arguments) -> str:
        if call.step.operator.startswith(("aten._to_copy", "aten.to.", "aten.type_as")):
            call.ignore(*call.names)
            if call.dtype in (torch.float16, torch.bfloat16, torch.float64):
                raise call.refused(f"to {call.dtype} is not translated to ONNX")
        return call.add(operator, [call.tensor(0, call.dtype)])

    return translate


def _binary(operator: str, turned: bool = False) -> Translation:
    def translate(call: Arguments) -> str:
        one, other = call.tensor(0, call.dtype), call.tensor(1, call.dtype)
        if call.has("alpha") and call.get("alpha") != 1:
            scaled = call.op("Mul", one if turned else other, call.get("alpha"))
            one, other = (scaled, other) if turned else (one, scaled)
        return call.add(operator, [other, one] if turned else [one, other])

    return translate


def _comparison(operator: str, opposite: bool) -> Translation:
    def translate(call: Arguments) -> str:
        operands = [call.sizes.meta(x.name) if isinstance(x, Name) else x for x in (call.get(0), call.get(1))]
        common = torch.result_type(*operands)
        found = call.add(operator, [call.tensor(0, common), call.tensor(1, common)])
        return call.add("Not", [found]) if opposite else found

    return translate


def _logical(operator: str) -> Translation:
    return lambda call: call.add(operator, [call.tensor(0, torch.bool), call.tensor(1, torch.bool)])


def _bitwise(of_truths: str, of_numbers: str) -> Translation:
    def translate(call: Arguments) -> str:
        operator = of_truths if call.dtype is torch.bool else of_numbers
        return call.add(operator, [call.tensor(place, call.dtype) for place in range(len(call.names))])

    return translate


def _composed(build: Callable[[Arguments, str], str]) -> Translation:
    """Of one tensor, by several nodes."""
    return lambda call: build(call, call.tensor(0, call.dtype))


def _clamp(call: Arguments) -> str:
    x = call.tensor(0, call.dtype)
    name = call.step.operator.split(".")[1]
    low: Any = 0 if name == "relu6" else call.get(1)
    high: Any = 6 if name == "relu6" else call.get(2) if len(call.names) > 2 else None
    if name == "clamp_max":
        low, high = None, low
    # Clip with one limit makes finite numbers of infinity
    if isinstance(low, Name) or isinstance(high, Name) or low is None or high is None:
        x = x if low is None else call.add("Max", [x, call.given(low, call.dtype)])
        return x if high is None else call.add("Min", [x, call.given(high, call.dtype)])
    return call.add("Clip", [x, *("" if v is None else call.given(v, call.dtype) for v in (low, high))])


def _gelu(call: Arguments, x: str) -> str:
    if call.get("approximate") == "tanh":
        cube = call.op("Mul", x, call.op("Mul", x, x))
        inner = call.op("Add", x, call.op("Mul", cube, 0.044715))
        inner = call.op("Tanh", call.op("Mul", inner, math.sqrt(2 / math.pi)))
    else:
        inner = call.op("Erf", call.op("Mul", x, math.sqrt(0.5)))
    return call.op("Mul", call.op("Mul", x, call.op("Add", inner, 1)), 0.5)


def _elu(call: Arguments, x: str) -> str:
    alpha, scale, inside = (float(call.get(n)) for n in ("alpha", "scale", "input_scale"))
    if (scale, inside) != (1.0, 1.0):
        raise call.refused("with a scale is not translated to ONNX")
    return call.add("Elu", [x], alpha=alpha)


def _softplus(call: Arguments, x: str) -> str:
    beta = float(call.get("beta"))
    if call.get("threshold") < 17 or beta <= 0:  # from where on floats tell no difference
        raise call.refused(f"with a threshold of {call.get('threshold')} is not translated to ONNX")
    if beta == 1:
        return call.add("Softplus", [x])
    return call.op("Div", call.add("Softplus", [call.op("Mul", x, beta)]), beta)


def _prelu(call: Arguments, x: str) -> str:
    rank = call.rank(0)
    slope = call.reshaped(call.tensor(1), [call.fixed(1, 0), *[1] * max(0, rank - 2)])
    return call.add("PRelu", [x, slope])


def _hardshrink(call: Arguments, x: str) -> str:
    limit = float(call.get("lambd"))
    return call.op("Where", call.op("LessOrEqual", call.op("Abs", x), limit), 0.0, x)


def _softshrink(call: Arguments, x: str) -> str:
    limit = float(call.get("lambd"))
    return call.op("Sub", x, call.op("Clip", x, -limit, limit))


def _threshold(call: Arguments, x: str) -> str:
    return call.op("Where", call.op("LessOrEqual", x, float(call.get(1))), float(call.get(2)), x)


def _where(call: Arguments) -> str:
    if not call.has("self"):
        raise call.refused("of one argument is not translated to ONNX")
    condition = call.tensor("condition", torch.bool)
    return call.add("Where", [condition, call.tensor("self", call.dtype), call.tensor("other", call.dtype)])


def _masked_fill(call: Arguments) -> str:
    value = call.tensor("value", call.dtype)
    return call.add("Where", [call.tensor("mask", torch.bool), value, call.tensor(0, call.dtype)])


def _glu(call: Arguments) -> str:
    dim = call.dim("dim")
    half = call.fixed(0, dim) // 2
    one, other = call.export.graph.add_all("Split", [call.tensor(0), call.ints([half, half])],
                                           [f"{call.step.output}/half"] * 2, axis=dim)  # fmt: skip
    return call.add("Mul", [one, call.add("Sigmoid", [other])])


def _dropout(call: Arguments) -> str:
    call.ignore("p")
    if call.get("train"):
        raise call.refused("in training is not translated to ONNX")
    return call.add("Identity", [call.tensor(0)])


ELEMENTWISE: dict[str, Translation] = {
    **{name: _unary(operator) for name, operator in _UNARY.items()},
    **{name: _binary(operator) for name, operator in _BINARY.items()},
    **{name: _comparison(*which) for name, which in _COMPARISONS.items()},
    **{name: _logical(operator) for name, operator in _LOGICAL.items()},
    **{name: _bitwise(*which) for name, which in _BITWISE.items()},
    **dict.fromkeys(("clamp", "clamp_min", "clamp_max", "hardtanh", "relu6"), _clamp),
    "rsub": _binary("Sub", turned=True),
    "logical_not": lambda call: call.add("Not", [call.tensor(0, torch.bool)]),
    "isnan": lambda call: call.add("IsNaN", [call.tensor(0)]),
    "rsqrt": _composed(lambda call, x: call.op("Reciprocal", call.op("Sqrt", x))),
    "square": _composed(lambda call, x: call.op("Mul", x, x)),
    "exp2": _composed(lambda call, x: call.add("Pow", [call.constant(torch.tensor(2.0).numpy()), x])),
    "log2": _composed(lambda call, x: call.op("Div", call.op("Log", x), math.log(2))),
    "log10": _composed(lambda call, x: call.op("Div", call.op("Log", x), math.log(10))),
    "log_sigmoid": _composed(lambda call, x: call.op("Neg", call.op("Softplus", call.op("Neg", x)))),
    "gelu": _composed(_gelu),
    "silu": _composed(lambda call, x: call.op("Mul", x, call.op("Sigmoid", x))),
    "hardsigmoid": _composed(lambda call, x: call.add("HardSigmoid", [x], alpha=1 / 6, beta=0.5)),
    "leaky_relu": _composed(lambda call, x: call.add("LeakyRelu", [x], alpha=float(call.get("negative_slope")))),
    "elu": _composed(_elu),
    "selu": _composed(lambda call, x: call.add("Selu", [x])),
    "celu": _composed(lambda call, x: call.add("Celu", [x], alpha=float(call.get("alpha")))),
    "softplus": _composed(_softplus),
    "prelu": _composed(_prelu),
    "softshrink": _composed(_softshrink),
    "hardshrink": _composed(_hardshrink),
    "threshold": _composed(_threshold),
    "where": _where,
    "masked_fill": _masked_fill,
    "glu": _glu,
    "dropout": _dropout,
}
