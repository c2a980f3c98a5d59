"""Networks of the kinds that people have: what becomes of them as wholes, and what they take and give."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop._kernels import _dispatch
from qsparseprop.inference import FrozenModule, freeze
from qsparseprop.training.models import BasicBlock, resnet20

from ._frozen import assert_as_good_as_8_bits, data, kinds, randomised
from ._helpers import run_python


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fewer, self.more = nn.Conv2d(channels, channels // 2, 1), nn.Conv2d(channels // 2, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.more(F.relu(self.fewer(self.pool(x)))))


class Mobile(nn.Module):
    """An inverted residual with squeeze and excitation, as in MobileNetV3."""

    def __init__(self):
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16),
                                       nn.Hardswish())  # fmt: skip
        self.excite = SqueezeExcite(16)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.project(self.excite(self.depthwise(self.expand(x))))
        return self.head(x.mean((2, 3)))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, (1, 5), padding=(0, 2)), nn.ReLU6())
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, 4, 1), nn.ReLU())
        self.after = nn.Conv2d(20, 6, 3)

    def forward(self, x):
        x = torch.cat([self.one(x), self.two(x), self.pool(x)], dim=1)
        return self.after(F.avg_pool2d(x, 2))


class Attention(nn.Module):
    """A transformer with embeddings, and its layers of torch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens)).mean(1))


def test_residual_blocks():
    torch.manual_seed(0)
    model = randomised(nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                     nn.Linear(8, 3)))  # fmt: skip
    x = data(8, 4, 12, 12)
    frozen = freeze(model, [x])
    assert kinds(frozen) == ["Quantize", *["Product"] * 5, "Pool", "Flatten", "Product"]
    assert_as_good_as_8_bits(model, frozen, x)


def test_a_whole_resnet_has_no_ordinary_tensor_between_its_layers():
    torch.manual_seed(0)
    frozen = freeze(randomised(resnet20()), [data(4, 3, 16, 16)])
    assert set(kinds(frozen)) == {"Quantize", "Product", "Pool", "Flatten"}
    assert [kind for kind in kinds(frozen) if kind == "Pool"] == ["Pool"] * 3
    assert kinds(frozen).count("Product") == 22
    assert len(frozen.report) == 20


def test_a_mobile_block():
    torch.manual_seed(0)
    model, x = randomised(Mobile()), data(8, 3, 16, 16)
    frozen = freeze(model, [x])
    assert kinds(frozen) == [
        "Quantize", "Product", "Product", "Table", "Product", "Table", "Pool", "Product", "Product", "Dequantize",
        "hardsigmoid", "mul", "Quantize", "Product", "Pool", "Flatten", "Product",
    ]  # fmt: skip
    assert_as_good_as_8_bits(model, frozen, x)


def test_an_inception_block():
    torch.manual_seed(0)
    model, x = Inception().eval(), data(8, 3, 12, 12)
    frozen = freeze(model, [x])
    assert kinds(frozen).count("Concat") == 1
    assert "cat" not in kinds(frozen)
    assert_as_good_as_8_bits(model, frozen, x)


def test_a_transformer_keeps_attention_and_norms_in_torch():
    model = Attention().eval()
    tokens = torch.randint(0, 30, (8, 7), generator=torch.Generator().manual_seed(0))
    frozen = freeze(model, [tokens])
    assert isinstance(frozen, FrozenModule)
    assert {"scaled_dot_product_attention", "layer_norm", "embedding"} <= set(kinds(frozen))
    assert kinds(frozen).count("Table") == 2
    layers = {layer.name: layer.quantised for layer in frozen.report}
    assert sum(layers.values()) == 9
    assert not layers["embed"]
    assert layers["layers.layers.1.linear2"]
    assert max(layer.error or 0 for layer in frozen.report) < 0.03
    with torch.no_grad():
        for batch in (0, 1, 7):
            some = torch.cat([tokens, tokens])[:batch]
            assert (frozen(some) - model(some)).norm() <= 0.03 * model(some).norm()


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, y, scale=2.0):
        z = torch.relu(self.a(x) + self.b(y))
        return {"c": self.c(z), "others": (z * scale, [x, z])}


def test_several_inputs_and_outputs():
    model, x, y = Several().eval(), data(9, 6), data(9, 5, seed=2)
    frozen = freeze(model, [(x, y)])
    result = frozen(x, y)
    assert list(result) == ["c", "others"]
    assert isinstance(result["others"], tuple)
    assert isinstance(result["others"][1], list)
    assert torch.equal(result["others"][1][0], x)
    assert_as_good_as_8_bits(model, frozen, x, y)
    assert frozen(x[:1], y[:1])["c"].shape == (1, 3)


