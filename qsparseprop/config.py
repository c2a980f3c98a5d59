"""What was built, what this machine supports, and what is in use."""

from __future__ import annotations

import os
import platform
import re
from typing import Any

import torch

from qsparseprop._kernels import _dispatch
from qsparseprop._processors import allowed_processors
from qsparseprop._version import __version__
from qsparseprop.layout.costs import cpu_model, machine_costs

__all__ = ["cpu_model", "get_config", "openmp_runtimes", "show_config", "usable_processors"]


def usable_processors() -> int:
    """How many logical processors this process may use, by its affinity and the limit of its control group.

    Torch starts threads for all processors that it sees: where this is less, call ``torch.set_num_threads``, as the
    command line does by itself.
    """
    return allowed_processors()


def _torch_build() -> str:
    """What torch was built with and what it uses of this processor, on one line."""
    shown = torch.__config__.show()
    patterns = (r"^\s*- ((?:GCC|clang|MSVC)[^\n]*)", r"(OpenMP \d+)", r"(oneAPI Math Kernel Library Version [\w.]+)",
                r"(MKL-DNN v[\w.]+)", r"(CPU capability usage: \w+)")  # fmt: skip
    found = (re.search(pattern, shown, re.MULTILINE | re.IGNORECASE) for pattern in patterns)
    return ", ".join(match[1].strip() for match in found if match) or "unknown"


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


def _openmp_waiting() -> str:
    """How threads wait for each other: what the environment said when GNU's runtime was started, as it is now."""
    policy, spins = (os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if spins is not None:
        return f"GOMP_SPINCOUNT={spins}"
    return f"OMP_WAIT_POLICY={policy}" if policy is not None else "they spin; see docs/pytorch.md for shared machines"


def _where_dense_rows_pay() -> str:
    """Up to which share of zeros dense rows are the faster way here, as measured; see `qsparseprop.layout.costs`."""
    costs = machine_costs(_dispatch.active_isa())
    shares = (1 - costs.spmm_dense / costs.spmm_list, 1 - costs.sddmm_dense / costs.sddmm_list)
    products, gradient = (f"up to {100 * share:.0f} % zeros" if share > 0 else "never" for share in shares)
    return f"{products}; weight gradients {gradient}"


def get_config() -> dict[str, Any]:
    """The configuration as a dictionary; `show_config` prints it."""
    return {
        "qsparseprop": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "processors": usable_processors(),
        "compiler": _dispatch.compiler,
        "torch_build": _torch_build(),
        "isa_built": _dispatch.built_isas(),
        "isa_supported": _dispatch.supported_isas(),
        "isa_chosen": _dispatch.active_isa(),
        "dense_rows": _where_dense_rows_pay(),
        "openmp": _dispatch.have_openmp,
        "openmp_runtimes": openmp_runtimes(),
        "openmp_waiting": _openmp_waiting(),
        "threads": torch.get_num_threads() if _dispatch.have_openmp else 1,
    }


def show_config() -> None:
    """Print what a report of a bug needs.

    Versions, processor, builds, instruction sets (built, supported, chosen), OpenMP runtimes and thread count.
    """
    found = get_config()
    labels = {
        "cpu": "processor",
        "processors": "processors that may be used",
        "compiler": "qsparseprop built by",
        "torch_build": "torch built by and using",
        "isa_built": "ISA built",
        "isa_supported": "ISA supported",
        "isa_chosen": "ISA chosen (QSPARSEPROP_ISA overrides)",
        "dense_rows": "dense rows (or by QSPARSEPROP_PRODUCTS)",
        "openmp": "OpenMP",
        "openmp_runtimes": f"OpenMP runtimes ({len(found['openmp_runtimes'])} mapped, 1 is right)",
        "openmp_waiting": "threads that wait for others",
        "threads": "threads (torch.get_num_threads())",
    }
    for key, value in found.items():
        if isinstance(value, list):
            value = ", ".join(value) or "unknown"
        elif isinstance(value, bool):
            value = "yes" if value else "no (single-threaded build)"
        print(f"{labels.get(key, key):<40} {value}")
