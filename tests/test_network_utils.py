"""Conversion of whole models: what is replaced, that nothing else changes, and what the result is good for."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.network_utils import (
    sparsity,
    swap_modules_for_state,
    swap_modules_with_dense,
    swap_modules_with_sparse,
)

from ._helpers import generator, relative_error, run_python, saved_for_backward, set_weight
from ._swapping import SHAPE, Net, assert_same, decisions, snapshot, swap

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- what is replaced ----


@pytest.mark.parametrize("quantize", [True, False])
def test_layers_that_are_sparse_enough_are_replaced(net, images, quantize):
    wanted = copy.deepcopy(net).eval()(images)
    dense = {n: m for n, m in net.named_modules() if hasattr(m, "weight")}
    model = swap(net, quantize=quantize)
    assert model is net
    conv, linear = (QuantizedSparseConv2d, QuantizedSparseLinear) if quantize else (SparseConv2d, SparseLinear)
    assert {n: type(model.get_submodule(n)) for n in ("stem", "block.2", "last", "head")} == {
        "stem": nn.Conv2d, "block.2": conv, "last": conv, "head": linear,
    }  # fmt: skip
    for name in ("block.2", "last", "head"):
        sparse = model.get_submodule(name)
        assert torch.equal(sparse.dense_weight(), dense[name].weight)
        assert (sparse.bias is None) == (dense[name].bias is None)
        assert sparse.training
    assert model.stem is dense["stem"]
    assert relative_error(model.eval()(images), wanted) < (0.05 if quantize else 1e-5)


def test_a_quantised_model_takes_the_config(net):
    config = QuantConfig(input="standard", grad="absmax")
    model = swap(net, qconfig=config)
    assert {m.qconfig for m in model.modules() if hasattr(m, "qconfig")} == {config}
    assert {m.qconfig for m in swap(Net()).modules() if hasattr(m, "qconfig")} == {QuantConfig()}


@pytest.mark.parametrize("min_sparsity", [0.0, 0.5, 0.8, 0.86, 0.9, 1.0])
def test_min_sparsity(net, min_sparsity):
    zeros = {n: (m.weight == 0).double().mean().item() for n, m in net.named_modules()
             if isinstance(m, (nn.Conv2d, nn.Linear))}  # fmt: skip
    model = swap(net, min_sparsity=min_sparsity)
    for name, d in decisions(model).items():
        assert d.sparsity == pytest.approx(zeros[name])
        assert d.swapped == (zeros[name] >= min_sparsity)
        if not d.swapped:
            assert d.reason == f"below min_sparsity={min_sparsity:g}"


@pytest.mark.parametrize("frozen", [False, True])
def test_modes_and_frozen_parameters_are_kept(net, frozen):
    net.eval()
    net.head.train()
    net.last.weight.requires_grad_(not frozen)
    net.head.bias.requires_grad_(not frozen)
    swap(net)
    assert not net.last.training
    assert not net.block[2].training
    assert net.head.training
    assert net.last.weight.requires_grad == (not frozen)
    assert net.head.bias.requires_grad == (not frozen)
    assert net.head.weight.requires_grad


def test_an_example_input_may_be_given(net):
    """Tokens for instance, of which a shape alone does not tell the dtype."""
    model = nn.Sequential(nn.Embedding(20, 8), set_weight(nn.Linear(8, 16), 0.1, 0), nn.ReLU(), nn.Linear(16, 2))
    tokens = torch.randint(20, (3, 7))
    swap(model, tokens, include_dense=True)
    assert decisions(model)["1"].input_shape == (3, 7, 8)
    assert model(tokens).shape == (3, 7, 2)
    assert decisions(swap(net, torch.randn(SHAPE), include_dense=True))["last"].input_shape == (6, 12, 5, 5)


def test_channels_last_models(net, images):
    net.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    wanted = copy.deepcopy(net).eval()(images)
    swap(net, images, quantize=False)
    assert relative_error(net.eval()(images), wanted) < 1e-5


# ---- nothing else changes ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("timed", [False, True])
def test_a_copy_leaves_the_original_untouched(net, images, training, timed):
    net(images).sum().backward()
    net.train(training)
    before = snapshot(net)
    model = swap(net, inplace=False, include_dense=timed)
    assert_same(before, snapshot(net))
    assert model is not net
    assert not hasattr(net, "swap_report")
    originals = {p.data_ptr() for p in [*net.parameters(), *net.buffers()]}
    assert not originals & {p.data_ptr() for p in [*model.parameters(), *model.buffers()] if p.numel()}
    assert model.training == training
    for name in ("block.0", "block.3"):
        for mine, theirs in zip(model.get_submodule(name).buffers(), net.get_submodule(name).buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("timed", [False, True])
def test_in_place_only_layers_change(net, images, timed):
    net(images).sum().backward()
    before = snapshot(net)
    swap(net, include_dense=timed)
    after = snapshot(net)
    assert torch.equal(before["random"], after["random"]), "the generator of random numbers has moved"
    assert_same(before["buffers"], {k: v for k, v in after["buffers"].items() if "indices" not in k})
    kept = [n for n in after["parameters"] if after["parameters"][n][0] == before["parameters"][n][0]]
    assert set(kept) >= {"stem.weight", "stem.bias", "block.0.weight", "block.3.bias"}
    assert_same({k: before["parameters"][k] for k in kept}, {k: after["parameters"][k] for k in kept})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"model": "net"}, TypeError, ["torch.nn.Module", "str"]),
        ({"min_sparsity": -0.1}, ValueError, ["min_sparsity", "-0.1"]),
        ({"min_sparsity": 80}, ValueError, ["min_sparsity", "80"]),
        ({"min_sparsity": float("nan")}, ValueError, ["min_sparsity", "nan"]),
        ({"qconfig": QuantConfig(), "quantize": False}, ValueError, ["qconfig", "quantize"]),
        ({"prototype": True, "quantize": False}, ValueError, ["prototype", "quantize"]),
        ({"qconfig": "absmax"}, TypeError, ["QuantConfig", "str"]),
        ({"skip_modules": ["stemm"]}, ValueError, ["skip_modules", "'stemm'"]),
        ({"input_shape": (0, 3, 10, 9)}, ValueError, ["input_shape", "(0, 3, 10, 9)"]),
        ({"input_shape": (2.0, 3, 10, 9)}, ValueError, ["input_shape", "2.0"]),
        ({"input_shape": (True, 3, 10, 9)}, ValueError, ["input_shape", "True"]),
        ({"input_shape": 3}, (TypeError, ValueError), []),
        ({"input_shape": (2, 4, 10, 9)}, RuntimeError, ["channels"]),
        ({"input_shape": (2, 3, 1, 1)}, RuntimeError, []),
    ],
)
def test_errors_leave_the_model_unchanged(net, arguments, error, words):
    before = snapshot(net)
    with pytest.raises(error) as caught:
        swap_modules_with_sparse(**{"model": net, "input_shape": SHAPE, "verbose": False, **arguments})
    for word in words:
        assert word in str(caught.value)
    assert_same(before, snapshot(net))


# ---- pruned models ----


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("inplace", [True, False])
def test_models_with_masks_attached(images, quantize, forward, inplace):
    """After a forward pass prune's weights are part of a graph, which deepcopy refuses."""
    net = Net()
    for module in (net.block[2], net.last, net.head):
        nn.init.normal_(module.weight, std=0.1)
        prune.random_unstructured(module, "weight", 0.9)
    if forward:
        net(images).sum().backward()
    with torch.no_grad():  # newer than the attribute that prune made
        net.head.weight_orig.mul_(-1)
    model = swap(net, quantize=quantize, inplace=inplace)
    assert [d.name for d in model.swap_report.swapped] == ["block.2", "last", "head"]
    for d in model.swap_report.swapped:
        assert d.sparsity == pytest.approx(0.9, abs=0.01)
        assert not [n for n, _ in model.get_submodule(d.name).named_parameters() if n not in ("weight", "bias")]
    if not inplace:
        assert prune.is_pruned(net)
        assert relative_error(model.eval()(images), net.eval()(images)) < (0.05 if quantize else 1e-5)
        assert torch.equal(model.head.dense_weight(), net.head.weight_orig * net.head.weight_mask)


