"""How many processors this process may use, asked of the operating system without torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["allowed_processors", "visible_processors"]

_PROC, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def allowed_processors() -> int:
    """Logical processors that this process may use: those of its affinity, or fewer by the limit of its control group.

    A container with two of 64 processors (``docker run --cpus=2``) sees all of them; OpenMP starts a thread for each,
    and the kernel stops them all most of the time.

    Returns
    -------
    int
        At least 1.
    """
    return math.ceil(min(visible_processors(), _quota()))


def visible_processors() -> int:
    """Those of the affinity alone: as many as OpenMP and torch know of."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> float:
    """Processors' worth of time that the control groups of this process give it, the least of them."""
    try:
        groups = [line.split(":", 2) for line in _PROC.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):  # not Linux
        groups = []
    return min((limit for group in groups for limit in _limits(*group[1:])), default=math.inf)


def _limits(controllers: str, path: str) -> Iterator[float]:
    """Those of a group and the groups that it is in: of version 2, or of 1, where each controller has its own tree."""
    if controllers and "cpu" not in controllers.split(","):
        return
    relative = PurePosixPath(path.lstrip("/"))
    root = _CGROUP / controllers if controllers else _CGROUP
    for folder in (relative, *relative.parents):
        try:
            if controllers:
                given = [(root / folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
            else:
                given = (root / folder / "cpu.max").read_text().split()
            time, period = (float(number) for number in given)
        except (OSError, ValueError):  # not there, or "max"
            continue
        if time > 0 and period > 0:
            yield time / period
