"""Time by layer."""

import json
import time

import torch
from torch import nn

from qsparseprop.training.finetuner import LayerTimer, layer_table

from ._finetuning import _loader, sparse_finetuner


def test_layer_times_cover_forward_and_backward_without_counting_twice():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 64)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            out = self.inner(x)
            out += x
            out = self.relu(out)
            time.sleep(0.01)  # its own time, not that of the modules inside
            return out

    model = nn.Sequential(nn.Linear(64, 64), Block())
    with LayerTimer(model) as timer:
        for _ in range(3):
            model(torch.randn(256, 64)).sum().backward()
    times = {t.name: t for t in timer.times()}
    assert set(times) == {"", "0", "1", "1.inner", "1.relu"}
    assert all(t.calls == 3 for t in times.values())
    assert times["1"].forward_ms >= 10
    assert times[""].forward_ms < 10
    for name in ("0", "1.inner", "1.relu"):
        assert 0 < times[name].forward_ms < 10
        assert times[name].backward_ms > 0
    assert times[""].backward_ms == 0
    assert "1.inner" in layer_table(timer.times())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_fit_times_layers_on_request(tmp_path):
    tuner = sparse_finetuner()
    result = tuner.fit(_loader("own generator"), 2, folder=tmp_path, time_layers=2)
    assert tuner.history.warmup_steps == {0, 1}
    kinds = {t.kind for t in result.layer_times}
    assert {"QuantizedSparseConv2d", "BatchNorm2d", "Linear"} <= kinds
    assert all(t.calls in (2, 4) for t in result.layer_times if t.kind == "QuantizedSparseConv2d")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    (logged,) = [line for line in lines if line["event"] == "layer_times"]
    assert len(logged["layers"]) == len(result.layer_times)
