"""Activations that travel packed from block to block."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsparseprop.nn import _norm_act
from qsparseprop.nn._handover import PackedTensor, handed_over
from qsparseprop.nn.intrinsic import (
    QuantizedBNReLU2d,
    QuantizedSparseConvBn2d,
    QuantizedSparseConvBnAddReLU2d,
)
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.saved_tensors import compress_saved_tensors


def fused(model, shape, **settings):
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.in_channels > 3:
                module.weight *= torch.rand_like(module.weight) > 0.7
    swap_modules_with_sparse(model, shape, fuse=True, include_dense=False, min_sparsity=0.5, verbose=False,
                             qconfig=QuantConfig(**settings))  # fmt: skip
    with torch.no_grad():
        model.eval()(torch.zeros(shape))  # in its first run blocks learn of each other
    return model.train()


def chain(**settings):
    layers = []
    for stride in (1, 2, 1):
        layers += [nn.Conv2d(12, 12, 3, stride, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
    model = nn.Sequential(*layers)
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return fused(model, (5, 12, 9, 7), **settings)


def blocks(model):
    return [m for m in model.modules() if isinstance(m, (QuantizedSparseConvBn2d, QuantizedBNReLU2d))]


def disconnected(model):
    """The same model, its activations ordinary tensors."""
    model = copy.deepcopy(model)
    model.forward.hand_over = False
    return model


def run(model, x, training=True):
    model.train(training)
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), x.grad, [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]


def assert_gradients_agree(model, grads, grads_plain):
    """Exactly, or for weights whose inputs are made again from 8 bits, to the step of these."""
    again = {f"{name}.weight" for name, module in model.named_modules() for block in blocks(model)
             if module in block._readers and not takes_residual(block) and repacks(block)}  # fmt: skip
    for (name, _), a, b in zip(model.named_parameters(), grads, grads_plain, strict=True):
        if name in again:
            assert 0 < (a - b).norm() < 2e-2 * b.norm()
        else:
            assert torch.equal(a, b), name


def takes_residual(block):
    return isinstance(block, QuantizedSparseConvBnAddReLU2d)


def repacks(block):
    reader = block._readers[0]
    return reader._qconfig.input != "sawb" and reader._qconfig.grad_weight == "int8"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"granularity": "tensor"}, {"input": "standard"}, {"input": "sawb"},
                                      {"grad": "absmax"}, {"grad": "luq"}, {"grad": "dithered"},
                                      {"grad_weight": "float32"}])  # fmt: skip
def test_a_chain_computes_the_same_bits(settings, training):
    model = chain(**settings)
    plain = disconnected(model)
    x = torch.randn(5, 12, 9, 7)
    y, dx, grads, buffers = run(model, x, training)
    y_plain, dx_plain, grads_plain, buffers_plain = run(plain, x, training)
    assert torch.equal(y, y_plain)
    assert torch.equal(dx, dx_plain)
    assert_gradients_agree(model, grads, grads_plain)
    assert all(torch.equal(a, b) for a, b in zip(buffers, buffers_plain, strict=True))


def test_only_what_the_next_block_reads_alone_is_a_packed_tensor():
    model = resnet20()
    model = fused(model, (4, 3, 32, 32))
    seen = {}
    for name, block in model.named_modules():
        if isinstance(block, QuantizedSparseConvBn2d):
            block.register_forward_hook(lambda module, args, y, name=name: seen.update({name: (args, y)}))
    model(torch.randn(4, 3, 32, 32))
    firsts = [name for name in seen if name.endswith("conv1") and "layer" in name]
    assert len(firsts) == 9
    for name in firsts:
        y = seen[name][1]
        assert type(y) is PackedTensor
        assert seen[name.replace("conv1", "conv2")][0][0] is y
    last = [seen[name][1] for name in seen if name.endswith("conv2")]
    assert all(type(y) is torch.Tensor for y in last)
    assert all(handed_over(y) is not None for y in last[:-1])


def test_a_residual_network_agrees():
    torch.manual_seed(0)
    model = fused(resnet20(), (8, 3, 32, 32))
    plain = disconnected(model)
    x = torch.randn(8, 3, 32, 32)
    y, _, grads, _ = run(model, x)
    y_plain, _, grads_plain, _ = run(plain, x)
    assert torch.equal(y, y_plain)
    assert_gradients_agree(model, grads, grads_plain)


class Downsampling(nn.Module):
    """A residual block of stride 2 with a 1x1 convolution beside its 3x3 one, behind a convolution that stays dense."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv1, self.norm1 = nn.Conv2d(12, 20, 3, 2, padding=1, bias=False), nn.BatchNorm2d(20)
        self.conv2, self.norm2 = nn.Conv2d(20, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.side, self.side_norm = nn.Conv2d(12, 20, 1, 2, bias=False), nn.BatchNorm2d(20)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.side_norm(self.side(x)))


