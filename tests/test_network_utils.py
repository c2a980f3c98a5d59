"""Conversion of whole models."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils import _layer_timing
from qsparseprop.utils.measurement_utils import Comparison, Spread
from qsparseprop.utils.network_utils import (
    SwapDecision,
    SwapReport,
    sparsity,
    swap_modules_for_state,
    swap_modules_with_dense,
    swap_modules_with_sparse,
)

from ._helpers import generator, relative_error, run_python, saved_for_backward, set_weight


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Small tensors only: on a busy machine a team of threads costs more than the work."""
    torch.set_num_threads(1)


SHAPE = (6, 3, 10, 9)


class Net(nn.Module):
    """A dense stem, two sparse convolutions with batch statistics and dropout between, a sparse classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1, bias=False),
                                   nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.1))
        self.last = nn.Conv2d(12, 12, (3, 1), groups=3)
        self.head = nn.Linear(12, 5)
        set_weight(self.stem, 1.0, 0)
        for seed, layer in enumerate((self.block[2], self.last, self.head)):
            set_weight(layer, 0.15, seed + 1)
        for p in self.parameters():
            p.data /= 4

    def forward(self, x):
        return self.head(self.last(self.block(self.stem(x))).mean((2, 3)))


@pytest.fixture
def net():
    return Net()


@pytest.fixture
def images():
    return torch.randn(SHAPE, generator=generator(1))


def swap(model, shape=SHAPE, **options):
    """Without timing, so that decisions do not depend on the machine."""
    return swap_modules_with_sparse(model, shape, **{"include_dense": False, "verbose": False, **options})


def snapshot(model):
    """Everything of a model that a conversion might disturb."""
    return {
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
                       for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }  # fmt: skip


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, a in before.items():
        b = after[key]
        if isinstance(a, dict):
            assert_same(a, b)
        elif isinstance(a, tuple):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def decisions(model):
    return {d.name: d for d in model.swap_report}


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


# ---- what is left alone ----


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("how", ["name", "object", "both"])
def test_skipped_layers(net, how, inplace):
    skip = {"name": ["last"], "object": [net.last], "both": ["last", net.head]}[how]
    skipped = {"last", "head"} if how == "both" else {"last"}
    model = swap(net, skip_modules=skip, inplace=inplace)
    for name, d in decisions(model).items():
        assert d.swapped == (name not in {*skipped, "stem"})
        assert (d.reason == "in skip_modules") == (name in skipped)
    assert type(model.last) is nn.Conv2d
    assert (model.last is net.last) == inplace


@pytest.mark.parametrize("inplace", [True, False])
def test_skipping_a_container_skips_what_it_holds(net, inplace):
    for skip in ("block", net.block):
        model = swap(copy.deepcopy(net) if skip == "block" else net, skip_modules=[skip], inplace=inplace)
        assert decisions(model)["block.2"].reason == "in skip_modules"
        assert decisions(model)["last"].swapped


class Subclass(nn.Linear):
    """A behaviour of its own."""

    def forward(self, x):
        return super().forward(x).square()


def _reflecting(model):
    model[0] = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")


def _subclass(model):
    model[0] = Subclass(4, 4)


def _hook(model):
    model[0].register_forward_hook(lambda *_: None)


def _pre_hook(model):
    model[0].register_forward_pre_hook(lambda *_: None)


def _backward_hook(model):
    model[0].register_full_backward_hook(lambda *_: None)


def _parametrized(model):
    parametrize.register_parametrization(model[0], "weight", nn.Identity())


def _weight_norm(model):
    nn.utils.parametrizations.weight_norm(model[0])


def _nan(model):
    model[0].weight.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_reflecting, "padding_mode='reflect'"), (_subclass, "Subclass is a subclass"), (_hook, "has hooks"),
        (_pre_hook, "has hooks"), (_backward_hook, "has hooks"), (_parametrized, "parametriz|subclass"),
        (_weight_norm, "parametriz|subclass"), (_nan, "NaN or Inf"),
    ],
)  # fmt: skip
def test_unsupported_layers_stay_dense_with_the_reason(change, reason):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for layer in model:
        set_weight(layer, 0.3, 0)
    change(model)
    first = model[0]
    with torch.no_grad():
        for p in first.parameters():
            p.mul_(0 if "NaN" not in reason else 1)
    swap(model, (2, 4, 4, 4), min_sparsity=0.5)
    assert model[0] is first
    d = decisions(model)["0"]
    assert not d.swapped
    assert any(part in d.reason for part in reason.split("|")), d.reason
    assert type(model[1]) is QuantizedSparseLinear


def test_a_layer_alone_stays():
    model = set_weight(nn.Linear(40, 40), 0.1, 0)
    assert swap(model, (2, 4)) is model
    (d,) = model.swap_report
    assert not d.swapped
    assert "from_dense" in d.reason


def test_a_layer_that_the_input_does_not_reach(net):
    net.unused = set_weight(nn.Linear(3, 40), 0.1, 0)
    timed = swap_modules_with_sparse(copy.deepcopy(net), SHAPE, verbose=False)
    assert type(timed.unused) is nn.Linear
    assert "not reached" in decisions(timed)["unused"].reason
    assert type(swap(net).unused) is QuantizedSparseLinear
    assert decisions(net)["unused"].input_shape is None


def test_a_layer_without_its_weight_yet():
    model = nn.Sequential(set_weight(nn.Linear(40, 40), 0.1, 0), nn.LazyLinear(3))
    swap(model, (2, 40))
    assert type(model[0]) is QuantizedSparseLinear
    assert "subclass" in decisions(model)["1"].reason


def test_weights_that_another_module_shares_stay_shared():
    """Two modules with one Parameter: replacing one of them would part them without a word."""
    embedding, head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
    with torch.no_grad():
        embedding.weight[torch.rand(30, 8) < 0.9] = 0
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    swap(model, torch.randint(30, (2, 3)))
    assert model[1].weight is model[0].weight
    assert decisions(model)["1"].reason


# ---- shared modules ----


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = set_weight(nn.Linear(6, 6), 0.1, 0)
        self.second = self.first
        self.inner = nn.ModuleList([nn.Sequential(self.first, nn.ReLU())])
        self.inner.append(self.inner[0])
        self.also = nn.Linear(6, 6)

    def forward(self, x):
        for layer in (self.first, self.second, *self.inner, self.also):
            x = layer(x)
        return x


@pytest.mark.parametrize("inplace", [True, False])
def test_shared_modules_stay_shared(inplace):
    model = Shared()
    wanted = model(torch.ones(2, 6))
    swapped = swap(model, (2, 6), quantize=False, inplace=inplace)
    assert type(swapped.first) is SparseLinear
    assert swapped.second is swapped.first is swapped.inner[0][0]
    assert swapped.inner[1] is swapped.inner[0]
    assert len(swapped.swap_report) == 2
    assert sum(p.numel() for p in swapped.parameters()) == swapped.first.nonzeros + 6 + 36 + 6
    assert relative_error(swapped(torch.ones(2, 6)), wanted) < 1e-5
    if not inplace:
        assert type(model.first) is nn.Linear


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


# ---- the report ----


def test_the_report(net, capsys):
    swap_modules_with_sparse(net, SHAPE, prototype=True, min_sparsity=0.5, verbose=True, skip_modules=["head"])
    assert [d.input_shape for d in net.swap_report] == [None, (6, 8, 10, 9), (6, 12, 5, 5), None]
    capsys.readouterr()
    net = Net()
    swap_modules_with_sparse(net, SHAPE, include_dense=False, verbose=True)
    printed = capsys.readouterr().out
    report = net.swap_report
    assert isinstance(report, SwapReport)
    assert all(isinstance(d, SwapDecision) for d in report)
    assert [d.name for d in report] == ["stem", "block.2", "last", "head"]
    assert [d.kind for d in report] == ["Conv2d", "Conv2d", "Conv2d", "Linear"]
    assert [d.shape for d in report] == [(8, 3, 3, 3), (12, 8, 3, 3), (12, 4, 3, 1), (5, 12)]
    assert [d.input_shape for d in report] == [None] * 4  # nothing was run
    assert [d.swapped for d in report] == [False, True, True, True]
    assert report.swapped == report[1:]
    assert printed == f"{report}\n"
    header, rule, *rows, note = str(report).splitlines()
    assert header.split()[0] == "layer"
    assert "parameter_groups" in note
    assert set(rule) == {"-"}
    assert len(rows) == 4
    for row, d in zip(rows, report, strict=True):
        assert row.startswith(d.name)
        assert "x".join(map(str, d.shape)) in row
        assert f"{100 * d.sparsity:.1f} %" in row
        assert ("sparse" if d.swapped else f"dense: {d.reason}") in row
    assert json.loads(json.dumps(report.as_dicts()))[1]["name"] == "block.2"
    assert not capsys.readouterr().out


def test_nothing_is_printed_unless_wanted(net, capsys):
    swap(net)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quantize", [True, False])
def test_with_timing(net, quantize):
    """Which is faster is the machine's business; that the table says what was done is not."""
    swap_modules_with_sparse(net, SHAPE, verbose=False, quantize=quantize)
    stem, *others = net.swap_report
    assert stem.dense_ms is stem.sparse_ms is None
    for d in others:
        assert d.dense_ms > 0
        assert d.sparse_ms > 0
        assert d.swapped == (d.sparse_ms < d.dense_ms)
        assert d.reason.startswith(("", "within the noise") if d.swapped else "faster dense")
        assert isinstance(net.get_submodule(d.name), (SparseConv2d, SparseLinear)) == d.swapped
        assert f"{d.dense_ms:.2f}" in str(net.swap_report)


