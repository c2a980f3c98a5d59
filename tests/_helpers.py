"""What several test files share: operands and layers to draw, and what they are after quantisation."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qsparseprop
from qsparseprop import nn as qnn
from qsparseprop.layout.geometry import Geometry, conv_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan
from qsparseprop.ops import reference, schemes

#: Sums of integers are exact, so only the few float operations after them differ from float64.
ROUNDING = 2e-6
#: Sums of a few hundred float32 products, relative to the largest result.
FLOAT_SUM = 1e-5

DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = ("contiguous", "reversed", "channels_last", "expanded", "sliced", "offset")
VALUES = ("normal", "positive", "negative", "skewed", "constant", "zero", "small", "large")


needs_inductor = pytest.mark.skipif(
    shutil.which("g++") is None or os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="inductor needs a C++ compiler, and what it writes for ATEN_CPU_CAPABILITY=default does not compile",
)


def examples(count: int) -> settings:
    """Decorates a test of hypothesis that tries so many examples at night, and at every push its share of them.

    The share is that of the profile (conftest.py), whose ``max_examples`` are those of a test without this decorator.
    """
    return settings(max_examples=-(-count * settings.default.max_examples // 100))


def sampled(cases: Iterable[Any], every: int = 3) -> list[Any]:
    """The cases of ``parametrize``, of which every n-th is tried at a push, and all at night.

    Take an n that has no divisor in common with the number of values of an inner argument, so that each is among them.
    """
    night = pytest.mark.nightly
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=[night] if index % every else [])
            for index, case in enumerate(cases)]  # fmt: skip


#: How much longer than alone anything takes under sanitizers (tests/sanitize.sh), and what waits for it has to wait.
PATIENCE = 10 if os.environ.get("QSPARSEPROP_SANITIZED") else 1


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, with the package that is being tested."""
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    inherited = {k: v for k, v in os.environ.items() if k != "QSPARSEPROP_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**inherited, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300 * PATIENCE,
        check=False,
    )  # fmt: skip


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a module of the tests as a program, with the package that is being tested."""
    tests = str(Path(__file__).parents[1])  # behind the package, which may be installed elsewhere
    code = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module(sys.argv.pop(1), run_name='__main__')"
    return run_python(code, tests, f"tests.{module}", *arguments)


def run_fuzzer(module: str, seed: int, count: int, folder: Path, *way: str) -> dict[str, int]:
    """Run one of tests/_fuzz*.py (see tests/fuzz.py) in a process of its own; what became of what it tried."""
    process = run_module(module, str(seed), str(count), str(folder), *way)
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    return json.loads(process.stdout.splitlines()[-1].removeprefix("done: "))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_values(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """Inputs of the kinds that quantisation treats differently."""
    x = torch.randn(shape, generator=generator(seed))
    return {
        "normal": lambda: x,
        "positive": lambda: x.relu(),
        "negative": lambda: -x.abs(),
        "skewed": lambda: x.abs() - 0.2,
        "constant": lambda: torch.full(shape, -0.37 if seed % 2 else 0.37),
        "zero": lambda: torch.zeros(shape),
        "small": lambda: x * 1e-30,
        "large": lambda: x * 1e30,
    }[kind]()


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's shape and, except for "expanded", values, but with other strides."""
    if layout == "reversed":
        dims = tuple(reversed(range(x.ndim)))
        return x.permute(dims).contiguous().permute(dims)
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if x.ndim > 1 else x
    if layout == "expanded":
        for dim in {0, x.ndim - 1} if x.numel() else ():
            x = x.narrow(dim, 0, 1).expand_as(x)
        return x
    if layout == "sliced":  # another start and step in every dimension, and NaN between, which must not be read
        big = torch.full([2 * n + 3 for n in x.shape], torch.nan, dtype=x.dtype)
        return big[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)].copy_(x)
    if layout == "offset":
        return torch.full((x.numel() + 7,), torch.nan, dtype=x.dtype)[3 : 3 + x.numel()].view(x.shape).copy_(x)
    return x.contiguous()


def random_mask(shape: tuple[int, ...], density: float, seed: int) -> Tensor:
    """Which weights exist; below a density of 1 with an empty row and an empty column wherever there are two."""
    if density in (0.0, 1.0):
        return torch.full(shape, bool(density))
    mask = torch.rand(shape, generator=generator(seed)) < density
    for dim in (0, 1):
        if shape[dim] > 1:
            mask.select(dim, seed % shape[dim]).fill_(False)
    return mask


