"""Operators of torch in ONNX files, on floats: what ONNX Runtime computes of each, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from qsparseprop.inference.calls import Name
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import run_reference
from qsparseprop.inference.steps import Call, Value
from qsparseprop.utils.errors import ConfigurationError

from ._frozen import data

onnx = pytest.importorskip("onnx", reason="ONNX files are written by onnx")
runtime = pytest.importorskip("onnxruntime", reason="ONNX files are read by ONNX Runtime")

from qsparseprop.inference.onnx import onnx_model  # noqa: E402

#: Inputs by name; others are constants.
SHAPES = {"x": (4, 6, 6), "y": (4, 6, 6), "line": (4, 7), "volume": (2, 4, 5, 6), "tokens": (5, 8), "row": (6,),
          "batch": (6, 6), "single": (1, 6), "thin": (4, 1, 9)}
CONSTANTS = {
    "w": data(4, 3, 3, 3, seed=2), "w1": data(4, 3, 3, seed=2), "w3": data(2, 3, 2, 3, 2, seed=2),
    "b3": data(3, seed=3), "b4": data(4, seed=3), "c": data(4, 4, 3, 3, seed=4), "c3": data(4, 2, 3, 3, 3, seed=4),
    "c1": data(4, 4, 3, seed=4), "slope": data(4, seed=5), "one": data(1, seed=5), "square": data(6, 6, seed=6),
    "mask": data(6, 6, seed=7) > 0, "see": (data(5, 5, seed=8) > 0).logical_and(torch.arange(5)[:, None] != 2),
    "bias": data(5, 5, seed=9), "places": torch.tensor([3, 0, 1, 3]), "matrix": data(8, 3, seed=10),
    "number": torch.tensor(0.25), "positive": data(4, seed=11).abs() + 0.5, "eight": data(8, seed=12),
}  # fmt: skip


def program_of(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any], item: int | None) -> Program:
    """One call on inputs and constants that are named among its arguments."""
    used: list[str] = []

    def resolved(argument: Any) -> Any:
        if isinstance(argument, str) and (argument in SHAPES or argument in CONSTANTS):
            used.append(argument)
            return Name(argument)
        return [resolved(each) for each in argument] if isinstance(argument, list) else argument

    arguments = tuple(resolved(argument) for argument in arguments)
    keywords = {key: resolved(value) if key != "mode" else value for key, value in keywords.items()}
    names = tuple(dict.fromkeys(used))
    name = operator if operator == "getitem" else f"aten.{operator}"
    steps = [Call(names, "found", name, arguments, keywords)]
    if item is not None:
        steps.append(Call(("found",), "item", "getitem", (Name("found"), item)))
    inputs = tuple(name for name in names if name in SHAPES)
    values = {name: Value(SHAPES[name]) for name in inputs} | {step.output: Value((-1,)) for step in steps}
    constants = {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    return Program(inputs, (steps[-1].output,), values, tuple(steps), constants)


def run_onnx(model: Any, program: Program, inputs: list[Tensor]) -> list[Tensor]:
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {name: x.numpy() for name, x in zip(program.inputs, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, given)]


def check(program: Program) -> None:
    """ONNX Runtime computes what torch does, for several sizes of the batch."""
    model = onnx_model(program)
    for batch in (3, 1):
        inputs = [data(batch, *SHAPES[name], seed=number) for number, name in enumerate(program.inputs)]
        [found], [wanted] = run_onnx(model, program, inputs), run_reference(program, *inputs)
        assert found.dtype is wanted.dtype
        assert found.shape == wanted.shape
        if wanted.is_floating_point():
            assert torch.allclose(found, wanted, rtol=2e-5, atol=2e-6, equal_nan=True)
        else:
            assert torch.equal(found, wanted)


def case(operator: str, *arguments: Any, item: int | None = None, **keywords: Any) -> tuple[Any, ...]:
    return operator, arguments, keywords, item


ELEMENTS = [
    *(case(f"{name}.default", "x") for name in (
        "abs", "ceil", "cos", "elu", "erf", "exp", "exp2", "floor", "gelu", "hardshrink", "hardsigmoid", "hardswish",
        "hardtanh", "isnan", "leaky_relu", "log_sigmoid", "mish", "neg", "reciprocal", "relu", "relu6", "round", "selu",
        "celu", "sigmoid", "sign", "silu", "sin", "softplus", "softshrink", "sqrt", "rsqrt", "square", "tan", "tanh",
        "sinh", "cosh", "atan", "log", "log2", "log10", "logical_not")),
    case("elu.default", "x", 0.5), case("celu.default", "x", 0.7), case("softplus.default", "x", 2.0, 30.0),
    case("hardtanh.default", "x", -0.3, 0.8), case("leaky_relu.default", "x", 0.3),
    case("softshrink.default", "x", 0.2),
    case("threshold.default", "x", 0.1, -3.0), case("clamp.default", "x", -0.5), case("clamp.default", "x", None, 0.5),
    case("clamp_min.default", "x", 0.1), case("clamp_max.default", "x", 0.1), case("clamp.Tensor", "x", "y"),
    case("prelu.default", "x", "slope"), case("prelu.default", "x", "one"), case("prelu.default", "row", "one"),
    case("gelu.default", "x", approximate="tanh"), case("glu.default", "x", -1), case("glu.default", "x", 1),
    case("pow.Tensor_Scalar", "x", 2), case("pow.Tensor_Scalar", "x", -1.5), case("pow.Scalar", 2.0, "x"),
    case("pow.Tensor_Tensor", "x", "y"), case("rsub.Scalar", "x", 1.0, 2), case("rsub.Tensor", "x", "y", alpha=3),
    case("add.Tensor", "x", "y", alpha=2), case("sub.Tensor", "x", "square"), case("div.Tensor", "places", 2),
    case("mul.Tensor", "x", "mask"), case("add.Tensor", "places", 1.5), case("maximum.default", "x", "y"),
    *(case(f"{name}.Tensor", "x", "square") for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(case(f"{name}.Scalar", "x", 0) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    case("bitwise_not.default", "mask"), case("bitwise_and.Tensor", "mask", "mask"),
    case("bitwise_or.Tensor", "places", "places"), case("eq.Scalar", "mask", 0),
    case("logical_and.default", "x", "mask"), case("logical_xor.default", "x", "mask"),
    case("where.self", "mask", "x", "y"), case("where.ScalarOther", "mask", "x", -math.inf),
    case("where.ScalarSelf", "mask", 1.5, "x"), case("masked_fill.Scalar", "x", "mask", -math.inf),
    case("masked_fill.Tensor", "x", "mask", "number"), case("dropout.default", "x", 0.5, False),
    case("_to_copy.default", "x", dtype=torch.int64), case("type_as.default", "x", "mask"),
]  # fmt: skip
MOVED = [
    case("squeeze.dim", "x", 1), case("squeeze.dims", "single", [1, 2]), case("squeeze.dim", "single", -2),
    case("unsqueeze.default", "x", -1),
    case("unsqueeze.default", "x", 0), case("flatten.using_ints", "x", 0), case("flatten.using_ints", "x", -2),
    case("reshape.default", "x", [-1, 3, 48]), case("unflatten.int", "x", 1, [2, -1]), case("view.default", "x", [-1]),
    case("permute.default", "x", [0, -1, 1, 2]), case("transpose.int", "x", -1, 1), case("t.default", "row"),
    case("movedim.intlist", "x", [-1], [1]), case("movedim.int", "x", 1, 2), case("select.int", "x", 1, -2),
    case("select.int", "x", -1, 3), case("slice.Tensor", "x", 1, 1, 3), case("slice.Tensor", "x", -1, -3, -1),
    case("slice.Tensor", "x", 2, None, None, 2), case("slice.Tensor", "x", 3, 1, 100, 3), case("slice.Tensor", "x"),
    case("slice.Tensor", "x", 2, -100, 2), case("narrow.default", "x", 2, -3, 2), case("narrow.default", "x", -1, 1, 4),
    case("split.Tensor", "x", 4, 2, item=1), case("split.Tensor", "x", 4, -1, item=0),
    case("split_with_sizes.default", "x", [1, 3], 1, item=1), case("chunk.default", "x", 4, -1, item=2),
    case("unbind.int", "x", 1, item=3), case("tensor_split.sections", "x", 4, 2, item=0),
    case("flip.default", "x", [1, -1]), case("roll.default", "x", [1, -2], [2, 3]), case("roll.default", "x", [9], [1]),
    case("cat.default", ["x", "y"], -3), case("stack.default", ["x", "y"], 1), case("stack.default", ["x", "y"], -1),
    case("expand.default", "square", [2, 6, 6]), case("expand.default", "row", [4, -1, 6]),
    case("expand_as.default", "row", "row"), case("repeat.default", "x", [1, 2, 1, 3]), case("tile.default", "x", [2]),
    case("repeat.default", "x", [2, 1, 1, 1, 2]), case("tril.default", "x", -1), case("triu.default", "x", 1),
    case("index_select.default", "x", 1, "places"), case("index.Tensor", "x", [None, None, "places"]),
    case("pad.default", "x", [1, 2, 0, 1]), case("pad.default", "x", [1, 2], "constant", 0.5),
    case("pad.default", "x", [1, 2, 2, 1], "reflect"), case("pad.default", "x", [1, 2, 2, 1], "replicate"),
    case("constant_pad_nd.default", "x", [0, 1, 1, 0], -math.inf), case("reflection_pad1d.default", "line", [2, 1]),
    case("replication_pad2d.default", "x", [1, 0, 0, 1]), case("zeros_like.default", "x"),
    case("full_like.default", "x", 2.5), case("pixel_shuffle.default", "x", 2), case("alias.default", "x"),
]  # fmt: skip
REDUCED = [
    *(case(f"{name}.dim", "x", [1, -1], keep) for name in ("mean",) for keep in (False, True)),
    case("mean.default", "x"), case("sum.default", "x"), case("sum.dim_IntList", "x", [0]), case("sum.default", "mask"),
    case("sum.dim_IntList", "x", None, True), case("amax.default", "x", [-1], True), case("amin.default", "x", [1, 2]),
    case("amax.default", "x"), case("max.default", "x"), case("max.dim", "x", 1, item=0), case("prod.dim_int", "x", 2),
    case("max.dim", "x", -1, True, item=1), case("min.dim", "x", 2, item=1), case("argmax.default", "x"),
    case("argmax.default", "x", 1), case("argmin.default", "x", -1, True), case("any.dim", "mask", 1),
    case("all.default", "mask"), case("var.correction", "x", [2, 3], correction=1), case("var.dim", "x", [1], False),
    case("std.correction", "x", [1], keepdim=True), case("linalg_vector_norm.default", "x", 2, [1], True),
    case("linalg_vector_norm.default", "x", math.inf), case("linalg_vector_norm.default", "x", 1, [-1]),
    case("cumsum.default", "x", 1), case("cumsum.default", "x", -1), case("cumsum.default", "mask", 0),
    case("softmax.int", "x", -2), case("log_softmax.int", "x", 1),
]  # fmt: skip
PRODUCTS = [
    case("matmul.default", "x", "square"), case("matmul.default", "square", "x"), case("linear.default", "x", "square"),
    case("addmm.default", "row", "row", "square", beta=0.5, alpha=2), case("bmm.default", "batch", "batch"),
    case("baddbmm.default", "batch", "batch", "batch", beta=2),
    case("einsum.default", "bchw,hk->bckw", ["x", "square"]), case("matmul.default", "tokens", "matrix"),
    case("conv1d.default", "line", "c1", "b4", [2], [1], [2]), case("conv1d.padding", "line", "c1", None, [1], "same"),
    case("conv2d.default", "x", "c", "b4", [1, 2], [1, 0]), case("conv2d.padding", "x", "c", None, [1], "same", [2]),
    case("conv3d.default", "volume", "c3", "b4", [1, 2, 1], [1, 1, 0]),
    case("conv_transpose1d.default", "line", "w1", "b3", [2], [1], [1]),
    case("conv_transpose2d.input", "x", "w", "b3", [2, 2]),
    case("conv_transpose2d.input", "x", "w", None, [3, 2], [1, 0], [2, 1], 1, [1, 2]),
    case("conv_transpose2d.input", "x", "w", None, [2], [1], [1], 2),
    case("conv_transpose3d.input", "volume", "w3", "b3", [2, 1, 2], [0, 1, 1], [1, 0, 0]),
    case("batch_norm.default", "x", None, None, "slope", "positive", False, 0.1, 1e-3, False),
    case("batch_norm.default", "line", "slope", "b4", "slope", "positive", False, 0.1, 1e-3, False),
    case("group_norm.default", "x", 2, "slope", "b4"), case("group_norm.default", "line", 4),
    case("instance_norm.default", "x", "slope", "b4", None, None, True, 0.1, 1e-4, False),
    case("layer_norm.default", "tokens", [8], "eight", "eight"), case("layer_norm.default", "x", [6, 6]),
    case("rms_norm.default", "tokens", [8], "eight", 1e-4), case("rms_norm.default", "tokens", [8]),
    case("scaled_dot_product_attention.default", "tokens", "tokens", "tokens"),
    case("scaled_dot_product_attention.default", "tokens", "tokens", "tokens", None, 0.0, True, scale=0.7),
    case("scaled_dot_product_attention.default", "tokens", "tokens", "tokens", "see"),
    case("scaled_dot_product_attention.default", "tokens", "tokens", "tokens", "bias"),
]  # fmt: skip
POOLS = [
    case("max_pool1d.default", "line", [3], [2], [1]), case("max_pool2d.default", "x", [2, 3]),
    *(case("max_pool2d.default", "x", [3], [s], [p], [d], up) for s, p, d, up in (
        (2, 1, 1, False), (2, 1, 1, True), (2, 0, 1, True), (2, 0, 2, True), (4, 1, 1, True), (5, 1, 2, True))),
    case("max_pool2d.default", "x", [2], [5], [1], [1], True),
    case("max_pool2d.default", "x", [4], [3], [2], [1], True),
    case("max_pool3d.default", "volume", [2], [2], [1], [1], True),
    case("max_pool2d_with_indices.default", "x", [2], item=0),
    case("avg_pool1d.default", "line", [3], [2], [1]), case("avg_pool1d.default", "line", [2], [2], [0], True),
    *(case("avg_pool2d.default", "x", [3, 2], [2], [1], up, count) for up in (False, True) for count in (False, True)),
    *(case("avg_pool2d.default", "x", [4], [3], [2], True, count) for count in (False, True)),
    case("avg_pool2d.default", "x", [3], [2], [1], False, True, 5),
    case("avg_pool2d.default", "x", [3], [2], [1], True, False, 5),
    case("avg_pool3d.default", "volume", [2], [2], [1], True, False),
    case("adaptive_avg_pool1d.default", "line", [3]), case("adaptive_avg_pool2d.default", "x", [1, 1]),
    case("adaptive_avg_pool2d.default", "x", [4, 5]), case("adaptive_avg_pool2d.default", "x", [2, 3]),
    case("adaptive_avg_pool2d.default", "x", [7, 6]), case("adaptive_avg_pool3d.default", "volume", [2, 1, 3]),
    case("adaptive_max_pool2d.default", "x", [3, 2], item=0), case("adaptive_max_pool1d.default", "line", [1], item=0),
]  # fmt: skip
RESIZED = [
    *(case(f"{name}.vec", "x", size, scales) for name in ("upsample_nearest2d", "_upsample_nearest_exact2d")
      for size, scales in ((None, [2.0, 3.0]), ([9, 4], None), ([7, 13], None), (None, [1.7, 0.6]), ([1, 1], None),
        (None, [1.1, 1.0]), (None, [1.1, 2.1]))),
    case("upsample_nearest1d.vec", "line", [11], None), case("upsample_nearest3d.vec", "volume", None, [2.0, 1.5, 1.0]),
    *(case(f"{name}.vec", "x", size, aligned, scales) for name in ("upsample_bilinear2d", "upsample_bicubic2d")
      for aligned in (False, True) for size, scales in (
        (None, [2.0, 2.0]), ([9, 4], None), ([7, 13], None), (None, [1.7, 0.6]), ([1, 1], None), ([1, 5], None))),
    case("upsample_linear1d.vec", "line", [11], False, None), case("upsample_linear1d.vec", "line", None, True, [1.3]),
    case("upsample_trilinear3d.vec", "volume", None, False, [2.0, 2.0, 2.0]),
    case("upsample_trilinear3d.vec", "volume", [5, 8, 9], True, None),
]  # fmt: skip
ALL = [*ELEMENTS, *MOVED, *REDUCED, *PRODUCTS, *POOLS, *RESIZED]


@pytest.mark.parametrize(("operator", "arguments", "keywords", "item"), ALL,
                         ids=[f"{number}-{each[0]}" for number, each in enumerate(ALL)])  # fmt: skip
def test_calls(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any], item: int | None) -> None:
    check(program_of(operator, arguments, keywords, item))


@pytest.mark.parametrize(("operator", "arguments"), [
    ("clamp.default", (-0.5,)), ("clamp.default", (-0.5, 0.5)), ("clamp_min.default", (0.1,)), ("relu.default", ()),
    ("clamp_max.default", (0.1,)), ("hardshrink.default", ()), ("softshrink.default", ()), ("silu.default", ()),
    ("threshold.default", (0.1, -3.0)), ("hardtanh.default", ()), ("softmax.int", (-1,)),
    ("max_pool2d.default", ([2],)),
])  # fmt: skip
def test_extreme_numbers_are_what_they_are(operator: str, arguments: tuple[Any, ...]) -> None:
    program = program_of(operator, ("x", *arguments), {}, None)
    x = data(2, *SHAPES["x"])
    x[0, 0, 0] = torch.tensor([100.0, -100.0, 0.0, -0.0, 1e30, -1e30])
    x[1, 0, 0, 2:4] = torch.tensor([math.inf, -1e-40])
    if operator not in ("silu.default", "softmax.int", "max_pool2d.default"):
        x[1, 1, 0, 2:4] = torch.tensor([math.nan, -math.inf])
    [found], [wanted] = run_onnx(onnx_model(program), program, [x]), run_reference(program, x)
    assert torch.allclose(found, wanted, rtol=2e-5, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize(("operator", "arguments", "keywords", "item"), [
    case("cummax.default", "x", 1, item=0), case("squeeze.default", "x"), case("squeeze.dim", "x", 0),
    case("max_pool2d.default", "thin", [2, 4], [1, 2], [1, 1], [2, 2]),
    case("softplus.default", "x", 1.0, 5.0), case("roll.default", "x", [1]),
    case("div.Tensor_mode", "x", 2, rounding_mode="floor"), case("round.decimals", "x", decimals=1),
    case("max.other", "x", "y"),
    case("split.Tensor", "x", 1, 0, item=0), case("adaptive_max_pool2d.default", "x", [4, 4], item=0),
    case("adaptive_max_pool2d.default", "x", [3, 3], item=1), case("max_pool2d_with_indices.default", "x", [2], item=1),
    case("adaptive_avg_pool3d.default", "volume", [3, 3, 4]), case("index.Tensor", "x", [None, "places", "places"]),
    case("upsample_trilinear3d.vec", "volume", None, False, [1.3, 1.3, 1.3]), case("nonzero.default", "x"),
    case("_to_copy.default", "x", dtype=torch.float64), case("pad.default", "x", [-1, 0]),
    case("pad.default", "x", [1, 1], "circular"), case("getitem", "x", 0), case("elu.default", "x", 1.0, 2.0),
    case("sum.default", "x", dtype=torch.float64), case("linalg_vector_norm.default", "x", 3),
])  # fmt: skip
def test_what_differs_is_refused_by_name(operator: str, arguments: tuple[Any, ...], keywords: dict[str, Any],
                                         item: int | None) -> None:  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"(aten\.|getitem).*, of step '\w+', .*not translated to ONNX"):
        onnx_model(program_of(operator, arguments, keywords, item))


def test_what_depends_on_no_input_is_a_constant() -> None:
    steps = (Call((), "ones", "aten.ones.default", ([6, 6],)),
             Call(("ones",), "low", "aten.tril.default", (Name("ones"),)),
             Call(("low",), "hidden", "aten.eq.Scalar", (Name("low"), 0)),
             Call(("hidden", "x"), "y", "aten.masked_fill.Scalar", (Name("x"), Name("hidden"), -1.0)))  # fmt: skip
    values = {name: Value((4, 6, 6)) for name in ("x", "ones", "low", "hidden", "y")}
    program = Program(("x",), ("y", "low"), values, steps)
    model = onnx_model(program)
    assert {node.op_type for node in model.graph.node} <= {"Where", "Identity"}
    x = data(2, 4, 6, 6)
    for found, wanted in zip(run_onnx(model, program, [x]), run_reference(program, x), strict=True):
        assert torch.equal(found, wanted)


def test_sizes_that_are_computed() -> None:
    steps = (Call(("x",), "size", "aten.sym_size.int", (Name("x"), 0)),
             Call(("size",), "twice", "aten.mul.int", (Name("size"), 2)),
             Call(("x", "size"), "split", "aten.reshape.default", (Name("x"), [Name("size"), 2, 2, 36])),
             Call(("x", "twice"), "y", "aten.reshape.default", (Name("x"), [Name("twice"), 72])),
             Call(("row0", "size"), "z", "aten.expand.default", (Name("row0"), [Name("size"), -1])))  # fmt: skip
    values = {name: Value((4, 6, 6)) for name in ("x", "size", "twice", "split", "y", "z")}
    program = Program(("x",), ("split", "y", "z"), values, steps, {"row0": data(1, 6)})
    model = onnx_model(program)
    for batch in (1, 5):
        x = data(batch, 4, 6, 6)
        for found, wanted in zip(run_onnx(model, program, [x]), run_reference(program, x), strict=True):
            assert torch.equal(found, wanted)
