"""The compiled kernels one by one: what they reach, and which share that is of what the machine can do.

Operators are called as a layer calls them, their results allocated anew each time, once with each instruction set that
this machine runs. GMAC/s counts useful products only: the nonzeros of the weight times the lanes that are part of the
result (batch, or batch x output height x output width), zeros at the border of an image included; neither padding of
rows nor of planes.

Shares are of peaks measured in the same run by a few lines of C (peaks.c, compiled on the fly where there is a
compiler): of `vpdpbusd` for spmm and sddmm in 8 bits, of FMA for those in float32, and for kernels that only move data
of the read bandwidth of the cache that holds their input and output. Their GB/s count the input, twice where it is read
twice, and the codes that are written.

  python benchmarks/kernels.py --json kernels.json
  python benchmarks/kernels.py --isa avx512vnni --shape linear
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import Competitor, Table, make_parser, put_zeros, race, remark_noise, say, start, write_json
from torch import Tensor

from qsparseprop import ops
from qsparseprop._kernels import _dispatch, _statistics
from qsparseprop.layout.geometry import Geometry, conv_geometry, linear_geometry, prefer_batch_innermost
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan

#: Seconds that one measurement of a peak takes, and how often it is done; the best counts.
PEAK_SECONDS, PEAK_REPEATS = 0.02, 5
#: Size of caches in bytes where the system does not tell.
USUAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}


@dataclass(frozen=True)
class Shape:
    """A layer and the fractions of zeros to try.

    Attributes
    ----------
    batch, inputs, outputs : int
    size : int
        Height and width of the images of a 3x3 convolution with padding 1; 0 for a linear layer.
    sparsity : tuple of float
    """

    batch: int
    inputs: int
    outputs: int
    size: int
    sparsity: tuple[float, ...]

    @property
    def name(self) -> str:
        if self.size:
            return f"conv 3x3 {self.inputs}@{self.size} b{self.batch}"
        return f"linear {self.batch}x{self.inputs}x{self.outputs}"

    def geometry(self, channels_last: bool) -> Geometry:
        """The geometry that the layer's module would choose."""
        if not self.size:
            return linear_geometry(self.inputs, self.outputs)
        size = (self.size, self.size)
        inner = prefer_batch_innermost(self.batch, size, channels_last)
        return conv_geometry(self.inputs, self.outputs, size, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), self.batch, inner)


SHAPES = (
    Shape(1024, 1024, 1024, 0, (0.8, 0.9, 0.95, 0.98)),
    Shape(16, 256, 256, 14, (0.9,)),
    Shape(16, 64, 64, 56, (0.9,)),
)
QUICK_SHAPES = (Shape(16, 32, 16, 0, (0.9,)), Shape(2, 8, 8, 5, (0.9,)))


@dataclass(frozen=True)
class Work:
    """A call of a kernel and what it amounts to.

    Attributes
    ----------
    name : str
    call : callable
    amount : float
        Multiply-adds or bytes.
    peak : str
        Which peak it is compared with: "int8", "float" (multiply-adds), or "read" (bytes).
    footprint : int
        Bytes of input and output, for "read".
    """

    name: str
    call: Callable[[], Any]
    amount: float
    peak: str
    footprint: int = 0

    @property
    def unit(self) -> str:
        return "GB/s" if self.peak == "read" else "GMAC/s"


# ---- peaks ----