def set_weight(module: nn.Module, density: float, seed: int) -> nn.Module:
    """Weights of mixed magnitude, most of them zero."""
    with torch.no_grad():
        weight = torch.randn(module.weight.shape, generator=generator(seed))
        weight.view(weight.shape[0], -1).mul_(torch.logspace(-1, 1, weight.shape[0])[:, None])
        module.weight.copy_(weight * random_mask(weight.shape, density, seed))
        if module.bias is not None:
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator(seed + 1)))
    return module


def relative_error(actual: Tensor, expected: Tensor, terms: float = 0.0) -> float:
    """Largest difference, relative to the largest expected value; infinite where nothing but zero is right.

    `terms` is the size of what float64 sums up to the expected value: terms that cancel leave a rest of its rounding.
    """
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference = (actual.detach().double() - expected.detach().double()).abs().max().item()
    if difference <= 1e-14 * terms:
        return 0.0
    size = expected.abs().max().item()
    return difference / size if size else (float("inf") if difference else 0.0)


def gradient_of(y: Tensor, layout: str, seed: int) -> Tensor:
    """A gradient for an output; "sum" is what `y.sum().backward()` gives."""
    if layout == "sum":
        return torch.ones(()).expand(y.shape).to(y.dtype)
    return laid_out(torch.randn(y.shape, generator=generator(seed)).to(y.dtype), layout)


def value_gradient(layer: nn.Module) -> Tensor:
    """Gradient of a layer's weight; that of a sparse one without any is None, which optimizers pass over."""
    if layer.weight.numel():
        return layer.weight.grad
    assert layer.weight.grad is None
    return torch.zeros_like(layer.weight)


def saved_for_backward(call: Callable[[], Tensor], module: nn.Module) -> list[Tensor]:
    """What autograd keeps, the module's own parameters not counted."""
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call()
    own = {p.data_ptr() for p in module.parameters()}
    return [t for t in saved if t.data_ptr() not in own]


# ---- operands after quantisation, by the formulas of QuantConfig, in the order of operations of the kernels ----


