"""Frozen programs on the kernels, against the reference in plain torch, bit for bit."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qsparseprop._kernels import _dispatch
from qsparseprop.inference.compiled import KEPT_BATCHES, CompiledProgram
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import run_reference
from qsparseprop.inference.segments import Part
from qsparseprop.inference.steps import Codes, Product, Quantize, Table, Value, Weight, Window
from tests._frozen_programs import Builder, random_program
from tests._helpers import examples

ISAS = _dispatch.supported_isas()


@pytest.fixture(autouse=True)
def _isa_again():
    before = _dispatch.active_isa()
    yield
    _dispatch.set_isa(before)


def compare(program: Program, inputs: list[Tensor], isas: list[str]) -> None:
    expected = run_reference(program, *inputs)
    for isa in isas:
        _dispatch.set_isa(isa)
        found = CompiledProgram(program)(*inputs)
        for name, one, other in zip(program.outputs, expected, found, strict=True):
            assert one.dtype is other.dtype
            assert one.shape == other.shape
            assert torch.equal(one, other), f"{name} on {isa}"


@examples(150)
@given(seed=st.integers(0, 10**6), batch=st.sampled_from([1, 2, 5, 33, 70]))
def test_programs_compute_what_the_reference_does(seed: int, batch: int) -> None:
    builder, program = random_program(seed)
    _dispatch.set_isa(ISAS[-1])
    compare(program, builder.tensors(batch), [ISAS[-1]])


@examples(60)
@given(seed=st.integers(0, 10**6), batch=st.sampled_from([1, 3, 40]))
def test_every_instruction_set_gives_the_same_bits(seed: int, batch: int) -> None:
    builder, program = random_program(seed)
    compare(program, builder.tensors(batch), ISAS)


@pytest.mark.parametrize("mode", ["list", "dense"])
@pytest.mark.parametrize("batch", [1, 20])
def test_residual_network(mode: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stem and two blocks of a residual network, of 1,000 rows in the end."""
    monkeypatch.setenv("QSPARSEPROP_PRODUCTS", mode)
    b = Builder(random.Random(0))
    same = Window((3, 3), (1, 1), (1, 1, 1, 1))
    x = b.product(b.add_input(3, 61, 47), 24, Window((7, 7), (2, 2), (3, 3, 3, 3)), density=1.0, limited=True)
    y = b.product(x, 24, same, density=0.2, limited=True)
    x = b.product(y, 24, same, density=0.05, residual=x, limited=True)
    y = b.product(x, 40, Window((3, 3), (2, 2), (1, 1, 1, 1)), density=0.1, limited=True)
    short = b.product(x, 40, Window((1, 1), (2, 2)), density=1.0)
    x = b.product(y, 40, same, density=0.1, residual=short, limited=True)
    x = b.flatten(b.pool(x, "mean", Window(b.values[x].image)))
    compare(b.program(b.product(x, 1000, floats=True, density=0.3)), b.tensors(batch), ISAS)


