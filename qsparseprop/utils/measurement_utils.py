"""Measuring training: time of a step, memory saved for the backward pass, memory of the process, and the machine.

Memory is given in bytes or in MB of 10**6 bytes. `cost_model` counts what a layer has to compute and to move; its names
are here as well.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from qsparseprop._kernels._memory import release_pages

from .cost_model import LayerCost, PassCost, layer_cost, model_costs

__all__ = [
    "LayerCost",
    "PassCost",
    "PeakMemory",
    "current_rss_mb",
    "environment",
    "interleaved_medians",
    "interleaved_times",
    "layer_cost",
    "measure_peak_rss",
    "model_costs",
    "peak_rss_mb",
    "release_free_memory",
    "reset_peak_rss",
    "saved_for_backward_bytes",
]


def saved_for_backward_bytes(forward: Callable[[], Any], model: nn.Module | None = None) -> int:
    """Count the memory that autograd keeps between the forward and the backward pass.

    Every storage counts once and whole, however many operations saved it or views of it: that is what stays allocated.

    Parameters
    ----------
    forward : callable
        Called once without arguments; returns what backward would start from (a loss, or logits). No backward is run.
        Like any forward pass in training mode it updates, for instance, the statistics of batch normalisation.
    model : nn.Module, optional
        Its parameters and buffers do not count: they are there anyway.

    Returns
    -------
    int
        Bytes.

    Notes
    -----
    Seen is what goes through ``save_for_backward``. Not seen are tensors that an ``autograd.Function`` keeps as other
    attributes of its context, and what is saved inside another ``saved_tensors_hooks`` that `forward` itself enters,
    since torch calls only the innermost hooks. `compress_saved_tensors` counts for itself what it keeps, and it is
    added, whether `forward` enters it or runs inside of it.
    """
    from .saved_tensors import counting_compressed

    known: set[int] = set()
    if model is not None:
        known = {_storage(tensor)[0] for tensor in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        key, size = _storage(tensor)
        if key not in known:
            sizes[key] = size
        return tensor

    with counting_compressed(pack) as hooks, torch.autograd.graph.saved_tensors_hooks(*hooks):
        # The result holds the graph and thereby every saved tensor, so that no address is used twice meanwhile.
        result = forward()
    del result
    return sum(sizes.values())


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    try:
        storage = tensor.untyped_storage()
        return storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):
        # Opaque layouts, such as oneDNN's own, have no storage to ask.
        return id(tensor), tensor.numel() * tensor.element_size()


def _proc_status_mb(field: str) -> float | None:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    return None


def current_rss_mb() -> float:
    """Return the resident memory of this process in MB, or NaN where the system does not tell (outside Linux)."""
    value = _proc_status_mb("VmRSS")
    return float("nan") if value is None else value


def peak_rss_mb() -> float:
    """Return the largest resident memory of this process so far in MB: since its start, or since `reset_peak_rss`.

    On Linux this is ``VmHWM`` rather than ``getrusage``, whose figure a child process inherits from its parent.
    NaN where the system does not tell.
    """
    value = _proc_status_mb("VmHWM")
    if value is not None:
        return value
    try:
        import resource
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The BSD family counts bytes, macOS included; the rest counts KiB.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def reset_peak_rss() -> bool:
    """Let `peak_rss_mb` start anew from the present resident memory.

    Returns
    -------
    bool
        Whether the system allowed it; if not, the peak goes on counting from the start of the process.
    """
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
    except OSError:
        return False
    return True


def release_free_memory() -> None:
    """Collect garbage and give freed memory back to the system.

    That is the memory of the kernels' results, and the C library's where it knows how (glibc's malloc_trim).
    Otherwise what a finished phase of the program has used would count as memory of the next one.
    """
    gc.collect()
    release_pages()
    if sys.platform.startswith("linux"):
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


@dataclass(frozen=True)
class PeakMemory:
    """Resident memory of the process around a call, in MB.

    Attributes
    ----------
    before_mb, peak_mb : float
        NaN where the system does not tell.
    of_call : bool
        Whether the peak is that of the call; otherwise it is that of the process since its start.
    """

    before_mb: float
    peak_mb: float
    of_call: bool

    @property
    def added_mb(self) -> float:
        """What the call has added to the memory of the process at most."""
        return self.peak_mb - self.before_mb


def measure_peak_rss(function: Callable[[], Any]) -> PeakMemory:
    """Call a function and measure the largest resident memory of the process meanwhile.

    Freed memory is given back to the system before. Memory that the C library keeps nevertheless can be used by the
    call without being seen: figures to compare belong in processes of their own.
    """
    release_free_memory()
    before = current_rss_mb()
    of_call = reset_peak_rss()
    function()
    return PeakMemory(before, peak_rss_mb(), of_call)


def interleaved_times(
    functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Time functions in turn - a, b, c, a, b, c, ... - so that a slow minute of the machine hits all of them alike.

    Parameters
    ----------
    functions : mapping of str to callable
        What to time, called without arguments.
    repeats : int
        Timed calls of each.
    warmup : int
        Calls of each that come first and are not timed.

    Returns
    -------
    dict of str to list of float
        Seconds of each timed call.

    Raises
    ------
    ValueError
        If `repeats` is less than 1 or `warmup` negative.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            elapsed = time.perf_counter() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def interleaved_medians(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each function, timed by `interleaved_times` (same parameters and errors)."""
    return {name: statistics.median(times) for name, times in interleaved_times(functions, repeats, warmup).items()}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def environment() -> dict[str, Any]:
    """Describe what a measurement was made on.

    Returns
    -------
    dict
        ``cpu`` (model name), ``cpu_count`` (logical processors that this process may use), ``threads`` (torch's),
        ``platform``, ``python``, ``torch``, ``qsparseprop`` (versions) and ``date`` (UTC, ISO 8601).
    """
    from qsparseprop._version import __version__

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cpu_count": usable,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qsparseprop": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
