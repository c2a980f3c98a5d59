"""Tensors that are not what they seem to be: views with the negative bit, wrappers, tensors without memory.

What is right is what a dense layer does with the same values; what cannot be right is refused by a sentence.
"""

import copy
import inspect
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.layout.geometry import linear_geometry, linear_numbers
from qsparseprop.layout.pattern import check_pattern, dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.quantization import QuantConfig, dequantize, quantize
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.saved_tensors import compress_saved_tensors

from ._helpers import KINDS, example, run_python

NO_DERIVATIVES = "operators of qsparseprop have no derivatives: use the modules"
NO_MEMORY = r"has no memory: the storage of a tensor of shape .* bytes; whoever has resized it"


def negative(t):
    """The same values, stored as their negatives."""
    return torch._neg_view(-t.detach())


def freed(t, size=0):
    t = t.detach().clone()
    t.untyped_storage().resize_(size)
    return t


def pruned(dense):
    with torch.no_grad():
        dense.weight.mul_(torch.rand(dense.weight.shape) < 0.4)
    return dense


def blocks():
    """Layers and what they compute together with, and inputs."""
    torch.manual_seed(0)
    conv = qnn.QuantizedSparseConv2d.from_dense(pruned(nn.Conv2d(4, 6, 3, padding=1)))
    reader = qnn.QuantizedSparseConv2d.from_dense(pruned(nn.Conv2d(4, 6, 1)))
    linear = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(12, 9)))
    x, rows = torch.randn(3, 4, 6, 5).to(memory_format=torch.channels_last), torch.randn(7, 12)
    yield "conv, norm, relu", fuse_modules(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())), x
    yield "norm, relu, conv", fuse_modules(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), reader)), x
    yield "linear, gelu", fuse_modules(nn.Sequential(linear, nn.GELU())), rows
    yield "linear", fuse_modules(nn.Sequential(copy.deepcopy(linear))), rows


BLOCKS = [name for name, *_ in blocks()]


def block(name):
    return next((module, x) for found, module, x in blocks() if found == name)


# ---- which tensors go past the dispatcher ----


def test_plain_tensors():
    x = torch.randn(4, 3)
    with torch.inference_mode():
        inference = torch.randn(3)
    for tensor in (x, x.t(), x[1:], nn.Parameter(x), x.clone().requires_grad_(), inference, x.int(), x > 0, None,
                   x.expand(10**6, 4, 3), torch.empty(0), torch.empty(3, 0, 2), x.bfloat16()):  # fmt: skip
        assert ops.are_plain(tensor)
    assert ops.are_plain(x, None, x)
    assert ops.relu_mask.chosen(x, None) is ops.relu_mask.function


def test_tensors_that_are_not_plain():
    x, z = torch.randn(3), torch.randn(3, dtype=torch.complex64)
    with FakeTensorMode():
        fake = torch.randn(3)
    for tensor in (negative(x), z.conj().imag, z.conj(), torch._efficientzerotensor(3), x.to("meta"), x.to_sparse(),
                   fake, freed(x), freed(x, 8), x.as_subclass(type("Own", (torch.Tensor,), {}))):  # fmt: skip
        assert not ops.are_plain(tensor)
        assert not ops.are_plain(x, tensor)
        assert ops.relu_mask.chosen(x, tensor) is torch.ops.qsparseprop.relu_mask.default


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [lambda f: torch.func.vmap(f), torch.func.functionalize])
def test_tensors_that_functorch_wraps(transform):
    seen = []
    transform(lambda x: seen.append(ops.are_plain(x)) or x)(torch.randn(2, 3))
    assert seen == [False]


