"""Each thing that can be computed on codes, on small models: what becomes of it, and that the numbers are right."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

from qsparseprop.inference import FrozenModule, freeze
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._frozen import assert_as_good_as_8_bits, data, kinds, randomised


class Lambda(nn.Module):
    """A model that is one expression over layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.function(self, x)


def conv(inside, outside, kernel=3, **settings):
    torch.manual_seed(inside + outside)
    return nn.Conv2d(inside, outside, kernel, **settings)


def check(model, *steps, shape=(8, 4, 10, 10)):
    """Freeze a model and look at the steps between the first and the last layer."""
    model = randomised(model)
    x = data(*shape)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    assert kinds(frozen) == ["Quantize", *steps]
    assert_as_good_as_8_bits(model, frozen, x)
    with torch.no_grad():
        for batch in (0, 1, 7):
            again = torch.cat([x, x])[:batch]
            assert frozen(again).shape == (batch, *frozen(x).shape[1:])
            if batch:  # without samples models may fail that ask for the size that is left, -1
                exact = model(again)
                assert (frozen(again) - exact).norm() < 0.1 * exact.norm()
    return frozen


@pytest.mark.parametrize("settings", [
    {}, {"padding": 1}, {"stride": 2, "padding": (1, 2)}, {"dilation": 2}, {"groups": 2}, {"groups": 4},
    {"bias": False}, {"padding": "same"}, {"padding": "same", "kernel": 4}, {"padding": "valid"},
    {"kernel": (1, 5), "stride": (3, 1)},
], ids=str)  # fmt: skip
def test_convolutions(settings):
    frozen = check(conv(4, 8, **settings), "Product")
    assert frozen.program.steps[1].groups == settings.get("groups", 1)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_is_torchs(mode):
    check(nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 4, padding=1, padding_mode=mode)),
          "Product", "pad", "Quantize", "Product")  # fmt: skip


def test_padding_of_images_that_names_the_channels_too():
    model = Lambda(lambda m, x: m.a(F.pad(x, (0, 1, 2, 0, 0, 0))), a=conv(4, 8, padding=1))
    assert check(model, "Product").program.steps[1].window.padding == (3, 1, 1, 2)


def test_padding_with_zeros_is_the_convolutions():
    model = Lambda(lambda m, x: m.a(F.pad(x, (0, 1, 2, 0))), a=conv(4, 8, padding=1))
    frozen = check(model, "Product")
    assert frozen.program.steps[1].window.padding == (3, 1, 1, 2)


@pytest.mark.parametrize("between", [
    nn.BatchNorm2d(8), nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.ReLU()), nn.ReLU6(), nn.Hardtanh(-0.3, 0.4),
    nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(inplace=True)), nn.Sequential(nn.ReLU6(), nn.ReLU()),
], ids=str)  # fmt: skip
def test_what_is_folded(between):
    check(nn.Sequential(conv(4, 8), between, conv(8, 4)), "Product", "Product")


@pytest.mark.parametrize("limit", [lambda x: x.clamp(-0.2, 0.5), lambda x: x.clamp(min=0.1), lambda x: x.clamp_max(0.3),
                                   lambda x: F.relu_(x), lambda x: torch.clamp(x, max=0.2)])  # fmt: skip
def test_limits(limit):
    frozen = check(Lambda(lambda m, x: m.b(limit(m.a(x))), a=conv(4, 8), b=conv(8, 4)), "Product", "Product")
    assert (frozen.program.steps[1].low, frozen.program.steps[1].high) != (float("-inf"), float("inf"))


@pytest.mark.parametrize("function", [
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.2),
    nn.ELU(0.7), nn.Softplus(), nn.Mish(),
], ids=str)  # fmt: skip
def test_tables(function):
    frozen = check(nn.Sequential(conv(4, 8), function, conv(8, 4)), "Product", "Table", "Product")
    program = frozen.program
    table = program.steps[2].table
    source, target = (program.values[program.steps[i].output].codes for i in (1, 2))
    real = (torch.arange(256, dtype=torch.float64) - source.zero_point) * source.scale.double().unsqueeze(1)
    codes = function(real) / target.scale.double().unsqueeze(1)
    assert torch.equal(table, (codes.round() + target.zero_point).clamp(0, 255).to(torch.uint8))


def test_a_table_for_all_channels_where_they_have_one_scale():
    model = nn.Sequential(conv(4, 8), nn.SiLU(), conv(8, 4))
    frozen = freeze(model, [data(4, 4, 8, 8)], per_channel=False)
    assert frozen.program.steps[2].table.shape == (256,)
    assert_as_good_as_8_bits(model, frozen, data(4, 4, 8, 8))


@pytest.mark.parametrize(("pool", "kind"), [
    (nn.MaxPool2d(2), "max"), (nn.MaxPool2d(3, 2, 1), "max"), (nn.MaxPool2d(2, 3, dilation=2), "max"),
    (nn.MaxPool2d(3, 2, ceil_mode=True), "max"), (nn.AvgPool2d(2), "mean"), (nn.AvgPool2d(3, 1, 1), "mean"),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), "mean"), (nn.AdaptiveAvgPool2d(4), "mean"),
    (nn.AdaptiveAvgPool2d((1, 2)), "mean"),
], ids=str)  # fmt: skip
def test_pools(pool, kind):
    model = nn.Sequential(conv(4, 8), nn.ReLU(), pool, conv(8, 4, 1))
    frozen = check(model, "Product", "Pool", "Product")
    assert frozen.program.steps[2].kind == kind


