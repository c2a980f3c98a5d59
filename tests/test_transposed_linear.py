"""Conv1D of transformers, a linear layer whose weight is (in_features, out_features)."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from qsparseprop import nn as qnn
from qsparseprop.quantization import QuantConfig

from ._helpers import (
    FLOAT_SUM,
    ROUNDING,
    dequantized,
    dequantized_weight,
    examples,
    generator,
    random_values,
    relative_error,
    run_python,
    set_weight,
)
from ._layers import run

pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D

CLASSES = (qnn.SparseTransposedLinear, qnn.QuantizedSparseTransposedLinear)

pytestmark = pytest.mark.usefixtures("one_thread")


def conv1d(nf=12, nx=20, density=0.3, seed=0):
    return set_weight(Conv1D(nf, nx), density, seed)


CASES = {
    "nx": st.sampled_from([1, 2, 17, 64, 90]),
    "nf": st.sampled_from([1, 3, 16, 70]),
    "batch": st.sampled_from([1, 7, 64, 130]),
    "density": st.sampled_from([0.0, 0.1, 0.4, 1.0]),
    "seed": st.integers(0, 1000),
}


@given(**CASES)
@examples(60)
def test_float_layers_are_float64_to_rounding(nx, nf, batch, density, seed):
    dense = conv1d(nf, nx, density, seed)
    x, dy = torch.randn(batch, nx, generator=generator(seed)), torch.randn(batch, nf, generator=generator(seed + 1))
    actual = run(qnn.SparseTransposedLinear.from_dense(dense), x, dy)
    wanted = run(copy.deepcopy(dense).double(), x.double(), dy.double())
    for a, w in zip(actual, (*wanted[:2], wanted[2][dense.weight != 0], wanted[3]), strict=True):
        assert relative_error(a, w) < FLOAT_SUM


@given(**CASES, values=st.sampled_from(["normal", "positive", "zero", "small"]),
       scheme=st.sampled_from(["absmax", "standard"]), per_channel=st.booleans())  # fmt: skip
@examples(100)
def test_quantised_layers_are_float64_on_dequantised_operands(
    nx, nf, batch, density, seed, values, scheme, per_channel
):
    dense = conv1d(nf, nx, density, seed)
    x, dy = random_values((batch, nx), values, seed), torch.randn(batch, nf, generator=generator(seed + 1))
    if values == "normal":
        x[:, ::2] = x[:, ::2].abs()
    config = QuantConfig(input=scheme, grad="absmax", granularity="channel" if per_channel else "tensor")
    layer = qnn.QuantizedSparseTransposedLinear.from_dense(dense, qconfig=config)
    y, dx, dw, _ = run(layer, x, dy)
    operands = [dequantized(t[..., None, None], s, None, per_channel)
                for t, s in ((x, scheme), (dy, "symmetric"), (x, "symmetric"))]  # fmt: skip
    (xq, x_scale), (dq, dy_scale), (xw, _) = [(q[..., 0, 0], s) for q, s in operands]
    weight, (row, column) = dense.weight.detach(), (torch.arange(n) for n in (nx, nf))
    forward = dequantized_weight(weight, column.expand(nx, nf), x_scale[:, None])
    backward = dequantized_weight(weight, row[:, None].expand(nx, nf), dy_scale)
    sizes = [t.double().abs().sum().item() for t in (xq, weight, dq)]
    assert relative_error(y, xq @ forward + dense.bias.detach().double(), sizes[0] * sizes[1]) < ROUNDING
    assert relative_error(dx, dq @ backward.t(), sizes[1] * sizes[2]) < ROUNDING
    assert relative_error(dw, (xw.t() @ dq)[weight != 0], sizes[0] * sizes[2]) < ROUNDING


@pytest.mark.parametrize("cls", CLASSES)
def test_instruction_sets_and_threads_agree(isa, cls):
    dense = conv1d(130, 200, 0.3)
    x, dy = torch.randn(150, 200), torch.randn(150, 130)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(run(cls.from_dense(dense), x, dy)[:3])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    with torch.no_grad():
        assert relative_error(results[0][0], dense(x)) < 0.03


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shape", [(20,), (2, 3, 20), (0, 20), (2, 0, 20)])
def test_shapes(cls, shape):
    dense = conv1d()
    layer, x = cls.from_dense(dense), torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], 12)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert relative_error(y, x @ dense.weight + dense.bias) < 0.05
    with pytest.raises(ValueError, match="in_features=20"):
        layer(torch.randn(2, 12))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(("nf", "nx"), [(3, 0), (0, 3)])
def test_no_features(cls, nf, nx):
    x = torch.randn(4, nx, requires_grad=True)
    y = cls(nf, nx)(x)
    assert y.shape == (4, nf)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("cls", CLASSES)
def test_attributes(cls):
    layer = cls.from_dense(conv1d())
    assert (layer.nf, layer.nx, layer.out_features, layer.in_features) == (12, 20, 12, 20)
    assert layer.weight_shape == (20, 12)
    assert layer.bias.shape == (12,)
    assert "in_features=20, out_features=12" in repr(layer)


@pytest.mark.parametrize("cls", CLASSES)
def test_conversion_state_and_copies(cls):
    dense = conv1d().eval()
    dense.weight.requires_grad_(False)
    layer = cls.from_dense(dense)
    again = layer.to_dense()
    assert type(again) is Conv1D
    assert not again.training
    assert not again.weight.requires_grad
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)
    assert torch.equal(layer.mask(), dense.weight != 0)
    assert torch.equal(layer.dense_weight(), dense.weight)
    x = torch.randn(5, 20)
    y = layer(x)
    empty, learnt, kept = cls(12, 20), cls(12, 20), cls.from_dense(conv1d())
    saved = io.BytesIO()
    torch.save(layer.state_dict(), saved)
    saved.seek(0)
    empty.load_state_dict(torch.load(saved, weights_only=True))
    with qnn.accept_dense_state("take_zeros"):
        learnt.load_state_dict(dense.state_dict())
    with qnn.accept_dense_state("keep_pattern"):
        kept.load_state_dict({k: v + 1 for k, v in dense.state_dict().items()})
    assert torch.equal(kept.dense_weight(), (dense.weight + 1) * kept.mask())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), empty, learnt):
        assert torch.equal(other(x), y)
    with pytest.raises(RuntimeError, match="shape"):
        cls(20, 12).load_state_dict(layer.state_dict())
    for transposed in (dense.weight.t(), dense.weight[:12, :12]):
        with pytest.raises(RuntimeError, match=r"expected shape \(20, 12\)"), qnn.accept_dense_state("take_zeros"):
            cls(12, 20).load_state_dict({"weight": transposed, "bias": dense.bias})


@pytest.mark.parametrize("cls", CLASSES)
def test_masks_have_the_dense_weight_s_order(cls):
    dense = conv1d()
    layer = cls.from_dense(dense)
    values = dense.weight[dense.weight != 0]
    assert torch.equal(layer.weight, values), "the values are those of the dense weight, in its order"
    further = torch.rand(20, 12) < 0.5
    layer.apply_further_mask(further)
    assert torch.equal(layer.dense_weight(), dense.weight * further)
    fresh = torch.randn(20, 12)
    layer.regrow(~further, fresh)
    assert torch.equal(layer.dense_weight(), torch.where(further, dense.weight, fresh))
    with pytest.raises(ValueError, match="shape"):
        layer.apply_further_mask(further.t())


def test_a_mask_of_prune_decides():
    dense = Conv1D(12, 20)
    prune.random_unstructured(dense, "weight", 0.7)
    layer = qnn.SparseTransposedLinear.from_dense(dense)
    assert torch.equal(layer.mask(), dense.weight_mask != 0)
    assert layer.nonzeros == 240 - math.floor(0.7 * 240)


@pytest.mark.parametrize("cls", CLASSES)
def test_what_is_refused(cls):
    for other in (nn.Linear(3, 4), nn.Conv1d(3, 4, 1)):
        with pytest.raises(TypeError, match="expects Conv1D of transformers"):
            cls.from_dense(other)
    bad = conv1d()
    bad.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        cls.from_dense(bad)


def test_transformers_is_not_imported():
    code = """
import sys
import torch
from qsparseprop.nn import SparseTransposedLinear
layer = SparseTransposedLinear(3, 4)
assert layer(torch.ones(2, 4)).shape == (2, 3)
assert not any(name.partition(".")[0] == "transformers" for name in sys.modules)
try:
    layer.to_dense()
except RuntimeError as error:
    print(error)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert "import transformers.pytorch_utils first" in result.stdout


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("cls", CLASSES)
def test_compiled(cls):
    torch._dynamo.reset()
    layer = cls.from_dense(conv1d())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, dy = torch.randn(2, 5, 20).relu(), torch.randn(2, 5, 12)
    for eager, other in zip(run(layer, x, dy)[:3], run(compiled, x, dy)[:3], strict=True):
        assert torch.equal(eager, other)
