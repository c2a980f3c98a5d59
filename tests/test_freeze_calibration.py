"""Scales, weights and biases of frozen models, and what they refuse."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop.inference import FreezeReport, freeze, measure_accuracy
from qsparseprop.inference.calibration import MinMax, MovingAverage, Percentile, codes_of
from qsparseprop.inference.draft import Layer
from qsparseprop.inference.steps import Codes, Product, Window
from qsparseprop.inference.weights import code_weight, real_weight

from ._frozen import assert_as_good_as_8_bits, data, randomised
from ._helpers import sampled


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()


def products(frozen):
    return [step for step in frozen.program.steps if isinstance(step, Product)]


# ---- observers ----


def seen(observer, *batches):
    for batch in batches:
        observer.see(torch.tensor(batch))
    return [limit.tolist() for limit in observer.ranges()]


def test_smallest_and_largest():
    assert seen(MinMax(), [[1.0, -2.0], [0.0, 3.0]], [[0.5, 4.0], [1.0, 1.0]]) == [[-2.0, 0.0], [4.0, 3.0]]


def test_average_of_extremes():
    low, high = seen(MovingAverage(), [[-1.0, 2.0]], [[-3.0, 4.0]], [[0.0, 1.0]])
    assert low == pytest.approx([0.9 * (0.9 * -1 + 0.1 * -3)])
    assert high == pytest.approx([0.9 * (0.9 * 2 + 0.1 * 4) + 0.1])


def test_all_but_a_few():
    values = torch.arange(-10000.0, 10001.0)
    low, high = seen(Percentile(99.9), [values.tolist(), (values * 0).tolist()])
    assert high == [values.quantile(0.999, interpolation="nearest").item(), 0]
    assert low == [-high[0], 0]
    # one that is almost always zero keeps what there is
    assert seen(Percentile(90.0), [[0.0] * 99 + [5.0]]) == [[0.0], [5.0]]
    many = Percentile()
    for seed in range(5):
        many.see(data(2, 30000, seed=seed))
    assert many._sample.shape[1] <= Percentile.SAMPLE
    assert all(3 < each < 5 for each in many.ranges()[1].tolist())
    with pytest.raises(ValueError, match=r"percentile must lie in \(50, 100\], got 30"):
        Percentile(30)


def test_scales():
    low, high = torch.tensor([0.0, 0.0, 0.0]).double(), torch.tensor([255.0, 0.0, 51.0]).double()
    codes = codes_of(low, high, 0)
    assert codes.scale.tolist() == pytest.approx([1.0, 0.2, 0.2])  # a channel that is always zero has the least scale
    assert codes_of(-high, low, 128).scale.tolist() == pytest.approx([255 / 127, 51 / 127, 51 / 127])
    assert codes_of(low, low, 0).scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "percentile"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_each_observer_in_a_model(observer, per_channel):
    model = randomised(small())
    x = data(256, 3, 8, 8)
    frozen = freeze(model, x.split(64), observer=observer, per_channel=per_channel)
    scales = frozen.program.values["x.codes" if "x.codes" in frozen.program.values else "input.codes"].codes.scale
    assert (scales.unique().numel() > 1) == per_channel
    with torch.no_grad():
        assert (frozen(x) - model(x)).norm() < 0.03 * model(x).norm()
    if observer == "minmax":
        assert_as_good_as_8_bits(model, frozen, x)


def test_zero_points():
    program = freeze(randomised(small()), [data(8, 3, 8, 8).abs()]).program
    points = [value.codes.zero_point for value in program.values.values() if value.codes]
    assert set(points) == {0}  # nothing is negative
    program = freeze(randomised(small()), [data(8, 3, 8, 8)]).program
    points = [value.codes.zero_point for value in program.values.values() if value.codes]
    assert sorted(set(points)) == [0, 128]


def test_channels_that_are_always_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data[2], model[0].bias.data[2] = 0, 0
    x = data(4, 3, 5, 5)
    x[:, 1] = 0
    frozen = freeze(model, [x])
    assert all(value.codes is None or bool((value.codes.scale > 0).all()) for value in frozen.program.values.values())
    assert_as_good_as_8_bits(model, frozen, x)


# ---- weights and biases ----


@pytest.mark.parametrize("groups", [1, 2])
def test_weights_have_the_scales_of_their_input(groups):
    weight = data(6, 4 // groups, 3, 3) * (data(6, 4 // groups, 3, 3, seed=5) > 0)
    weight[4] = 0
    layer = Layer(inputs=("x",), output="y", weight=weight, bias=torch.zeros(6), window=Window((3, 3)), groups=groups)
    source = Codes(torch.tensor([0.5, 2.0, 1.0, 0.1]), 128)
    coded = code_weight(layer, source)
    scale = source.scale.double().view(groups, 1, -1).repeat_interleave(6 // groups, 1).view(6, -1, 1, 1)
    step = coded.scale.double().view(6, 1, 1, 1) / scale
    real = real_weight(layer, coded, source)
    assert bool(((real - weight.double()).abs() <= step * 0.5 * (1 + 1e-12)).all())
    assert bool((real[weight == 0] == 0).all())
    assert bool((coded.codes != 0).all())
    largest = coded.dense().abs().amax(1)
    assert largest.tolist() == [127, 127, 127, 127, 0, 127]


def test_biases_are_corrected():
    """Coarse weights have errors that do not cancel, and the mean of each output is right all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for layer in (model[0], model[2], model[4]):
        layer.weight.data[:, 0] = 20 * layer.weight.data.abs().max()  # one weight a row that takes all codes
    x = 1 + 0.2 * data(256, 64).abs()  # of one sign, so that errors add up
    x[:, 0] *= 0.01
    exact = model(x).detach()
    errors = {}
    for correct in (True, False):
        frozen = freeze(model, [x], correct_bias=correct, per_channel=False)
        difference = frozen(x) - exact
        errors[correct] = difference.mean(0).norm(), difference.norm()
        other = 1 + 0.2 * data(256, 64, seed=9).abs()
        other[:, 0] *= 0.01
        errors[correct] += ((frozen(other) - model(other).detach()).norm(),)
    assert errors[True][0] < 1e-4 * exact.mean(0).norm()
    assert errors[True][0] < 0.01 * errors[False][0]
    assert errors[True][1] < 0.7 * errors[False][1]
    assert errors[True][2] < 0.7 * errors[False][2]