@pytest.mark.parametrize("sparse_ms", [0.9, 1.1])
def test_what_is_within_the_noise_is_said(net, monkeypatch, sparse_ms):
    def timed(steps):
        return Comparison({"dense": 1e-3, "sparse": 1e-3 * sparse_ms}, Spread(1 / sparse_ms, 0.8, 1.3), 25)

    monkeypatch.setattr(_layer_timing, "compare_interleaved", timed)
    swap_modules_with_sparse(net, SHAPE, verbose=False)
    d = decisions(net)["head"]
    assert d.swapped == (sparse_ms < 1)
    note = "within the noise: 0.80x to 1.30x in 25 passes"
    assert d.reason == (note if d.swapped else f"faster dense, {note}")


def test_layers_that_differ_in_hardly_any_zeros_are_timed_once(monkeypatch):
    def layer(features=40, density=0.1, bias=True, frozen=False, kind=nn.Linear):
        made = set_weight(kind(features, features, bias=bias), density, 0)
        made.weight.requires_grad_(not frozen)
        return made

    times = iter([(2e-3, 1e-3), (1e-3, 2e-3)] * 5)

    def timed(steps):
        dense, sparse = next(times)
        return Comparison({"dense": dense, "sparse": sparse}, Spread(dense / sparse, 0.4, 2.5), 9)

    monkeypatch.setattr(_layer_timing, "compare_interleaved", timed)
    model = nn.Sequential(
        # the first one gets an input that wants no gradient
        layer(), layer(), layer(density=0.104), layer(density=0.15), layer(bias=False), layer(frozen=True),
        layer(density=0.104), nn.Linear(40, 48), layer(48),
    )  # fmt: skip
    names = []
    swap_modules_with_sparse(model, (3, 40), verbose=False, on_layer=names.append)
    made = decisions(model)
    assert names == [name for name in made if name != "7"]
    note = "within the noise: 0.40x to 2.50x in 9 passes"
    like = {"2": "1", "6": "1"}
    slower = iter([False, True] * 5)
    for name in names:
        twin = made[like.get(name, name)]
        if name == twin.name:
            expected = ("faster dense, " if next(slower) else "") + note
            assert made[name].reason == expected
        else:
            assert made[name].reason == f"{twin.reason}, timed as {twin.name}"
        assert made[name].swapped == twin.swapped == (made[name].reason.startswith("within"))
        assert (made[name].dense_ms, made[name].sparse_ms) == (twin.dense_ms, twin.sparse_ms)


