"""What was built, what this machine supports, and what is in use."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from qsparseprop._kernels import _dispatch
from qsparseprop._version import __version__


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that are mapped into this process; one is right, two oversubscribe the processor.

    Empty where the operating system does not tell (it is read from /proc).
    """
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    except OSError:
        return []
    names = ("libgomp", "libomp", "libiomp")
    return sorted(p for p in paths if p.rsplit("/", 1)[-1].startswith(names))


def get_config() -> dict[str, Any]:
    """The configuration as a dictionary; `show_config` prints it."""
    return {
        "qsparseprop": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "isa_built": _dispatch.built_isas(),
        "isa_supported": _dispatch.supported_isas(),
        "isa_chosen": _dispatch.active_isa(),
        "openmp": _dispatch.have_openmp,
        "openmp_runtimes": openmp_runtimes(),
        "threads": torch.get_num_threads() if _dispatch.have_openmp else 1,
    }


def show_config() -> None:
    """Print versions, instruction sets (built, supported, chosen), OpenMP runtime and thread count."""
    labels = {
        "isa_built": "ISA built",
        "isa_supported": "ISA supported",
        "isa_chosen": "ISA chosen (QSPARSEPROP_ISA overrides)",
        "openmp": "OpenMP",
        "openmp_runtimes": "OpenMP runtime",
        "threads": "threads (torch.get_num_threads())",
    }
    for key, value in get_config().items():
        if isinstance(value, list):
            value = ", ".join(value) or "unknown"
        elif isinstance(value, bool):
            value = "yes" if value else "no (single-threaded build)"
        sys.stdout.write(f"{labels.get(key, key):<40} {value}\n")
