import functools
import itertools
import math
import sys
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from torch import nn

from qsparseprop.utils.measurement_utils import (
    Spread,
    compare_interleaved,
    current_rss_mb,
    environment,
    interleaved_medians,
    interleaved_times,
    machine_memory_bytes,
    peak_rss_mb,
    ratio_spread,
    release_free_memory,
    reset_peak_rss,
    saved_for_backward_bytes,
)

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_linear_saves_its_input_but_not_its_weight():
    layer = nn.Linear(30, 20)
    inputs = torch.randn(8, 30, requires_grad=True)
    assert saved_for_backward_bytes(lambda: layer(inputs), layer) == 8 * 30 * 4
    assert saved_for_backward_bytes(lambda: layer(inputs)) == 8 * 30 * 4 + 30 * 20 * 4


def test_a_storage_counts_once_and_whole():
    x = torch.randn(100, requires_grad=True)
    # exp saves its result, and both products save parts of that same result.
    assert saved_for_backward_bytes(lambda: (e := x.exp())[:10] * e[10:20] * 2) == 100 * 4


def test_different_storages_add_up():
    x = torch.randn(100, requires_grad=True)
    assert saved_for_backward_bytes(lambda: x.exp() + x.double().exp()) == 100 * 4 + 100 * 8


def test_buffers_do_not_count():
    layer = nn.BatchNorm1d(6).eval()
    inputs = torch.randn(5, 6)
    assert saved_for_backward_bytes(lambda: layer(inputs), layer) == 5 * 6 * 4


def test_custom_functions_count():
    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.to(torch.uint8))
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = torch.rand(64, requires_grad=True)
    assert saved_for_backward_bytes(lambda: Packed.apply(x)) == 64


def test_nothing_is_saved_without_gradients():
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        assert saved_for_backward_bytes(lambda: layer(torch.randn(2, 4)), layer) == 0


@linux_only
def test_peak_memory_sees_what_is_gone_again_and_can_be_reset():
    release_free_memory()
    before = current_rss_mb()
    block = torch.ones(25_000_000)  # 100 MB, written to
    del block
    release_free_memory()
    assert peak_rss_mb() > before + 90
    if not reset_peak_rss():
        pytest.skip("the system does not let a process restart its peak")
    assert peak_rss_mb() < before + 50


@linux_only
def test_peak_is_at_least_the_present():
    present = current_rss_mb()
    assert 0 < present < math.inf
    # The kernel updates its counters lazily, by a few pages a thread.
    assert peak_rss_mb() >= present - 1


def test_interleaved_times_take_turns_and_leave_out_the_warmup():
    calls = []
    times = interleaved_times({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=2)
    assert "".join(calls) == "abc" * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in times.values() for value in values)