@pytest.mark.parametrize("flat", [
    lambda x: x.mean((2, 3)), lambda x: x.mean([-1, -2]), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
    lambda x: F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)), lambda x: F.avg_pool2d(x, 8).view(x.size(0), -1),
    lambda x: F.adaptive_avg_pool2d(x, (1, 1)).reshape(-1, 8),
])  # fmt: skip
def test_means_before_a_classifier(flat):
    model = Lambda(lambda m, x: m.b(flat(F.relu(m.a(x)))), a=conv(4, 8), b=nn.Linear(8, 3))
    check(model, "Product", "Pool", "Flatten", "Product")


@pytest.mark.parametrize("flat", [nn.Flatten(), Lambda(lambda m, x: x.view(x.shape[0], -1)),
                                  Lambda(lambda m, x: x.reshape(x.size(0), 8 * 64))])  # fmt: skip
def test_flattened_images(flat):
    check(nn.Sequential(conv(4, 8), nn.ReLU(), flat, nn.Linear(512, 5)), "Product", "Flatten", "Product")


@pytest.mark.parametrize("activation", [F.relu, lambda x: x, F.relu6])
def test_residual_additions_are_in_the_layer_before_them(activation):
    model = Lambda(lambda m, x: m.c(activation(m.b(F.relu(m.a(x))) + m.a(x))), a=conv(4, 8), b=conv(8, 8, padding=1),
                   c=conv(8, 4))  # fmt: skip
    # the first convolution is computed twice, since the model says so
    frozen = check(model, "Product", "Product", "Product", "Product")
    assert sum(len(step.inputs) == 2 for step in frozen.program.steps) == 1


def test_additions_of_what_others_read_too_are_by_themselves():
    def block(m, x):
        y, z = F.relu(m.a(x)), F.relu(m.b(x))
        return m.c(F.relu(y + z)) + m.c(y) + m.c(z)

    model = Lambda(block, a=conv(4, 8), b=conv(4, 8), c=conv(8, 4))
    frozen = check(model, "Product", "Product", "Add", "Product", "Product", "Product", "add", "add")
    assert frozen.program.steps[3].low == 0


def test_a_value_added_to_itself():
    def block(m, x):
        y = F.relu(m.a(x))
        return m.b(y + y)

    check(Lambda(block, a=conv(4, 8), b=conv(8, 4)), "Product", "Add", "Product")


def test_concatenation_shares_a_zero_point():
    def block(m, x):
        return m.c(torch.cat([F.relu(m.a(x)), m.b(x), F.max_pool2d(F.relu(m.a(x)), 3, 1, 1)], 1))

    model = Lambda(block, a=conv(4, 8), b=conv(4, 6), c=conv(22, 4))
    frozen = check(model, "Product", "Product", "Product", "Pool", "Concat", "Product")
    zero_points = {v.codes.zero_point for name, v in frozen.program.values.items() if v.codes and name != "x.codes"}
    assert zero_points == {128}


def test_normalisation_that_is_behind_no_layer():
    model = nn.Sequential(conv(4, 8), nn.ReLU(), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 4))
    frozen = check(model, "Product", "Product", "Product")
    assert frozen.program.steps[2].groups == 8
    assert [layer.kind for layer in frozen.report] == ["Conv2d", "BatchNorm", "Conv2d"]


def test_normalisation_of_floats_stays_one():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Softmax(1), conv(4, 8))
    frozen = freeze(randomised(model), [data(4, 4, 8, 8)])
    assert kinds(frozen) == ["conv2d", "softmax", "Quantize", "Product"]
    assert [(layer.name, layer.quantised) for layer in frozen.report] == [("0", False), ("2", True)]


def test_every_second_pixel_and_channels_of_zeros():
    def block(m, x):
        y = F.relu(m.a(x))
        return m.c(F.relu(m.b(y) + F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 3, 5))))

    model = Lambda(block, a=conv(4, 8), b=conv(8, 16, 3, stride=2, padding=1), c=conv(16, 4, 1))
    frozen = check(model, "Product", "Pool", "Product", "Product", "Product")
    assert [layer.name for layer in frozen.report] == ["a", "b", "c"]
    # the copy is the residual, so that nothing is added by itself
    residual = next(step for step in frozen.program.steps if len(step.inputs) == 2)
    assert residual.weight.columns == 72


def test_one_dimension_is_height_one():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=2, dilation=2), nn.BatchNorm1d(8), nn.GELU(),
                          nn.Conv1d(8, 6, 3, stride=2, groups=2, padding="valid"))  # fmt: skip
    model = randomised(model)
    x = data(6, 4, 16)
    frozen = freeze(model, [x])
    assert kinds(frozen) == ["reshape", "Quantize", "Product", "Table", "Product", "reshape"]
    assert_as_good_as_8_bits(model, frozen, x)


