"""Calls modules, blocks and operators with tensors that are not what they seem to be.

    python -m tests._fuzz_tensors SEED CALLS

A crash, a hang or memory out of
all proportion ends the process. A call that is not refused must give what it gives for a plain copy of its tensors.
"""

import contextlib
import copy
import faulthandler
import json
import random
import re
import resource
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.nn.deferred import conditions
from qsparseprop.quantization import QuantConfig, dequantize, quantize
from qsparseprop.utils.saved_tensors import compress_saved_tensors

MEMORY = 512 << 20  # bytes that a call may ask for, at most


class ConvBlock(qnn.QuantizedSparseConv2d):
    """A convolution with a batch normalisation behind it, and perhaps more."""

    deferring = True

    def forward(self, x, residual=None):
        y = self.norm(super().forward(x))
        return self.activation(y if residual is None else y + residual)


class LinearBlock(qnn.QuantizedSparseLinear):
    """A linear layer with an activation behind it."""

    deferring = True

    def forward(self, x):
        return self.activation(super().forward(x))


class Subclass(torch.Tensor):
    """A subclass in name only."""


class Wrapper(torch.Tensor):
    """A subclass that holds another tensor, as DTensor does."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, Wrapper, func(*args, **kwargs))


def resized(size):
    def change(t):
        t = t.detach().clone()
        t.untyped_storage().resize_(size if size < t.untyped_storage().nbytes() else 0)
        return t

    return change


def in_fake_mode(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t.detach())


def in_inference_mode(t):
    with torch.inference_mode():
        return t.clone()


def overlapping(t):
    """Every element of a dimension is the first one."""
    if t.ndim == 0 or t.numel() == 0:
        return t
    d = random.randrange(t.ndim)
    return t.narrow(d, 0, 1).expand(t.shape)


def with_gaps(t):
    big = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan") if t.is_floating_point() else 1)
    view = big[..., 3::2]
    view.copy_(t)
    return view


def negative(t):
    return torch._neg_view(-t.detach()) if t.dtype != torch.uint8 else t


def from_conjugate(t):
    """What .conj().imag of an FFT is."""
    return torch.complex(torch.zeros(t.shape), -t.detach().float()).conj().imag if t.is_floating_point() else t


def bad_value(t):
    if t.is_floating_point() and t.numel():
        t = t.detach().clone()
        t.view(-1)[random.randrange(t.numel())] = random.choice([float("nan"), float("inf"), -float("inf"), 3e38])
    return t


#: Whose values are what they were, or what they are taken to be.
SAME = {
    "negative": negative, "conjugate": from_conjugate, "gaps": with_gaps, "overlapping": overlapping,
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), "subclass": lambda t: t.as_subclass(Subclass),
    "wrapper": Wrapper, "inference": in_inference_mode, "parameter": lambda t: nn.Parameter(t, t.is_floating_point()),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim else t, "not finite": bad_value,
    "offset": lambda t: torch.cat([t.reshape(-1)[:1], t.reshape(-1)])[t.numel() > 0 :].view(t.shape),
}  # fmt: skip
#: That can only be refused, or whose values are others.
OTHER = {
    "freed": resized(0), "cut": resized(4), "meta": lambda t: t.to("meta"), "fake": in_fake_mode,
    "sparse": lambda t: t.to_sparse(), "csr": lambda t: (t.reshape(t.shape[0], -1) if t.ndim else t).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]), "huge": lambda t: t.expand(10**6, 10**6, *t.shape),
    "large": lambda t: t.reshape(-1)[:1].expand(10**12), "empty": lambda t: t[:0] if t.ndim else t,
    "no memory": lambda t: t.new_empty(0, *t.shape), "longer": lambda t: torch.cat([t, t]) if t.ndim else t,
    "shorter": lambda t: t[:-1] if t.ndim else t, "scalar": lambda t: t.reshape(-1)[:1].sum(),
    "dtype": lambda t: t.to(random.choice([torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool,
                                           torch.complex64, torch.int64, torch.float8_e4m3fn])),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "list": lambda t: t.tolist(),
    "none": lambda t: None,
}  # fmt: skip


def plain(t):
    if isinstance(t, Wrapper):
        t = t.inner
    return t.detach().as_subclass(torch.Tensor).resolve_neg().contiguous().clone() if isinstance(t, torch.Tensor) else t


# ---- what is called: each a function of a dict of tensors ----


def layer(module, tensors, between=None):
    """Output and gradients of a module whose parameters and pattern are among the tensors."""
    state = {k: v for k, v in tensors.items() if k in ("weight", "bias")}
    for k in state:
        if isinstance(state[k], torch.Tensor):
            try:
                setattr(module, k, nn.Parameter(state[k]))
            except TypeError:  # a subclass that detaches to another one
                module._parameters[k] = state[k]
        else:
            module._parameters[k] = state[k]
    for k in ("crow_indices", "col_indices"):
        setattr(module, k, tensors[k])
    x = tensors["x"]
    if isinstance(x, torch.Tensor) and not x.is_inference() and x.is_floating_point():
        x = x.detach().requires_grad_()
    y = module(x) if "residual" not in tensors else module(x, tensors["residual"])
    wanted = [t for t in (x, module.weight, module.bias) if isinstance(t, torch.Tensor) and t.requires_grad]
    if between is not None:
        between(y)
    if not wanted or not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y, wanted, tensors["dy"], allow_unused=True)]


def layer_cases():
    def pruned(dense):
        dense = copy.deepcopy(dense)
        dense.weight.data *= torch.rand(dense.weight.shape) < 0.4
        return dense

    configs = [QuantConfig(), QuantConfig(granularity="tensor", weight="sawb"), QuantConfig(check_finite=True),
               QuantConfig(grad_weight="float32", grad="luq"), QuantConfig(input="sawb", grad="absmax")]  # fmt: skip
    linear, conv, conv1d = nn.Linear(12, 9), nn.Conv2d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 3, stride=2)
    x2, x4, x3 = torch.randn(7, 12), torch.randn(3, 4, 6, 5), torch.randn(3, 4, 9)
    xn = torch.randn(2, 3, 12)
    for quantized in (False, True):
        for qconfig in configs if quantized else [None]:
            more = {"qconfig": qconfig} if quantized else {}
            name = "QuantizedSparse" if quantized else "Sparse"
            for dense, kind, x in ((linear, "Linear", x2), (linear, "Linear", xn), (conv, "Conv2d", x4),
                                   (conv1d, "Conv1d", x3)):  # fmt: skip
                if hasattr(qnn, name + kind):
                    yield getattr(qnn, name + kind).from_dense(pruned(dense), **more), x
    for qconfig in configs[:1] + configs[3:]:
        for training in (True, False):
            for activation in (nn.Identity(), nn.ReLU(), nn.ReLU6()):
                block = ConvBlock.from_dense(pruned(conv), qconfig=qconfig)
                block.norm, block.activation = nn.BatchNorm2d(6), activation
                yield block.train(training), x4
        for activation in (nn.ReLU(), nn.GELU(), nn.Identity()):
            block = LinearBlock.from_dense(pruned(linear), qconfig=qconfig)
            block.activation = activation
            yield block, random.choice([x2, xn])


def freeing_saved(module, tensors):
    """A layer whose saved tensors lose their memory between the forward and the backward pass."""
    saved = []

    def pack(t):
        saved.append(t)
        return t

    def between(_):
        for t in random.sample(saved, random.choice([1, len(saved)])) if saved else []:
            if type(t) in (torch.Tensor, nn.Parameter) and t.untyped_storage().resizable():
                t.untyped_storage().resize_(random.choice([0, 0, 3]))

    tensors = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        return layer(module, tensors, between)


TRANSFORMS = {
    "vmap": lambda f, x: torch.func.vmap(f)(x[None])[0],
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vjp": lambda f, x: (lambda y, g: g(torch.ones_like(y))[0])(*torch.func.vjp(f, x)),
}  # fmt: skip


def in_transform(name, module, x):
    """What a transform of torch.func makes of a module, and the right value by reverse mode."""
    result = TRANSFORMS[name](module, x)
    if name in ("vmap", "functionalize"):
        return result, module(x)
    if name == "jvp":
        return result, None  # there is no right value but a refusal
    leaf = x.detach().requires_grad_()
    return result, torch.autograd.grad(module(leaf).sum(), leaf)[0]


def operator_calls():
    """Operators that take whole tensors, with what of their arguments is no tensor."""
    x = torch.randn(6, 5, 4, 3)
    _, bits = ops.relu_mask(x)
    codes, scale, zero = ops.quantize(x, "absmax", 8, None, None, True, None, [])
    yield (lambda x: torch.ops.qsparseprop.relu_mask(x)[0]), [x]
    yield torch.ops.qsparseprop.keep_masked, [x, bits]
    yield torch.ops.qsparseprop.quantize, [x, "absmax", 8, None, None, True, None, []]
    yield torch.ops.qsparseprop.dequantize, [codes, scale, zero, None, None, torch.float32]
    for scheme in ("absmax", "standard", "sawb", "stochastic", "luq"):
        yield (lambda x, scheme=scheme: dequantize(quantize(x, scheme))), [x]
        yield (lambda x, scheme=scheme: dequantize(quantize(x, scheme, dim=1))), [x]


def compressed(f):
    def compressed_call(x):
        x = x.detach().requires_grad_()
        with compress_saved_tensors(min_size=0):
            y = f(x)
        return [y, torch.autograd.grad(y.sum(), x)[0]]

    return compressed_call


def compressed_calls():
    x = torch.randn(4, 3, 8, 8)
    for f in (lambda x: torch.relu(x * 1), lambda x: torch.sigmoid(x * 2) * x, nn.functional.relu6,
              lambda x: torch.relu_(x * 1), lambda x: nn.functional.max_pool2d(x * 1, 2),
              lambda x: torch._neg_view(x * 1).square() + (x * 1).square()):  # fmt: skip
        yield compressed(f), [x]


# ---- comparison ----


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for r in result for t in flat(r)] if isinstance(result, list | tuple) else []


def same(a, b, tolerance):
    a, b = flat(a), flat(b)
    if not a or not b:
        return False
    if len(a) != len(b):  # tensors of inference mode have no gradients
        a, b = a[:1], b[:1]
    for s, t in zip(a, b, strict=True):
        s, t = (plain(v).double() for v in (s, t))
        finite = t.nan_to_num(0, 0, 0).abs()
        atol = tolerance * (1 + float(finite.max() if t.numel() else 0))
        if s.shape != t.shape or not torch.allclose(s, t, rtol=10 * tolerance, atol=atol, equal_nan=True):
            return False
    return True


def attempt(call):
    """The result of a call, or its error."""
    torch.manual_seed(5)
    try:
        return call(), None
    except Exception as error:
        return None, error


def check(result, error, wanted, wanted_error, what, tolerance=1e-5):
    if error is not None:
        text = str(error)
        assert text, (what, repr(error))
        assert "INTERNAL ASSERT" not in text, (what, text)
        # whoever asks for a result of 10^12 elements is told that there is no memory for it, as by torch
        no_memory = re.search("allocate memory|out of memory", text)
        assert not no_memory or "huge" in what or "large" in what, (what, text)
        return "refused"
    if wanted is None and wanted_error is not None:
        raise AssertionError(f"{what}: gave a result where plain tensors are refused by {wanted_error!r}")
    found = [*map(plain, flat(result))]
    assert same(found, wanted, tolerance), f"{what}: another result; {found} in place of {wanted}, {what}"
    return "right"


def call_layer(cases):
    module, x = random.choice(cases)
    module = copy.deepcopy(module)
    y = copy.deepcopy(module)(x)
    tensors = {"x": x, "weight": module.weight.detach(), "bias": module.bias.detach(),
               "crow_indices": module.crow_indices, "col_indices": module.col_indices,
               "dy": torch.randn_like(y)}  # fmt: skip
    if isinstance(module, ConvBlock) and isinstance(module.activation, nn.ReLU6):
        tensors["residual"] = torch.randn_like(y)

    def run(call, tensors):
        return attempt(lambda: call(copy.deepcopy(module), tensors))

    kind = random.random()
    if kind < 0.08:
        what = f"{type(module).__name__} freed between the passes"
        print(what, flush=True)
        return check(*run(freeing_saved, tensors), *run(layer, tensors), what)
    if kind < 0.16:
        name = random.choice(list(TRANSFORMS))
        print(name, type(module).__name__, flush=True)
        found, error = attempt(lambda: in_transform(name, module.eval(), x))
        result, wanted = found if error is None else (None, None)
        return check(result, error, wanted, None, f"{name} of {type(module).__name__}")
    changed, changes = dict(tensors), {}
    for name in random.sample(list(tensors), random.choice([1, 1, 1, 2])):
        change, group = random.choice([(k, SAME) for k in SAME] + [(k, OTHER) for k in OTHER])
        with contextlib.suppress(Exception):  # not every change is one of every tensor
            changed[name] = group[change](tensors[name])
            changes[name] = change
    if changes.get("x") in ("subclass", "wrapper"):  # no blocks form: nothing is kept in 8 bits
        module.deferring = False
    what = f"{type(module).__name__}({module.extra_repr()}, {module._qconfig}) {changes}"
    print(what, flush=True)
    result, error = run(layer, changed)
    if error is None and all(change in SAME or change in ("dtype", "none") for change in changes.values()):
        return check(result, error, *run(layer, {k: plain(v) for k, v in changed.items()}), what)
    assert error is not None or not set(changes.values()) & {"freed", "cut"}, f"{what}: read what is not there"
    return check(None, error, None, None, what) if error is not None else "other"


def call_operator(cases):
    op, arguments = random.choice(cases)
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
    place = random.choice(places)
    change, group = random.choice([(k, SAME) for k in SAME] + [(k, OTHER) for k in OTHER])
    what = f"{op} {place} {change}"
    print(what, flush=True)
    given = list(arguments)
    compressing = getattr(op, "__name__", "") == "compressed_call"
    if compressing and change in ("freed", "cut"):  # torch's own operators read it
        return "other"
    try:
        given[place] = group[change](given[place])
    except Exception:
        return "other"
    result, error = attempt(lambda: op(*given))
    in_memory = op is torch.ops.qsparseprop.keep_masked and change in ("gaps", "overlapping", "transposed")
    if error is None and group is SAME and not in_memory:
        # what is kept in 8 bits has its groups in the order of memory
        tolerance = 0.02 if compressing else 1e-5
        return check(result, error, *attempt(lambda: op(*map(plain, given))), what, tolerance)
    if error is None and change in ("freed", "cut"):
        raise AssertionError(f"{what}: read memory that is not there")
    return check(None, error, None, None, what) if error is not None else "other"


def main():
    seed, calls = int(sys.argv[1]), int(sys.argv[2])
    conditions.LEAST_ELEMENTS = 0  # blocks form on small tensors, too
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 + seed % 2)
    random.seed(seed)
    torch.manual_seed(seed)
    layers, others = list(layer_cases()), [*operator_calls(), *compressed_calls()]
    for module, x in layers:
        module(x)
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    counts = {"refused": 0, "right": 0, "other": 0}
    for _ in range(calls):
        faulthandler.dump_traceback_later(60, exit=True)
        counts[call_layer(layers) if random.random() < 0.7 else call_operator(others)] += 1
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(counts))
    assert counts["refused"] > calls // 10
    assert counts["right"] > calls // 10


if __name__ == "__main__":
    main()