# ---- the negative and the conjugate bit ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["x", "weight", "bias", "dy", "conj"])
def test_negative_views_give_the_same(kind, place):
    """Were off by a factor of 2, with gradients of the wrong sign."""
    layer, _, x = example(kind)
    dy = torch.randn_like(layer(x))
    runs = []
    for hostile in (False, True):
        given = x
        if hostile and place == "conj":  # what .conj().imag of an FFT is
            given = torch.complex(torch.zeros(x.shape), -x).conj().imag
        elif hostile and place == "x":
            given = negative(x)
        for name in ("weight", "bias"):
            if hostile and place == name:
                setattr(layer, name, nn.Parameter(negative(getattr(layer, name))))
        given = given.detach().requires_grad_()
        torch.manual_seed(7)
        y = layer(given)
        runs.append([y, *torch.autograd.grad(y, [given, layer.weight, layer.bias],
                                             negative(dy) if hostile and place == "dy" else dy)])  # fmt: skip
    for wanted, found in zip(*runs, strict=True):
        assert torch.equal(wanted, found)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("place", ["x", "dy"])
@pytest.mark.parametrize("training", [True, False])
def test_negative_views_in_blocks(name, place, training):
    runs = []
    for hostile in (False, True):
        module, x = block(name)
        module.train(training)
        x = (negative(x) if hostile and place == "x" else x).detach().requires_grad_()
        torch.manual_seed(7)
        y = module(x)
        dy = torch.ones_like(y).cumsum(0)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], negative(dy) if hostile and place == "dy" else dy)
        runs.append([y, *gradients])
    for wanted, found in zip(*runs, strict=True):
        if name.startswith("norm") and place == "x":  # left to torch, which keeps no 8 bits of it
            torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())
        else:
            assert torch.equal(wanted, found)


@pytest.mark.parametrize("place", ["residual", "dy"])
@pytest.mark.parametrize("kind", ["negative", "zero", "subclass"])
def test_what_meets_a_deferred_tensor(kind, place):
    """Was read as the memory that lies behind it: gradients of GELU were of the wrong sign."""
    torch.manual_seed(0)
    linear = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(12, 9)), qconfig=QuantConfig(grad="absmax"))
    module, x, other = fuse_modules(nn.Sequential(linear)), torch.randn(7, 12), torch.randn(7, 9)
    other = torch.zeros(7, 9) if kind == "zero" else other
    change = {"negative": negative, "zero": lambda t: torch._efficientzerotensor(t.shape),
              "subclass": lambda t: t.as_subclass(type("Own", (torch.Tensor,), {}))}[kind]  # fmt: skip
    runs = []
    for given in (other, change(other)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        if place == "residual":
            y = y + given
        y = nn.functional.gelu(y)
        y.backward(given if place == "dy" else torch.ones(y.shape))
        runs.append((y, leaf.grad))
    for wanted, found in zip(*runs, strict=True):
        torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scheme", ["absmax", "standard", "sawb", "stochastic"])
def test_negative_views_are_quantised_as_what_they_are(scheme):
    x = torch.randn(5, 7)
    torch.manual_seed(1)
    wanted = dequantize(quantize(x, scheme))
    torch.manual_seed(1)
    assert torch.equal(dequantize(quantize(negative(x), scheme)), wanted)


@pytest.mark.parametrize("inplace", [False, True])
def test_negative_views_in_operators_that_keep_a_bit(inplace):
    x = torch.randn(4, 5, 6)
    runs = []
    for hostile in (False, True):
        leaf = (-x if hostile else x).requires_grad_()
        with compress_saved_tensors(min_size=0):
            middle = torch._neg_view(leaf * 1) if hostile else leaf * 1
            y = nn.functional.relu(middle, inplace=inplace)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
        runs.append([y, -gradient if hostile else gradient])
    for wanted, found in zip(*runs, strict=True):
        assert torch.allclose(wanted, found, atol=0.05)


def test_a_negative_view_is_not_compressed_as_what_it_is_the_negative_of():
    """Both lie in the same memory, of which only one set of codes is kept."""
    x = torch.linspace(-3, 3, 8192).requires_grad_()
    with compress_saved_tensors():
        middle = x * 1
        y = middle.exp() * torch._neg_view(middle)  # each saves one of them
    y.sum().backward()
    wanted = -(x.detach().exp() * (1 + x.detach()))
    assert torch.allclose(x.grad, wanted, atol=0.3)


def test_tensors_that_only_say_that_they_are_zero():
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    zeros = torch._efficientzerotensor((3, 8))
    assert torch.equal(layer(zeros), layer(torch.zeros(3, 8)))
    x = torch.randn(3, 8, requires_grad=True)
    layer(x).backward(torch._efficientzerotensor((3, 5)))
    assert torch.equal(x.grad, torch.zeros(3, 8))


def test_negative_views_in_the_operator_of_graphs():
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    x = torch.randn(3, 8)
    trace = layer._trace  # what torch.compile calls
    numbers = linear_numbers(8, 5)
    wanted = trace(x[..., None, None], numbers, 1)
    assert torch.equal(trace(negative(x)[..., None, None], numbers, 1), wanted)
    layer.crow_indices, layer.col_indices = negative(layer.crow_indices), negative(layer.col_indices)
    assert torch.equal(trace(x[..., None, None], numbers, 1), wanted)
    given = x[..., None, None].clone()
    given.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=NO_MEMORY):
        trace(given, numbers, 1)