def test_a_layer_whose_sparse_form_cannot_take_its_input_stays_dense(monkeypatch):
    def refuse(self, x):
        raise ValueError("planes too large")

    monkeypatch.setattr(QuantizedSparseLinear, "forward", refuse)
    model = nn.Sequential(set_weight(nn.Linear(40, 40), 0.1, 0), nn.ReLU())
    swap_modules_with_sparse(model, (3, 40), verbose=False)
    assert type(model[0]) is nn.Linear
    assert decisions(model)["0"].reason == "cannot take its input: planes too large"


def test_an_empty_report():
    model = nn.Sequential(nn.ReLU())
    swap(model, (2, 2))
    assert model.swap_report == []
    assert str(model.swap_report).splitlines()[0].startswith("layer")


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


# ---- what users have set ----


@pytest.mark.parametrize("inplace", [True, False])
def test_attributes_of_layers_and_parameters_go_along(net, inplace):
    net.last.learning_rate_scale, net.last.group_name = 0.5, "tail"
    net.last.weight._no_weight_decay = True
    net.last.bias.tag = "bias"
    net.train()
    net.last.eval()
    model = swap(net, inplace=inplace)
    assert type(model.last) is QuantizedSparseConv2d
    assert (model.last.learning_rate_scale, model.last.group_name) == (0.5, "tail")
    if inplace:  # torch's copies of parameters are without their attributes
        assert model.last.weight._no_weight_decay
        assert model.last.bias.tag == "bias"
    assert not model.last.training
    back = swap_modules_with_dense(model)
    assert (back.last.learning_rate_scale, back.last.group_name) == (0.5, "tail")
    assert hasattr(back.last.weight, "_no_weight_decay") == inplace
    assert set(vars(back.last)) - set(vars(net.stem)) == {"learning_rate_scale", "group_name"}


