"""How the threads of the program wait for each other."""

from __future__ import annotations

import os
import sys

__all__ = ["SPINS", "sleep_soon"]

#: Turns of a loop that a thread waits for another one before it sleeps: some 50 microseconds, longer than between two
#: passes of a layer. GNU's OpenMP takes 300,000 by itself, which is milliseconds.
SPINS = "3000"


def sleep_soon() -> None:
    """Let threads that wait for each other sleep soon, where nobody has said how they are to wait.

    Threads that spin take the processor from those that they wait for as soon as other programs want it, too: a layer
    with two threads was 16 times slower than with one then. The runtime reads this once, when torch is imported;
    programs that this one starts inherit it.
    """
    if "torch" not in sys.modules and not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
