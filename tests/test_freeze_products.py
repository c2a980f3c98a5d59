"""Products with constant matrices, layers without outputs, and how programs are written for people."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.inference import FrozenModule, freeze
from qsparseprop.inference.equations import linear_equations

from ._frozen import assert_as_good_as_8_bits, data, kinds


class Products(nn.Module):
    """A product with a parameter, as a function says."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(data(*shape, seed=3))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.w)


@pytest.mark.parametrize("function", [
    lambda x, w: x @ w,
    lambda x, w: torch.matmul(x, w.abs()),
    lambda x, w: torch.einsum("...d,dk->...k", x, w),
    lambda x, w: torch.einsum("dk, bd -> bk" if x.ndim == 2 else "dk, bsd -> bsk", w, x),
    lambda x, w: torch.einsum("...d,kd->...k", x, w.t()),
], ids=["operator", "computed", "einsum", "weight first", "turned"])  # fmt: skip
@pytest.mark.parametrize("shape", [(32, 24), (8, 5, 24)], ids=str)
def test_products_with_a_constant_matrix_are_linear_layers(function: Callable[[Tensor, Tensor], Tensor],
                                                           shape: tuple[int, ...]) -> None:  # fmt: skip
    model, x = Products(function, 24, 12), data(*shape)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    assert "Product" in kinds(frozen)
    assert [(layer.name, layer.kind, layer.quantised) for layer in frozen.freeze_report] == [("w", "Linear", True)]
    with torch.no_grad():
        exact = model(x)
    assert frozen(x).shape == exact.shape
    assert float((frozen(x) - exact).norm() / exact.norm()) < 0.02
    if len(shape) == 2:
        assert_as_good_as_8_bits(model, frozen, x)
    left = freeze(model, [x], keep_float=["w"])
    assert [(layer.quantised, layer.reason) for layer in left.freeze_report] == [(False, "asked for")]


@pytest.mark.parametrize(("function", "kind"), [
    (lambda x, w: w @ x.transpose(1, 2), "matmul"),
    (lambda x, w: torch.einsum("sd,bsd->bs", w, x), "einsum"),
], ids=["left", "all"])  # fmt: skip
def test_other_products_with_constants_are_in_the_report(function: Callable[[Tensor, Tensor], Tensor],
                                                         kind: str) -> None:  # fmt: skip
    frozen = freeze(Products(function, 5, 24), [data(8, 5, 24)])
    found = [(layer.kind, layer.quantised, layer.reason) for layer in frozen.freeze_report]
    assert found == [(kind, False, "has no form on codes")]


@pytest.mark.parametrize(("equation", "found"), [
    ("bsd,dk->bsk", (True, None)), ("bd,kd->bk", (False, None)), ("kd,bd->bk", (None, False)),
    ("bd,dk->kb", (None, None)), ("bd,dk", (None, None)), ("bd,bd->b", (None, None)), ("d,dk->k", (True, None)),
    ("bdd,dk->bdk", (None, None)), ("bd,dd->bd", (None, None)), ("b...,...k->bk", (None, None)),
])  # fmt: skip
def test_equations(equation: str, found: tuple[bool | None, bool | None]) -> None:
    assert linear_equations(equation, 2) == found


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_layer_without_outputs_stays_as_it_is(wrapped: bool) -> None:
    layer = nn.Linear(4, 0)
    frozen = freeze(nn.Sequential(nn.Linear(4, 4), layer) if wrapped else layer, [data(8, 4)])
    assert frozen(data(3, 4)).shape == (3, 0)
    assert [entry.reason for entry in frozen.freeze_report if not entry.quantised] == ["it has no weights"]


def test_programs_are_written_in_a_line_for_each_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.Softmax(1))
    program = freeze(model, [data(8, 3, 6, 6)]).program
    lines = repr(program).splitlines()
    assert lines[0] == "Program("
    assert len(lines) == len(program.inputs) + len(program.steps) + 3
    assert lines[1] == "  input: (3, 6, 6)"
    assert lines[2].startswith("  input.codes = Quantize(input): (3, 6, 6), scale ")
    assert lines[2].endswith(", zero 128")
    assert "Product(input.codes, weight=4 x 27, 108 nonzeros, bias=float32 (4,), window=(kernel=(3, 3), padding=" in (
        repr(program))  # fmt: skip
    assert lines[-3].startswith("  softmax = aten.softmax.int(")
    assert lines[-2:] == [f"  return {program.outputs[0]}", ")"]
    assert "tensor(" not in repr(program)
    assert max(map(len, lines)) < 200
