"""What people do with a model while blocks form: as with one whose layers are computed one by one."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from qsparseprop.nn.deferred import DeferredTensor
from qsparseprop.utils.fusion import chains, unfuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_dense
from qsparseprop.utils.saved_tensors import compress_saved_tensors

from ._blocks import assert_close, assert_same, conv_net, is_deferred, mlp, relative, run, stepwise, swapped

SHAPE = (5, 12, 9, 7)


@pytest.fixture
def model() -> nn.Sequential:
    return swapped(conv_net(), SHAPE, grad="absmax")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(SHAPE)


@pytest.fixture
def pair(model, x) -> tuple[Tensor, Tensor]:
    """What the first three modules give, deferred and step by step, with their histories."""
    other = copy.deepcopy(model)
    deferred, plain = model[:3](x), stepwise(other[:3])(x)
    assert is_deferred(deferred)
    return deferred, plain * 1


# ---- the model ----


def gradients(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without statistics, which checkpoints count twice."""
    return {name: value for name, value in found.items() if name in ("output", "input") or name.endswith("grad")}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(model, x, reentrant):
    other = copy.deepcopy(model)
    found = run(model, x, lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_same(gradients(found), gradients(run(other, x)))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("k", range(1, 9))
def test_checkpoints_that_begin_and_end_within_blocks(model, x, k, reentrant):
    # what a checkpoint is given from within a block is read, not made of 8 bits of before: near the whole, and equal to
    # the same checkpoint of operations one by one
    wanted = gradients(run(copy.deepcopy(model), x))
    for call in (
        lambda m: lambda x: m[k:](checkpoint(m[:k], x, use_reentrant=reentrant)),
        lambda m: lambda x: checkpoint(m[k:], m[:k](x), use_reentrant=reentrant),
    ):
        mine, other = copy.deepcopy(model), copy.deepcopy(model)
        found = gradients(run(mine, x, call(mine)))
        assert_same(found, gradients(run(other, x, stepwise(call(other)))))
        for name, value in found.items():
            assert relative(value, wanted[name]) < 0.06, name


@pytest.mark.parametrize("segments", [2, 4])
def test_sequential_checkpoints(model, x, segments):
    def call(m):
        return lambda x: checkpoint_sequential(m, segments, x, use_reentrant=False)

    mine, other = copy.deepcopy(model), copy.deepcopy(model)
    found = gradients(run(mine, x, call(mine)))
    assert_same(found, gradients(run(other, x, stepwise(call(other)))))
    # where a segment begins within a block, what follows is torch's
    assert_close(found, gradients(run(model, x)), 0.06)


@pytest.mark.parametrize("context", [torch.autograd.graph.save_on_cpu, compress_saved_tensors])
def test_hooks_on_saved_tensors(model, x, context):
    def call(x):
        with context():
            return model(x)

    x = torch.randn(8, *SHAPE[1:])  # large enough to be compressed
    wanted = run(copy.deepcopy(model), x)
    assert_same(run(model, x, call), wanted)
    with context():
        assert is_deferred(model[:3](x))


def test_compression_finds_nothing_left_in_blocks(model):
    """Its own operators for ReLU and others stay away from what blocks keep in fewer bits."""
    x = torch.randn(8, *SHAPE[1:])
    with compress_saved_tensors() as compression:
        model(x)
    blocks = compression.saved
    with compress_saved_tensors() as compression:
        unfuse_modules(model)(x)
    assert blocks.ratio > 0.99
    assert blocks.after < compression.saved.after


def test_several_forward_passes_before_a_backward_pass(model):
    other = copy.deepcopy(model)
    xs = [torch.randn(SHAPE) for _ in range(3)]
    for network in (model, other):
        call = network if network is model else stepwise(network)
        sum(call(x).square().sum() for x in xs).backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_threads_share_a_model(model, x):
    model.eval()
    wanted = run(copy.deepcopy(model), x)
    results: list = [None] * 4

    def work(i):
        for _ in range(5):
            y = model(x)
            scale = torch.linspace(-1, 1, y.numel()).view(y.shape)
            results[i] = [y, *torch.autograd.grad((y * scale).sum(), list(model.parameters()))]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [wanted["output"], *(value for name, value in wanted.items() if name.endswith("grad"))]
    for found in results:
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_threads_share_a_tensor(model, x):
    model.eval()
    wanted = model(x).detach().clone()
    for _ in range(5):
        h, outputs = copy.deepcopy(model)[:3](x), []
        readers = [lambda t: model[3:](t), lambda t: t.sum(), lambda t: model[3:](t), torch.sigmoid]
        threads = [threading.Thread(target=lambda f=f, h=h, o=outputs: o.append(f(h))) for f in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outputs) == 4
        for y in outputs:
            if y.shape == wanted.shape:
                torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)


