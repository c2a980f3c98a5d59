"""Measuring training: time of a step, memory saved for the backward pass, memory of the process, and the machine.

Memory is given in bytes or in MB of 10**6 bytes. `cost_model` counts what a layer has to compute and to move; its names
are here as well.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn

from qsparseprop import arguments
from qsparseprop.config import cpu_model, usable_processors

from ._process_memory import (
    PeakMemory,
    current_rss_mb,
    measure_peak_rss,
    peak_rss_mb,
    release_free_memory,
    reset_peak_rss,
)
from .cost_model import LayerCost, PassCost, layer_cost, model_costs

__all__ = [
    "Comparison",
    "LayerCost",
    "PassCost",
    "PeakMemory",
    "Spread",
    "compare_interleaved",
    "current_rss_mb",
    "environment",
    "interleaved_medians",
    "interleaved_times",
    "layer_cost",
    "machine_memory_bytes",
    "measure_peak_rss",
    "model_costs",
    "peak_rss_mb",
    "ratio_spread",
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

    if not callable(forward):
        raise TypeError(f"forward must be a function, got {arguments.shown(forward)}")
    known: set[int] = set()
    if model is not None:
        arguments.model(model)
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


def interleaved_times(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] | None = None,
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
    clock : callable, optional
        Returns seconds; ``time.perf_counter`` unless given.

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
    clock = clock or time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(warmup + repeats):
        for name, function in functions.items():
            start = clock()
            function()
            elapsed = clock() - start
            if turn >= warmup:
                times[name].append(elapsed)
    return times


def interleaved_medians(functions: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Return the median seconds of each function, timed by `interleaved_times` (same parameters and errors).

    Parameters
    ----------
    functions, repeats, warmup
        As for `interleaved_times`.

    Returns
    -------
    dict of str to float
    """
    return {name: statistics.median(times) for name, times in interleaved_times(functions, repeats, warmup).items()}


@dataclass(frozen=True)
class Spread:
    """How far a measured ratio is known.

    Attributes
    ----------
    value : float
        Ratio of the medians.
    low, high : float
        Lower and upper quartile of the ratios of calls that were timed beside each other, with `value` between them.
        Quartiles of fewer than eight pairs tell nothing, and so few need not have met the worst: there the ends are
        `value`, divided and multiplied by as much as the largest of the ratios is larger than the smallest. One pair
        has no spread.
    """

    value: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """1 where the ratio is clearly above 1, -1 where it is clearly below, 0 within the noise."""
        return (self.low > 1) - (self.high < 1)


_LEAST_SECONDS = 1e-9
#: Fewer pairs than this have no quartiles to speak of.
_PAIRS_WITH_QUARTILES = 8


def ratio_spread(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratio of two things that were timed in turn, and its spread.

    A slow moment of the machine hits both calls of a pair, so that their ratio varies less than either time.

    Parameters
    ----------
    numerators, denominators : sequence of float
        Seconds of each call, in the order of the turns (see `interleaved_times`); as many of either, at least one.

    Returns
    -------
    Spread

    Raises
    ------
    ValueError
        If there are none, not as many of either, or one is not positive.
    """
    pairs = list(zip(numerators, denominators, strict=True))
    if not pairs or not all(0 < n < math.inf and 0 < d < math.inf for n, d in pairs):
        raise ValueError(f"a ratio needs positive times, got {len(pairs)} pairs: {pairs[:3]}")
    value = statistics.median(numerators) / statistics.median(denominators)
    ratios = sorted(n / d for n, d in pairs)
    if len(ratios) < _PAIRS_WITH_QUARTILES:
        width = ratios[-1] / ratios[0]
        return Spread(value, value / width, value * width)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Spread(value, min(low, value), max(high, value))


@dataclass(frozen=True)
class Comparison:
    """Two ways to do the same, timed in turn.

    Attributes
    ----------
    medians : dict of str to float
        Seconds of each.
    ratio : Spread
        Of the first one's time to the second one's: how many times faster the second one is.
    passes : int
        Timed calls of each.
    """

    medians: dict[str, float]
    ratio: Spread
    passes: int

    @property
    def within_noise(self) -> bool:
        """Whether it is not known which of them is faster."""
        return self.ratio.side == 0

    @property
    def note(self) -> str:
        """For a report: that the two are within the noise, and how far; empty where one is clearly faster."""
        if not self.within_noise:
            return ""
        return f"within the noise: {self.ratio.low:.2f}x to {self.ratio.high:.2f}x in {self.passes} passes"


#: Passes after which a comparison is settled where the medians differ by the factor beside, which the machine's noise
#: does not turn round where all of the faster one's passes take as many seconds as this.
_SETTLED, _SETTLED_SECONDS = {1: 3.0, 3: 2.0}, 0.01
#: So many are enough for any factor, unless the spread holds 1; quartiles of this many mean something.
_USUAL_PASSES = 9


def compare_interleaved(
    steps: Mapping[str, Callable[[], Any]],
    *,
    most_passes: int = 25,
    most_seconds: float = 1.0,
    clock: Callable[[], float] | None = None,
) -> Comparison:
    """Time two functions in turn until it is clear which one is faster, or that the machine does not tell.

    One pass settles a factor of 3, three passes one of 2, and nine passes any, provided that 1 lies outside of the
    spread. Where it lies within, passes go on until it does no more, or one of the limits is reached.

    Parameters
    ----------
    steps : mapping of str to callable
        Two, called without arguments: once to warm up, then timed.
    most_passes : int
        Timed calls of each, at most.
    most_seconds : float
        No further passes after so much time, once there are three.
    clock : callable, optional
        Returns seconds; ``time.perf_counter`` unless given.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If there are not two functions, or `most_passes` is less than 1.
    """
    if len(steps) != 2 or most_passes < 1:
        raise ValueError(f"two functions and at least one pass make a comparison, got {len(steps)} and {most_passes}")
    clock = clock or time.perf_counter
    first, second = steps
    interleaved_times(steps, 1, warmup=0, clock=clock)
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = clock()
    while True:
        for name, (seconds,) in interleaved_times(steps, 1, warmup=0, clock=clock).items():
            # a clock that is coarser than a step has not moved
            times[name].append(max(seconds, _LEAST_SECONDS))
        passes = len(times[first])
        medians = {name: statistics.median(values) for name, values in times.items()}
        least, most = sorted(medians.values())
        ratio = ratio_spread(times[first], times[second])
        early = passes in _SETTLED and most >= _SETTLED[passes] * least and passes * least >= _SETTLED_SECONDS
        enough = (early or passes >= _USUAL_PASSES) and ratio.side != 0
        late = passes >= max(_SETTLED) and clock() - start >= most_seconds
        if enough or late or passes >= most_passes:
            return Comparison(medians, ratio, passes)


def machine_memory_bytes() -> int | None:
    """Memory that this process may use at most: the machine's, or its container's; None where the system does not tell.
    """
    limits = []
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(path, encoding="ascii") as file:
            limits.append(int(file.read()))  # "max" where there is none
    return min((limit for limit in limits if limit > 0), default=None)


def environment() -> dict[str, Any]:
    """Describe what a measurement was made on.

    Returns
    -------
    dict
        ``cpu`` (model name), ``cpu_count`` (logical processors that this process may use), ``threads`` (torch's),
        ``platform``, ``python``, ``torch``, ``qsparseprop`` (versions) and ``date`` (UTC, ISO 8601).
    """
    from qsparseprop._version import __version__

    return {
        "cpu": cpu_model(),
        "cpu_count": usable_processors(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "qsparseprop": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