def test_rows_longer_than_an_int32_holds_stay_float():
    model = nn.Sequential(nn.Linear(65537, 2), nn.ReLU(), nn.Linear(2, 2))
    frozen = freeze(model, [data(4, 65537)])
    assert [(layer.quantised, layer.reason) for layer in frozen.report] == [
        (False, "rows of 65537 weights, of more than 65536"), (True, "")]  # fmt: skip
    longest = nn.Linear(65536, 2)
    longest.weight.data.fill_(1.0)
    x = torch.full((2, 65536), 255.0)
    # all codes are 255 and all weights 127: the largest sum that there is
    assert freeze(longest, [x])(x)[0, 0].item() == pytest.approx(65536 * 255, rel=1e-6)


# ---- settings ----


def test_layers_that_stay_float():
    x = data(8, 3, 8, 8)
    frozen = freeze(small(), [x], keep_float=[nn.Linear])
    assert [(layer.name, layer.quantised, layer.reason) for layer in frozen.report] == [
        ("0", True, ""), ("4", False, "asked for")]  # fmt: skip
    inside = nn.Sequential(small(), nn.Linear(4, 2))
    for kept in (["0.0", "0.4", "1"], [nn.Conv2d, "0.4", nn.Linear], ["0", "1"]):
        frozen = freeze(inside.eval(), [x], keep_float=kept)
        assert products(frozen) == []
        torch.testing.assert_close(frozen(x), inside(x).detach(), rtol=1e-5, atol=1e-5)


def test_data_loaders_have_labels():
    x, y = data(20, 3, 8, 8), torch.arange(20) % 4
    frozen = freeze(small(), DataLoader(TensorDataset(x, y), batch_size=8))
    assert torch.equal(frozen(x), freeze(small(), x.split(8))(x))
    without = DataLoader(TensorDataset(x), batch_size=8)
    assert torch.equal(frozen(x), freeze(small(), without)(x))


def test_an_example_to_trace_with():
    batches = [data(1, 3, 8, 8), data(6, 3, 8, 8)]
    frozen = freeze(small(), batches, example=batches[1])
    assert torch.equal(frozen(batches[1]), freeze(small(), batches)(batches[1]))


def test_a_metric_before_and_after():
    x, y = data(32, 3, 8, 8), torch.arange(32) % 4
    model = small()
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    frozen = freeze(model, loader, metric=lambda m: measure_accuracy(m, loader))
    assert frozen.report.metric_before == measure_accuracy(model, loader)
    assert frozen.report.metric_after == measure_accuracy(frozen, [(x, y)])
    with torch.no_grad():
        assert frozen.report.metric_before == 100 * float((model(x).argmax(1) == y).float().mean())
    assert measure_accuracy(model, loader, "top5") == 100
    assert measure_accuracy(model, loader, lambda out, labels: float(len(labels))) == 16
    with pytest.raises(ValueError, match="metric must be 'top1', 'top5' or a function, got 'top2'"):
        measure_accuracy(model, loader, "top2")
    with pytest.raises(ValueError, match="no batches"):
        measure_accuracy(model, [])
    text = str(frozen.report)
    assert "metric" in text.splitlines()[-1]
    assert "4" in text