def test_one_packing_serves_kernels_of_different_sizes(monkeypatch):
    model = fused(Downsampling(), (5, 3, 9, 8))
    assert isinstance(model.norm, QuantizedBNReLU2d)
    plain = disconnected(model)
    packed, seen = [], []
    forward_pass = _norm_act.forward_pass
    monkeypatch.setattr(_norm_act, "forward_pass", lambda *args: packed.append(args) or forward_pass(*args))
    hook = model.side.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    x = torch.randn(5, 3, 9, 8)
    y, dx, grads, _ = run(model, x)
    hook.remove()
    assert not packed  # both convolutions read what the batch normalisation has packed
    assert type(seen[0]) is PackedTensor
    y_plain, dx_plain, grads_plain, _ = run(plain, x)
    assert len(packed) == 2  # the first one serves both as well
    assert torch.equal(y, y_plain)
    torch.testing.assert_close(dx, dx_plain, rtol=1e-5, atol=1e-6)  # sums of two, in another order
    for a, b in zip(grads, grads_plain, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()


class Branches(nn.Module):
    """Two convolutions that read the same tensor."""

    def __init__(self, stride=1):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.main, self.main_norm = nn.Conv2d(12, 8, 3, 1, padding=1, bias=False), nn.BatchNorm2d(8)
        self.side, self.side_norm = nn.Conv2d(12, 8, 1, stride, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return torch.relu(self.main_norm(self.main(x))).mean((2, 3)) + self.side_norm(self.side(x)).mean((2, 3))


@pytest.mark.parametrize("change", [{"input": "standard"}, {"granularity": "tensor"}, {"grad_weight": "float32"}, {}])
def test_readers_that_cannot_share_see_the_values(change):
    model = fused(Branches(1 if change else 2), (4, 3, 8, 8))
    model.side.qconfig = QuantConfig(**change)
    plain = disconnected(model)
    seen = []
    model.side.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    x = torch.randn(4, 3, 8, 8)
    y, dx, grads, _ = run(model, x)
    assert type(seen[0]) is torch.Tensor
    y_plain, dx_plain, grads_plain, _ = run(plain, x)
    assert torch.equal(y, y_plain)
    torch.testing.assert_close(dx, dx_plain, rtol=1e-5, atol=1e-6)
    by_name = dict(zip([n for n, _ in model.named_parameters()], zip(grads, grads_plain, strict=True), strict=True))
    assert torch.equal(*by_name["side.weight"])


@pytest.mark.parametrize("side_first", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_two_readers(side_first, reentrant):
    model = fused(Branches(), (4, 3, 8, 8), grad="absmax")
    x = torch.randn(4, 3, 8, 8)
    stem = nn.Conv2d(3, 12, 1)
    assert len(blocks(model)) == 3

    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.main_norm = model.main, model.main_norm
            self.side, self.side_norm = model.side, model.side_norm

        def forward(self, x):
            first, second = (self.side, self.main) if side_first else (self.main, self.side)
            return first(x).mean((2, 3)) + second(x).mean((2, 3))

    inner = Inner()
    results = []
    for use in (False, True):
        for p in (*inner.parameters(), *stem.parameters()):
            p.grad = None
        hidden = stem(x)
        y = checkpoint(inner, hidden, use_reentrant=reentrant) if use else inner(hidden)
        y.square().sum().backward()
        results.append([p.grad.clone() for p in (*inner.parameters(), *stem.parameters()) if p.grad is not None])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


def test_deep_models_can_be_copied():
    layers = []
    for _ in range(150):
        layers += [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()]
    model = fused(nn.Sequential(*layers), (2, 4, 3, 3))
    again = copy.deepcopy(model)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(again(x), model(x))
    own = set(again.modules())
    assert all(reader in own for block in blocks(again) for reader in block._readers)
    counts = [sum(len(block._readers) for block in blocks(m)) for m in (model, again)]
    assert counts[0] == counts[1] > 100


def test_frozen_weights_keep_no_input():
    model = chain()
    for block in blocks(model):
        block.weight.requires_grad_(False)
    x = torch.randn(5, 12, 9, 7, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(x)
    assert all(t.numel() <= 5 * 12 * 9 * 7 for t in kept)
    assert sum(t.dtype == torch.uint8 for t in kept) == 3  # of each convolution's output
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


OPERATIONS = {
    "index": lambda y: y[0],
    "sum": lambda y: y.sum(),
    "view": lambda y: y.permute(0, 2, 3, 1).reshape(-1),
    "cat": lambda y: torch.cat([y, y], 1),
    "relu": torch.relu,
    "detach": lambda y: y.detach(),
    "double": lambda y: y.double(),
    "clone": lambda y: y.clone(),
    "unsqueeze": lambda y: y.unsqueeze(0) * 2,
    "convolution": lambda y: nn.functional.conv2d(y, torch.ones(3, 12, 1, 1)),
}


@pytest.fixture
def packed():
    model = chain()
    first = blocks(model)[0]
    x = torch.randn(5, 12, 9, 7)
    torch.manual_seed(1)
    y = first(x)
    assert type(y) is PackedTensor
    plain = disconnected(model)
    return y, blocks(plain)[0](x), handed_over(y).scale


@pytest.mark.parametrize("name", OPERATIONS)
def test_any_operation_sees_an_ordinary_tensor(packed, name):
    y, plain, scale = packed
    result, expected = OPERATIONS[name](y), OPERATIONS[name](plain)
    assert type(result) is torch.Tensor
    assert result.shape == expected.shape
    assert result.stride() == expected.stride()
    assert result.requires_grad == expected.requires_grad
    close = 0.51 * scale.max().item() * (plain.numel() if name == "sum" else 12 if name == "convolution" else 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=close)
    if result.requires_grad:
        result.sum().backward()


def test_values_and_their_gradient(packed):
    y, plain, scale = packed
    values = y * 1
    steps = scale[:12].view(-1, 1, 1)
    assert ((values - plain).abs() <= 0.501 * steps).all()
    assert repr(y) == repr(values.detach())
    assert y.tolist() == values.tolist()
    assert (y.numpy(force=True) == values.detach().numpy()).all()


def test_saving_keeps_an_ordinary_tensor(packed, tmp_path):
    y, _, _ = packed
    torch.save(y, tmp_path / "y.pt")
    again = torch.load(tmp_path / "y.pt", weights_only=True)
    assert type(again) is torch.Tensor
    assert again.requires_grad
    assert torch.equal(again, y.detach())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = chain()
    gradients = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        x = torch.linspace(-2, 2, 5 * 12 * 9 * 7).view(5, 12, 9, 7).requires_grad_()
        torch.manual_seed(1)
        forward(x).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_saved_by_another_operation_and_compressed():
    first = blocks(chain())[0]
    x, weight = torch.randn(64, 12, 9, 7, requires_grad=True), torch.ones(3, 12, 1, 1, requires_grad=True)
    gradients = []
    for context in (contextlib.nullcontext(), compress_saved_tensors()):
        torch.manual_seed(1)
        with context:
            y = first(x)
            assert type(y) is PackedTensor
            loss = nn.functional.conv2d(y, weight).square().sum()
        gradients.append(torch.autograd.grad(loss, (x, weight)))
    for plain, compressed in zip(*gradients, strict=True):
        torch.testing.assert_close(compressed, plain, rtol=0, atol=0.05 * plain.abs().max().item())


def test_a_change_in_place_ends_the_packed_form(packed):
    y, plain, _ = packed
    with torch.no_grad():
        changed = y.add_(1)
    assert changed is y
    assert handed_over(y) is None
    torch.testing.assert_close(y * 1, plain + 1, rtol=0, atol=0.1)


def test_hooks_see_ordinary_values_and_may_replace_them():
    model = chain()
    x = torch.randn(5, 12, 9, 7)
    plain = disconnected(model)
    first, first_plain = blocks(model)[0], blocks(plain)[0]
    for block in (first, first_plain):
        block.register_forward_hook(lambda module, args, y: y * 0.5)
    torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.05)
    sizes = []
    blocks(model)[1].register_full_backward_hook(lambda module, given, wanted: sizes.append(given[0].shape))
    blocks(model)[1].register_forward_pre_hook(lambda module, args: sizes.append(args[0].mean().shape))
    model(x).sum().backward()
    assert sizes == [torch.Size([]), torch.Size([5, 12, 9, 7])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, dtype):
    model = chain().eval()
    x = torch.randn(5, 12, 9, 7, dtype=dtype)
    with mode():
        y = model(x)
    expected = disconnected(model)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


def test_what_a_user_keeps_holds_no_packed_form():
    model = chain()
    x = torch.randn(5, 12, 9, 7)
    model(x)
    assert handed_over(x) is None
    x = torch.randn(5, 12, 9, 7, requires_grad=True)
    model(x)
    assert handed_over(x) is None


def test_bad_numbers_reach_the_output():
    model = chain()
    x = torch.randn(5, 12, 9, 7)
    x[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(model(x)).any()


def test_memory_of_a_chain():
    """Between blocks: a byte and a bit for the gradient, of which the next one's input is made again; no floats."""
    layers = []
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = fused(nn.Sequential(*layers), (64, 16, 16, 16))
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(64, 16, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    assert sum(kept.values()) < (1.1 + 4 * 1.125) * x.numel() + 100_000
    y.sum().backward()
