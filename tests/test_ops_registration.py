"""What torch knows of the operators: schemas, fake results, a reference of each."""

from __future__ import annotations

import inspect

import pytest
import torch

from qsparseprop import ops
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.nn._traced import config_text
from qsparseprop.ops import reference
from qsparseprop.quantization import QuantConfig

from ._helpers import laid_out

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_operator_has_a_reference():
    """With the same parameters."""
    operators = {name: op for name in ops.__all__ if isinstance(op := getattr(ops, name), ops.Operator)}
    functions = {name: getattr(ops, name) for name in reference.__all__ if hasattr(ops, name)}
    assert set(operators) < set(functions)
    assert set(functions) - set(operators) == {
        "epilogue_grad_pack", "epilogue_pack", "gather_weight", "layer_backward", "layer_forward", "multiply", "pack",
        "packed_backward", "quantize_pack", "quantize_weight", "sddmm", "spmm"}  # fmt: skip
    for name, op in functions.items():
        mine = inspect.signature(op.function if name in operators else op).parameters.values()
        theirs = inspect.signature(getattr(reference, name)).parameters.values()
        assert [(p.name, p.default) for p in mine] == [(p.name, p.default) for p in theirs], name


SAMPLES = [(op, scheme, layout) for op in ("sparse_layer", "sparse_layer_backward") for scheme in ("absmax", None)
           for layout in ("contiguous", "channels_last")]  # fmt: skip


def sample(op, scheme, variant):
    """Arguments of a small call of what graphs see of a layer."""
    g = conv_geometry(2, 3, (5, 4), (3, 2), (2, 1), (1, 1, 0, 0), (1, 1), 3, False)
    crow, col, _ = dense_pattern(torch.rand(3, 12) < 0.5)
    values = torch.randn(col.numel())
    config = "" if scheme is None else config_text(QuantConfig(input=scheme, grad=scheme))
    x, dy = (laid_out(torch.randn(3, *rest).bfloat16(), variant) for rest in ((2, 5, 4), (3, *g.output_size)))
    rest = (crow, col, g.numbers, 1, config)
    if op == "sparse_layer":
        return x, values, torch.randn(3), *rest, torch.bfloat16
    packed = torch.ops.qsparseprop.sparse_layer(x, values, None, *rest, torch.bfloat16)[1:]
    return dy, values, *packed, *rest, x.shape, [True, True, True], torch.bfloat16


@pytest.mark.parametrize(("op", "scheme", "variant"), SAMPLES)
# torch's own tracing warns of itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opcheck(op, scheme, variant):
    torch.library.opcheck(getattr(torch.ops.qsparseprop, op).default, sample(op, scheme, variant))


@pytest.mark.parametrize(("op", "scheme", "variant"), SAMPLES)
def test_fake_results_look_like_real_ones(op, scheme, variant):
    arguments = sample(op, scheme, variant)
    op = getattr(torch.ops.qsparseprop, op)
    real = op(*arguments)
    fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
    for r, f in zip(real, fake, strict=True):
        assert f.is_meta
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())
