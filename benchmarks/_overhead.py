"""What a call of a layer costs besides its kernels, and what the imports cost."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Competitor, Table, put_zeros, race, say, training_step
from torch import Tensor, nn

import qsparseprop
from qsparseprop import ops
from qsparseprop._kernels import _matmul, _pack, _sums
from qsparseprop.nn import QuantizedSparseLinear, SparseLinear

#: What is imported, one after the other.
IMPORTS = ("torch", "qsparseprop", "qsparseprop.nn", "qsparseprop.utils.network_utils")

#: Features and batch of the layers whose kernels are timed by themselves.
SMALL_LAYERS = ((64, 64), (1024, 1))


class NothingComputed(torch.autograd.Function):
    """A node that saves and gives as many tensors as a layer's, and computes none of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        """One of the given tensors."""
        ctx.save_for_backward(weight, *given[:3])
        ctx.given = given
        return given[3].detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """The others."""
        _ = ctx.saved_tensors
        return *(torch.empty_like(g) for g in ctx.given[4:]), None  # which torch takes as they are


def kernel_calls(layer: QuantizedSparseLinear, x: Tensor, dy: Tensor) -> dict[str, Callable[[], Any]]:
    """The compiled calls of a training step, each by itself."""
    threads = torch.get_num_threads()
    layer(x)  # which makes the plan
    plan = layer.last_plan()
    assert plan is not None
    assert layer.qconfig is not None
    values, bias, x = layer.weight.detach(), layer.bias, x.detach()
    rows, back, seed = plan.multiplied(True), plan.multiplied(True, swapped=True), ops.draw_seed()
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    in_scheme, out_scheme = layer.qconfig.input_scheme, layer.qconfig.grad_scheme
    planes, scale, zero = _pack.quantize_pack(x, rows.source, in_scheme, seed, threads)
    dplanes, dscale, dzero = _pack.quantize_pack(dy, back.source, out_scheme, seed, threads)
    calls = {
        "pack x": lambda: _pack.quantize_pack(x, rows.source, in_scheme, seed, threads),
        "weight, product": lambda: _matmul.quantized_spmm(values, rows, scale, zero, None, planes, bias, y, threads),
        "pack dy": lambda: _pack.quantize_pack(dy, back.source, out_scheme, seed, threads),
        "weight, dx": lambda: _matmul.quantized_spmm(values, back, dscale, dzero, None, dplanes, None, dx, threads),
        "dweight": lambda: _matmul.sddmm(planes, dplanes, scale, zero, dscale, plan.differentiated(True), len(x),
                                         values.numel(), threads),
        "dbias": lambda: _sums.channel_sums(dy, threads),
    }  # fmt: skip
    given = (planes, scale, zero, y, dx, torch.zeros_like(values), torch.zeros_like(bias))
    leaf = x.clone().requires_grad_()

    def nothing() -> None:
        leaf.grad = layer.weight.grad = layer.bias.grad = None
        NothingComputed.apply(leaf, layer.weight, layer.bias, given).backward(dy)

    def in_turn() -> None:
        """All of them, so that each finds in the caches what it does in a step."""
        for call in calls.values():
            call()

    return {**calls, "kernels": in_turn, "autograd alone": nothing}


def _measure_small_layers(args: argparse.Namespace, threads: int) -> list[dict[str, Any]]:
    """Steps of small layers, dense and sparse, and the kernels of the latter: all in turn, in one race."""
    several = "s" if threads > 1 else ""
    say(f"\nmicroseconds of a training step of a small Linear, 90 % zeros, {threads} thread{several}\n")
    results, table = [], None
    for features, batch in SMALL_LAYERS[:1] if args.quick else SMALL_LAYERS:
        dense = nn.Linear(features, features)
        put_zeros(dense.weight, 0.9)
        x, dy = torch.randn(batch, features, requires_grad=True), torch.randn(batch, features)
        sparse = QuantizedSparseLinear.from_dense(dense)
        steps = {"dense": training_step(dense, x, dy), "sparse": training_step(sparse, x, dy),
                 **kernel_calls(sparse, x, dy)}  # fmt: skip
        found = race([Competitor(name, name, step) for name, step in steps.items()], args)["ms"]
        us = {name: 1e3 * ms for name, ms in found.items()}
        us["above"] = us["sparse"] - us["kernels"]
        results.append({"features": features, "batch": batch, "us": us})
        if table is None:
            table = Table(["layer", *us])
        table.row(f"{features}, batch {batch}", *us.values())
    return results


def measure_overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Time layers so small that the cost of a call counts, and the import."""
    dense = nn.Linear(64, 64)
    put_zeros(dense.weight, 0.9)
    x, dy = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    modules = {
        "Linear": dense,
        "QuantizedSparseLinear": QuantizedSparseLinear.from_dense(dense),
        "SparseLinear": SparseLinear.from_dense(dense),
    }

    def forward_only(module: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                module(x)

        return step

    calls: dict[str, Any] = {}
    small: dict[str, Any] = {}
    for threads in args.threads:
        torch.set_num_threads(threads)
        say(f"\nmicroseconds of a call, 64 x 64, batch 8, 90 % zeros, {threads} thread{'s' if threads > 1 else ''}\n")
        table = Table(["", "forward + backward", "forward, no_grad"])
        both = race([Competitor(name, name, training_step(m, x, dy)) for name, m in modules.items()], args)["ms"]
        forward = race([Competitor(name, name, forward_only(m)) for name, m in modules.items()], args)["ms"]
        for name in modules:
            table.row(name, 1e3 * both[name], 1e3 * forward[name])
        calls[str(threads)] = {name: {"forward_backward_us": 1e3 * both[name], "forward_us": 1e3 * forward[name]}
                               for name in modules}  # fmt: skip
        small[str(threads)] = _measure_small_layers(args, threads)

    runs = [_time_imports() for _ in range(1 if args.quick else 5)]
    imports = {name: statistics.median(run[name] for run in runs) for name in IMPORTS}
    say(f"\nmilliseconds of an import, each after the one above (median of {len(runs)} processes)\n")
    table = Table(["module", "ms"], first=36)
    for name, ms in imports.items():
        table.row(name, ms)
    return {"calls": calls, "small_layers": small, "import_ms": imports}


def _time_imports() -> dict[str, float]:
    """Milliseconds of each of `IMPORTS`, one after the other in a process of its own."""
    code = ("import importlib, sys, time\n"
            "for name in sys.argv[1:]:\n"
            "    began = time.perf_counter()\n"
            "    importlib.import_module(name)\n"
            "    print(1e3 * (time.perf_counter() - began))\n")  # fmt: skip
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", code, *IMPORTS], env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, check=True)  # fmt: skip
    return dict(zip(IMPORTS, map(float, done.stdout.split()), strict=True))
