"""Frozen modules in files: loaded in another process without the model's class, they compute the same."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.inference import FrozenModule, freeze, load, save
from qsparseprop.utils.errors import ConfigurationError
from tests._frozen_files import join_file, split_file
from tests._helpers import run_python

pytest.importorskip("safetensors", reason="files of frozen models are read by safetensors")


class Network(nn.Module):
    """Takes a flag, and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor, doubled: bool = False) -> dict[str, Any]:
        y = self.stem(x)
        y = torch.relu(self.conv(y) + y).mean((2, 3))
        scores = self.head(y) * (2 if doubled else 1)
        return {"scores": scores, "likely": (scores.softmax(1), y)}


class Branching(nn.Module):
    """Cannot be traced: it asks a value."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else self.other(x)


@pytest.fixture(scope="module")
def frozen() -> FrozenModule:
    torch.manual_seed(0)
    made = freeze(Network().eval(), [torch.randn(8, 3, 12, 12) for _ in range(2)])
    assert isinstance(made, FrozenModule)
    return made


def test_a_model_comes_back(frozen: FrozenModule, tmp_path: Path) -> None:
    save(frozen, tmp_path / "model.qsp")
    loaded = load(tmp_path / "model.qsp")
    x = torch.randn(5, 3, 12, 12)
    before, after = frozen(x), loaded(x)
    assert before.keys() == after.keys()
    assert torch.equal(before["scores"], after["scores"])
    assert all(torch.equal(a, b) for a, b in zip(before["likely"], after["likely"], strict=True))
    assert str(loaded.report) == str(frozen.report)
    assert repr(loaded) == repr(frozen)
    assert loaded.signature == frozen.signature
    with pytest.raises(ValueError, match="input 0 must be"):
        loaded(torch.randn(5, 3, 11, 12))
    # what was loaded can be saved again, as the same file
    save(loaded, tmp_path / "again.qsp")
    assert (tmp_path / "again.qsp").read_bytes() == (tmp_path / "model.qsp").read_bytes()


def test_another_process_needs_no_class(frozen: FrozenModule, tmp_path: Path) -> None:
    save(frozen, tmp_path / "model.qsp")
    x = torch.randn(4, 3, 12, 12)
    torch.save({"x": x, "y": frozen(x)["scores"]}, tmp_path / "data.pt")
    code = """
import sys, torch
from qsparseprop.inference import load
data = torch.load(sys.argv[2])
print(torch.equal(load(sys.argv[1])(data["x"])["scores"], data["y"]))
"""
    process = run_python(code, str(tmp_path / "model.qsp"), str(tmp_path / "data.pt"))
    assert process.stdout.strip() == "True", process.stderr


def test_a_linear_layer_takes_any_leading_dimensions(tmp_path: Path) -> None:
    layer = freeze(nn.Sequential(nn.Linear(6, 4)), [torch.randn(8, 6)])
    save(layer, tmp_path / "model.qsp")
    loaded = load(tmp_path / "model.qsp")
    x = torch.randn(7, 6)
    assert torch.equal(loaded(x), layer(x))


def test_models_that_are_frozen_in_parts_are_refused(tmp_path: Path) -> None:
    parts = freeze(Branching().eval(), [torch.randn(8, 6), -torch.randn(8, 6).abs()])
    with pytest.raises(ConfigurationError, match="a Branching is not frozen as a whole"):
        save(parts, tmp_path / "model.qsp")
    with pytest.raises(ConfigurationError, match="a Linear is not frozen as a whole"):
        save(nn.Linear(3, 3), tmp_path / "model.qsp")
    assert list(tmp_path.iterdir()) == []


def test_programs_without_a_module_are_refused(frozen: FrozenModule, tmp_path: Path) -> None:
    from qsparseprop.inference.files import save_program

    save_program(frozen.program, tmp_path / "model.qsp")
    with pytest.raises(ConfigurationError, match="what is said about the model must be a dict, not None"):
        load(tmp_path / "model.qsp")


WRONG = [None, True, -1, 7, 1.5, "x", [], {"tuple": []}, {"dict": []}, {"dtype": "int8"}, {"tuple": [7]}, [[7]]]


def _refusal(path: Path) -> str | None:
    try:
        load(path)(torch.randn(2, 3, 12, 12))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def test_what_is_said_of_a_model_is_checked(frozen: FrozenModule, tmp_path: Path) -> None:
    """Each entry in turn is something else: the file is refused, or the model still runs or refuses its input."""
    path = tmp_path / "model.qsp"
    save(frozen, path)
    header, description, data = split_file(path)
    del header["__metadata__"]
    refused = 0
    for place in range(len(description["about"]["dict"])):
        for wrong in WRONG:
            edited = copy.deepcopy(description)
            edited["about"]["dict"][place][1] = wrong
            join_file(path, header, edited, data)
            sentence = _refusal(path)
            assert sentence is None or "frozen" in sentence
            refused += sentence is not None and "holds no frozen model: " in sentence
    assert refused > 60
