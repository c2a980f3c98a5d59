import math
import sys
from datetime import datetime, timezone

import pytest
import torch
from torch import nn

from qsparseprop.utils.measurement_utils import (
    current_rss_mb,
    environment,
    interleaved_medians,
    interleaved_times,
    peak_rss_mb,
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