def test_interleaved_medians():
    medians = interleaved_medians({"nothing": lambda: None}, repeats=3)
    assert list(medians) == ["nothing"]
    assert medians["nothing"] >= 0


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_senseless_counts_are_errors(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        interleaved_times({}, repeats, warmup)


def test_environment_describes_machine_and_versions():
    facts = environment()
    assert set(facts) == {"cpu", "cpu_count", "threads", "platform", "python", "torch", "qsparseprop", "date"}
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cpu"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(facts["date"])
    assert abs(age.total_seconds()) < 60


@linux_only
def test_peak_memory_of_a_call():
    from qsparseprop.utils.measurement_utils import measure_peak_rss

    def use_memory():
        torch.ones(25_000_000).sum()

    peak = measure_peak_rss(use_memory)
    assert peak.of_call
    assert 90 < peak.added_mb < 150


# ---- comparisons: steps that take what a clock of our own says ----


class Machine:
    """Steps whose times are given, on a clock that only they move."""

    def __init__(self, **times):
        self.now, self.calls = 0.0, []
        self.steps = {name: functools.partial(self.run, name, iter(values)) for name, values in times.items()}

    def run(self, name, seconds):
        self.calls.append(name)
        self.now += next(seconds)

    def compare(self, **settings):
        return compare_interleaved(self.steps, clock=lambda: self.now, **settings)


def repeated(*values):
    return itertools.chain([1.0], itertools.cycle(values))  # the first call warms up


@pytest.mark.parametrize(("dense", "sparse", "passes", "noisy"), [
    (repeated(0.31), repeated(0.1), 1, False),
    (repeated(0.1), repeated(0.31), 1, False),
    (repeated(0.3), repeated(0.101), 3, False),  # not quite a factor of 3: three passes
    (repeated(0.02), repeated(0.009), 3, False),
    (repeated(0.0022), repeated(0.001), 9, False),  # too quick to be settled by one or three
    (repeated(0.019), repeated(0.01), 9, False),  # less than a factor of 2
    (repeated(0.0011), repeated(0.001), 9, False),
    (repeated(0.010, 0.012), repeated(0.011), 25, True),
    (repeated(0.01), repeated(0.01), 25, True),
    (repeated(0.15, 0.12), repeated(0.13), 4, True),  # a second is over
    (repeated(2.0), repeated(1.5), 3, False),
    (repeated(2.0, 1.0), repeated(1.5), 3, True),
    (repeated(0.03, 0.07), repeated(0.02), 9, False),  # three passes that differ more than they prove
    (repeated(0.0), repeated(0.0), 25, True),  # a clock that does not move
])  # fmt: skip
def test_comparisons_take_as_many_passes_as_it_takes(dense, sparse, passes, noisy):
    machine = Machine(dense=dense, sparse=sparse)
    found = machine.compare()
    assert (found.passes, found.within_noise) == (passes, noisy)
    assert machine.calls == ["dense", "sparse"] * (passes + 1)
    assert ("within the noise" in found.note) == noisy
    assert set(found.medians) == {"dense", "sparse"}
    assert found.ratio.value == pytest.approx(max(found.medians["dense"], 1e-9) / max(found.medians["sparse"], 1e-9))


def test_more_passes_settle_what_nine_do_not():
    # a burst of load in the middle; before and behind it sparse is faster by a tenth
    dense = itertools.chain([1.0], [0.011] * 3, [0.011] * 4, itertools.repeat(0.011))
    sparse = itertools.chain([1.0], [0.010] * 3, [0.020] * 4, itertools.repeat(0.010))
    found = Machine(dense=dense, sparse=sparse).compare()
    assert 9 < found.passes < 25
    assert not found.within_noise
    assert found.medians == pytest.approx({"dense": 0.011, "sparse": 0.010})


def test_limits_of_comparisons():
    for settings, passes in (({"most_passes": 2}, 2), ({"most_seconds": 0.0}, 3),
                             ({"most_passes": 12, "most_seconds": 100.0}, 12), ({}, 4)):  # fmt: skip
        found = Machine(a=repeated(0.125), b=repeated(0.125)).compare(**settings)
        assert found.note == f"within the noise: 1.00x to 1.00x in {passes} passes"


@pytest.mark.parametrize(("steps", "passes"), [({}, 5), ({"a": print}, 5), (dict.fromkeys("abc", print), 5),
                                               (dict.fromkeys("ab", print), 0)])  # fmt: skip
def test_senseless_comparisons_are_errors(steps, passes, capsys):
    with pytest.raises(ValueError, match="two functions and at least one pass"):
        compare_interleaved(steps, most_passes=passes)
    assert capsys.readouterr().out == ""


def test_spread_of_ratios():
    assert ratio_spread([2.0], [1.0]) == Spread(2.0, 2.0, 2.0)
    # few: wider than what was met, so that three of three are no proof; many: quartiles, as numpy's
    assert ratio_spread([1.5, 2.0, 6.0], [1.0, 1.0, 1.0]) == Spread(2.0, 0.5, 8.0)
    assert ratio_spread([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]) == Spread(2.0, 2.0, 2.0)
    times = torch.rand(2, 41, dtype=torch.float64).add(0.5)
    low, high = np.quantile((times[0] / times[1]).numpy(), [0.25, 0.75])
    found = ratio_spread(times[0].tolist(), times[1].tolist())
    assert (found.low, found.high) == pytest.approx((low, high))
    # a slow minute hits both calls of a pair
    slow = [1.0] * 6 + [3.0] * 6
    assert ratio_spread([1.2 * s for s in slow], slow).low == pytest.approx(1.2)
    # the medians' ratio is never outside
    found = ratio_spread([1, 1, 1, 9, 9, 9, 9, 9, 9], [1, 2, 3, 9, 9, 9, 9, 9, 9])
    assert found.low <= found.value <= found.high
    assert [Spread(v, low, high).side for v, low, high in ((2, 1.5, 3), (0.5, 0.4, 0.9), (1.1, 1, 2))] == [1, -1, 0]


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [0.0]), ([-1.0], [1.0]), ([1.0], [math.inf]), ([1], [1, 2])])
def test_senseless_times_are_errors(a, b):
    with pytest.raises(ValueError, match=r"positive times|zip"):
        ratio_spread(a, b)


def test_memory_of_the_machine():
    limit = machine_memory_bytes()
    assert limit is None or limit > 1e8
