"""What the command line shows of its work, in a terminal and elsewhere, and how it finds the fastest dense way."""

import io
import re
import sys
import time

import pytest
import torch
from torch import nn

from qsparseprop.benchmarking import dense_modes
from qsparseprop.benchmarking.dense_modes import DENSE_MODES, MODE_STEPS, time_dense_modes
from qsparseprop.cli import _progress
from qsparseprop.utils import measurement_utils


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def progress(monkeypatch):
    pytest.importorskip("tqdm")

    def make(terminal):
        monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
        monkeypatch.setattr(_progress, "_REFRESH_SECONDS", 0.01)
        monkeypatch.setattr(_progress, "_SILENCE_SECONDS", 0.0)
        made.append(_progress.Progress("job"))
        return made[-1], sys.stderr

    made = []
    yield make
    for each in made:
        each.close()


def wait_for(pattern, text):
    deadline = time.monotonic() + 60
    while not re.search(pattern, text()):
        assert time.monotonic() < deadline, text()
        time.sleep(0.01)


def test_a_terminal_has_a_bar_at_once_and_one_for_what_is_counted(progress, capsys):
    shown, screen = progress(terminal=True)
    assert "job:   0%" in screen.getvalue()
    assert min(shown._bar.ncols, shown._bar.nrows) > 0  # with less tqdm shows nothing
    shown.stage("reading", 0.2)
    wait_for(r"job:   0%.*reading", screen.getvalue)
    shown.stage("training", 0.6)
    advance = shown.progress("dense", 4)
    advance("loss 1.5")
    assert re.search(r"dense +:  25%.* 1/4 loss 1.5", screen.getvalue())
    # a fourth of the way from 20 to 60 %
    assert re.search(r"job:  30%.*training", screen.getvalue())
    shown.message("a line that stays")
    assert capsys.readouterr().out == "a line that stays\n"
    shown.close()
    shown.message("after the end")
    assert capsys.readouterr().out == "after the end\n"


def test_elsewhere_there_is_a_line_when_nothing_else_was_said(progress, capsys):
    shown, screen = progress(terminal=False)
    shown.stage("training", 0.5)
    shown.progress("dense", 4)("loss 1.5")
    out = ""

    def text():
        nonlocal out
        out += capsys.readouterr().out
        return out

    wait_for(r"  \[0 s, 12 %\] training; dense 1/4 loss 1.5\n", text)
    # more steps than were announced are no more than all of it
    advance = shown.progress("sparse", 1)
    advance("one")
    advance("two")
    wait_for(r"; dense 1/4 loss 1.5; sparse 1/1 two\n", text)
    assert "\r" not in out
    assert screen.getvalue() == ""


@pytest.mark.parametrize(("costs", "told", "best"), [
    # of fp32 contiguous, fp32 channels_last, bf16 contiguous, bf16 channels_last; what each step of a batch takes
    ((1.0, 0.9, 0.5, 0.6), (2, 2, 3, 3), 2),
    ((1.0, 1.1, 90.0, 80.0), (3, 3, 0, 0), 0),  # hopeless: seen on a part of the batch
    ((4.0, 0.5, 0.6, 5.0), (1, 3, 3, 1), 1),
])  # fmt: skip
def test_ways_that_are_far_behind_drop_out(costs, told, best, monkeypatch):
    clock = [0.0]

    class Stub:
        def __init__(self, cost):
            self.cost = cost

        def train_step(self, inputs, targets):
            clock[0] += self.cost * len(inputs) / 64

    trainers = iter(costs)
    monkeypatch.setattr(dense_modes, "make_finetuner", lambda *args: Stub(next(trainers)))
    monkeypatch.setattr(dense_modes.time, "perf_counter", lambda: clock[0])
    assert measurement_utils.time is dense_modes.time
    seen = []
    seconds = time_dense_modes(nn.Linear(2, 2), torch.zeros(64, 2), torch.zeros(64), seen.append)
    names = [mode.name for mode in DENSE_MODES]
    assert list(seconds) == names
    assert tuple(seen.count(name) for name in names) == told
    assert len(seen) <= MODE_STEPS
    assert min(seconds, key=seconds.get) == names[best]
    assert [seconds[name] for name in names] == pytest.approx(costs)


def test_a_moment_of_noise_does_not_rule_out_the_fastest(monkeypatch):
    clock = [0.0]
    spent = {mode.name: iter(times) for mode, times in zip(DENSE_MODES, (
        [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.9, 0.9], [2.9, 0.5, 0.5],
    ), strict=True)}  # fmt: skip

    class Stub:
        def __init__(self, mode):
            self.times = spent[mode.name]

        def train_step(self, inputs, targets):
            clock[0] += 0.01 if len(inputs) < 64 else next(self.times)

    monkeypatch.setattr(dense_modes, "make_finetuner", lambda model, mode, *args: Stub(mode))
    monkeypatch.setattr(dense_modes.time, "perf_counter", lambda: clock[0])
    seconds = time_dense_modes(nn.Linear(2, 2), torch.zeros(64, 2), torch.zeros(64))
    assert min(seconds, key=seconds.get) == "bf16 channels_last"
