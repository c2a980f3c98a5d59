"""Tools that would take a frozen model over: refused by a sentence, or right. Results of other kinds than tensors."""

import pytest
import torch
from torch import nn

from qsparseprop.inference import FrozenModule, freeze, load, save

from ._frozen import data


@pytest.fixture(scope="module")
def frozen():
    torch.manual_seed(0)
    return freeze(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [data(16, 6)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracing_would_make_a_constant_of_the_result(frozen):
    x = data(4, 6)
    with pytest.raises(RuntimeError, match=r"no graph of torch's operators.*export_onnx"):
        torch.jit.trace(frozen, x)
    with pytest.raises(RuntimeError, match=r"no graph of torch's operators.*export_onnx"):
        torch.jit.trace(nn.Sequential(nn.Linear(6, 6), frozen), x)
    with pytest.raises(RuntimeError, match=r"no graph of torch's operators.*export_onnx"):
        torch.export.export(frozen, (x,))


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_transforms_are_refused(frozen, transform):
    with pytest.raises(NotImplementedError, match=r"no derivatives and no vmap \(torch.func\)"):
        transform(frozen)(data(4, 6))


def test_calls_of_another_form_are_told_the_right_one():
    model = nn.Linear(6, 3)
    frozen = freeze(nn.Sequential(model), [{"input": data(8, 6)}])
    said = r"frozen for \(input=floating point \(batch, 6\)\), .* got \(torch.float32 \(2, 6\)\)"
    with pytest.raises(TypeError, match=said):
        frozen(data(2, 6))


class Aside(nn.Module):
    """Attention, for instance, gives None in the place of weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x), None, {"x": x, "aux": None}


def test_results_may_hold_none(tmp_path):
    x = data(8, 6)
    frozen = freeze(Aside(), [x])
    assert isinstance(frozen, FrozenModule)
    save(frozen, tmp_path / "m.qsp")
    for module in (frozen, load(tmp_path / "m.qsp")):
        first, second, third = module(x)
        assert torch.equal(first, frozen(x)[0])
        assert second is None
        assert torch.equal(third["x"], x)
        assert third["aux"] is None


def test_models_of_torch_jit_are_refused():
    model = torch.jit.ScriptModule()
    with pytest.raises(TypeError, match=r"torch.jit has compiled"):
        freeze(model, [data(8, 6)])


def test_an_example_that_is_none_is_refused_as_the_model_does():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        freeze(nn.Sequential(nn.Linear(6, 3)), [data(8, 6)], example=data(8, 7))


class Cell(nn.Module):
    """Layers around an operator that programs may not call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.cell, self.after = nn.Linear(6, 8), nn.GRUCell(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.after(self.cell(self.before(x)))


def test_operators_that_programs_may_not_call_leave_the_parts_around_them():
    model, x = Cell(), data(64, 6)
    found = freeze(model, [x])
    assert "aten.gru_cell.default" in found.freeze_report.reason
    assert [layer.name for layer in found.freeze_report if layer.quantised] == ["before", "after"]
    with torch.no_grad():
        assert (found(x) - model(x)).norm() < 0.03 * model(x).norm()
