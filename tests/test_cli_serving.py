"""The freeze command, and requests to frozen models in the bench command."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch

from qsparseprop.benchmarking.serving import OURS, ServingConfig, format_serving, serve
from qsparseprop.cli import main
from qsparseprop.inference import load
from qsparseprop.utils.errors import ConfigurationError

from .test_cli_training import command, npz  # noqa: F401  # a fixture

pytest.importorskip("safetensors", reason="files of frozen models need safetensors")


@pytest.fixture(scope="module")
def trained(npz, tmp_path_factory):  # noqa: F811
    """The folder of a short run of a small network."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert main(command(npz, "--epochs", "1", "--sparsity", "0.8", "--out", str(folder))) == 0
    return folder


def test_a_run_becomes_a_file_that_serves(trained, tmp_path, capsys):
    out = tmp_path / "model.qsp"
    assert main(["freeze", str(trained / "best.pt"), "--out", str(out), "--samples", "40"]) == 0
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"top-1 ([\d.]+) % before, ([\d.]+) % after", printed).groups())
    assert abs(before - json.loads((trained / "result.json").read_text())["best_top1"]) < 15  # of autocast's
    assert abs(before - after) < 15
    frozen = load(out)
    assert frozen.report.metric_before == before
    shape = frozen.signature.shapes[0][1:]
    assert frozen(torch.zeros(3, *shape)).shape[0] == 3
    assert main(["info", str(out)]) == 0
    assert capsys.readouterr().out == f"{frozen.freeze_report}\n"  # of codes nobody can tell the zeros


@pytest.mark.parametrize(("change", "complaint"), [
    ({"checkpoint": "nothing.pt"}, "cannot read the checkpoint"),
    ({"checkpoint": ""}, "Is a directory: name a file in it, best.pt of a run"),
    ({"out": "no/such/folder/model.qsp"}, "folder that is not there"),
    ({"keep": "nonsense"}, "keep_float names 'nonsense'"),
])  # fmt: skip
def test_what_cannot_be_frozen_is_explained(change, complaint, trained, tmp_path, capsys):
    checkpoint = str(trained / change.get("checkpoint", "best.pt"))
    out = str(tmp_path / change.get("out", "model.qsp"))
    keep = ["--keep-float", change["keep"]] if "keep" in change else []
    with pytest.raises(SystemExit) as end:
        main(["freeze", checkpoint, "--out", out, *keep])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("**/*.qsp"))


def test_a_checkpoint_without_its_run_is_explained(trained, tmp_path, capsys):
    (tmp_path / "best.pt").write_bytes((trained / "best.pt").read_bytes())
    with pytest.raises(SystemExit) as end:
        main(["freeze", str(tmp_path / "best.pt"), "--out", str(tmp_path / "model.qsp")])
    assert end.value.code == 2
    assert "holds no run: there is no run.json" in capsys.readouterr().err


def test_requests_are_measured(monkeypatch):
    engines = {"other": lambda x: x}, ["b"]
    monkeypatch.setattr("qsparseprop.benchmarking.serving.installed_engines", lambda *a: engines)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    result = serve("small", model, (3, 6, 6), ServingConfig((1, 3), (1,), seconds=0))
    assert [(one["batch"], one["threads"]) for one in result["results"]] == [(1, 1), (3, 1)]
    assert result["missing"] == ["b"]
    for one in result["results"]:
        ours = one["milliseconds"][OURS]
        assert 0 < ours["p50"] <= ours["p95"] <= ours["p99"]
        assert one["best"] != OURS
        assert np.isclose(one["speedup"], one["milliseconds"][one["best"]]["p50"] / ours["p50"])
    assert "batch 3, 1 thread(s)" in format_serving(result)
    with pytest.raises(ConfigurationError, match="would wait for each other"):
        serve("small", model, (3, 6, 6), ServingConfig((1,), (10**6,)))


def test_bench_measures_requests(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qsparseprop.benchmarking.serving.installed_engines", lambda *a: ({}, []))
    arguments = ["bench", "--inference", "--layer", "Linear(20, 30)", "--input", "4,20", "--batches", "1", "4"]
    assert main([*arguments, "--sparsity", "0.5", "--threads", "1", "--out", str(tmp_path)]) == 0
    (result,) = json.loads((tmp_path / "inference.json").read_text())["inference"]
    assert [one["batch"] for one in result["results"]] == [1, 4]
    assert "Linear(20, 30), 50 % zeros, batch 4" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "complaint"), [
    (["--batches", "1"], "need --inference"),
    (["--inference"], "measures one --model or one --layer"),
    (["--inference", "--by-layer", "--model", "resnet20", "--input", "1,3,32,32"], "measures one --model"),
])  # fmt: skip
def test_wrong_arguments(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *arguments])
    assert end.value.code == 2
    assert complaint in capsys.readouterr().err