# ---- functorch ----


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # of torch's own jvp
@pytest.mark.parametrize("kind", KINDS)
def test_transforms_of_functions_are_refused(kind):
    layer, _, x = example(kind)
    for call in (lambda: torch.func.grad(lambda x: layer(x).sum())(x), lambda: torch.func.vmap(layer)(x[None]),
                 lambda: torch.func.functionalize(layer)(x), lambda: torch.func.jvp(layer, (x,), (x,))):  # fmt: skip
        with pytest.raises(NotImplementedError, match=rf"{kind} does not go with the transforms .* to_dense\(\) gives"):
            call()


def test_operators_have_no_derivatives():
    """Torch took them for zero."""
    x = torch.randn(2, 3, requires_grad=True)
    y, _ = torch.ops.qsparseprop.relu_mask(x)
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVES):
        y.sum().backward()


def test_operators_that_write_into_their_arguments_have_no_derivatives():
    """Torch kept the history of what was written over, and gave gradients of 1 in place of those of a ReLU."""
    x = torch.randn(2, 3, requires_grad=True)
    one, codes, saved = torch.ones(3), ops.codes_like(x), ops.saved_like(x, "silu")
    codes.zero_()
    middle = x * 1
    for call in (
        lambda: torch.ops.qsparseprop.relu_mask_(middle),
        lambda: torch.ops.qsparseprop.norm_statistics(x, one, one, one, one, 0.1, 1e-5, True, True),
        lambda: torch.ops.qsparseprop.epilogue(x, None, None, None, "silu", [], one, one, codes, saved),
    ):
        with pytest.raises(NotImplementedError, match=NO_DERIVATIVES):
            call()
    assert torch.equal(middle, x)
    assert torch.equal(one, torch.ones(3))
    assert not codes.any()
    with torch.no_grad():
        mask = torch.ops.qsparseprop.relu_mask_(middle)
    assert torch.equal(middle, x.relu())
    assert mask.shape == (1,)


# ---- tensors whose memory is gone ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["x", "weight", "bias", "crow_indices", "col_indices", "dy"])
@pytest.mark.parametrize("size", [0, 4])
def test_storages_that_were_resized(kind, place, size):
    layer, _, x = example(kind)
    y = layer(x)
    if place == "x":
        with pytest.raises(ValueError, match=f"the input {NO_MEMORY}"):
            layer(freed(x, size))
    elif place == "dy":
        with pytest.raises(ValueError, match=NO_MEMORY):
            y.backward(freed(torch.randn_like(y), size))
    else:
        tensor = freed(getattr(layer, place), size)
        setattr(layer, place, nn.Parameter(tensor) if place in ("weight", "bias") else tensor)
        with pytest.raises(ValueError, match=NO_MEMORY):
            layer(x)


@pytest.mark.parametrize("config", [QuantConfig(check_finite=True), QuantConfig(weight="sawb", granularity="tensor")])
def test_resized_weights_that_are_read_before_they_are_quantised(config):
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)), qconfig=config)
    layer.weight = nn.Parameter(freed(layer.weight))
    with pytest.raises(ValueError, match=f"the weight {NO_MEMORY}"):
        layer(torch.randn(3, 8))


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, torch.Tensor.t])
def test_resized_inputs_that_are_converted_first(convert):
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 8)))
    x = convert(torch.randn(8, 8))
    inputs = x, x[None]
    x.untyped_storage().resize_(0)
    for given in inputs:
        with pytest.raises(ValueError, match=f"the input {NO_MEMORY}"):
            layer(given)