def test_arguments_by_name():
    model, x, y = Several().eval(), data(9, 6), data(9, 5, seed=2)
    frozen = freeze(model, [{"x": x, "y": y, "scale": 3.0}])
    with torch.no_grad():
        exact = model(x, y, 3.0)
    assert torch.equal(frozen(y=y, scale=3.0, x=x)["c"], frozen(x=x, y=y, scale=3.0)["c"])
    assert (frozen(x=x, y=y, scale=3.0)["others"][0] - exact["others"][0]).norm() < 0.02 * exact["others"][0].norm()
    with pytest.raises(ValueError, match=r"frozen with 3\.0 for an argument, got 2\.0"):
        frozen(x=x, y=y, scale=2.0)
    with pytest.raises(TypeError, match=r"frozen for \(scale=3\.0, x=floating point \(batch, 6\), y=.* got \(torch"):
        frozen(x, y)


def test_the_module_is_for_serving_only():
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), data(9, 6)
    frozen = freeze(model, [x])
    assert list(frozen.parameters()) == []
    assert not frozen.training
    assert not frozen.eval().training
    with pytest.raises(RuntimeError, match="does not train"):
        frozen.train()
    given = x.clone().requires_grad_()
    assert not frozen(given).requires_grad
    assert torch.equal(frozen(x.double()), frozen(x))
    assert frozen(x.bfloat16()).dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen(x.clone()))
        assert frozen(x).dtype is torch.float32
    with torch.inference_mode():
        assert torch.equal(frozen(x), frozen(given))
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(other(x), frozen(x))
    assert repr(frozen).startswith("FrozenModule((floating point (batch, 6)), 2 of 2 layers on codes)")


def test_what_is_no_input_is_refused():
    frozen = freeze(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), [data(4, 3, 2, 2)])
    said = r"input 0 must be floating point \(batch, 3, 2, 2\) on the CPU, as it was when the model was frozen, got "
    for wrong in (data(4, 12), data(4, 3, 2, 3), torch.ones(4, 3, 2, 2, dtype=torch.int64), torch.ones(())):
        with pytest.raises(ValueError, match=said):
            frozen(wrong)
    with pytest.raises(ValueError, match=r"got torch.float32 \(4, 3, 2, 2\) on meta"):
        frozen(torch.ones(4, 3, 2, 2, device="meta"))
    with pytest.raises(TypeError, match=r"frozen for \(floating point \(batch, 3, 2, 2\)\), .*, got \(\[float\]\)"):
        frozen([1.0])
    several = freeze(Several(), [(data(4, 6), data(4, 5))])
    with pytest.raises(ValueError, match=r"batches of different sizes, \[3, 4\]"):
        several(data(4, 6), data(3, 5))


def test_a_linear_layer_takes_any_number_of_dimensions():
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    frozen = freeze(layer, [data(5, 6), data(2, 3, 6)])
    assert isinstance(frozen, FrozenModule)
    x = data(2, 3, 6)
    assert frozen(x).shape == (2, 3, 4)
    assert torch.equal(frozen(x).flatten(0, 1), frozen(x.flatten(0, 1)))
    assert frozen(x[0, 0]).shape == (4,)
    assert frozen(data(0, 3, 6)).shape == (0, 3, 4)
    assert (frozen(x) - layer(x)).norm() < 0.02 * layer(x).norm()
    with pytest.raises(ValueError, match=r"floating point \(\.\.\., 6\)"):
        frozen(data(3, 5))


def test_the_same_program_everywhere():
    code = """
import torch
from torch import nn
from qsparseprop.inference import freeze
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
frozen = freeze(model, [torch.randn(4, 3, 8, 8)])
print([int(s.weight.codes.long().sum()) for s in frozen.program.steps if hasattr(s, "weight")])
"""
    done = [run_python(code, QSPARSEPROP_ISA=isa) for isa in _dispatch.supported_isas()[:2]]
    assert not any(each.returncode for each in done), done[0].stderr
    assert done[0].stdout == done[-1].stdout


class Masked(nn.Module):
    """Attention with a mask of infinities."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        scores = self.query(x) @ x.transpose(1, 2)
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        return scores.softmax(-1) @ self.value(x)


def test_infinities_that_are_meant():
    model, x = Masked().eval(), data(16, 5, 8)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    assert (frozen(x) - model(x).detach()).norm() < 0.02 * model(x).detach().norm()


def test_rows_for_each_sample():
    """Tokens are rows, and so are images that are put behind each other: the program says how many."""
    model = Attention().eval()
    program = freeze(model, [torch.randint(0, 30, (8, 7))]).program
    assert {value.rows for value in program.values.values() if value.codes} == {1, 7}

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x, y):
            both = self.head(F.relu(self.conv(torch.cat([x, y]))).mean((2, 3)))
            first, second = both.chunk(2)
            return first - second

    model, x, y = Siamese().eval(), data(8, 3, 6, 6), data(8, 3, 6, 6, seed=3)
    frozen = freeze(model, [(x, y)])
    assert isinstance(frozen, FrozenModule)
    assert {value.rows for value in frozen.program.values.values() if value.codes} == {2}
    with torch.no_grad():
        for batch in (8, 1, 5):
            exact = model(x[:batch], y[:batch])
            assert (frozen(x[:batch], y[:batch]) - exact).norm() < 0.05 * exact.norm()
