"""Enters every parallel region of the kernels with several threads, for ThreadSanitizer to look for races.

Run by ``tests/sanitize.sh thread`` in a process of its own, which has loaded ``tests/native/regions.c``: a region that
no team has entered is an error, since nothing was looked at there. Arguments: the instruction sets, if not all that the
processor has, one of which may not have every region.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

import qsparseprop
from qsparseprop import ops
from qsparseprop._kernels import _dispatch, _kept
from qsparseprop.inference import freeze
from qsparseprop.layout.modes import DENSE, LIST, Modes, use_modes
from qsparseprop.nn import (
    QuantizedSparseConv2d,
    QuantizedSparseConvTranspose2d,
    QuantizedSparseLinear,
    SparseConv2d,
    SparseLinear,
)
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.saved_tensors import compress_saved_tensors

THREADS = 3
#: Rows and channels of what is above every size from which on threads are used.
IMAGES, CHANNELS, SIZE = 8, 48, 18


def pruned(layer: nn.Module, density: float) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) < density)
    return layer


def step(model: nn.Module, *inputs: Tensor) -> None:
    """Both passes, as in training."""
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    y = model(*inputs)
    y.float().square().sum().backward()


def layers() -> Iterator[tuple[str, Callable[[], None]]]:
    """Products by lists and by dense rows, of codes and of floats, and their packing and weights."""
    for mode in LIST, DENSE:
        with use_modes(Modes(mode, mode, mode)):
            yield from layers_in(mode)


def layers_in(mode: str) -> Iterator[tuple[str, Callable[[], None]]]:
    image, rows, wide = torch.randn(IMAGES, CHANNELS, SIZE, SIZE), torch.randn(2500, 96), torch.randn(320, 512)
    # above what the codes of a weight, and their pairs, are made of by one thread
    large = QuantizedSparseLinear.from_dense(pruned(nn.Linear(512, 512), 0.4))
    yield f"large {mode}", lambda: step(large, wide)
    for density in (0.15, 1.0):
        conv = pruned(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), density)
        linear = pruned(nn.Linear(96, 400), density)
        turned = pruned(nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1), density)
        for config in (QuantConfig(), QuantConfig(granularity="tensor", input="sawb", weight="sawb", grad="luq")):
            for x in (image, image.to(memory_format=torch.channels_last), image.bfloat16()):
                module = QuantizedSparseConv2d.from_dense(conv, qconfig=config)
                yield f"conv {mode} {density} {x.dtype} {config}", lambda m=module, x=x: step(m, x)
            module = QuantizedSparseLinear.from_dense(linear, qconfig=config)
            yield f"linear {mode} {density} {config}", lambda m=module: step(m, rows)
            module = QuantizedSparseConvTranspose2d.from_dense(turned, qconfig=config)
            yield f"transposed {mode} {density} {config}", lambda m=module: step(m, image)
        for made, x in ((SparseConv2d.from_dense(conv), image), (SparseLinear.from_dense(linear), rows)):
            yield f"floats {density} {type(made).__name__}", lambda m=made, x=x: step(m, x)


class Residual(nn.Module):
    """Two layers of a block, with what lies between them and an addition behind them."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        convs = [QuantizedSparseConv2d.from_dense(pruned(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), 0.3))
                 for _ in range(3)]  # fmt: skip
        self.body = nn.Sequential(convs[0], nn.BatchNorm2d(CHANNELS), activation, convs[1], nn.BatchNorm2d(CHANNELS))
        self.activation, self.last = activation, convs[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.body(x) + x))


def blocks() -> Iterator[tuple[str, Callable[[], None]]]:
    """Batch normalisation, activations and additions between layers; what other layers save, in fewer bits."""
    image = torch.randn(IMAGES, CHANNELS, SIZE, SIZE).to(memory_format=torch.channels_last)
    for activation in (nn.ReLU(), nn.SiLU(), nn.Hardswish()):
        model = fuse_modules(Residual(activation))
        yield f"block {type(activation).__name__}", lambda m=model: step(m, image)
        yield f"block {type(activation).__name__}, bfloat16", lambda m=model: step(m, image.bfloat16())

    dense = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.GELU())

    def compressed() -> None:
        with compress_saved_tensors():
            step(dense, image)

    yield "saved tensors in fewer bits", compressed