# ---- what the result is good for ----


@pytest.mark.parametrize("quantize", [True, False])
def test_training_a_swapped_network_lowers_the_loss(net, quantize):
    model = swap(net, quantize=quantize)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    labels = torch.arange(60) % 5
    images = torch.randn(60, *SHAPE[1:], generator=generator(3))
    images[:, 0] += labels[:, None, None] - 2.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_swapped_models_can_be_copied_and_stored(net, images):
    model = swap(net).eval()
    wanted = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), wanted)
        assert other.swap_report.as_dicts() == model.swap_report.as_dicts()
    other = Net()
    with torch.no_grad():
        for module in (other.block[2], other.last, other.head):  # as many weights elsewhere
            module.weight.copy_(module.weight.flip(0))
    other = swap(other).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(images), wanted)


def test_swapping_twice_changes_nothing_more(net, images):
    model = swap(net).eval()
    wanted, first = model(images), model.last
    swap(model)
    assert [d.name for d in model.swap_report] == ["stem"]
    assert model.last is first
    assert torch.equal(model(images), wanted)


def test_a_swapped_network_keeps_less_for_backward(net):
    images = torch.randn(64, *SHAPE[1:])

    def kept(model):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                    for t in saved_for_backward(lambda: model(images), model)}
        return sum(storages.values())

    dense = copy.deepcopy(net)
    assert kept(swap(net)) < kept(swap(dense, quantize=False))


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(training):
    """Outside of training torch hands their weights to a function of its own, which knows nothing of sparse ones."""
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    for layer in (model.linear1, model.linear2):
        set_weight(layer, 0.15, 0)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        wanted = model(x)
    swap(model, x, quantize=False)
    assert type(model.linear1) is SparseLinear
    model.train(training)
    assert relative_error(model(x), wanted) < 1e-4
    with torch.no_grad():
        assert relative_error(model(x), wanted) < 1e-4


