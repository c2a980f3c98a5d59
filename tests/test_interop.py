"""What sparse modules answer to tools that take them for dense ones."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune, spectral_norm

from qsparseprop import nn as qnn
from qsparseprop.nn._foreign_masks import foreign_masks
from qsparseprop.utils.network_utils import swap_modules_with_dense, swap_modules_with_sparse

from ._helpers import KINDS, example, relative_error, set_weight

WAY_OUT = "swap_modules_with_dense"
LINEAR = ("SparseLinear", "QuantizedSparseLinear")


def network(quantize: bool = True, fuse: bool = False) -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(set_weight(nn.Conv2d(3, 8, 3), 0.2, 0), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                          set_weight(nn.Linear(8 * 36, 4), 0.2, 1))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    swap_modules_with_sparse(model, x, include_dense=False, verbose=False, min_sparsity=0.5, quantize=quantize,
                             fuse=fuse)  # fmt: skip
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in model.modules())
    return model.eval(), x


def unchanged(layer: nn.Module, x: torch.Tensor, wanted: torch.Tensor, keys: list[str]) -> None:
    assert list(layer.state_dict()) == keys
    assert torch.equal(layer(x), wanted)


# ---- tracers ----


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("fuse", [False, True])
def test_torchscript(fuse):
    model, x = network(fuse=fuse)
    wanted = model(x)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.jit.trace(model, x)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.jit.script(model)
    assert torch.equal(model(x), wanted)
    dense = swap_modules_with_dense(model, inplace=False)
    traced = torch.jit.trace(dense, x)
    other = torch.randn_like(x)
    assert torch.allclose(traced(other), dense(other))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_jit_trace_of_a_layer(kind):
    """It used to make a constant of the output, where it did not fail."""
    layer, _, x = example(kind)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.jit.trace(layer, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_older_onnx_exporter():
    pytest.importorskip("onnx")
    model, x = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=WAY_OUT):
            torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("exported", [False, True])
def test_onnx(exported, tmp_path):
    pytest.importorskip("onnxscript")
    model, x = network()
    program = torch.export.export(model, (x,)) if exported else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=WAY_OUT):
            torch.onnx.export(program, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x))


def test_the_sentence_about_onnx(monkeypatch):
    """Both ways of `test_onnx`, where onnx is not installed: what the exporter makes it say."""
    model, x = network()
    program = torch.export.export(model, (x,))
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=WAY_OUT):
        torch.export.export(model, (x,))
    with pytest.raises(RuntimeError, match=WAY_OUT):
        program.run_decompositions()


def test_openvino():
    openvino = pytest.importorskip("openvino")
    model, x = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(Exception, match=WAY_OUT):
            openvino.convert_model(model, example_input=x)


class SparseLeaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return "weight_shape" in dir(type(module)) or super().is_leaf_module(module, name)


def test_symbolic_trace():
    model, x = network(quantize=False)
    model.train()
    with pytest.raises(TypeError, match=f"{WAY_OUT}.*leaves"):
        torch.fx.symbolic_trace(model)
    traced = torch.fx.GraphModule(model, SparseLeaves().trace(model))  # what the sentence says
    assert torch.equal(traced(x), model(x))
    traced(x).square().sum().backward()
    assert model[0].weight.grad.any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_eager_quantisation_of_what_stayed_dense():
    """It sets and deletes an attribute `qconfig` of every module, which float32 modules have in common with torch's."""
    sparse, _, _ = example("SparseLinear")
    model = nn.Sequential(sparse, nn.Linear(sparse.out_features, 4)).eval()
    dynamic = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert type(dynamic[0]) is qnn.SparseLinear
    assert type(dynamic[1]) is not nn.Linear
    x = torch.randn(8, sparse.in_features)
    assert relative_error(dynamic(x), model(x)) < 0.05


# ---- tools that give a layer another weight ----


def dense_count(layer: nn.Module, count: int) -> nn.Module:
    """As many nonzeros as rows, so that sizes fit by chance."""
    weight = torch.zeros(layer.weight.numel())
    weight[torch.randperm(weight.numel())[:count]] = 1.0
    layer.weight.data.copy_(weight.view_as(layer.weight))
    return layer