def _freeing_what_is_saved(module, x, which):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x.requires_grad_())
    tensors = [t for t in saved if t.numel()]
    for tensor in tensors if which == "all" else [tensors[which]]:
        tensor.untyped_storage().resize_(0)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["all", 0, 1, -1])
def test_saved_tensors_that_were_freed_before_the_backward_pass(kind, which):
    layer, _, x = example(kind)
    y = _freeing_what_is_saved(layer, x, which)
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.sum().backward()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("which", ["all", 0, 1, -1])
def test_tensors_that_blocks_saved_and_somebody_freed(name, which):
    module, x = block(name)
    y = _freeing_what_is_saved(module, x, which)
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.sum().backward()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_refuse_inputs_and_gradients_without_memory(name):
    module, x = block(name)
    with pytest.raises((ValueError, RuntimeError), match=f"{NO_MEMORY}|not allocated"):  # the latter by torch
        module(freed(x))
    y = module(x.requires_grad_())
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.backward(freed(torch.ones_like(y)))


@pytest.mark.parametrize("place", ["weight", "crow_indices", "col_indices", "bias"])
def test_modules_whose_own_memory_is_gone(place):
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    tensor = getattr(layer, place)
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    if place != "bias":
        with pytest.raises(ValueError, match=f"{place} {NO_MEMORY}"):
            layer.dense_weight()
        with pytest.raises(ValueError, match=f"{place} {NO_MEMORY}"):
            layer.apply_further_mask(torch.zeros(5, 8))
    with pytest.raises(RuntimeError, match=f"{place} of the module {NO_MEMORY}"):
        layer.load_state_dict(state)
    tensor.untyped_storage().resize_(size)
    with torch.no_grad():
        tensor.zero_()
    layer.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("place", ["weight_orig", "weight_mask", "bias"])
def test_dense_layers_whose_memory_is_gone(place):
    """As of a model whose parameters FSDP has spread over processes."""
    dense = prune.l1_unstructured(nn.Linear(8, 5), "weight", 0.5)
    getattr(dense, place).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{place} of the dense layer {NO_MEMORY}"):
        qnn.SparseLinear.from_dense(dense)


def test_masks_without_memory():
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=f"mask {NO_MEMORY}"):
        layer.apply_further_mask(freed(torch.ones(5, 8)))
    with pytest.raises(ValueError, match=f"values {NO_MEMORY}"):
        layer.regrow(torch.ones(5, 8), freed(torch.ones(5, 8)))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("place", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisations_of_blocks_whose_memory_is_gone(place, training):
    if training and place.startswith("running"):
        pytest.skip("not read in training")
    module, x = block("conv, norm, relu")
    norm = module[1].train(training)
    getattr(norm, place).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=NO_MEMORY):
        module(x)


def operator_calls():
    x, matrix = torch.randn(2, 3, 4, 5), torch.randn(6, 20)
    one = torch.ones(20)
    _, bits = ops.relu_mask(x)
    codes, scale, zero = ops.quantize(x, "absmax", 8, None, None, True, None, [])
    kept, slopes = ops.codes_like(matrix), ops.saved_like(matrix, "silu")
    epilogue = [matrix, matrix, one, one, "silu", [], one, one, kept, slopes]
    ranges, factor = torch.ones(20, 2), torch.ones(3, 20)
    return {
        "relu_mask": [x], "relu_mask_": [x], "keep_masked": [x, bits],
        "quantize": [x, "absmax", 8, None, None, True, None, []], "dequantize": [codes, scale, zero, None, None],
        "norm_statistics": [matrix, one, one.clone(), one.clone(), one + 1, 0.1, 1e-5, True, True],
        "norm_factors": [torch.ones(20, 3).double(), torch.ones(7, 20).double(), one, 6, True],
        "epilogue": epilogue, "epilogue_pack": [*epilogue, ranges],
        "epilogue_range": [matrix, matrix, one, one, "silu", []], "activation_range": [torch.ones(20, 2), "silu", []],
        "epilogue_sums": [matrix, kept, slopes, "silu", []],
        "epilogue_grad": [matrix, kept, slopes, "silu", [], torch.ones(3, 20), True],
        "epilogue_grad_pack": [matrix, kept, slopes, factor, ranges, torch.tensor(1)],
        "quantize_weight": [one, one.clone(), one.int(), one[:1].clone()],
    }  # fmt: skip