@contextmanager
def compiled_peaks() -> Iterator[ctypes.CDLL | str]:
    """Compile peaks.c and give the library, or a sentence that says why there is none."""
    command = shlex.split(os.environ.get("CC", "")) or [c for c in ("cc", "gcc", "clang") if shutil.which(c)][:1]
    if not command:
        yield "there is no C compiler (set CC to name one)"
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        target = Path(folder, "peaks.so")
        source = Path(__file__).with_name("peaks.c")
        try:
            subprocess.run([*command, "-O2", "-shared", "-fPIC", "-o", str(target), str(source)], check=True,
                           capture_output=True, text=True)  # fmt: skip
            library = ctypes.CDLL(str(target))
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            yield f"peaks.c could not be compiled: {lines[0] if lines else error}"
            return
        for function in (library.peak_int8, library.peak_float, library.peak_read):
            function.restype = ctypes.c_int64
        library.peak_int8.argtypes = library.peak_float.argtypes = [ctypes.c_int64]
        library.peak_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        yield library


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches of the first core, by level; usual ones where the system does not tell."""
    sizes = dict(USUAL_CACHES)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind, level, size = (index.joinpath(name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and f"L{level}" in sizes and size.endswith("K"):
            sizes[f"L{level}"] = int(size[:-1]) << 10
    return sizes


def _memory(size: int) -> np.ndarray:
    """Bytes on huge pages, where possible, that are really there (all ones)."""
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    memory.fill(1)
    return memory


def _rate(calls: Sequence[Callable[[int], int]], seconds: float, repeats: int) -> float:
    """Sum of the best rates per second of functions that run at the same time, one a thread."""
    barrier = threading.Barrier(len(calls))

    def best(call: Callable[[int], int]) -> float:
        rounds, rate, left = 1, 0.0, repeats
        call(1)
        barrier.wait()
        while left:
            began = time.perf_counter()
            amount = call(rounds)
            elapsed = time.perf_counter() - began
            if elapsed < seconds / 2:
                rounds = rounds * 2 if elapsed < seconds / 100 else int(rounds * seconds / elapsed) + 1
                continue
            rate, left = max(rate, amount / elapsed), left - 1
        return rate

    with ThreadPoolExecutor(len(calls)) as pool:
        return sum(pool.map(best, calls))


def measure_peaks(library: ctypes.CDLL, threads: int, quick: bool) -> dict[str, float]:
    """What `threads` cores do together.

    Returns
    -------
    dict
        "int8" and "float" in GMAC/s (left out where unknown), and the read bandwidth of "L1", "L2", "L3" and "DRAM" in
        GB/s. Buffers are half a cache in size; the last level and memory are shared by the threads.
    """
    seconds, repeats = (0.001, 1) if quick else (PEAK_SECONDS, PEAK_REPEATS)
    peaks = {}
    for name, function in (("int8", library.peak_int8), ("float", library.peak_float)):
        if function(1):
            peaks[name] = _rate([function] * threads, seconds, repeats) / 1e9
    caches = cache_sizes()
    sizes = {name: size // 2 for name, size in caches.items()}
    sizes["DRAM"] = min(8 * caches["L3"], 512 << 20)
    for name, size in sizes.items():
        if quick:
            size = min(size, 1 << 20)
        if name in ("L3", "DRAM"):
            size //= threads
        buffers = [_memory(size) for _ in range(threads)]
        calls = [lambda rounds, b=b: library.peak_read(b.ctypes.data, b.nbytes, rounds) for b in buffers]
        peaks[name] = _rate(calls, seconds, repeats) / 1e9
    return peaks


def level_of(footprint: int) -> str:
    """The smallest cache that holds as many bytes, or "DRAM"."""
    return next((name for name, size in cache_sizes().items() if footprint <= size), "DRAM")


# ---- kernels ----


def packing(x: Tensor, geometry: Geometry) -> list[Work]:
    """Kernels that read a layer's input: its range, and its codes in planes."""
    layout, seed = geometry.input_layout, torch.tensor(1)
    lanes, size = layout.lanes(x.shape[0]), 4 * x.numel()
    absmax, channels, stochastic, dithered = (
        ops.Scheme("absmax"), ops.Scheme("absmax", (), True), ops.Scheme("stochastic"), ops.Scheme("dithered")
    )  # fmt: skip
    return [
        Work("range", lambda: _statistics.tensor_range(x, torch.get_num_threads()), size, "read", size),
        Work("quantize_pack absmax", lambda: ops.quantize_pack(x, layout, absmax),
             2 * size + lanes, "read", size + lanes),
        Work("quantize_pack stochastic", lambda: ops.quantize_pack(x, layout, stochastic, seed),
             2 * size + lanes, "read", size + lanes),
        Work("quantize_pack dithered", lambda: ops.quantize_pack(x, layout, dithered, seed),
             3 * size + lanes, "read", size + lanes),
        Work("quantize_pack channels", lambda: ops.quantize_pack(x, layout, channels),
             2 * size + lanes, "read", size + lanes),
    ]  # fmt: skip