FOLD = {
    "conv": (lambda: nn.Conv2d(3, 32, 3), lambda c: fusion.fuse_conv_bn_eval(c, nn.BatchNorm2d(32).eval())),
    "conv1d": (lambda: nn.Conv1d(3, 32, 3), lambda c: fusion.fuse_conv_bn_eval(c, nn.BatchNorm1d(32).eval())),
    "linear": (lambda: nn.Linear(16, 32), lambda c: fusion.fuse_linear_bn_eval(c, nn.BatchNorm1d(32).eval())),
}


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("nonzeros", [1, 32, 40])
@pytest.mark.parametrize("name", FOLD)
def test_folding_batch_normalisation(name, nonzeros, quantized):
    make, fold = FOLD[name]
    dense = dense_count(make(), nonzeros).eval()
    layer = getattr(qnn, ("Quantized" if quantized else "") + f"Sparse{type(dense).__name__}").from_dense(dense)
    x = torch.randn(2, 16) if name == "linear" else torch.randn(2, 3, *[9] * (dense.weight.ndim - 2))
    wanted, keys = layer(x), list(layer.state_dict())
    with pytest.raises(NotImplementedError, match=WAY_OUT):  # by the weight: it cannot be scaled row by row
        fold(layer)
    with pytest.raises(ValueError, match=WAY_OUT):  # in place, as ultralytics' fuse() does
        layer.weight = nn.Parameter(dense.weight.detach().clone())
    unchanged(layer, x, wanted, keys)
    fold(layer.to_dense())


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