def _inverse(absmax: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    scale = (absmax / levels).clamp(min=schemes.MIN_SCALE)
    return scale, 1 / scale


def _quantized(x: Tensor, scheme: str, seed: int, order: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Codes around zero and scale of a tensor, or of a channel of it, whose elements are numbered by `order`."""
    if scheme == "standard":
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale, inverse = _inverse(high / 255 - low / 255, 1)
        zero = (-low * inverse).round().clamp(0, 255)
        codes = (x * inverse).round().clamp(-zero, 255 - zero)
    elif scheme == "stochastic":
        absmax = torch.maximum(x.abs().max(), least)
        scale, inverse = _inverse(absmax, 127)
        inverse = reference.limited_inverse(scale, absmax, 127)
        codes = reference.stochastic_round(x * inverse, seed, order)
    elif scheme == "absmax" and x.min() >= 0:
        scale, inverse = _inverse(x.max(), 255)
        codes = (x * inverse).round()
    else:  # "symmetric"
        scale, inverse = _inverse(x.abs().max(), 127)
        codes = (x * inverse).round().clamp(-127, 127)
    return codes, scale


def dequantized(x: Tensor, scheme: str, seed: Tensor | None = None, per_channel: bool = False) -> tuple[Tensor, Tensor]:
    """float64 values that the codes of an (images, channels, height, width) tensor stand for, and the scales (float32).

    Scales are of shape (1,), or (channels,) with one for each.
    """
    x = x.detach().to(torch.float32)
    if x.numel() == 0:
        return x.double(), torch.full((x.shape[1] if per_channel else 1,), schemes.MIN_SCALE)
    order = torch.arange(x.numel()).view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    mixed = 0 if seed is None else schemes.mix_seed(int(seed))
    parts = zip(x.split(1, 1), order.split(1, 1), strict=True) if per_channel else [(x, order)]
    least = x.abs().max() / 16  # of the other channels, where rounding is random
    codes, scales = zip(*(_quantized(part, scheme, mixed, numbers, least) for part, numbers in parts), strict=True)
    scale = torch.stack(scales)
    return torch.cat(codes, 1).double() * scale.double()[:, None, None], scale


def dequantized_weight(weight: Tensor, group: Tensor, factor: Tensor | None = None) -> Tensor:
    """float64 weight after quantisation with one scale for every number in `group` (int64, of the weight's shape).

    With a `factor` (float32, expandable to that shape) what is quantised is the product with it.
    """
    weight = weight.detach().to(torch.float32)
    if factor is None:
        factor = torch.ones(())
    factor = torch.ldexp(factor, -torch.frexp(factor.max()).exponent).expand(weight.shape)
    flat, index = (weight * factor).reshape(-1), group.reshape(-1)
    absmax = torch.zeros(int(group.max()) + 1).scatter_reduce(0, index, flat.abs(), "amax")
    scale, inverse = _inverse(absmax, 127)
    codes = (flat * inverse[index]).round().clamp(-127, 127)
    return (codes.double() * scale.double()[index]).view(weight.shape) / factor.double()


def row_groups(weight: Tensor) -> Tensor:
    """One scale an output channel: forward."""
    return torch.arange(weight.shape[0]).view(-1, *[1] * (weight.ndim - 1)).expand(weight.shape)


def plane_groups(conv: nn.Conv2d) -> Tensor:
    """One scale an input plane (channel and phase of the stride): backward."""
    rows, per_group, height, width = conv.weight.shape
    channel = torch.arange(rows)[:, None] // (rows // conv.groups) * per_group + torch.arange(per_group)
    y = torch.arange(height) * conv.dilation[0] % conv.stride[0]
    x = torch.arange(width) * conv.dilation[1] % conv.stride[1]
    phase = y[:, None] * conv.stride[1] + x
    return channel[:, :, None, None] * (conv.stride[0] * conv.stride[1]) + phase


# ---- modules ----

KINDS = ("QuantizedSparseLinear", "SparseLinear", "QuantizedSparseConv2d", "SparseConv2d")


def dense_example(kind: str, density: float = 0.3, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A dense layer with zeros and an input for it."""
    if "Linear" in kind:
        dense, shape = nn.Linear(20, 12), (9, 20)
    else:
        dense, shape = nn.Conv2d(6, 8, (3, 2), (2, 1), (1, 2), groups=2), (5, 6, 9, 7)
    return set_weight(dense, density, seed), torch.randn(shape, generator=generator(seed + 2))


def example(kind: str, density: float = 0.3, seed: int = 0) -> tuple[nn.Module, nn.Module, Tensor]:
    """A sparse layer, the dense one that it was made of, and an input."""
    dense, x = dense_example(kind, density, seed)
    return getattr(qnn, kind).from_dense(dense), dense, x


# ---- convolutions to draw ----


@dataclass(frozen=True)
class ConvCase:
    """A convolution, its input's shape, and the seed of all values."""

    batch: int
    groups: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    bias: bool
    batch_innermost: bool | None
    density: float
    seed: int

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Zeros above, below, left and right."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2
        y, x = (0, 0) if self.padding == "valid" else self.padding
        return y, y, x, x

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.in_channels, *self.size

    def conv(self) -> nn.Conv2d:
        conv = nn.Conv2d(self.in_channels, self.out_channels, self.kernel, self.stride, self.padding, self.dilation,
                         self.groups, self.bias)
        return set_weight(conv, self.density, self.seed)

    def geometry(self) -> Geometry:
        return conv_geometry(self.in_channels, self.out_channels, self.size, self.kernel, self.stride, self.pads,
                             self.dilation, self.batch, bool(self.batch_innermost))

    def plan(self) -> tuple[Plan, Tensor]:
        """Lists of the kernels and the values of the nonzeros."""
        weight = self.conv().weight.detach()
        crow, col, flat = dense_pattern((weight != 0).view(self.out_channels, -1))
        return make_plan(crow, col, self.geometry(), self.groups), weight.view(-1)[flat]


@st.composite
def conv_cases(draw: Callable, most_channels: int = 5) -> ConvCase:
    pair = st.tuples
    kernel = draw(pair(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(pair(st.integers(1, 3), st.integers(1, 3)))
    stride = draw(pair(st.integers(1, 3), st.integers(1, 3)))
    padding = draw(st.one_of(pair(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])))
    if padding == "same":
        stride = (1, 1)
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    depthwise = draw(st.booleans()) and groups > 1
    in_channels = groups * (1 if depthwise else draw(st.integers(1, most_channels)))
    case = ConvCase(
        batch=draw(st.sampled_from([1, 2, 3, 7, 17, 65])),
        groups=groups,
        in_channels=in_channels,
        out_channels=groups * draw(st.sampled_from([1, 2, 3, 5, 17])),
        size=(1, 1),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
        batch_innermost=draw(st.sampled_from([None, False, True])),
        density=draw(st.sampled_from([0.0, 0.1, 0.4, 1.0])),
        seed=draw(st.integers(0, 1000)),
    )
    least = [max(1, d * (k - 1) + 1 - p - q)
             for d, k, p, q in zip(dilation, kernel, case.pads[::2], case.pads[1::2], strict=True)]
    size = tuple(n + draw(st.integers(0, 8)) for n in least)
    # what the kernels see as one more dimension need not be large in all of them at once
    batch = min(case.batch, 7) if size[0] * size[1] > 60 else case.batch
    return ConvCase(**{**vars(case), "size": size, "batch": batch})
