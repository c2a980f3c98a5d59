"""Weights of all kinds: computed by the model, shared, kept float by name or type, in several shapes of one value."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.inference import FrozenModule, freeze, load, save
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._frozen import assert_as_good_as_8_bits, data, kinds


class Masked(nn.Linear):
    """Pruned by hand, as many training scripts do it."""

    def __init__(self, inside, outside):
        super().__init__(inside, outside)
        self.register_buffer("mask", (torch.rand(outside, inside) < 0.1).float())

    def forward(self, x):
        return F.linear(x, self.weight * self.mask, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x):
        spread, mean = torch.std_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (spread + 1e-5), self.bias, self.stride, self.padding)


class Cut(nn.Module):
    """Two layers with one parameter, as cross attention has them."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(12, 8) / 3)

    def forward(self, x):
        query, key = self.both.split([4, 8])
        return F.linear(F.linear(x, key).relu(), query)


@pytest.mark.parametrize(("build", "shape", "names"), [
    (lambda: nn.Sequential(Masked(8, 16), nn.ReLU(), Masked(16, 4)), (64, 8), ["0", "2"]),
    (lambda: nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 4, 3)), (8, 3, 9, 9), ["0", "2"]),
    (Cut, (64, 8), ["both", "both"]),
    (lambda: nn.Sequential(nn.Linear(8, 8), nn.utils.weight_norm(nn.Linear(8, 4))), (64, 8), ["0", "1"]),
], ids=["masked", "standardised", "cut", "weight_norm"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_are_computed_once(build, shape, names):
    torch.manual_seed(0)
    model, x = build().eval(), data(*shape)
    frozen = freeze(model, [x])
    assert [(layer.name.split(".weight")[0], layer.quantised) for layer in frozen.report] == [(n, True) for n in names]
    assert kinds(frozen) == ["Quantize", "Product", "Product"]
    assert_as_good_as_8_bits(model, frozen, x)
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, Masked):
        assert all(layer.zeros > 0.8 for layer in frozen.report)


def test_cross_attention_is_on_codes():
    torch.manual_seed(0)
    model, x, y = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True).eval(), data(8, 5, 16), data(8, 4, 16, seed=2)
    frozen = freeze(model, [(x, y)])
    assert len(frozen.report) == 7
    assert all(layer.quantised for layer in frozen.report)
    with torch.no_grad():
        exact = model(x, y)
    assert (frozen(x, y) - exact).norm() < 0.02 * exact.norm()


class Tied(nn.Module):
    """Two layers with one weight, and one module under two names."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.third = self.alias = nn.Linear(8, 3)

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())


@pytest.mark.parametrize(("kept", "codes"), [
    (["first"], ["second", "third"]), (["second"], ["first", "third"]), (["alias"], ["first", "second"]),
    (["third"], ["first", "second"]),
])  # fmt: skip
def test_layers_that_share_a_weight_are_told_apart(kept, codes):
    torch.manual_seed(0)
    report = freeze(Tied(), [data(64, 8)], keep_float=kept).report
    assert [layer.name for layer in report] == ["first", "second", "third"]
    assert [layer.name for layer in report if layer.quantised] == codes


def test_layers_are_kept_by_the_names_that_the_report_has():
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), data(8, 5, 16)
    for name in [layer.name for layer in freeze(model, [x]).report]:
        report = freeze(model, [x], keep_float=[name]).report
        assert [layer.name for layer in report if not layer.quantised] == [name]


def test_types_of_dense_layers_mean_swapped_ones_too():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)), data(8, 3, 8, 8)
    for layer in (model[0], model[3]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    swapped = swap_modules_with_sparse(model, None, inplace=False, verbose=False, include_dense=False, min_sparsity=0.5)
    for kind in (nn.Linear, type(swapped[3])):
        report = freeze(swapped, [x], keep_float=[kind]).report
        assert [layer.quantised for layer in report] == [True, False]


class Mixing(nn.Module):
    """One value read as a signal, by a convolution, and as rows, by a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.rows, self.last = nn.Conv1d(8, 12, 3, padding=1), nn.Linear(10, 6), nn.Conv1d(12, 5, 1)

    def forward(self, x):
        return self.rows(x), self.last(self.rows(self.conv(x).relu()).relu())


def test_a_value_may_be_rows_and_a_signal(tmp_path):
    torch.manual_seed(0)
    model, x = Mixing(), data(16, 8, 10)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    assert all(layer.quantised for layer in frozen.report)
    save(frozen, tmp_path / "m.qsp")
    with torch.no_grad():
        for mine, same, exact in zip(frozen(x), load(tmp_path / "m.qsp")(x), model(x), strict=True):
            assert torch.equal(mine, same)
            assert (mine - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("tokens", [6, 9], ids=["as many as features", "others"])
def test_normalisation_over_tokens_stays_one(tokens):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(tokens), nn.ReLU(), nn.Linear(6, 4)).eval()
    model[1].running_mean.normal_()
    x = data(16, tokens, 8)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    with torch.no_grad():
        exact = model(x)
    assert (frozen(x) - exact).norm() < 0.02 * exact.norm()