def test_causal_convolutions():
    def block(m, x):
        y = F.relu(m.a(F.pad(x, (2, 0))))
        return m.b(F.pad(y, (4, 0))) + F.pad(x, (1, -1), "reflect")

    model = Lambda(block, a=nn.Conv1d(4, 8, 3), b=nn.Conv1d(8, 4, 3, dilation=2)).eval()
    x = data(6, 4, 16)
    frozen = freeze(model, [x])
    assert kinds(frozen).count("pad") == 1
    assert [s.window.padding for s in frozen.program.steps if hasattr(s, "weight")] == [(0, 0, 2, 0), (0, 0, 4, 0)]
    assert_as_good_as_8_bits(model, frozen, x)


@pytest.mark.parametrize("shape", [(5, 6), (5, 3, 6), (5, 2, 3, 6)])
def test_linear_layers_on_rows_of_any_shape(shape):
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(), nn.Linear(16, 6))
    rows = Lambda(lambda m, x: m.a(x), a=model).eval()
    x = data(*shape)
    frozen = freeze(rows, [x])
    around = ["reshape"] if len(shape) > 2 else []
    assert kinds(frozen) == [*around, "Quantize", "Product", "Table", "Product", *around]
    assert_as_good_as_8_bits(rows, frozen, x)


@pytest.mark.parametrize("kind", [nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Conv3d(1, 2, 3)])
def test_others_stay_as_they_are(kind):
    model = nn.Sequential(nn.Unflatten(1, (1, 4)), kind) if isinstance(kind, nn.Conv3d) else kind
    frozen = freeze(model.eval(), [data(4, 4, 8, 8)])
    assert [(layer.kind, layer.quantised, layer.reason) for layer in frozen.report] == [
        (type(kind).__name__, False, "has no form on codes")]  # fmt: skip
    torch.testing.assert_close(frozen(data(3, 4, 8, 8)), model(data(3, 4, 8, 8)).detach())


def test_zeros_are_left_out():
    model = nn.Sequential(conv(4, 8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 6))
    for layer in (model[0], model[3]):
        prune.random_unstructured(layer, "weight", 0.8)
    before = copy.deepcopy(model.state_dict())
    x = data(4, 4, 10, 10)
    frozen = freeze(model, [x])
    counts = [step.weight.codes.numel() for step in frozen.program.steps if hasattr(step, "weight")]
    kept = [int((layer.weight != 0).sum()) for layer in (model[0], model[3])]
    # some round to zero
    assert all(0.9 * n <= count <= n for count, n in zip(counts, kept, strict=True))
    assert [round(layer.zeros, 2) for layer in frozen.report] == [0.8, 0.8]
    assert prune.is_pruned(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert_as_good_as_8_bits(model.eval(), frozen, x)


def test_parametrized_weights():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(conv(4, 8)), nn.ReLU(), conv(8, 4)).eval()
    x = data(4, 4, 8, 8)
    before = model(x)
    frozen = freeze(model, [x])
    assert torch.equal(model(x), before)
    assert parametrize.is_parametrized(model[0])
    assert_as_good_as_8_bits(model, frozen, x)


def test_swapped_models_are_frozen_as_their_dense_ones():
    dense = randomised(nn.Sequential(conv(4, 16), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 6)))
    for layer in (dense[0], dense[4]):
        layer.weight.data *= torch.rand_like(layer.weight) < 0.2
    swapped = swap_modules_with_sparse(copy.deepcopy(dense), None, verbose=False, include_dense=False, min_sparsity=0.5,
                                       fuse=True)  # fmt: skip
    assert isinstance(swapped[0], QuantizedSparseConv2d)
    assert isinstance(swapped[4], QuantizedSparseLinear)
    x = data(4, 4, 10, 10)
    first, second = freeze(dense, [x]), freeze(swapped, [x])
    assert torch.equal(first(x), second(x))
    assert isinstance(swapped[0], QuantizedSparseConv2d)
    assert [layer.name for layer in second.report] == ["0", "4"]


def test_pools_of_what_layers_read_too_are_on_codes():
    model = Lambda(lambda m, x: torch.cat([m.a(x), m.b(F.max_pool2d(x, 3, 1, 1))], 1), a=conv(4, 8, 1), b=conv(4, 8, 1))
    check(model, "Product", "Pool", "Product", "cat")


def test_calls_lie_together():
    """What of torch depends on nothing on codes does not lie between two steps on them."""

    def block(m, x):
        y = F.relu(m.a(x))
        z = x.softmax(1)
        y = F.relu(m.b(y))
        return m.c(y + F.relu(m.d(z)))

    layers = {"a": conv(4, 8), "b": conv(8, 8, padding=1), "c": conv(8, 4), "d": conv(4, 8)}
    frozen = freeze(Lambda(block, **layers).eval(), [data(4, 4, 10, 10)])
    assert kinds(frozen)[0] == "softmax"
    assert kinds(frozen).count("softmax") == 1
    assert all(kind in ("Quantize", "Product", "Add") for kind in kinds(frozen)[1:])