REPARAMETRISE = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight", Double()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older spectral_norm": spectral_norm,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REPARAMETRISE)
def test_reparametrisation(name, kind):
    """What was normed by them was the vector of the nonzeros, without a word."""
    layer, _, x = example(kind)
    wanted, keys = layer(x), list(layer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        with pytest.raises(NotImplementedError, match=WAY_OUT):
            REPARAMETRISE[name](layer)
    unchanged(layer, x, wanted, keys)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_older_weight_norm():
    layer, _, _ = example("SparseLinear")
    with pytest.raises(NotImplementedError, match=WAY_OUT):
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_prune(kind):
    layer, _, x = example(kind)
    wanted, keys = layer(x), list(layer.state_dict())
    for attempt in (lambda: prune.l1_unstructured(layer, "weight", 0.5),
                    lambda: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
                    lambda: prune.identity(layer, "weight")):  # fmt: skip
        with pytest.raises(NotImplementedError, match="apply_further_mask"):
            attempt()
    unchanged(layer, x, wanted, keys)


def test_what_replaces_a_weight_rightly():
    layer, _, x = example("SparseLinear")
    wanted = layer(x).detach()
    values = layer.weight.detach()
    zeros = torch.func.functional_call(layer, {"weight": torch.zeros_like(values)}, (x,))
    assert torch.equal(zeros, layer.bias.expand_as(zeros))
    layer.weight = nn.Parameter(values.clone())
    assert torch.equal(layer(x), wanted)
    layer.load_state_dict({k: v.clone() for k, v in layer.state_dict().items()}, assign=True)
    assert torch.equal(layer(x), wanted)


# ---- masks that others keep ----


class Hooks(nn.Module):
    """Masks kept as NNCF keeps them."""

    def __init__(self, names: dict[str, torch.Tensor], learned: bool = False) -> None:
        super().__init__()
        self.post_hooks = nn.ModuleDict()
        for name, mask in names.items():
            holder = nn.Module()
            if learned:
                holder.mask = nn.Parameter(torch.randn(mask.shape))
            else:
                holder.register_buffer("binary_mask", mask)
            self.post_hooks[f"{name.replace('.', ':')}:weight__0"] = nn.ModuleDict({"0": holder})


@pytest.mark.parametrize("learned", [False, True])
def test_masks_kept_in_hooks(learned):
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    mask = torch.rand(8, 8) < 0.5
    assert foreign_masks(model) == {}
    model.add_module("__nncf_hooks", Hooks({"1.0": mask}, learned))
    ((name, found),) = foreign_masks(model).items()
    assert name == "1.0"
    assert found.mask is None if learned else torch.equal(found.mask, mask)
    assert "nncf.strip" in found.reason
    assert list(foreign_masks(nn.ModuleDict({"student": model, "0": nn.Linear(8, 8)}))) == ["student.1.0"]


def test_masks_kept_beside_layers():
    model = nn.ModuleDict({"fc_1": nn.Linear(4, 6), "fc": nn.Linear(4, 6)})
    mask = torch.rand(6, 4) < 0.5
    model.register_buffer("fc_1_weight_mask", mask.float())
    assert list(foreign_masks(model)) == ["fc_1"]
    model.register_buffer("fc_1_weight_mask", None)
    model["fc"].mask = nn.Parameter(mask.float(), requires_grad=False)
    assert torch.equal(foreign_masks(model)["fc"].mask, mask)
    with torch.no_grad():
        model["fc"].weight.mul_(mask)
    assert foreign_masks(model) == {}, "the weight is masked already"


def test_known_masks_are_not_foreign():
    layer = nn.Sequential(nn.Linear(8, 8), set_weight(nn.Linear(8, 8), 0.5, 0))
    prune.l1_unstructured(layer[0], "weight", 0.5)
    prototype = nn.Sequential(qnn.FakeQuantLinear.from_dense(layer[1]))
    sparse, _, _ = example("SparseConv2d")
    for model in (layer, prototype, nn.Sequential(sparse)):
        assert foreign_masks(model) == {}


def test_nncf():
    nncf = pytest.importorskip("nncf")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Linear(64, 128))

        def forward(self, x):
            return self.a(x)

    x = torch.randn(4, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nncf.prune(Net().eval(), mode=nncf.PruneMode.UNSTRUCTURED_MAGNITUDE_LOCAL, ratio=0.9, examples_inputs=x)
        found = foreign_masks(net)["a.0"]
        assert found.mask.float().mean() == pytest.approx(0.1, abs=0.01)
        wanted = net(x)
        pytest.importorskip("torchao")  # which strip needs
        net = nncf.strip(net, strip_format=nncf.StripFormat.IN_PLACE, do_copy=False)
    assert foreign_masks(net) == {}
    swap_modules_with_sparse(net, x, quantize=False, include_dense=False, verbose=False)
    assert relative_error(net(x), wanted) < 1e-5


# ---- accelerate ----


@pytest.fixture
def make_accelerator():
    """accelerate keeps its settings for the process."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.Accelerator(cpu=True)

    def make(precision):
        accelerate.state.AcceleratorState._reset_state(True)
        return accelerate.Accelerator(cpu=True, mixed_precision=precision)

    yield make
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("fuse", [False, True])
def test_accelerate_unwraps_a_model(make_accelerator, fuse, precision, keep, tmp_path):
    model, x = network(fuse=fuse)
    wanted = model(x).detach()
    accelerator = make_accelerator(precision)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.01))
    accelerator.backward(prepared(x).sum())
    accelerator.save_state(tmp_path)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer.step()
    accelerator.load_state(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
    assert unwrapped is model
    if not keep or precision == "no":
        assert torch.equal(unwrapped(x), wanted)
        dense = swap_modules_with_dense(unwrapped)
        assert type(dense[0]) is nn.Conv2d
        assert relative_error(dense(x), wanted) < 0.05


def wrapped_by_accelerate(optimizer):
    return pytest.importorskip("accelerate").optimizer.AcceleratedOptimizer(optimizer)


def wrapped_by_lightning(optimizer):
    return pytest.importorskip("lightning").pytorch.core.optimizer.LightningOptimizer(optimizer)


@pytest.mark.parametrize("wrap", [wrapped_by_accelerate, wrapped_by_lightning])
@pytest.mark.usefixtures("make_accelerator")
def test_wrapped_optimizers(wrap):
    layer, _, x = example("SparseLinear")
    optimizer = torch.optim.AdamW(layer.parameters(), 0.01)
    layer(x).sum().backward()
    optimizer.step()
    wrapper = wrap(optimizer)
    wanted = optimizer.state[layer.weight]["exp_avg"]
    mask = torch.rand(layer.weight_shape) < 0.5
    kept = mask[layer.mask()]
    layer.apply_further_mask(mask, wrapper)
    assert torch.equal(optimizer.state[layer.weight]["exp_avg"], wanted[kept])
    optimizer.step()
    with pytest.raises(NotImplementedError, match="LBFGS"):
        layer.apply_further_mask(mask, wrap(torch.optim.LBFGS(layer.parameters())))