def _epilogue_pack(x, residual, scale, shift, activation, options, code_scale, code_shift, codes, saved, ranges):
    ops.epilogue_pack(x, residual, ops.Affine(scale, shift), ops.Activation(activation, options),
                      ops.Kept(code_scale, code_shift, codes, saved), ranges, linear_geometry(20, 20).input_layout,
                      ops.Scheme("absmax", (), True), True)  # fmt: skip


def _epilogue_grad_pack(dy, codes, saved, factor, ranges, seed):
    layout, scheme = linear_geometry(20, 20).input_layout, ops.Scheme("stochastic", (), True)
    ops.epilogue_grad_pack(dy, codes, saved, ops.Activation("silu"), factor, ranges, layout, scheme, seed, True)


def _quantize_weight(values, factor, zero_point, clip):
    rows = make_plan(*dense_pattern(torch.eye(20) > 0)[:2], linear_geometry(20, 20)).forward
    ops.quantize_weight(values, rows, factor, zero_point, clip)


#: Those that take plans, and parts of them.
FUNCTIONS = {"epilogue_pack": _epilogue_pack, "epilogue_grad_pack": _epilogue_grad_pack,
             "quantize_weight": _quantize_weight}  # fmt: skip


@pytest.mark.parametrize("name", operator_calls())
def test_operators_refuse_every_tensor_without_memory(name):
    arguments = operator_calls()[name]
    op = FUNCTIONS.get(name) or getattr(torch.ops.qsparseprop, name)
    op(*arguments)
    parameters = [*inspect.signature(op).parameters] if name in FUNCTIONS else [
        a.name for a in op.default._schema.arguments]  # fmt: skip
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            for size in (0, 1):
                given = [freed(argument, size) if i == place else a for i, a in enumerate(arguments)]
                with pytest.raises(ValueError, match=f"^{parameters[place]} {NO_MEMORY}"):
                    op(*given)


# ---- patterns ----


