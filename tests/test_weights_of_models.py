"""Every module with a prunable weight has a line in the report, and `sparsity` counts what the report lists."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop.utils.network_utils import sparsity, swap_modules_with_sparse


def zero(weight, share=0.9):
    """Make exactly that share zero, as near as the size allows."""
    with torch.no_grad():
        flat = weight.view(-1)
        flat.copy_(torch.rand(flat.shape) + 0.5)
        flat[: round(share * flat.numel())] = 0


class ForeignLinear(nn.Module):
    """As torch_geometric's and others': no subclass of nn.Linear."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(20, 10)), nn.Parameter(torch.zeros(20))


class Experts(nn.Module):
    """As in mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.empty(3, 8, 20)), nn.Parameter(torch.empty(3, 10, 8))


class StandardizedConv2d(nn.Conv2d):
    """As timm's ScaledStdConv2d: computes with another weight than it holds."""


LAYERS = {
    "Conv3d": (lambda: nn.Conv3d(1, 20, 3), None),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 10, 3), None),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 5, 2), None),
    "LSTM": (lambda: nn.LSTM(10, 20, 2), "LSTM"),
    "GRU": (lambda: nn.GRU(10, 20), "GRU"),
    "LSTMCell": (lambda: nn.LSTMCell(10, 20), "LSTMCell"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(20, 2), "MultiheadAttention"),
    "Bilinear": (lambda: nn.Bilinear(4, 5, 10), "Bilinear"),
    "StandardizedConv2d": (lambda: StandardizedConv2d(4, 10, 3), "subclass"),
    "ForeignLinear": (ForeignLinear, "ForeignLinear"),
    "Experts": (Experts, "Experts"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_a_line_with_its_reason(name):
    make, reason = LAYERS[name]
    module = make()
    for key, p in module.named_parameters():
        if p.ndim > 1 and "bias" not in key:
            zero(p)
    model = nn.Sequential(nn.ReLU(), module)
    found = sparsity(model)
    assert found == pytest.approx(0.9, abs=0.01)
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    lines = {d.name: d for d in model.swap_report}
    assert "1" in lines
    assert sum(math.prod(d.shape) for d in model.swap_report) > 0
    if reason is not None:
        assert not lines["1"].swapped
        assert reason in lines["1"].reason
        assert lines["1"].sparsity == pytest.approx(0.9, abs=0.01)
    assert sparsity(model) == pytest.approx(found)


def test_masks_on_any_parameter_count():
    model = nn.Sequential(nn.LSTM(10, 20))
    prune.l1_unstructured(model[0], "weight_ih_l0", 0.5)
    prune.l1_unstructured(model[0], "weight_hh_l0", 0.8)
    wanted = (0.5 * 80 * 10 + 0.8 * 80 * 20) / (80 * 30)
    assert sparsity(model) == pytest.approx(wanted)
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    assert model.swap_report[0].sparsity == pytest.approx(wanted)


def test_what_is_no_weight_is_not_listed():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.cls_token = nn.Parameter(torch.zeros(1, 4, 8)), nn.Parameter(torch.zeros(1, 1, 8))

    model = nn.Sequential(Tokens(), nn.LayerNorm((4, 8)).requires_grad_(False), nn.BatchNorm2d(3), nn.Embedding(5, 8))
    model = nn.Sequential(model[0], model[2], model[3])
    assert sparsity(model) == 0.0
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    assert model.swap_report == []


@pytest.mark.parametrize("how", ["mask", "zeros"])
def test_embeddings_count_where_they_were_pruned(how):
    model = nn.Sequential(nn.Embedding(10, 8), nn.Embedding(10, 8))
    if how == "mask":
        prune.l1_unstructured(model[0], "weight", 0.8)
    else:
        zero(model[0].weight, 0.8)
    assert sparsity(model) == pytest.approx(0.8)
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    (d,) = model.swap_report
    assert (d.name, d.swapped) == ("0", False)
    assert "Embedding" in d.reason


@pytest.mark.filterwarnings("ignore")
def test_torchscript_modules():
    linear = nn.Linear(20, 10)
    zero(linear.weight)
    model = nn.Sequential(torch.jit.script(linear), nn.ReLU())
    assert sparsity(model) == pytest.approx(0.9)
    swap_modules_with_sparse(model, (2, 20), verbose=False)
    (d,) = model.swap_report
    assert not d.swapped
    assert "RecursiveScriptModule" in d.reason


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules():
    dynamic = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    ao = pytest.importorskip("torch.ao.quantization")
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build of torch has no quantised kernels")
    net = nn.Sequential(nn.Linear(20, 10), nn.LSTM(10, 10))
    for p in net.parameters():
        zero(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = ao.quantize_dynamic(net, {nn.Linear, nn.LSTM})
    assert type(model[0]) is dynamic.Linear
    assert sparsity(model) == pytest.approx(0.9, abs=0.01)
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    assert [d.swapped for d in model.swap_report] == [False, False]
    assert [d.kind for d in model.swap_report] == ["Linear", "LSTM"]


def test_layers_on_meta_and_lazy_ones_have_a_line():
    model = nn.Sequential(nn.Linear(20, 10, device="meta"), nn.LazyConv2d(3, 3), nn.LSTM(4, 4, device="meta"))
    assert sparsity(model) == 0.0
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    assert len(model.swap_report) == 3
    assert not model.swap_report.swapped


def test_a_weight_that_two_modules_share_counts_once():
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(20, 10), nn.Linear(10, 20))
    zero(model[0].weight, 0.9)
    zero(model[2].weight, 0.5)
    model[1].weight = model[0].weight
    assert sparsity(model) == pytest.approx(0.7)


def test_a_subclass_of_the_same_name_is_told_from_torchs():
    kind = type("Linear", (nn.Linear,), {"__module__": "some.package"})
    model = nn.Sequential(kind(10, 10))
    zero(model[0].weight)
    swap_modules_with_sparse(model, None, include_dense=False, verbose=False)
    assert model.swap_report[0].reason == "some.package.Linear is a subclass with a behaviour of its own"
