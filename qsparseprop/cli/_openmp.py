"""How many threads the program has, and how they wait for each other."""

from __future__ import annotations

import os
import sys

from qsparseprop._processors import allowed_processors, visible_processors

__all__ = ["SPINS", "prepare_threads"]

#: Turns of a loop that a thread waits for another one before it sleeps: some 50 microseconds, longer than between two
#: passes of a layer. GNU's OpenMP takes 300,000 by itself, which is milliseconds.
SPINS = "3000"


def prepare_threads() -> None:
    """Say to OpenMP, where nobody else has, how many threads to start and how they are to wait.

    Threads that spin take the processor from those that they wait for as soon as other programs want it, too: a layer
    with two threads was 16 times slower than with one then. Of a control group that has less than all processors
    OpenMP knows nothing. The runtime reads this once, when torch is imported; programs that this one starts inherit it.
    """
    if "torch" in sys.modules:
        return
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    if allowed_processors() < visible_processors() and not os.environ.keys() & {"OMP_NUM_THREADS", "MKL_NUM_THREADS"}:
        os.environ["OMP_NUM_THREADS"] = str(allowed_processors())
