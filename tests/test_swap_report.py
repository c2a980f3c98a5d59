"""The report of a swap, and the times in it."""

import json

import pytest
import torch
from torch import nn

from qsparseprop.nn import QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.utils import _layer_timing
from qsparseprop.utils.measurement_utils import Comparison, Spread
from qsparseprop.utils.network_utils import SwapDecision, SwapReport, swap_modules_with_sparse

from ._helpers import set_weight
from ._swapping import SHAPE, Net, decisions, swap

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_report(net, capsys):
    swap_modules_with_sparse(net, SHAPE, prototype=True, min_sparsity=0.5, verbose=True, skip_modules=["head"])
    assert [d.input_shape for d in net.swap_report] == [None, (6, 8, 10, 9), (6, 12, 5, 5), None]
    capsys.readouterr()
    net = Net()
    swap_modules_with_sparse(net, SHAPE, include_dense=False, verbose=True)
    printed = capsys.readouterr().out
    report = net.swap_report
    assert isinstance(report, SwapReport)
    assert all(isinstance(d, SwapDecision) for d in report)
    assert [d.name for d in report] == ["stem", "block.2", "last", "head"]
    assert [d.kind for d in report] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    assert [d.shape for d in report] == [(8, 3, 3, 3), (12, 8, 3, 3), (12, 4, 3, 1), (5, 12)]
    assert [d.input_shape for d in report] == [None] * 4  # nothing was run
    assert [d.swapped for d in report] == [False, True, True, True]
    assert report.swapped == report[1:]
    assert printed == f"{report}\n"
    header, rule, *rows, note = str(report).splitlines()
    assert header.split()[0] == "layer"
    assert "parameter_groups" in note
    assert set(rule) == {"-"}
    assert len(rows) == 4
    for row, d in zip(rows, report, strict=True):
        assert row.startswith(d.name)
        assert "x".join(map(str, d.shape)) in row
        assert f"{100 * d.sparsity:.1f} %" in row
        assert ("sparse" if d.swapped else f"dense: {d.reason}") in row
    assert json.loads(json.dumps(report.as_dicts()))[1]["name"] == "block.2"
    assert not capsys.readouterr().out


def test_nothing_is_printed_unless_wanted(net, capsys):
    swap(net)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quantize", [True, False])
def test_with_timing(net, quantize):
    """Which is faster is the machine's business; that the table says what was done is not."""
    swap_modules_with_sparse(net, SHAPE, verbose=False, quantize=quantize)
    stem, *others = net.swap_report
    assert stem.dense_ms is stem.sparse_ms is None
    for d in others:
        assert d.dense_ms > 0
        assert d.sparse_ms > 0
        assert d.swapped == (d.sparse_ms < d.dense_ms)
        assert d.reason.startswith(("", "within the noise") if d.swapped else "faster dense")
        assert isinstance(net.get_submodule(d.name), (SparseConv2d, SparseLinear)) == d.swapped
        assert f"{d.dense_ms:.2f}" in str(net.swap_report)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_layers_are_timed_under_the_autocast_of_the_run(net, monkeypatch, outside, inside):
    """The second layer gets bfloat16 there, which a dense one takes under autocast only."""
    seen = set()
    monkeypatch.setattr(_layer_timing, "ordinary", lambda y: seen.add(y.dtype) or y)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return model(torch.zeros(SHAPE))

    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        swap_modules_with_sparse(net, run, verbose=False)
    assert all(d.dense_ms > 0 for d in net.swap_report[1:])
    assert seen == {torch.bfloat16 if inside else torch.float32}


@pytest.mark.parametrize("sparse_ms", [0.9, 1.1])
def test_what_is_within_the_noise_is_said(net, monkeypatch, sparse_ms):
    def timed(steps):
        return Comparison({"dense": 1e-3, "sparse": 1e-3 * sparse_ms}, Spread(1 / sparse_ms, 0.8, 1.3), 25)

    monkeypatch.setattr(_layer_timing, "compare_interleaved", timed)
    swap_modules_with_sparse(net, SHAPE, verbose=False)
    d = decisions(net)["head"]
    assert d.swapped == (sparse_ms < 1)
    note = "within the noise: 0.80x to 1.30x in 25 passes"
    assert d.reason == (note if d.swapped else f"faster dense, {note}")


def test_layers_that_differ_in_hardly_any_zeros_are_timed_once(monkeypatch):
    def layer(features=40, density=0.1, bias=True, frozen=False, kind=nn.Linear):
        made = set_weight(kind(features, features, bias=bias), density, 0)
        made.weight.requires_grad_(not frozen)
        return made

    times = iter([(2e-3, 1e-3), (1e-3, 2e-3)] * 5)

    def timed(steps):
        dense, sparse = next(times)
        return Comparison({"dense": dense, "sparse": sparse}, Spread(dense / sparse, 0.4, 2.5), 9)

    monkeypatch.setattr(_layer_timing, "compare_interleaved", timed)
    model = nn.Sequential(
        # the first one gets an input that wants no gradient
        layer(), layer(), layer(density=0.104), layer(density=0.15), layer(bias=False), layer(frozen=True),
        layer(density=0.104), nn.Linear(40, 48), layer(48),
    )  # fmt: skip
    names = []
    swap_modules_with_sparse(model, (3, 40), verbose=False, on_layer=names.append)
    made = decisions(model)
    assert names == [name for name in made if name != "7"]
    note = "within the noise: 0.40x to 2.50x in 9 passes"
    like = {"2": "1", "6": "1"}
    slower = iter([False, True] * 5)
    for name in names:
        twin = made[like.get(name, name)]
        if name == twin.name:
            expected = ("faster dense, " if next(slower) else "") + note
            assert made[name].reason == expected
        else:
            assert made[name].reason == f"{twin.reason}, timed as {twin.name}"
        assert made[name].swapped == twin.swapped == (made[name].reason.startswith("within"))
        assert (made[name].dense_ms, made[name].sparse_ms) == (twin.dense_ms, twin.sparse_ms)


def test_a_layer_whose_sparse_form_cannot_take_its_input_stays_dense(monkeypatch):
    def refuse(self, x):
        raise ValueError("planes too large")

    monkeypatch.setattr(QuantizedSparseLinear, "forward", refuse)
    model = nn.Sequential(set_weight(nn.Linear(40, 40), 0.1, 0), nn.ReLU())
    swap_modules_with_sparse(model, (3, 40), verbose=False)
    assert type(model[0]) is nn.Linear
    assert decisions(model)["0"].reason == "cannot take its input: planes too large"


def test_an_empty_report():
    model = nn.Sequential(nn.ReLU())
    swap(model, (2, 2))
    assert model.swap_report == []
    assert str(model.swap_report).splitlines()[0].startswith("layer")