def layer_kernels(shape: Shape, sparsity: float, channels_last: bool) -> list[Work]:
    """All kernels of a layer's forward and backward pass, in 8 bits and in float32."""
    torch.manual_seed(0)
    weight = torch.randn(shape.outputs, shape.inputs * (9 if shape.size else 1))
    put_zeros(weight, sparsity)
    crow, col, flat = dense_pattern(weight != 0)
    values = weight.reshape(-1)[flat]
    g = shape.geometry(channels_last)
    plan = make_plan(crow, col, g)
    memory_format = torch.channels_last if channels_last and shape.size else torch.contiguous_format
    x = torch.randn(shape.batch, shape.inputs, *[shape.size or 1] * 2).to(memory_format=memory_format)
    dy = torch.randn(shape.batch, shape.outputs, *g.output_size).to(memory_format=memory_format)
    macs = values.numel() * dy.numel() / shape.outputs

    def kernels(quantized: bool) -> list[Work]:
        if quantized:
            xq = ops.quantize_pack(x, g.input_layout, ops.Scheme("absmax"))
            dq = ops.quantize_pack(dy, g.output_layout, ops.Scheme("absmax"))
            w, wt = (ops.quantize_weight(values, rows) for rows in (plan.forward, plan.backward))
        else:
            xq, dq = ops.pack(x, g.input_layout), ops.pack(dy, g.output_layout)
            w, wt = (ops.gather_weight(values, rows) for rows in (plan.forward, plan.backward))
        batch, last = shape.batch, memory_format is torch.channels_last

        def forward() -> Tensor:
            return ops.spmm(xq, w, plan.forward, batch, channels_last=last)

        def input_gradient() -> Tensor:
            return ops.spmm(dq, wt, plan.backward, batch, channels_last=last)

        def weight_gradient() -> Tensor:
            return ops.sddmm(xq, dq, plan.forward, batch, values.numel())

        kind = "int8" if quantized else "float"
        label = "int8" if quantized else "fp32"
        return [
            Work(f"{label} spmm", forward, macs, kind),
            Work(f"{label} spmm, input grad", input_gradient, macs, kind),
            Work(f"{label} sddmm", weight_gradient, macs, kind),
        ]

    slots = plan.forward.slots
    weight_bytes = 4 * values.numel() + 4 * slots + slots
    quantize = Work("quantize_weight", lambda: ops.quantize_weight(values, plan.forward), weight_bytes, "read",
                    weight_bytes)  # fmt: skip
    return [*kernels(True), *kernels(False), quantize, *packing(x, g)]