@pytest.mark.parametrize("batch", [1, 2, 9, 49, 64, 65])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.4, 1.0])
def test_linear_chain(batch: int, density: float) -> None:
    """Few tokens and many, to codes and to floats."""
    b = Builder(random.Random(batch))
    x = b.add_input(300)
    y = b.product(x, 129, density=density, limited=True)
    y = b.product(y, 129, density=density, residual=y)
    compare(b.program(b.product(y, 17, floats=True, density=density), b.dequantize(y)), b.tensors(batch), ISAS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", [False, True])
def test_products_look_up_what_only_a_table_reads(isa: str, channels: bool) -> None:
    """Every code of every table, with and without gaps between pixels and a residual; and one that others read, too."""
    for image, shared in (((8, 8), False), ((13, 5), False), ((13, 5), True)):
        b = Builder(random.Random(5))
        x = b.add_input(16, *image)
        first = b.product(x, 16, Window((3, 3), (1, 1), (1, 1, 1, 1)), density=0.5, residual=x)
        # all codes occur
        source = b.values[first].coded
        b.values[first] = Value((16, *image), Codes(source.scale / 20, source.zero_point))
        b.rng = random.Random(2 if channels else 1)
        tabled = b.table(first)
        step = b.steps[-1]
        assert isinstance(step, Table)
        assert step.table.dim() == 1 + channels
        outputs = [b.dequantize(b.add(tabled, first) if shared else tabled)]
        program = b.program(*outputs)
        inputs = b.tensors(9)
        compare(program, inputs, [isa])
        (part,) = CompiledProgram(program).get(9).parts
        assert isinstance(part, Part)
        # the input is packed and the output unpacked; the sum is a step, and then the table, too
        assert len(part.segment.steps) == (5 if shared else 3)


def test_the_longest_row_is_exact() -> None:
    """65,536 products of 255 and 127 are the largest sum that 32 bits hold."""
    columns = 65536
    weight = Weight(torch.tensor([0, columns], dtype=torch.int32), torch.arange(columns, dtype=torch.int32),
                    torch.full((columns,), 127, dtype=torch.int8), torch.ones(1), columns)  # fmt: skip
    values = {"x": Value((columns,)), "q": Value((columns,), Codes(torch.ones(columns), 0)), "y": Value((1,))}
    steps = (Quantize(("x",), "q"), Product(("q",), "y", weight, torch.zeros(1)))
    program = Program(("x",), ("y",), values, steps)
    for batch in (1, 70):
        x = torch.full((batch, columns), 255.0)
        compare(program, [x], ISAS)
        assert torch.equal(run_reference(program, x)[0], torch.full((batch, 1), float(255 * 127 * columns)))


def test_what_is_outside_of_the_range_goes_to_its_ends() -> None:
    values = {"x": Value((6,)), "q": Value((6,), Codes(torch.full((6,), 0.5), 100)), "y": Value((6,))}
    identity = Weight(torch.arange(7, dtype=torch.int32), torch.arange(6, dtype=torch.int32),
                      torch.ones(6, dtype=torch.int8), torch.ones(6), 6)  # fmt: skip
    program = Program(("x",), ("y",), values, (Quantize(("x",), "q"), Product(("q",), "y", identity, torch.zeros(6))))
    x = torch.tensor([[-1e38, -1e30, 0.25, 0.75, 1e30, 1e38]])
    for batch in (1, 50):
        compare(program, [x.expand(batch, 6)], ISAS)
    # halves to even: 0.25 and 0.75 are half a code from their neighbours
    assert CompiledProgram(program)(x)[0].tolist() == [[-100.0, -100.0, 0.0, 2.0, 155.0, 155.0]]


def test_samples_that_are_not_finite_stay_so() -> None:
    """Codes have no NaN: what comes of such a sample is one, and the others are as they were."""
    builder, program = random_program(12)
    (x,) = builder.tensors(5)
    expected = run_reference(program, x)
    x[1].view(-1)[2], x[3].view(-1)[0] = torch.nan, -torch.inf
    for one, other in zip(CompiledProgram(program)(x), expected, strict=True):
        assert one[[1, 3]].isnan().all()
        assert torch.equal(one[[0, 2, 4]], other[[0, 2, 4]])


def test_threads_do_not_change_a_bit() -> None:
    builder, program = random_program(12)
    inputs = builder.tensors(70)
    compiled, before = CompiledProgram(program), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compiled(*inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_several_threads_in_one_program() -> None:
    b = Builder(random.Random(3))
    x = b.product(b.add_input(8, 12, 12), 30, Window((3, 3), (1, 1), (1, 1, 1, 1)), limited=True)
    program = b.program(b.dequantize(b.product(x, 30, Window((3, 3)), limited=True)))
    compiled = CompiledProgram(program)
    inputs = [b.tensors(batch) for batch in (1, 2, 3, 4) for _ in range(6)]
    expected = [run_reference(program, *one)[0] for one in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: compiled(*one)[0], inputs))
    assert all(map(torch.equal, expected, found))


def test_what_batch_sizes_ask_for_is_not_kept_for_all() -> None:
    builder, program = random_program(5)
    compiled = CompiledProgram(program)
    for batch in range(1, KEPT_BATCHES + 3):
        inputs = builder.tensors(batch)
        assert all(map(torch.equal, compiled(*inputs), run_reference(program, *inputs)))
    assert [batch for batch, _ in compiled._kept] == list(range(3, KEPT_BATCHES + 3))


def test_another_instruction_set_takes_over() -> None:
    builder, program = random_program(5)
    compiled, inputs = CompiledProgram(program), builder.tensors(2)
    expected = run_reference(program, *inputs)
    for isa in (*ISAS, *ISAS):
        _dispatch.set_isa(isa)
        assert all(map(torch.equal, compiled(*inputs), expected))


def test_no_images() -> None:
    builder, program = random_program(5)
    found = CompiledProgram(program)(*builder.tensors(0))
    assert [tuple(t.shape) for t in found] == [(0, *program.values[name].shape) for name in program.outputs]


@pytest.mark.parametrize("tokens", [1, 6, 50, 120])
@pytest.mark.parametrize("dynamic", [False, True])
def test_tokens(tokens: int, dynamic: bool) -> None:
    """Linear layers with a scale for each token, or one for all."""
    b = Builder(random.Random(1))
    b.values["x"] = Value((200,))
    b.inputs.append("x")
    x = b.add_step(Quantize(("x",), "q", dynamic), Value((200,), Codes(torch.rand(200) + 0.5, 128)))
    products = b.product(x, 33, floats=True, limited=True), b.product(x, 130, floats=True), b.product(x, 1, floats=True)
    program = b.program(*products)
    given = torch.randn(tokens, 200) * torch.logspace(-40, 30, tokens).view(-1, 1)
    given[0] = 0
    compare(program, [given], ISAS)


def test_a_token_that_is_not_finite_stays_so() -> None:
    b = Builder(random.Random(1))
    b.values["x"] = Value((40,))
    b.inputs.append("x")
    b.add_step(Quantize(("x",), "q", True), Value((40,), Codes(torch.ones(40), 128)))
    program = b.program(b.product("q", 20, floats=True, density=1.0))
    for tokens in (3, 80):
        x = torch.randn(tokens, 40)
        x[1, 7], x[2, 3] = torch.nan, torch.inf
        (found,) = CompiledProgram(program)(x)
        assert not found[1:3].isfinite().any()
        assert found[0].isfinite().all()
        assert found[3:].isfinite().all()


def test_scales_of_tokens_are_for_products_that_give_tensors() -> None:
    b = Builder(random.Random(1))
    b.values["x"] = Value((40,))
    b.inputs.append("x")
    b.add_step(Quantize(("x",), "q", True), Value((40,), Codes(torch.ones(40), 128)))
    with pytest.raises(ValueError, match="only products do that give ordinary tensors"):
        b.program(b.dequantize("q"))
    b.steps[-1:] = []
    with pytest.raises(ValueError, match="only products do that give ordinary tensors"):
        b.program(b.dequantize(b.product("q", 4)))