def test_in_a_fresh_process():
    """Nothing else has been imported that the conversion might rely on."""
    process = run_python("""
import torch
from qsparseprop.utils.network_utils import swap_modules_with_sparse
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
model[0].weight.data[1:] = 0
swap_modules_with_sparse(model, (4, 8), include_dense=False)
model(torch.randn(4, 8)).sum().backward()
print(type(model[0]).__name__)
""")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "QuantizedSparseLinear"


# ---- sparsity ----


def test_sparsity():
    assert sparsity(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))) == 0.0
    assert sparsity(nn.Linear(4, 4)) == 0.0
    linear, conv = nn.Linear(10, 10), nn.Conv2d(2, 5, 2)
    with torch.no_grad():
        linear.weight[:9] = 0
        linear.bias.zero_()
    model = nn.Sequential(linear, conv)
    assert sparsity(model) == pytest.approx(90 / 140)
    assert sparsity(nn.Sequential(linear, linear)) == pytest.approx(0.9)  # a shared layer counts once
    assert sparsity(nn.ModuleList([nn.Conv1d(2, 2, 1), nn.ConvTranspose3d(2, 2, 1)])) == 0.0


def test_sparsity_with_masks_and_sparse_layers(net):
    wanted = sparsity(net)
    assert wanted == pytest.approx(
        sum((m.weight == 0).sum().item() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        / sum(m.weight.numel() for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    )
    assert sparsity(swap(copy.deepcopy(net))) == pytest.approx(wanted)
    masked = Net()
    for module in (masked.stem, masked.block[2], masked.last, masked.head):
        nn.init.ones_(module.weight)
        prune.random_unstructured(module, "weight", 0.75)
    assert sparsity(masked) == pytest.approx(0.75, abs=0.01)
    masked(torch.randn(SHAPE))
    assert sparsity(masked) == pytest.approx(0.75, abs=0.01)


# ---- every kind of layer ----


def volumes():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(2, 8, 3, stride=2, padding=1), nn.ReLU(), nn.ConvTranspose3d(8, 4, 2, stride=2),
                         nn.Flatten(2), nn.Conv1d(4, 6, 5, stride=3), nn.ConvTranspose1d(6, 4, 3, padding=1, groups=2),
                         nn.Unflatten(2, (1, -1)), nn.ConvTranspose2d(4, 3, 3), nn.Conv2d(3, 5, 3))  # fmt: skip


@pytest.mark.parametrize("quantize", [True, False])
def test_every_kind_of_layer_is_replaced_and_put_back(quantize):
    model = volumes()
    layers = [m for m in model if hasattr(m, "weight")]
    for seed, layer in enumerate(layers):
        set_weight(layer, 0.3, seed)
    x = torch.randn(3, 2, 4, 6, 5)
    wanted = model(x)
    kinds = [type(m) for m in model]
    swap_modules_with_sparse(model, x, min_sparsity=0.5, include_dense=False, quantize=quantize, verbose=False)
    assert [d.kind for d in model.swap_report.swapped] == [k.__name__ for k in kinds if "Conv" in k.__name__]
    y = model(x)
    assert relative_error(y, wanted) < (0.2 if quantize else 1e-4)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    fresh = volumes()
    swap_modules_for_state(fresh, model.state_dict(), quantize=quantize).load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), y)
    swap_modules_with_dense(model)
    assert [type(m) for m in model] == kinds
    assert relative_error(model(x), wanted) < 1e-5


def test_transformers_conv1d_is_replaced_like_a_linear_layer():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=100, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    kind = type(model.transformer.h[0].mlp.c_fc)
    for m in model.modules():
        if isinstance(m, kind):
            with torch.no_grad():
                m.weight.mul_(torch.rand(m.weight.shape) > 0.9)
    x = torch.randint(0, 100, (2, 8))
    wanted = model(x).logits
    swap_modules_with_sparse(model, x, include_dense=False, quantize=False, verbose=False)
    assert [d.kind for d in model.swap_report.swapped] == ["Conv1D"] * 8
    assert relative_error(model(x).logits, wanted) < 1e-5
    model.train()
    model(x, labels=x).loss.backward()
    assert model.transformer.h[1].attn.c_attn.weight.grad is not None
    swap_modules_with_dense(model.eval())
    assert sum(isinstance(m, kind) for m in model.modules()) == 8
    assert relative_error(model(x).logits, wanted) < 1e-6


@pytest.mark.parametrize("patch", [9, 14, 16])
@pytest.mark.parametrize("timed", [True, False])
def test_patch_embeddings(patch, timed):
    model = nn.Sequential(nn.Conv2d(3, 48, patch, patch), nn.Flatten(2))
    prune.l1_unstructured(model[0], "weight", 0.9)
    x = torch.rand(2, 3, 3 * patch, 3 * patch)
    wanted = model(x)
    swap_modules_with_sparse(model, x, include_dense=timed, quantize=False, verbose=False)
    assert timed or type(model[0]) is SparseConv2d
    assert relative_error(model(x), wanted) < 1e-5