def test_attributes_of_pruned_layers_go_along(net):
    prune.l1_unstructured(net.last, "weight", 0.9)
    net.last.weight_orig.tag = "weight"
    net.last.name = "last"
    swap(net)
    assert (net.last.name, net.last.weight.tag) == ("last", "weight")
    assert not {"weight_orig", "weight_mask"} & set(vars(net.last))


def test_hooks_of_sparse_layers_go_along_on_the_way_back(net, images):
    model, seen = swap(net), []
    handles = [model.last.register_forward_hook(lambda *_: seen.append("forward")),
               model.last.register_forward_pre_hook(lambda *_: seen.append("pre")),
               model.last.register_full_backward_hook(lambda *_: seen.append("backward"))]  # fmt: skip
    model = swap_modules_with_dense(model)
    model(images).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    for handle in handles:
        handle.remove()
    model(images)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_layers_whose_parameters_have_gradient_hooks_stay_dense(net, kind):
    handle = getattr(net.last.weight, kind)(lambda *_: None)
    assert "gradient hooks" in decisions(swap(net))["last"].reason
    assert type(net.last) is nn.Conv2d
    handle.remove()
    swap(net)
    assert type(net.last) is QuantizedSparseConv2d


def test_the_way_back_replaces_every_place_or_none(net):
    model = swap(net)
    model.tail = [model.last]
    before = model.last
    with pytest.raises(ValueError, match="also holds last in a list"):
        swap_modules_with_dense(model)
    assert model.last is before
    assert type(model.head) is QuantizedSparseLinear
    del model.tail
    assert type(swap_modules_with_dense(model).last) is nn.Conv2d
