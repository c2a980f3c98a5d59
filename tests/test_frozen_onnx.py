"""Frozen models as ONNX files: what ONNX Runtime computes from them, step by step and in all."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from qsparseprop.inference.calls import Name
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import run_reference, run_step
from qsparseprop.inference.steps import Call, Codes, Concat, Flatten, Pool, Product, Quantize, Table, Value, Window
from qsparseprop.utils.errors import ConfigurationError
from tests._frozen_programs import Builder, random_program
from tests._helpers import examples

onnx = pytest.importorskip("onnx", reason="ONNX files are written by onnx")
runtime = pytest.importorskip("onnxruntime", reason="ONNX files are read by ONNX Runtime")

from qsparseprop.inference.onnx import export_onnx, onnx_model  # noqa: E402

SAME = Window((3, 3), (1, 1), (1, 1, 1, 1))


def session_of(model: Any, optimized: Path | None = None) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnx(model: Any, program: Program, inputs: list[Tensor]) -> list[Tensor]:
    given = {name: x.numpy() for name, x in zip(program.inputs, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session_of(model).run(None, given)]


def translated(program: Program) -> Any:
    """A program as ONNX; windows that this cannot say are no examples."""
    means = [step.window for step in program.steps if isinstance(step, Pool) and step.kind == "mean"]
    # one pixel of a few, or fewer of them than there is padding
    assume(all(w.dilation == (1, 1) and max(w.padding) < min(w.kernel) for w in means))
    return onnx_model(program)


class UniformBuilder(Builder):
    """One scale for all channels, and zero at code 0 behind the input."""

    def codes(self, channels: int, zero: int | None = None) -> Codes:
        return Codes(torch.full((channels,), self.rng.choice([0.02, 0.03])), 0 if self.steps else 128)


def network(builder: type[Builder]) -> tuple[Builder, Program]:
    """A convolution, a residual block, pools and a classifier."""
    b = builder(random.Random(3))
    stem = b.product(b.add_input(3, 16, 16), 16, SAME)
    inner = b.product(stem, 16, SAME, density=0.1)
    block = b.product(inner, 16, SAME, density=0.1, residual=stem)
    pooled = b.pool(b.pool(block, "max", Window((2, 2), (2, 2))), "mean", Window((8, 8)))
    return b, b.program(b.product(b.flatten(pooled), 10, floats=True, density=0.5))


# ---- what is computed ----


@examples(60)
@given(seed=st.integers(0, 10**6))
def test_each_step_is_within_one_code_of_the_reference_on_the_same_codes(seed: int) -> None:
    builder, program = random_program(seed)
    model = translated(program)
    coded = [step.output for step in program.steps if program.values[step.output].codes is not None]
    for name in coded:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    inputs = builder.tensors(2)
    names = [*program.outputs, *coded]
    values = dict(zip(names, run_onnx(model, program, inputs), strict=True)) | dict(
        zip(program.inputs, inputs, strict=True)
    )
    for step in program.steps:
        target = program.values[step.output]
        wanted = run_step(step, program.values, values)
        found = values[step.output]
        assert found.shape == wanted.shape
        if target.codes is None:
            # a bias is a multiple of the products' unit
            unit = step.weight.scale.max() / 2 if isinstance(step, Product) else 0.0
            assert torch.allclose(found, wanted, rtol=1e-5, atol=float(unit) + 1e-5)
            continue
        exact = isinstance(step, Table | Concat | Flatten) or (isinstance(step, Pool) and step.kind == "max")
        assert int((found.int() - wanted.int()).abs().max()) <= (0 if exact else 1), step.output


@pytest.mark.parametrize("coded_sums", [False, True])
@pytest.mark.parametrize("builder", [Builder, UniformBuilder])
def test_a_network_classifies_as_the_reference_does(builder: type[Builder], coded_sums: bool) -> None:
    b, program = network(builder)
    inputs = b.tensors(200)
    [found] = run_onnx(onnx_model(program, coded_sums), program, inputs)
    [wanted] = run_reference(program, *inputs)
    assert float((found.argmax(1) == wanted.argmax(1)).float().mean()) >= (0.9 if coded_sums else 0.97)
    # a code more or less in a layer is one of some 100 that values have
    assert float((found - wanted).norm() / wanted.norm()) <= (0.05 if coded_sums else 0.01)


def test_the_error_of_a_network_is_within_what_codes_can_add_up_to() -> None:
    """A code a layer, and what the layers behind make of those before at most."""
    b = UniformBuilder(random.Random(0))
    names = [b.product(b.add_input(3, 12, 12), 8, SAME)]
    for _ in range(4):
        names.append(b.product(names[-1], 8, SAME, density=0.2, residual=names[-1]))
    program = b.program(*[b.dequantize(name) for name in names])
    bound, bounds = 1.0, []
    for step in (step for step in program.steps if isinstance(step, Product)):
        scales = [program.values[name].coded.scale[0] for name in (*step.inputs, step.output)]
        if bounds:
            growth = (step.weight.dense().abs().sum(1) * step.weight.scale).max() / scales[-1]
            bound = 1 + bound * float(growth + scales[1] / scales[-1])
        else:
            bound = 1 + float((step.weight.dense().abs().sum(1) * step.weight.scale).max() / scales[-1])
        bounds.append(bound)
    inputs = b.tensors(4)
    found, wanted = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    for name, one, other, most in zip(names, found, wanted, bounds, strict=True):
        assert float((one - other).abs().max() / program.values[name].coded.scale[0]) <= most + 1e-3


def test_engines_see_layers_of_integers(tmp_path: Path) -> None:
    _, program = network(UniformBuilder)
    session_of(onnx_model(program, coded_sums=True), tmp_path / "optimized.onnx")
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 3
    assert kinds["QGemm"] == 1
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["Gemm"] == 0


def test_zeros_of_weights_are_zeros_of_the_file(tmp_path: Path) -> None:
    _, program = network(Builder)
    export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer if w.name.endswith("/weight")}
    products = [step for step in program.steps if isinstance(step, Product)]
    assert len(weights) == len(products)
    for step in products:
        found = weights[f"{step.output}/weight"]
        assert found.dtype == np.int8
        dense = step.weight.dense().numpy()
        assert (found == 0).sum() == (dense == 0).sum() > 0.4 * dense.size
        assert np.array_equal(np.abs(found.reshape(dense.shape).astype(int)), np.abs(dense.astype(int)))


def test_rows_of_any_sign_size_and_bias() -> None:
    """Rows without weights, scales below zero, and biases that are no multiple of anything."""
    b = UniformBuilder(random.Random(1))
    name = b.product(b.add_input(40), 6, density=0.5)
    step = b.steps[-1]
    assert isinstance(step, Product)
    step.weight.scale.mul_(torch.tensor([1.0, -1.0, 0.0, 1e-30, 1.0, 0.0]))
    step.bias.copy_(torch.tensor([0.5, 1.0, 1.2345, 0.7, 0.0, 0.0]))
    program = b.program(b.dequantize(name))
    inputs = b.tensors(5)
    [found], [wanted] = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    assert float((found - wanted).abs().max()) <= 1.001 * float(program.values[name].coded.scale[0])


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("builder", [Builder, UniformBuilder])
def test_rows_without_weights_are_their_bias(builder: type[Builder], coded: bool) -> None:
    """As pruning leaves them, with a scale of 1: engines round biases to multiples of scales, and all of a layer."""
    b = builder(random.Random(1))
    name = b.product(b.add_input(40), 6, density=0.5, floats=not coded)
    step = b.steps[-1]
    assert isinstance(step, Product)
    first, last = step.weight.crow_indices[2:4].tolist()
    step.weight.codes[:first] = 0
    step.weight.codes[last:] = 0
    step.weight.scale[[0, 1, 3, 4, 5]] = 1.0
    step.bias.copy_(torch.tensor([0.5, -0.3, 0.1, 0.4, -0.2, 0.45]))
    program = b.program(b.dequantize(name) if coded else name)
    inputs = b.tensors(5)
    [found], [wanted] = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    found, wanted = (found, wanted) if coded else (found[:, [0, 1, 3, 4, 5]], wanted[:, [0, 1, 3, 4, 5]])
    most = program.values[name].coded.scale if coded else 1e-6
    assert bool(((found - wanted).abs() <= 1.001 * most).all())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("builder", [Builder, UniformBuilder])
def test_tokens_with_scales_of_their_own(builder: type[Builder], groups: int) -> None:
    b = builder(random.Random(1))
    b.values["x"] = Value((6,))
    b.inputs.append("x")
    b.add_step(Quantize(("x",), "q", True), Value((6,), replace(b.codes(6, 128), zero_point=128)))
    weight = b.weight(4, 6 // groups, 0.7)
    b.add_step(Product(("q",), "p", weight, torch.randn(4), groups=groups, low=0.0), Value((4,)))
    program = b.program("p")
    inputs = [torch.randn(50, 6) * torch.logspace(-3, 3, 50)[:, None]]
    inputs[0][7] = 0.0
    [found], [wanted] = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    step = inputs[0].abs().amax(1, keepdim=True) / 127
    rest = 1e-5 * wanted.abs().max(1, keepdim=True).values
    # a code more or less where two are equally near
    most = step * (weight.dense().abs().amax() * weight.scale.amax() / program.values["q"].coded.scale.min())
    assert bool(((found - wanted).abs() <= most + rest + 1e-5).all())
    assert float(((found - wanted).abs() <= rest + 1e-5).float().mean()) > 0.9


# ---- operators of torch ----


def with_call(
    operator: str, arguments: tuple[Any, ...], constants: dict[str, Tensor] | None = None, **keywords: Any
) -> tuple:
    """Codes of 6 x 5 x 5, and a call on what they mean."""
    b = Builder(random.Random(5))
    plain = b.dequantize(b.product(b.add_input(3, 7, 7), 6, Window((3, 3))))
    constants = constants or {}
    given = tuple(
        Name(plain) if a == "x" else Name(a) if isinstance(a, str) and a in constants else a for a in arguments
    )
    b.add_step(Call((plain, *constants), "y", operator, given, keywords), Value((-1,)))
    return b, Program(tuple(b.inputs), ("y",), b.values, tuple(b.steps), constants)


G = torch.Generator().manual_seed(0)
VECTOR, MATRIX, FILTERS = (
    torch.rand(6, generator=G) + 0.5,
    torch.randn(4, 5, generator=G),
    torch.randn(4, 3, 3, 3, generator=G),
)
CALLS = [
    ("aten.relu.default", ("x",), {}),
    ("aten.softmax.int", ("x", 1), {}),
    ("aten.log_softmax.int", ("x", -1), {}),
    ("aten.add.Tensor", ("x", "x"), {"alpha": 2}),
    ("aten.mul.Tensor", ("x", 0.5), {}),
    ("aten.div.Tensor", ("x", 3), {}),
    ("aten.sub.Tensor", ("x", "w"), {"constants": {"w": VECTOR.view(6, 1, 1)}}),
    ("aten.gelu.default", ("x",), {}),
    ("aten.gelu.default", ("x",), {"approximate": "tanh"}),
    ("aten.silu.default", ("x",), {}),
    ("aten.hardswish.default", ("x",), {}),
    ("aten.hardsigmoid.default", ("x",), {}),
    ("aten.leaky_relu.default", ("x", 0.2), {}),
    ("aten.clamp.default", ("x", -0.5, None), {}),
    ("aten.hardtanh.default", ("x",), {}),
    ("aten.mean.dim", ("x", [2, 3], True), {}),
    ("aten.flatten.using_ints", ("x", 1), {}),
    ("aten.reshape.default", ("x", [-1, 30, 5]), {}),
    ("aten.permute.default", ("x", [0, 2, 3, 1]), {}),
    ("aten.transpose.int", ("x", 1, -1), {}),
    ("aten.unsqueeze.default", ("x", 2), {}),
    ("aten.linear.default", ("x", "w", "b"), {"constants": {"w": MATRIX, "b": VECTOR[:4]}}),
    ("aten.conv2d.default", ("x", "w", None, [2, 1], [1, 0], [1, 1], 2), {"constants": {"w": FILTERS}}),
    ("aten.layer_norm.default", ("x", [5], "w"), {"constants": {"w": VECTOR[:5]}}),
    ("aten.batch_norm.default", ("x", "w", "b", "m", "v", False, 0.1, 1e-3, False),
     {"constants": {"w": VECTOR, "b": VECTOR, "m": VECTOR, "v": VECTOR}}),
    ("aten.adaptive_avg_pool2d.default", ("x", [1, 1]), {}),
    ("aten.clone.default", ("x",), {"memory_format": torch.contiguous_format}),
]  # fmt: skip


@pytest.mark.parametrize(("operator", "arguments", "rest"), CALLS, ids=[call[0] for call in CALLS])
def test_calls(operator: str, arguments: tuple[Any, ...], rest: dict[str, Any]) -> None:
    b, program = with_call(operator, arguments, **rest)
    inputs = b.tensors(3)
    [found], [wanted] = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    assert found.shape == wanted.shape
    # codes before it may differ by one
    assert float((found - wanted).abs().max()) <= 0.05 * max(1.0, float(wanted.abs().max()))


def test_values_that_are_joined_and_looked_up() -> None:
    b = Builder(random.Random(5))
    plain = b.dequantize(b.product(b.add_input(3, 7, 7), 6, Window((3, 3))))
    b.add_step(Call((plain,), "y", "aten.cat.default", ([Name(plain), Name(plain)], 1)), Value((12, 5, 5)))
    b.values["tokens"] = Value((4,))
    b.inputs.append("tokens")
    table = torch.randn(7, 3, generator=G)
    b.add_step(Call(("table", "tokens"), "z", "aten.embedding.default", (Name("table"), Name("tokens"))), Value((4, 3)))
    program = Program(tuple(b.inputs), ("y", "z", "z", "table"), b.values, tuple(b.steps), {"table": table})
    inputs = [torch.randn(2, 3, 7, 7), torch.tensor([[0, 1, 2, 6], [3, 3, 3, 5]])]
    found = run_onnx(onnx_model(program), program, inputs)
    wanted = run_reference(program, *inputs)
    assert float((found[0] - wanted[0]).abs().max()) <= 0.03
    assert torch.equal(found[1], F.embedding(inputs[1], table))
    assert torch.equal(found[2], found[1])
    assert torch.equal(found[3], table)


# ---- what is refused ----


@pytest.mark.parametrize(("operator", "arguments", "rest"), [
    ("aten.logcumsumexp.default", ("x", 1), {}),
    ("aten.softmax.int", ("x", 1), {"dtype": torch.float64}),
    ("aten.div.Tensor_mode", ("x", 2), {"rounding_mode": "floor"}),
    ("getitem", ("x", 0), {}),
])  # fmt: skip
def test_what_is_not_translated_is_refused_by_name(operator: str, arguments: tuple[Any, ...], rest: dict[str, Any],
                                                   tmp_path: Path) -> None:  # fmt: skip
    _, program = with_call(operator, arguments, **rest)
    with pytest.raises(ConfigurationError, match=rf"{operator}, of step 'y', .*not translated to ONNX"):
        export_onnx(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_frozen_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"a Linear is not frozen.*inference\.freeze"):
        export_onnx(nn.Linear(3, 3), tmp_path / "model.onnx")


def test_without_onnx_an_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = network(Builder)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'qsparseprop\[onnx\]'"):
        onnx_model(program)


def test_limits_within_what_codes_say_are_nodes_and_others_are_none() -> None:
    b = UniformBuilder(random.Random(0))
    name = b.add_input(4, 6, 6)
    for low, high in ((0.0, math.inf), (0.0, 1.0), (-1.0, 100.0)):
        name = b.product(name, 4, SAME)
        step = b.steps[-1]
        object.__setattr__(step, "low", low)
        object.__setattr__(step, "high", high)
    program = b.program(b.dequantize(name))
    kinds = Counter(node.op_type for node in onnx_model(program).graph.node)
    assert (kinds["Relu"], kinds["Clip"]) == (0, 1)
    inputs = b.tensors(3)
    [found], [wanted] = run_onnx(onnx_model(program), program, inputs), run_reference(program, *inputs)
    assert float((found - wanted).abs().max()) <= 0.1