def test_the_report():
    report = freeze(randomised(small()), [data(8, 3, 8, 8)]).report
    assert isinstance(report, FreezeReport)
    assert [(layer.name, layer.kind, layer.quantised) for layer in report] == [
        ("0", "Conv2d", True), ("4", "Linear", True)]  # fmt: skip
    assert all(0 < layer.error < 0.03 for layer in report)
    assert [layer.name for layer in report.worst(1)] == [max(report, key=lambda layer: layer.error).name]
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "type", "zeros", "error", "computes", "on"]
    assert lines[2].split()[0] == "0"
    assert report.as_dicts()[0]["name"] == "0"
    assert report.whole


# ---- refusals ----


def test_what_is_refused():
    x = data(4, 3, 8, 8)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        freeze("model", [x])
    with pytest.raises(TypeError, match=r"calibration must be an iterable of batches, .* got Tensor"):
        freeze(small(), x)
    for empty in ([], [x[:0]]):
        with pytest.raises(ValueError, match="no calibration batches: scales need some examples"):
            freeze(small(), empty)
    with pytest.raises(TypeError, match=r"a calibration batch must be a tensor, or a tuple, .* got int"):
        freeze(small(), [3])
    with pytest.raises(TypeError, match="a calibration batch holds no tensor"):
        freeze(small(), [(3,)])
    with pytest.raises(ValueError, match="observer must be one of 'minmax', 'moving_average', 'percentile', got 'max'"):
        freeze(small(), [x], observer="max")
    with pytest.raises(ValueError, match="keep_float names 'conv', which the model does not have"):
        freeze(small(), [x], keep_float=["conv"])
    with pytest.raises(TypeError, match="keep_float must be several names, got the string"):
        freeze(small(), [x], keep_float="0")
    with pytest.raises(TypeError, match="keep_float takes names and types of modules, got 3"):
        freeze(small(), [x], keep_float=[3])
    with pytest.raises(ValueError, match="the model is frozen already"):
        freeze(freeze(small(), [x]), [x])
    with pytest.raises(ValueError, match="the model must be on the CPU"):
        freeze(small().to("meta"), [x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad):
    x = data(4, 3, 8, 8)
    model = small()
    model[4].weight.data[0, 0] = bad
    with pytest.raises(ValueError, match="the weights of '4' hold NaN or infinity"):
        freeze(model, [x])
    wrong = x.clone()
    wrong[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="the calibration data holds NaN or infinity"):
        freeze(small(), [x, wrong])
    model = small()
    model[0].weight.data *= 1e30
    with pytest.raises(ValueError, match="'0' gives NaN or infinity on the calibration data"):
        freeze(model, [x, x * 1e10])


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_few_samples_do_not_tell_the_ranges_of_channels(observer):
    """Of a handful of rows each feature's largest element is far from what it may be: all get that of the largest."""
    layer, few = nn.Linear(200, 30), torch.randn(4, 200)
    batches = [few] if observer == "minmax" else list(few.split(1)) * 20
    scales = freeze(layer, batches, token_scales=False, observer=observer).program.values["input.codes"].codes.scale
    assert bool((scales == scales[0]).all())
    if observer == "minmax":
        assert scales[0] >= few.abs().max() / 127
    else:
        assert scales[0] >= 0.5 * few.abs().amax(1).mean() / 127


@pytest.mark.parametrize(
    ("observer", "samples", "width"),
    sampled(product(["minmax", "moving_average", "percentile"], [64, 256, 1024], [8, 64]), every=5),
)
def test_scales_of_channels_are_no_worse_than_one_for_all(observer, width, samples):
    """What few elements do not show of a channel is cut off later, which costs more than coarser codes."""
    torch.manual_seed(0)
    first, second, last = nn.Linear(20, width), nn.Linear(width, width), nn.Linear(width, 5)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
    x, batches = data(2048, 20, seed=3), data(samples, 20).split(64)
    with torch.no_grad():
        exact = model(x)
    errors = [(freeze(model, batches, observer=observer, per_channel=own)(x) - exact).norm() for own in (True, False)]
    assert errors[0] < 3 * errors[1]
    assert errors[0] < 0.03 * exact.norm()


def test_data_that_is_zero_all_over_is_refused():
    with pytest.raises(ValueError, match="zero all over"):
        freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), [torch.zeros(4, 3, 9, 9)])