def operators() -> Iterator[tuple[str, Callable[[], None]]]:
    """Those of which modules call only one form or none."""
    rows, channels = 3000, 40
    x, one, factor = torch.randn(rows, channels), torch.rand(channels) + 0.5, torch.randn(3, channels)
    codes, nothing = ops.codes_like(x), (None, None)
    yield "norm_statistics", lambda: ops.norm_statistics(x, one, one, one.clone(), one.clone(), 0.1, 1e-5, True, True)
    yield "digest of a weight", lambda: _kept.digest(torch.randn(700, 700), THREADS)
    yield "relu_mask", lambda: ops.keep_masked(x, ops.relu_mask(x)[1])
    yield "relu_mask_", lambda: ops.relu_mask_(x.clone())
    yield "transpose", lambda: ops.transpose(x, 1, rows, channels)
    for activation in (("clamp", [0.0, 6.0]), ("silu", []), ("gelu", [])):
        saved = ops.saved_like(x, activation[0])
        yield "epilogue", lambda a=activation, s=saved: ops.epilogue(x, x, one, one, *a, one, one, codes, s)
        yield "epilogue_range", lambda a=activation: ops.epilogue_range(x, None, *nothing, *a)
        yield "epilogue_sums", lambda a=activation, s=saved: ops.epilogue_sums(x, codes, s, *a)
        yield "epilogue_grad", lambda a=activation, s=saved: ops.epilogue_grad(x, codes, s, *a, factor, True)
    for scheme in ("absmax", "standard", "stochastic"):
        for dim, group in ((None, None), (0, None), (1, None), (None, 64)):

            def both(scheme: str = scheme, dim: int | None = dim, group: int | None = group) -> None:
                given = ops.quantize(x, scheme, 8, dim, group, scheme != "standard", torch.tensor(5), [])
                ops.dequantize(*given, dim, group, torch.float32)

            yield f"quantize {scheme} {dim} {group}", both


def frozen() -> Iterator[tuple[str, Callable[[], None]]]:
    """Programs of every kind of step: of images, and of tokens."""
    image = torch.randn(4, 3, 40, 40)
    convs = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        pruned(nn.Conv2d(64, 64, 3, padding=1), 0.1), nn.Hardswish(), nn.Conv2d(64, 96, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    ).eval()  # fmt: skip
    tokens = torch.randn(4, 100, 128)
    rows = nn.Sequential(nn.LayerNorm(128), pruned(nn.Linear(128, 512), 0.3), nn.GELU(),
                         pruned(nn.Linear(512, 128), 0.3), nn.LayerNorm(128), nn.Linear(128, 256)).eval()  # fmt: skip
    few = nn.Sequential(pruned(nn.Linear(512, 1024), 0.4), nn.GELU(), nn.Linear(1024, 256)).eval()
    few_tokens = torch.randn(8, 512)
    for name, model, x in (("images", convs, image), ("tokens", rows, tokens), ("few tokens", few, few_tokens)):
        made = freeze(model, [x, x + 0.1])

        def serve(made: nn.Module = made, x: Tensor = x) -> None:
            with torch.no_grad():
                made(x)

        yield f"frozen {name}", serve


def callers() -> Iterator[tuple[str, Callable[[], None]]]:
    """Two of Python's threads in one layer, and in one frozen model, at a time: each with a team of its own."""
    image = torch.randn(IMAGES, CHANNELS, SIZE, SIZE)
    conv = pruned(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), 0.2)
    served = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)).eval()
    for name, module in (("a layer", QuantizedSparseConv2d.from_dense(conv).eval()),
                         ("a frozen model", freeze(served, [image]))):  # fmt: skip

        def call(_: int, module: nn.Module = module) -> Tensor:
            with torch.no_grad():
                return module(image)

        def at_once(call: Callable[[int], Tensor] = call) -> None:
            expected = call(0)
            with ThreadPoolExecutor(2) as threads:
                assert all(torch.equal(y, expected) for y in threads.map(call, range(6)))

        yield f"two callers of {name}", at_once


def regions_of(module: str) -> dict[int, str]:
    """Parallel regions of a compiled module, by their place in it: the functions that the compiler made of them."""
    found = subprocess.run(["nm", module], capture_output=True, text=True, check=True)
    regions = re.findall(r"^(\w+) . (\S+\._omp_fn\.\d+)$", found.stdout, re.M)
    return {int(address, 16): name for address, name in regions}


def entered() -> set[tuple[str, int]]:
    """What several threads have entered so far: module and place."""
    noted, seen = ctypes.CDLL(None), set()
    library, offset = ctypes.c_char_p(), ctypes.c_ulong()
    while noted.seen_region(len(seen), ctypes.byref(library), ctypes.byref(offset)):
        seen.add((Path((library.value or b"").decode()).name, offset.value))
    return seen


def main() -> None:
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")
    calls = 0
    for isa in sys.argv[1:] or _dispatch.supported_isas():
        _dispatch.set_isa(isa)
        torch.manual_seed(0)
        for family in (operators, layers, blocks, frozen, callers):
            for name, call in family():
                print(isa, name, flush=True)
                call()
                calls += 1
    modules = sorted(Path(qsparseprop.__file__).parent.glob("_kernels/*.so"))
    regions = {(path.name, at): name for path in modules for at, name in regions_of(str(path)).items()}
    missed = sorted(regions[key] for key in regions.keys() - entered())
    print(f"done: {calls} calls, {len(regions) - len(missed)} of {len(regions)} parallel regions entered by a team")
    if (missed and not sys.argv[1:]) or not regions:  # some belong to some instruction sets
        sys.exit(f"no team has entered {', '.join(missed) or 'any region'}")


if __name__ == "__main__":
    main()
