"""What is saved for the backward pass, compressed: exact where it has to be, close elsewhere, and never in the way."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsparseprop.training.models import build_model, resnet20
from qsparseprop.utils._codec import encode
from qsparseprop.utils.measurement_utils import saved_for_backward_bytes
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent
from qsparseprop.utils.saved_tensors import CompressedModule, compress_saved_tensors

from ._helpers import needs_inductor

FORMATS = [torch.contiguous_format, torch.channels_last]


def gradients(model, x, context=None):
    """Loss and gradients of one step, with the same random numbers every time."""
    torch.manual_seed(7)
    model.zero_grad()
    with context or contextlib.nullcontext():
        loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def relative_error(actual, expected):
    difference = torch.cat([(a - e).flatten() for a, e in zip(actual, expected, strict=True)])
    return (difference.norm() / torch.cat([e.flatten() for e in expected]).norm()).item()


# ---- codes ----


@pytest.mark.parametrize("scheme", ["standard", "absmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("elements", [1, 511, 512, 5000])
def test_codes_are_off_by_half_a_scale_at_most(scheme, dtype, elements):
    x = (torch.randn(elements) + 0.3).to(dtype)
    codes = encode(x, scheme, 512)
    assert codes.codes.dtype == torch.uint8
    assert codes.decode().dtype == dtype
    step = codes.scale.repeat_interleave(512)[:elements].double()
    rounding = x.abs().double() * torch.finfo(dtype).eps + step * 1e-3
    assert ((codes.decode().double() - x.double()).abs() <= step / 2 + rounding).all()
    assert sum(t.nbytes for t in codes.tensors) == elements + 8 * -(-elements // 512)


def test_zero_is_exact_and_positive_values_stay_positive():
    x = torch.randn(4096).relu()
    x[0], x[1] = 1e-30, 100.0
    x[2048] = -50.0
    for scheme in ("standard", "absmax"):
        decoded = encode(x, scheme, 1024, keep_sign=True).decode()
        assert torch.equal(decoded > 0, x > 0)
        assert (decoded[x == 0] == 0).all()
    assert not torch.equal(encode(x, "standard", 1024).decode() > 0, x > 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_encoded(value):
    x = torch.randn(2000)
    x[1234] = value
    assert encode(x, "standard", 512) is None
    layer = nn.Sequential(nn.Linear(10, 500), nn.GELU())
    with compress_saved_tensors(min_size=1):
        y = layer(torch.full((4, 10), value))
    y.sum().backward()
    assert not torch.isfinite(layer[0].weight.grad).any()


def test_ranges_at_the_ends_of_float32():
    for scale in (1e-42, 1e-30, 3e38):
        x = scale * torch.linspace(-1, 1, 1000)
        codes = encode(x, "standard", 256)
        if codes is not None:
            assert torch.isfinite(codes.decode()).all()
            assert (codes.decode() - x).abs().max() <= max(scale / 100, 1e-37)


# ---- operators that keep bits: exactly torch's ----

OPERATORS = {
    "relu": (lambda x: F.relu(x), 1 / 8),
    "relu in place": (lambda x: F.relu(x * 1, inplace=True), 1 / 8),
    "torch.relu_": (lambda x: torch.relu_(x * 1), 1 / 8),
    "method": (lambda x: x.relu(), 1 / 8),
    "relu6": (lambda x: F.relu6(3 * x), 1 / 8),
    "relu6 in place": (lambda x: F.relu6(3 * x, inplace=True), 1 / 8),
    "hardtanh": (lambda x: F.hardtanh(x, -0.5, 0.7), 1 / 8),
    "dropout": (lambda x: F.dropout(x, 0.3), 1 / 8),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), 1 / 4),
    "max_pool2d, overlapping": (lambda x: F.max_pool2d(x, (3, 2), stride=(2, 1), padding=1, ceil_mode=True), None),
    "max_pool2d, dilated": (lambda x: F.max_pool2d(x, 3, stride=2, dilation=2), None),
    "modules": (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.5), nn.ReLU6(inplace=True)), None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_bits_give_the_same_results_and_gradients(name, memory_format, dtype):
    operator, bytes_an_element = OPERATORS[name]
    data = torch.randn(3, 5, 18, 16).to(dtype).to(memory_format=memory_format)
    data[0, 0, 0] = 0
    results = []
    for context in (contextlib.nullcontext(), compress_saved_tensors(min_size=1)):
        torch.manual_seed(3)
        x = data.clone(memory_format=torch.preserve_format).requires_grad_()
        with context:
            y = operator(x)
        after = torch.rand(1)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(grad.to(memory_format=memory_format))
        results.append((y.detach(), x.grad, after))
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)
    assert results[0][0].stride() == results[1][0].stride()
    assert results[0][1].stride() == results[1][1].stride()
    if bytes_an_element is not None:
        x = data.clone().requires_grad_()
        saved = saved_for_backward_bytes(lambda: _inside(compress_saved_tensors(min_size=1), lambda: operator(x)))
        assert saved == pytest.approx(bytes_an_element * data.numel(), abs=100)


def test_relu_lets_the_gradient_of_nan_pass_as_torch_does():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.full((4096,), float("nan"), dtype=dtype)
        x[1], x[2], x[3] = -1, float("inf"), 0
        gradients_of = []
        for context in (contextlib.nullcontext(), compress_saved_tensors(min_size=1)):
            leaf = x.clone().requires_grad_()
            with context:
                y = leaf.relu()
            y.backward(torch.ones_like(y))
            gradients_of.append(leaf.grad)
        assert torch.equal(*gradients_of)


def _inside(context, function):
    with context:
        return function()


def test_small_and_other_operands_are_left_to_torch():
    x = torch.randn(8, requires_grad=True)
    with compress_saved_tensors():
        assert F.relu(x).grad_fn.name() == "ReluBackward0"
        assert not F.relu(torch.randn(10_000)).requires_grad
        with torch.no_grad():
            assert F.relu(torch.randn(10_000, requires_grad=True)).grad_fn is None
        assert F.dropout(torch.ones(10_000), 0.5, training=False).eq(1).all()
        assert F.max_pool2d(torch.randn(1, 100, 100, requires_grad=True), 2).shape == (1, 50, 50)
        y, index = F.max_pool2d(torch.randn(1, 1, 100, 100, requires_grad=True), 2, return_indices=True)
        assert y.shape == index.shape
        assert torch.relu(torch.arange(-3, 3)).tolist() == [0, 0, 0, 0, 1, 2]


def test_masks_read_from_an_input_are_exact_too():
    x = torch.randn(10_000)
    x[:100] = 1e-6
    x[100:200] = -1e-6
    for operator in (F.leaky_relu, lambda v: F.elu(v), nn.PReLU()):
        grads = []
        for context in (contextlib.nullcontext(), compress_saved_tensors()):
            leaf = x.clone().requires_grad_()
            with context:
                y = operator(leaf * 1)
            y.sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, atol=0.02, rtol=0)


# ---- whole models ----


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_residual_network(memory_format):
    torch.manual_seed(0)
    model = resnet20(width=8).train().to(memory_format=memory_format)
    x = torch.randn(16, 3, 32, 32).to(memory_format=memory_format)
    loss, plain = gradients(model, x)
    compression = compress_saved_tensors()
    compressed_loss, compressed = gradients(model, x, compression)
    assert torch.equal(loss, compressed_loss)
    assert relative_error(compressed, plain) < 0.02
    assert relative_error(compressed, plain) > 0  # it did something
    assert compression.saved.ratio < 0.35


@pytest.mark.parametrize(("name", "largest_ratio"), [("vgg11", 0.35), ("mlp", 1), ("vit-tiny", 0.45)])
def test_other_networks(name, largest_ratio):
    torch.manual_seed(0)
    model = build_model(name, width=32).train()
    x = torch.randn(64, 3, 32, 32)  # most of what the MLP saves is its input, which is the caller's
    loss, plain = gradients(model, x)
    compression = compress_saved_tensors(min_size=1024)
    compressed_loss, compressed = gradients(model, x, compression)
    assert torch.equal(loss, compressed_loss)
    assert relative_error(compressed, plain) < 0.02
    assert compression.saved.ratio < largest_ratio


def test_a_swapped_model_under_autocast():
    torch.manual_seed(0)
    model = resnet20(width=8)
    layerwise_magnitude_prune(model, 0.9)
    make_pruning_permanent(model)
    swap_modules_with_sparse(model, (16, 3, 32, 32), verbose=False, include_dense=False)
    x = torch.randn(16, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, plain = gradients(model, x)
        compression = compress_saved_tensors()
        compressed_loss, compressed = gradients(model, x, compression)
    assert torch.equal(loss, compressed_loss)
    assert relative_error(compressed, plain) < 0.02
    assert compression.saved.ratio < 0.6


def test_the_report_and_the_counter_agree():
    model = resnet20(width=8).train()
    x = torch.randn(16, 3, 32, 32)
    plain = saved_for_backward_bytes(lambda: model(x), model)
    compression = compress_saved_tensors()
    inside = saved_for_backward_bytes(lambda: _inside(compression, lambda: model(x)), model)
    saved = compression.saved
    assert saved.before == pytest.approx(plain, rel=0.02)
    assert saved.after == pytest.approx(inside, rel=0.01)  # it does not know the model's buffers
    with compression:
        around = saved_for_backward_bytes(lambda: model(x), model)
    assert around == inside
    assert inside < 0.35 * plain


def test_a_tensor_that_is_saved_twice_is_encoded_once():
    x = torch.randn(100, 100, requires_grad=True)
    compression = compress_saved_tensors(min_size=1)
    with compression:
        y = x.sin() * 2
        z = y.exp() + y * y + y.view(10_000).cos().view(100, 100)
    # y for the product (twice) and the cosine, and the result of exp
    assert compression.saved.after < 2 * 10_000 * 1.1 + 8 * 40
    z.sum().backward()
    y = x.detach().sin() * 2
    expected = 2 * x.detach().cos() * (y.exp() + 2 * y - y.sin())
    assert ((x.grad - expected).norm() / expected.norm()) < 0.02


def test_memory_that_is_used_again_is_not_mistaken_for_what_it_held_before():
    compression = compress_saved_tensors(min_size=1)
    x = torch.randn(50_000, requires_grad=True)
    with compression:
        total = sum((x * k).square().sum() for k in range(1, 20))  # each product is freed before the next one
    total.backward()
    expected = 2 * sum(k * k for k in range(1, 20)) * x.detach()
    assert ((x.grad - expected).norm() / expected.norm()) < 0.02


def test_parameters_buffers_and_integers_are_not_touched():
    seen = []
    layer = nn.Linear(200, 200)
    table = nn.Embedding(500, 200)
    with compress_saved_tensors(min_size=1) as compression:
        original = compression.pack
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append((t, original(t))) or t, lambda t: t):
            with torch.autocast("cpu", torch.bfloat16):
                h = F.linear(table(torch.arange(100)), layer.weight, layer.bias)
            h = h.gather(1, torch.zeros(100, 200, dtype=torch.int64)) * torch.ones(200)
    untouchable = [p for t, p in seen if t.shape == (200, 200) or not t.is_floating_point()]
    kept = {type(packed).__name__ for packed in untouchable}
    assert kept == {"_Untouched"}
    assert any(type(packed).__name__ == "_Packed" for _, packed in seen)


# ---- together with other things ----


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_with_activation_checkpointing(use_reentrant):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 64))
    head = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(256, 64, requires_grad=True)

    def model():
        return head(checkpoint(block, x, use_reentrant=use_reentrant).relu())

    results = []
    for context in (contextlib.nullcontext(), compress_saved_tensors(min_size=1)):
        torch.manual_seed(1)
        for module in (block, head):
            module.zero_grad()
        with context:
            loss = model().square().mean()
        loss.backward()
        results.append([p.grad.clone() for m in (block, head) for p in m.parameters()])
    assert relative_error(results[1], results[0]) < 0.02


def test_changes_in_place_of_what_was_not_copied_are_noticed():
    x = torch.randn(10, requires_grad=True)
    with compress_saved_tensors():
        y = x.exp()
        z = y * y
    with torch.no_grad():
        y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_the_module_wrapper():
    model = resnet20(width=4).train()
    wrapped = CompressedModule(model)
    x = torch.randn(16, 3, 32, 32)
    loss, plain = gradients(model, x)
    compressed_loss, compressed = gradients(wrapped, x)
    assert torch.equal(loss, compressed_loss)
    assert relative_error(compressed, plain) < 0.02
    assert wrapped.compression.saved.ratio < 0.35
    with torch.no_grad():
        wrapped(x)
    assert wrapped.compression.saved.before == 0


def test_graphs_are_freed():
    import gc
    import weakref

    class Flag:
        pass

    model = nn.Sequential(nn.Linear(100, 100), nn.ReLU(), nn.Sigmoid(), nn.Softmax(1))
    with compress_saved_tensors(min_size=20_000):
        y = model(torch.randn(100, 100))
    y.grad_fn.metadata["flag"] = flag = Flag()
    alive = weakref.ref(flag)
    gc.disable()
    try:
        del y, flag
        assert alive() is None
    finally:
        gc.enable()


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="scheme must be one of 'standard', 'absmax'"):
        compress_saved_tensors("sawb")
    with pytest.raises(ValueError, match="group_size"):
        compress_saved_tensors(group_size=0)
    with pytest.raises(ValueError, match="min_size"):
        compress_saved_tensors(min_size=1.5)
    compression = compress_saved_tensors()
    with compression, pytest.raises(RuntimeError, match="active already"):
        compression.__enter__()


@needs_inductor
@pytest.mark.parametrize("compiled", ["model inside", "wrapper"])
def test_with_torch_compile(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    x = torch.randn(512, 64)
    loss, plain = gradients(model, x)
    if compiled == "wrapper":
        compressed_loss, compressed = gradients(torch.compile(CompressedModule(model)), x)
    else:
        compressed_loss, compressed = gradients(torch.compile(model), x, compress_saved_tensors())
    torch.testing.assert_close(compressed_loss, loss)
    assert relative_error(compressed, plain) < 0.02
