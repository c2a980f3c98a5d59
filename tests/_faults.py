"""Makes kernels do what sanitizers must report, or would not report elsewhere either.

Run by ``tests/sanitize.sh`` in a process of its own; the argument is the fault: ``memory``, a tensor that says that it
is longer than its memory; ``race``, two threads that write to one tensor at a time.
"""

from __future__ import annotations

import ctypes
import sys
import threading

import torch

from qsparseprop import ops


def memory() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    there = (ctypes.c_float * 1024).from_address(libc.malloc(1000))
    ops.relu_mask_(torch.frombuffer(there, dtype=torch.float32))


def race() -> None:
    torch.set_num_threads(1)
    x = torch.randn(1 << 18)
    for _ in range(5):
        both = [threading.Thread(target=ops.relu_mask_, args=(x,)) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()


if __name__ == "__main__":
    {"memory": memory, "race": race}[sys.argv[1]]()
