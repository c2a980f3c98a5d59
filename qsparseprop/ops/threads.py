"""How many threads a call of the kernels takes."""

from __future__ import annotations

import os
import sys
import threading
import warnings

import torch

__all__ = ["thread_count"]

#: Whether this process was forked from one whose OpenMP threads had been started: they are not here, and GNU's runtime,
#: which torch for Linux brings along, waits for them for ever.
_without_threads = False
#: Of the process that forks, found just before.
_has_threads = False
_warned = False


def thread_count() -> int:
    """How many threads a call takes: torch's number, asked for at every call; in some forked processes one.

    Returns
    -------
    int

    Warns
    -----
    RuntimeWarning
        Once in a process that was forked from one which had used threads, and would use some: torch's own operators
        hang there.
    """
    threads = torch.get_num_threads()
    if not _without_threads or threads == 1:
        return threads
    _warn_once()
    return 1


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            "this process was forked from one that had used several threads, which GNU's OpenMP does not survive: "
            "qsparseprop computes with one thread here, and operators of torch hang. Call torch.set_num_threads(1) "
            "first, or start processes by multiprocessing.get_context('spawn')",
            RuntimeWarning,
            stacklevel=4,
        )



def _look_for_threads() -> None:
    """Before a fork: threads that Python has not started are OpenMP's, or may be."""
    global _has_threads
    try:
        _has_threads = _without_threads or len(os.listdir("/proc/self/task")) > threading.active_count()
    except OSError:
        _has_threads = torch.get_num_threads() > 1


def _remember_threads() -> None:
    global _without_threads
    _without_threads = _has_threads


if sys.platform == "linux":
    os.register_at_fork(before=_look_for_threads, after_in_child=_remember_threads)
