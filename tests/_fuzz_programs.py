"""Runs generated programs in every way and prints those, shrunk, in which blocks make a difference.

Arguments: the first seed, and how many programs. Ends with an error if there were any.
"""

import json
import sys
import time

import torch

from qsparseprop.nn.deferred import conditions
from tests._program_faults import fault
from tests._programs import Program, random_program, shrunk, source


def kind(found: str | None) -> str | None:
    """What is kept of a fault while its program is shrunk."""
    return None if found is None else found.split(":")[0]


def main() -> None:
    torch.set_num_threads(1)
    conditions.LEAST_ELEMENTS = 0  # blocks form on small tensors, too
    first, count = (int(a) for a in sys.argv[1:3])
    start, failures = time.monotonic(), 0
    for seed in range(first, first + count):
        program = random_program(seed)
        found = fault(source(program))
        if (seed + 1 - first) % 1000 == 0:
            print(f"{seed + 1 - first} programs, {time.monotonic() - start:.0f} s", flush=True)
        if found is None:
            continue
        failures += 1

        def fails(candidate: Program, found: str = found) -> bool:
            return kind(fault(source(candidate))) == kind(found)

        small = shrunk(program, fails)
        print(f"==== seed {seed}: {fault(source(small))}\n{small}\n{source(small)}", flush=True)
    print("done:", json.dumps({"right": count - failures, "found": failures}), flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
