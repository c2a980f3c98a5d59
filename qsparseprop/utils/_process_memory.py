"""The memory of the process, as the system tells it, in MB of 10**6 bytes; users import it from `measurement_utils`."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qsparseprop._kernels._memory import release_pages

__all__ = [
    "PeakMemory",
    "current_rss_mb",
    "measure_peak_rss",
    "peak_rss_mb",
    "release_free_memory",
    "reset_peak_rss",
]


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

    Parameters
    ----------
    function : callable

    Returns
    -------
    PeakMemory
    """
    release_free_memory()
    before = current_rss_mb()
    of_call = reset_peak_rss()
    function()
    return PeakMemory(before, peak_rss_mb(), of_call)