def test_a_backward_pass_in_another_thread(model, x):
    other = copy.deepcopy(model)
    y = model(x).square().sum()
    thread = threading.Thread(target=y.backward)
    thread.start()
    thread.join()
    stepwise(other)(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_copies_and_files(model, x, tmp_path):
    keys = list(unfuse_modules(copy.deepcopy(model)).state_dict())
    model(x)
    model.eval()
    wanted = model(x)
    torch.save(model, tmp_path / "model.pt")
    buffer = io.BytesIO(pickle.dumps(model))
    for again in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False), pickle.load(buffer)):
        assert torch.equal(again(x), wanted)
        assert list(again.state_dict()) == keys
        assert is_deferred(again[0](x))
        again[0].weight.data.zero_()  # shares nothing
    assert torch.equal(model(x), wanted)
    other = unfuse_modules(copy.deepcopy(model))
    with torch.no_grad():
        other[1].running_mean.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), unfuse_modules(model)(x))


def test_deep_models_can_be_copied():
    layers = []
    for _ in range(150):
        layers += [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = swapped(nn.Sequential(*layers), (2, 4, 3, 3))
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_back_to_dense_layers(model, x):
    model(x)
    model.eval()
    dense = swap_modules_with_dense(model, inplace=False)
    plain = swap_modules_with_dense(unfuse_modules(copy.deepcopy(model)), inplace=False)
    assert [type(m) for m in dense] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 3
    for network in (dense, plain):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
        assert not {"deferring", "_usages"} & {name for m in network.modules() for name in vars(m)}
    assert torch.equal(dense(x), plain(x))
    torch.testing.assert_close(dense(x), model(x), rtol=0.1, atol=0.1)
    swap_modules_with_dense(model)  # in place
    assert torch.equal(model(x), dense(x))
    assert not {"deferring", "_usages"} & {name for m in model.modules() for name in vars(m)}


def test_unfused_models_are_plain_ones(model, x):
    model(x)
    unfuse_modules(model)
    assert all(type(model[:k](x)) is Tensor for k in range(1, 10))
    assert chains(model) == {}


def test_parts_of_a_model(model, x):
    """Slices, parts in other models, layers exchanged, and calls in another order."""
    model.eval()
    wanted = model(x)
    assert torch.equal(model[3:](model[:3](x)), wanted)
    assert torch.equal(nn.Sequential(nn.Identity(), model[:4], nn.Sequential(*model[4:]))(x), wanted)
    h = x
    for layer in model:
        h = layer(h)
    assert torch.equal(h, wanted)
    model[1] = nn.Identity()
    assert torch.equal(model(x), stepwise(copy.deepcopy(model))(x))
    with_dropout = nn.Sequential(*model[:2], nn.Dropout(0.5), *model[2:]).train()
    other = copy.deepcopy(with_dropout)
    assert_same(run(with_dropout, x), run(other, x, stepwise(other)))


def test_the_forward_pass_is_the_models_own(x):
    """Whatever it looks at: flags, arguments, numbers, and a forward that was replaced."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.flag, self.last = conv_net(), False, None

        def forward(self, x, mask=None):
            h = self.net[:3](x)
            if self.flag:
                h = -h
            if self.training and h.mean() > 1e3:
                raise AssertionError
            self.last = h
            return self.net[3:](h if mask is None else h * mask)

    model = swapped(Own(), SHAPE, grad="absmax").eval()
    other = copy.deepcopy(model)
    inner = model.forward
    for flag in (False, True):
        model.flag = other.flag = flag
        for mask in (None, torch.rand(12, 1, 1)):
            assert torch.equal(model(x, mask), stepwise(other)(x, mask))
            assert torch.equal(model.last, other.last)
    model.forward = lambda x: 2 * inner(x)
    assert torch.equal(model(x), 2 * stepwise(other)(x))


# ---- hooks ----


@pytest.mark.parametrize("on", range(9))
def test_hooks_see_ordinary_values_and_may_replace_them(model, x, on):
    other = copy.deepcopy(model)
    results = []
    for network in (model, other):
        seen: list[Tensor] = []
        network[on].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].mean()))
        network[on].register_forward_hook(lambda _, args, y, seen=seen: seen.append(y.std()) or y * 0.5)
        network[on].register_full_backward_hook(lambda _, wanted, given, seen=seen: seen.append(given[0].mean()))
        results.append((run(network, x, network if network is model else stepwise(network)), seen))
    assert_same(results[0][0], results[1][0])
    assert len(results[0][1]) == 3
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=str)
def test_feature_extractors(activation):
    """Whoever keeps what modules give has the values, whatever the modules behind do with it."""
    model = swapped(mlp(activation), (4, 24), grad="absmax").eval()
    other, x = copy.deepcopy(model), torch.randn(9, 24)
    kept: list[dict[int, Tensor]] = []
    for network in (model, other):
        found: dict[int, Tensor] = {}
        for i, module in enumerate(network):
            module.register_forward_hook(lambda _, args, y, i=i, found=found: found.update({i: y}))
        stepwise(network)(x) if network is other else network(x)
        kept.append(found)
    assert any(type(y) is DeferredTensor for y in kept[0].values())
    for i, y in kept[0].items():
        torch.testing.assert_close(y.detach(), kept[1][i].detach(), rtol=1e-2, atol=1e-2)


# ---- others who take part ----


class Names(TorchDispatchMode):
    def __init__(self):
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [FlopCounterMode(display=False), Names(), torch.device("cpu")],
                         ids=["FlopCounterMode", "dispatch mode", "device"])  # fmt: skip
def test_modes_see_an_ordinary_model(model, x, mode):
    other = unfuse_modules(copy.deepcopy(model))
    h = model[:3](x)
    wanted = stepwise(copy.deepcopy(model)[:3])(x)
    with mode:
        assert torch.equal(h, wanted)
        h, y, plain = model[0](x), model(x), other(x)
        assert type(h) is type(y) is Tensor
        assert torch.equal(y, plain)
    if isinstance(mode, Names):
        assert "aten.native_batch_norm.default" in mode.names


def test_a_default_device_is_kept(model, x):
    with torch.device("cpu"):  # not set_default_device: what that leaves behind breaks torch 2.8's get_default_device
        assert type(model[0](x)) is Tensor


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.jacrev])
def test_transforms_of_functions_are_refused(model, pair, x, transform):
    def loss(x):
        return model(x).sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        transform(loss)(x[None] if transform is torch.vmap else x)
    doubled = torch.vmap(lambda t: 2 * t)(pair[0])  # of what a model has given they work
    assert torch.equal(doubled, 2 * pair[1])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own use
def test_forward_mode_is_refused(model, x):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        model(forward_ad.make_dual(x, x))


def test_functional_calls(model, x):
    other = copy.deepcopy(model)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    y = torch.func.functional_call(model, weights, (x,))
    y.square().sum().backward()
    stepwise(other)(x).square().sum().backward()
    for name, value in other.named_parameters():
        assert torch.equal(weights[name].grad, value.grad)