class Wrapper(torch.Tensor):
    """Holds another tensor, as DTensor does, and has no memory."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inner = [a.inner if isinstance(a, Wrapper) else a for a in args]
        result = func(*inner, **(kwargs or {}))
        return Wrapper(result) if isinstance(result, torch.Tensor) else result


def test_patterns_in_tensors_that_have_no_memory():
    """The kernels read the tables that torch had made of one at address 0."""
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    for name in ("crow_indices", "col_indices"):
        kept = getattr(layer, name)
        setattr(layer, name, Wrapper(kept))
        with pytest.raises(TypeError, match=f"{name} must be a tensor in memory, got Wrapper"):
            layer(torch.randn(3, 8))
        setattr(layer, name, kept)


def test_sizes_of_a_pattern_come_before_its_contents():
    crow, col = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    for bad, message in (
        (col[:1].expand(10**12), r"col_indices: the 1000000000000 elements of .* share 8 bytes of memory"),
        (torch.zeros(7, dtype=torch.int32), r"at most 2 \* 3 elements, got 7"),
        (col.to_sparse(), "expected a dense .* got torch.sparse_coo"), (col.to("meta"), "has no contents"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_pattern(crow, bad, (2, 3))
    with pytest.raises(ValueError, match=r"crow_indices: the 3 elements of .* share 4 bytes of memory"):
        check_pattern(torch.zeros(1, dtype=torch.int32).expand(3), col, (2, 3))


# ---- at random ----


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by calls of Linux")
def test_random_hostile_tensors(number):
    script = Path(__file__).with_name("_fuzz_tensors.py").read_text()
    process = run_python(script, str(number), "250")
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    assert "done" in process.stdout


def operands():
    """What the functions that take a plan are given, by name."""
    plan = make_plan(*dense_pattern(torch.ones(16, 16) > 0)[:2], linear_geometry(16, 16))
    rows = plan.forward
    x, values = torch.randn(rows.source.shape(70)), torch.randn(256)
    return plan, {"x": x, "values": values, "planes": ops.pack(x, rows.source)[0], "bias": torch.randn(16),
                  "slots": ops.gather_weight(values, rows).slots, "out": torch.empty(rows.target.shape(70)),
                  "plan": plan, "gradient": torch.randn(rows.target.shape(70)),
                  "dy": ops.pack(torch.randn(rows.target.shape(70)), rows.target)[0]}  # fmt: skip


CALLS = {
    "pack": (lambda rows, t: ops.pack(t["x"], rows.source)[0], ["x"]),
    "quantize_pack": (lambda rows, t: ops.quantize_pack(t["x"], rows.source, ops.Scheme("absmax", (), True))[0], ["x"]),
    "gather_weight": (lambda rows, t: ops.gather_weight(t["values"], rows).slots, ["values"]),
    "quantize_weight": (lambda rows, t: ops.quantize_weight(t["values"], rows).slots, ["values"]),
    "spmm": (lambda rows, t: ops.spmm(ops.Packed(t["planes"]), ops.Weights(t["slots"]), rows, 70, t["bias"]),
             ["planes", "slots", "bias"]),
    "multiply": (lambda rows, t: ops.multiply(ops.Packed(t["planes"]), t["values"], rows, t["out"], t["bias"]),
                 ["planes", "values", "bias", "out"]),
    "sddmm": (lambda rows, t: ops.sddmm(ops.Packed(t["planes"]), ops.Packed(t["dy"]), rows, 70, 256), ["planes", "dy"]),
    "layer_forward": (lambda rows, t: ops.layer_forward(
        t["x"], t["values"], t["bias"], t["plan"], ops.Quantisation(), torch.float32)[0], ["x", "values", "bias"]),
    "layer_backward": (lambda rows, t: torch.cat([g.flatten() for g in ops.layer_backward(
        t["gradient"], t["values"], ops.Packed(t["planes"]), t["plan"], ops.Quantisation(), (True, True, False),
        torch.float32)[:2]]), ["gradient", "values", "planes"]),
    "packed_backward": (lambda rows, t: torch.cat([g.flatten() for g in ops.packed_backward(
        ops.Packed(t["dy"]), t["values"], ops.Packed(t["planes"]), t["plan"], 70, None, (True, True), torch.float32,
        False)]), ["dy", "values", "planes"]),
}  # fmt: skip
PLACES = [(name, place) for name, (_, places) in CALLS.items() for place in places]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_functions_of_plans_refuse_tensors_without_memory(name, place):
    plan, tensors = operands()
    tensors[place].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=NO_MEMORY):
        CALLS[name][0](plan.forward, tensors)


@pytest.mark.parametrize(("name", "place"), [(name, place) for name, place in PLACES if place != "out"])
def test_functions_of_plans_see_what_negative_views_show(name, place):
    plan, tensors = operands()
    wanted = CALLS[name][0](plan.forward, {**tensors, place: -tensors[place]}).clone()
    found = CALLS[name][0](plan.forward, {**tensors, place: torch._neg_view(tensors[place])})
    assert torch.equal(found, wanted)


def test_results_are_not_written_to_negative_views():
    plan, tensors = operands()
    tensors["out"] = torch._neg_view(tensors["out"])
    with pytest.raises(ValueError, match="out must be memory"):
        CALLS["multiply"][0](plan.forward, tensors)


def test_lists_of_freed_tensors_are_refused():
    rows = operands()[0].forward
    parts = [rows.group_ptr, rows.offset, rows.index, rows.plane]
    for i in range(4):
        given = [t.clone() for t in parts]
        given[i].untyped_storage().resize_(4)
        with pytest.raises(ValueError, match=NO_MEMORY):
            ops.GatherList(*given, rows.source, rows.target)
