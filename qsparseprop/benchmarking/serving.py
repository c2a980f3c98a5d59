"""Latency and throughput of a frozen model, beside dense PyTorch and engines that serve dense models in 8 bits."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop.benchmarking.engines import installed_engines
from qsparseprop.config import usable_processors
from qsparseprop.inference import freeze
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.measurement_utils import environment, interleaved_times

__all__ = ["OURS", "ServingConfig", "format_serving", "serve", "serving_times"]

#: Of what is measured, the frozen model.
OURS = "frozen"
#: Calls of a competitor at most, however short they are.
_MOST_CALLS = 2000


@dataclass(frozen=True)
class ServingConfig:
    """What `serve` measures.

    Attributes
    ----------
    batches : tuple of int
        One request after the other, each of so many samples.
    threads : tuple of int
        Of torch and of the engines.
    seconds : float
        That a comparison takes at least.
    compiled : bool
        Whether torch.compile takes part; it needs a C++ compiler, and a minute for each batch.
    """

    batches: tuple[int, ...] = (1, 16)
    threads: tuple[int, ...] = (1,)
    seconds: float = 2.0
    compiled: bool = False


def serve(name: str, model: nn.Module, shape: tuple[int, ...], config: ServingConfig,
          say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:  # fmt: skip
    """Freeze a model, and measure it.

    Parameters
    ----------
    name : str
        For the table.
    model : torch.nn.Module
        Dense, with its zeros.
    shape : tuple of int
        Of a sample.
    config : ServingConfig
    say : callable
        Told how far it is.

    Returns
    -------
    dict
        ``results``: for each batch and number of threads ``milliseconds``, by competitor the percentiles 50, 95 and 99
        of a request; ``best``, the fastest of the others; ``speedup``, its median over ours; ``per_second``, samples
        that ours serves. ``missing``: what could not be measured, and why. ``config``, ``environment``.

    Raises
    ------
    ConfigurationError
        If threads are more than processors.
    """
    if max(config.threads) > usable_processors():
        raise ConfigurationError(f"{max(config.threads)} threads would wait for each other: this process may use "
                                 f"{usable_processors()} processors")  # fmt: skip
    model = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    say(f"{name}: freezing ...")
    frozen = freeze(model, [torch.randn(16, *shape, generator=generator)])
    results: list[dict[str, Any]] = []
    missing: dict[str, None] = {}
    before = torch.get_num_threads()
    try:
        for threads in config.threads:
            torch.set_num_threads(threads)
            for batch in config.batches:
                say(f"{name}: batch {batch}, {threads} thread(s) ...")
                x = torch.randn(batch, *shape, generator=generator)
                times, absent = serving_times(model, frozen, x, config)
                missing.update(dict.fromkeys(absent))
                results.append({"name": name, "batch": batch, "threads": threads, **_summary(times, batch)})
    finally:
        torch.set_num_threads(before)
    return {"results": results, "missing": list(missing), "config": asdict(config), "environment": environment()}


def serving_times(
    model: nn.Module, frozen: nn.Module, x: Tensor, config: ServingConfig
) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of requests of one batch, all competitors in turn, and a sentence for each that is missing."""
    engines, missing = installed_engines(model, x, torch.get_num_threads())
    ways: dict[str, Callable[[], Any]] = {OURS: lambda: frozen(x)}
    ways |= {name: (lambda engine=engine: engine(x)) for name, engine in engines.items()}  # type: ignore[misc]
    ways |= _torch_ways(model, x)
    if config.compiled:
        found, absent = _compiled_ways(model, x)
        ways |= found
        missing = [*missing, *absent]
    with torch.inference_mode():
        turn = sum(times[0] for times in interleaved_times(ways, 1, warmup=2).values())
        calls = max(5, min(_MOST_CALLS, int(config.seconds / turn)))
        return interleaved_times(ways, calls, warmup=1), missing


def _way(module: Callable[[Tensor], Any], given: Tensor, bf16: bool) -> Callable[[], Any]:
    def call() -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return module(given)

    return call


def _torch_ways(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    ways = {"torch fp32": _way(model, x, False), "torch bf16": _way(model, x, True)}
    if x.ndim == 4:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        given = x.contiguous(memory_format=torch.channels_last)
        ways |= {"torch fp32 channels_last": _way(last, given, False),
                 "torch bf16 channels_last": _way(last, given, True)}  # fmt: skip
    return ways


def _compiled_ways(model: nn.Module, x: Tensor) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """Those of torch.compile, called once, and a sentence for each that fails: not every model can be compiled."""
    ways: dict[str, Callable[[], Any]] = {}
    missing = []
    for name, bf16 in (("torch.compile fp32", False), ("torch.compile bf16", True)):
        # constants in the graph, so that weights are laid out once for its products
        graph = torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": True})
        call = _way(graph, x, bf16)
        try:
            with torch.inference_mode():
                call()
        except Exception as error:
            missing.append(f"{name}: left out ({str(error).splitlines()[0] if str(error) else type(error).__name__})")
        else:
            ways[name] = call
    return ways, missing


def _summary(times: dict[str, list[float]], batch: int) -> dict[str, Any]:
    milliseconds = {}
    for name, seconds in times.items():
        cuts = statistics.quantiles(seconds, n=100, method="inclusive")
        milliseconds[name] = {"p50": 1e3 * statistics.median(seconds), "p95": 1e3 * cuts[94], "p99": 1e3 * cuts[98]}
    others = {name: found["p50"] for name, found in milliseconds.items() if name != OURS}
    best = min(others, key=others.__getitem__)
    ours = milliseconds[OURS]["p50"]
    return {"milliseconds": milliseconds, "best": best, "speedup": others[best] / ours,
            "per_second": 1e3 * batch / ours}  # fmt: skip


def format_serving(result: dict[str, Any]) -> str:
    """A table of the result of `serve`."""
    lines = []
    for one in result["results"]:
        where = f"{one['name']}, batch {one['batch']}, {one['threads']} thread(s)"
        lines.append(f"{where}: {one['per_second']:.0f} samples "
                     f"a second, {one['speedup']:.2f}x of the best of the others ({one['best']})")  # fmt: skip
        lines.append(f"  {'':26}{'p50 ms':>10}{'p95':>10}{'p99':>10}")
        for name, found in sorted(one["milliseconds"].items(), key=lambda item: item[1]["p50"]):
            lines.append(f"  {name:26}{found['p50']:10.3f}{found['p95']:10.3f}{found['p99']:10.3f}")
        lines.append("")
    return "\n".join([*lines, *result["missing"]])
