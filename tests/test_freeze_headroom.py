"""Ranges of channels that few examples were seen of."""

import pytest
import torch
from torch import nn

from qsparseprop.inference import freeze
from qsparseprop.inference.calibration import MinMax, MovingAverage

from ._frozen import data


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("batches", [1, 16])
def test_features_that_go_beyond_what_was_seen_are_not_cut_off(batches):
    """A linear layer sees one element of each feature a sample; 128 samples cost 12 % before ranges grew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    frozen = freeze(model, data(128, 32).chunk(batches))
    x = data(1000, 32, seed=2)
    with torch.no_grad():
        assert relative(frozen(x), model(x)) < 0.04


def ranges(observer, values, batches=1):
    for part in values.chunk(batches, 1):
        observer.see(part)
    return observer.ranges()


@pytest.mark.parametrize("batches", [1, 4, 64])
def test_ranges_come_near_those_of_many_more_examples(batches):
    values = data(200, 64 * 32)
    low, high = ranges(MinMax(), values[:, :64], batches)
    all_low, all_high = ranges(MinMax(), values)
    assert 0.8 < float((high / all_high).mean()) < 1.4
    assert 0.8 < float((low / all_low).mean()) < 1.4
    assert float((ranges(MovingAverage(), values[:, :64], batches)[1] / all_high).mean()) < 0.6


def test_values_with_an_end_keep_it():
    values = data(64, 100).mul(100).clamp(0, 6)
    values[:3] = 0
    low, high = ranges(MinMax(), values)
    assert not high[:3].any()
    assert high[3:].eq(6).all()
    assert not low.any()


def test_few_channels_tell_nothing_and_a_single_example_little():
    values = data(4, 50)
    assert torch.equal(ranges(MinMax(), values)[1], values.amax(1).double())
    one = data(20, 1)
    assert torch.equal(ranges(MinMax(), one)[1], one.amax(1).double() * MinMax.MOST)