def on_isa(isa: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function that calls another with the kernels of one instruction set."""

    def switched() -> None:
        _dispatch.set_isa(isa)
        call()

    return switched


def measure(title: str, works: Sequence[Work], isas: Sequence[str], peaks: dict[str, float] | None,
            args: argparse.Namespace) -> list[dict[str, Any]]:  # fmt: skip
    """Race the instruction sets on each kernel and print one row for each."""
    threads = torch.get_num_threads()
    say(f"\n{title}, {threads} thread{'s' if threads > 1 else ''}\n")
    table = Table(["kernel", "ISA".ljust(12), "ms", "rate", "unit", "share"])
    results = []
    active = _dispatch.active_isa()
    try:
        for work in works:
            result = race([Competitor(isa, isa, on_isa(isa, work.call)) for isa in isas], args)
            ms = result["ms"]
            against = level_of(work.footprint) if work.peak == "read" else work.peak
            peak = (peaks or {}).get(against)
            for isa in isas:
                rate = work.amount / ms[isa] / 1e6
                share = None if peak is None else rate / peak
                results.append({"case": title, "kernel": work.name, "isa": isa, "threads": threads, "ms": ms[isa],
                                "quartiles_ms": result["quartiles_ms"][isa], "min_ms": result["min_ms"][isa],
                                "rate": rate, "unit": work.unit, "of": against, "share": share,
                                "noisy": result["noisy"]})  # fmt: skip
                of = f" of {against}" if work.peak == "read" else ""
                table.row(work.name, isa.ljust(12), ms[isa], rate, work.unit,
                          None if share is None else f"{100 * share:.1f} %{of}")
    finally:
        _dispatch.set_isa(active)
    return results


def measure_rounding(x: Tensor, geometry: Geometry, isa: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Race the schemes of gradients on one instruction set; print what each costs compared with rounding to nearest."""
    layout, seed = geometry.input_layout, torch.tensor(1)
    say(f"\nquantize_pack with {isa}, schemes in turn, time relative to rounding to nearest (absmax)\n")
    table = Table(["scale of", "stochastic", "dithered", "luq"])
    results = []
    for per_channel in (False, True):
        schemes = {
            scheme.name: on_isa(isa, lambda s=scheme: ops.quantize_pack(x, layout, s, seed))
            for scheme in (ops.Scheme(name, (), per_channel) for name in ("absmax", "stochastic", "dithered", "luq"))
        }  # fmt: skip
        result = race([Competitor(name, name, call) for name, call in schemes.items()], args)
        relative = {s: ms / result["ms"]["absmax"] for s, ms in result["ms"].items()}
        least = {s: ms / result["min_ms"]["absmax"] for s, ms in result["min_ms"].items()}
        of = "channel" if per_channel else "tensor"
        results.append({"case": f"rounding, one scale a {of}", "isa": isa, "relative": relative,
                        "relative_min": least, **result})  # fmt: skip
        table.row(of, *(f"{relative[s]:.2f} (least {least[s]:.2f})" for s in ("stochastic", "dithered", "luq")))
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    # the model of AMX is for tests; its other functions are those of avx512vnni
    supported = [isa for isa in _dispatch.supported_isas() if isa != "amx_model"]
    parser = make_parser(__doc__, repeats=7, sparsity=(), threads=(1,))
    parser.add_argument("--isa", nargs="+", choices=supported, default=supported[::-1],
                        help="instruction sets (default: all that this build has and this machine runs, %(default)s)")
    parser.add_argument("--shape", nargs="+", metavar="TEXT", default=[],
                        help="only cases in whose name every TEXT occurs; names are like `linear 1024x1024x1024` "
                             "(batch, inputs, outputs), `conv 3x3 256@14 b16` (channels@size, batch) and `packing`")
    parser.add_argument("--contiguous", action="store_true",
                        help="images of convolutions contiguous, not channels_last: only packing and spmm differ")
    args, document = start("kernels", parser, argv)
    active = _dispatch.active_isa()
    shapes = QUICK_SHAPES if args.quick else SHAPES
    side = 20 if args.quick else 1000
    document["peaks"], document["results"], document["rounding"] = {}, [], []
    with compiled_peaks() as library:
        if isinstance(library, str):
            say(f"\nshares are left out: {library}")
            document["peaks_missing"] = library
        for threads in args.threads:
            torch.set_num_threads(threads)
            peaks = None
            if not isinstance(library, str):
                peaks = measure_peaks(library, threads, args.quick)
                document["peaks"][str(threads)] = peaks
                say(f"\npeaks of {threads} thread{'s' if threads > 1 else ''}: "
                    + ", ".join(f"{name} {rate:.0f} {'GMAC/s' if name in ('int8', 'float') else 'GB/s'}"
                                for name, rate in peaks.items()))
            cases = [(f"{s.name}, {100 * z:g} % zeros", s, z)
                     for s in shapes for z in (args.sparsity or s.sparsity)]  # fmt: skip
            title = f"packing {side * side} activations"
            if all(text in title for text in args.shape):
                x = torch.randn(side, side, 1, 1)
                works = packing(x, linear_geometry(side, side))
                document["results"] += measure(title, works, args.isa, peaks, args)
                for isa in args.isa:
                    if isa != "scalar":
                        document["rounding"] += measure_rounding(x, linear_geometry(side, side), isa, args)
                _dispatch.set_isa(active)
            for title, shape, sparsity in cases:
                if all(text in title for text in args.shape):
                    works = layer_kernels(shape, sparsity, not args.contiguous)
                    document["results"] += measure(title, works, args.isa, peaks, args)
    remark_noise(document["results"])
    write_json(args.json, document)


if __name__ == "__main__":
    main()
