"""Models that cannot be traced: what of them is frozen, and what is said of the rest."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.inference import FrozenModule, freeze

from ._frozen import data


class Branches(nn.Module):
    """A model that looks at values, holds layers in a list, and lends a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.some = nn.ModuleList([nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.lent, self.never = nn.Linear(8, 3), nn.Linear(2, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > 0:
            x = -x
        x = self.norm(self.inner(x))
        for layer in self.some:
            x = layer(x)
        return F.linear(x, self.lent.weight) if x.sum() < 1e9 else self.never(x)


def frozen_parts(model):
    return {name for name, module in model.named_modules() if isinstance(module, FrozenModule)}


def test_the_largest_parts_are_frozen():
    model = Branches()
    x = data(16, 6)
    frozen = freeze(model, [x])
    assert frozen_parts(frozen) == {"first", "inner", "some.0", "some.1"}
    assert frozen_parts(model) == set()
    assert not frozen.training
    report = frozen.freeze_report
    assert not report.whole
    assert "data-dependent" in report.reason
    assert f"frozen part by part: {report.reason}" in str(report)
    layers = {layer.name: (layer.quantised, layer.reason) for layer in report}
    assert layers == {
        "first": (True, ""), "inner.0": (True, ""), "inner.2": (True, ""), "some.0": (True, ""), "some.1.0": (True, ""),
        "lent": (False, "not called as a module"), "never": (False, "not called as a module"),
    }  # fmt: skip
    with torch.no_grad():
        for rows in (x, x[:1], torch.cat([x, x])[:23], x[:0]):
            exact = model(rows)
            assert (frozen(rows) - exact).norm() <= 0.03 * exact.norm()


def test_nothing_of_torch_is_printed(capfd):
    freeze(Branches(), [data(16, 6)])
    assert capfd.readouterr() == ("", "")


class AsksForOne(nn.Module):
    """What it does with one sample is something else than with several."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.conv(x), 1).squeeze())


def test_a_graph_that_is_wrong_for_one_sample_is_not_taken():
    model = AsksForOne()
    frozen = freeze(model, [data(8, 3, 6, 6)])
    assert frozen.freeze_report.reason == "its graph computes something else than it does"
    assert frozen_parts(frozen) == {"conv", "head"}
    assert frozen(data(1, 3, 6, 6)).shape == model(data(1, 3, 6, 6)).shape == (2,)
    assert frozen(data(5, 3, 6, 6)).shape == (5, 2)


class Draws(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what, self.layer, self.conv = what, nn.Linear(6, 4), nn.Conv2d(1, 2, 1)

    def forward(self, x):
        return self.what(self, self.layer(x))


class Named(dict):
    """A result that is no plain dict."""


def counted(model, x):
    model.count.add_(1)
    return x


@pytest.mark.parametrize(("what", "reason"), [
    (lambda m, x: x + torch.rand_like(x), "draws random numbers"),
    (lambda m, x: F.dropout(x, 0.5, training=True), "draws random numbers"),
    (lambda m, x: (x, 3), "its result holds 3"),
    (lambda m, x: x + 1 if x.shape[0] % 3 else x, "some sizes of the batch only ((batch % 3) != 0)"),
    (lambda m, x: x + 1 if x.shape[0] != 7 else x, "some sizes of the batch only (batch != 7)"),
    (lambda m, x: x + 1 if x.shape[0] > 3 else x, "some sizes of the batch only"),
    (lambda m, x: x.view(x.shape[0] // 4, 4, -1).flatten(0, 1), "some sizes of the batch only"),
    (lambda m, x: x.reshape(len(x), 4), "some sizes of the batch only (batch == 4)"),
    (lambda m, x: torch.tensor(x.tolist()), ""),
    (counted, "it writes to 'count'"),
])  # fmt: skip
def test_reasons(what, reason):
    model = Draws(what)
    model.register_buffer("count", torch.zeros(()))
    frozen = freeze(model, [data(4, 6)])
    assert frozen_parts(frozen) == {"layer"}
    assert reason in frozen.freeze_report.reason
    with torch.no_grad():
        assert frozen(data(4, 6)) is not None


def test_inputs_of_several_sizes():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(1, 4, 3), nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(self.conv(x).mean((2, 3)))

    frozen = freeze(Any(), [data(4, 1, 8, 8), data(4, 1, 6, 6)])
    assert frozen_parts(frozen) == {"linear"}
    assert [(layer.name, layer.reason) for layer in frozen.freeze_report] == [
        ("linear", ""), ("conv", "calibration batches differ in more than their number of samples")]  # fmt: skip


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x):
        if x.abs().max() > 1e9:
            raise ValueError("too large")
        return self.layer(x)


def test_a_transformer_layer_as_a_part():
    model = Transformer().eval()
    x = data(4, 5, 16)
    frozen = freeze(model, [x])
    assert frozen_parts(frozen) == {"layer"}
    assert [layer.name for layer in frozen.freeze_report if layer.quantised] == [
        "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj", "layer.linear1", "layer.linear2"]  # fmt: skip
    with torch.no_grad():
        assert (frozen(x[:3]) - model(x[:3])).norm() < 0.02 * model(x[:3]).norm()


def test_tokens_of_any_number_leave_the_linear_layers():
    """Torch's own layers would read the weights of theirs, were they not kept off their fast path."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 4)).eval()
    frozen = freeze(model, [data(32, 5, 16), data(32, 6, 16)])
    assert frozen_parts(frozen) == {"0.linear1", "0.linear2", "1"}
    reasons = {layer.name: layer.reason for layer in frozen.freeze_report if not layer.quantised}
    assert reasons == {"0.self_attn.out_proj": "not called as a module"}
    with torch.no_grad():
        assert (frozen(data(3, 9, 16)) - model(data(3, 9, 16))).norm() < 0.02 * model(data(3, 9, 16)).norm()
    assert frozen(data(3, 9, 16)).shape == (3, 9, 4)


class ReadsWeights(nn.Module):
    """A layer whose weight somebody else reads, and that is called as well."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.other(self.layer(x)) * self.layer.weight.mean()


def test_a_layer_whose_weight_is_read_stays():
    frozen = freeze(ReadsWeights(), [data(4, 4)])
    assert frozen_parts(frozen) == {"other"}
    left = next(layer for layer in frozen.freeze_report if layer.name == "layer")
    assert left.reason == ("the model does not run with it frozen "
                           "(AttributeError: 'FrozenModule' object has no attribute 'weight')")  # fmt: skip


class Held(nn.Module):
    """A part of a model that nobody calls: others call what is in it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6))), nn.Linear(6, 2)

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.head(self.body[1](torch.relu(self.body[0](x))))


def test_parts_of_what_is_not_called_are_frozen():
    frozen = freeze(Held(), [data(4, 4)])
    assert frozen_parts(frozen) == {"body.0", "body.1", "head"}
    assert all(layer.quantised for layer in frozen.freeze_report)


def test_layers_of_other_packages():
    """Transposed linear layers of transformers, as parts."""
    transformers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)

    class Model(Held):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(transformers.Conv1D(6, 4), transformers.Conv1D(6, 6))

    model = Model().eval()
    frozen = freeze(model, [data(8, 4)])
    assert frozen_parts(frozen) == {"body.0", "body.1", "head"}
    with torch.no_grad():
        assert (frozen(data(8, 4)) - model(data(8, 4))).norm() < 0.02 * model(data(8, 4)).norm()
