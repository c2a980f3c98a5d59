"""What the products on codes cost on this machine, by lists and by dense rows.

The constants are measured, once for a machine and instruction set, and kept in a file::

    list         units * nonzeros * list
    dense rows   units * (entries * dense + table entries * interleave)

with units of 64 lanes, for the two products with planes (SpMM) and the weight gradient (SDDMM), each with its own.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels import _matmul
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._gather_list import GatherList
from qsparseprop._kernels._plan import ProductRows, ValuePattern
from qsparseprop.layout.geometry import GROUP, UNIT, Geometry, linear_geometry

__all__ = ["Costs", "cost_key", "costs_file", "cpu_model", "machine_costs", "measure_costs"]


class Costs(NamedTuple):
    """Nanoseconds for one unit of 64 lanes, on one thread.

    Attributes
    ----------
    spmm_list, sddmm_list : float
        Of a nonzero.
    spmm_dense, sddmm_dense : float
        Of an entry of dense rows.
    interleave : float
        Of an entry of a table of dense rows, which serves all of its rows.
    """

    spmm_list: float
    spmm_dense: float
    sddmm_list: float
    sddmm_dense: float
    interleave: float


def costs_file() -> Path:
    """Where what was measured is kept: ``QSPARSEPROP_COSTS``, or a file in the user's cache."""
    if given := os.environ.get("QSPARSEPROP_COSTS"):
        return Path(os.path.expanduser(given))
    # which stays as it is for a user without a home; nothing can be written there then
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache, "qsparseprop", "product_costs.json")


def cpu_model() -> str:
    """Name of the processor, as far as the system tells.

    Linux gives names on x86, and on ARM the numbers of who made it and of what he calls it.
    """
    told: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            told.setdefault(key.strip(), value.strip())
    if name := told.get("model name"):
        return name
    machine = platform.machine()
    if part := told.get("CPU part"):
        return f"{machine}, implementer {told.get('CPU implementer', 'unknown')}, part {part}"
    return platform.processor() or machine or "unknown"


def cost_key(isa: str) -> str:
    """What the constants depend on, the machine and the instruction set: their name in the file."""
    return f"{cpu_model()}, {isa}"


def _read(path: Path) -> dict[str, object] | None:
    """What a file has, by machine and instruction set; None of one that is not ours, which stays as it is."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        return None
    ours = isinstance(kept, dict) and all(isinstance(value, dict) for value in kept.values())
    return kept if ours else None


def _as_costs(value: object) -> Costs | None:
    """What somebody measured; None where it is not that, or of a version that measured something else."""
    try:
        costs = Costs(**{name: float(number) for name, number in value.items()})  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):
        return None
    valid = 0 <= costs.interleave < math.inf and all(0 < number < math.inf for number in costs[:4])
    return costs if valid else None


@functools.lru_cache(maxsize=16)
def machine_costs(isa: str) -> Costs:
    """The constants of this machine for an instruction set: from the file of `costs_file`, or measured and put there.

    A file that holds anything else is left as it is; then, and where nothing can be written, every process measures.

    Parameters
    ----------
    isa : str
        The active one.

    Returns
    -------
    Costs
    """
    path, key = costs_file(), cost_key(isa)
    kept = _read(path)
    if kept and (costs := _as_costs(kept.get(key))) is not None:
        return costs
    costs = measure_costs()
    if kept is not None and path.is_absolute():
        _write(path, {**kept, key: costs._asdict()})
    return costs


def _write(path: Path, kept: dict[str, object]) -> None:
    """Put a file in the place of another one, which others may be reading; nothing where that cannot be done."""
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        new.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            new.unlink()


def _nanoseconds(call: Callable[[], object], times: int = 5) -> float:
    call()
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter_ns()
        call()
        best = min(best, time.perf_counter_ns() - start)
    return best


#: Of the layer that is measured: features of its input and output, batch, and a nonzero of how many weights.
_FEATURES, _BATCH, _ONE_OF = 256, 512, 4


def _dense_rows(crow: Tensor, col: Tensor, geometry: Geometry) -> DenseRows:
    return DenseRows(ValuePattern(crow, col, _FEATURES), 1, (0,), (0,), geometry.input_layout, geometry.output_layout,
                     False)  # fmt: skip


def measure_costs() -> Costs:
    """Measure the constants with the kernels in use, on one thread: some ten milliseconds.

    Returns
    -------
    Costs
    """
    with torch.device("cpu"):  # whatever the default is
        return _measure()


def _measure() -> Costs:
    # each row has every fourth column, from another one on
    col = torch.arange(0, _FEATURES, _ONE_OF, device="cpu").repeat(_FEATURES).view(_FEATURES, -1)
    col = (col + torch.arange(_FEATURES, device="cpu")[:, None] % _ONE_OF).flatten().to(torch.int32)
    crow = torch.arange(0, col.numel() + 1, _FEATURES // _ONE_OF, dtype=torch.int32, device="cpu")
    g = linear_geometry(_FEATURES, _FEATURES)
    offset = col * g.input_grid.pitch + g.input_grid.front
    index = torch.arange(col.numel(), dtype=torch.int32, device="cpu")
    as_list = GatherList(crow // GROUP, offset, index, col, g.input_layout,
                         g.output_layout)  # fmt: skip
    floats = torch.float32
    one, zero = torch.ones(1, dtype=floats, device="cpu"), torch.zeros(1, dtype=torch.int32, device="cpu")
    planes = torch.full((g.input_layout.lanes(_BATCH),), 1, dtype=torch.uint8, device="cpu")
    scale = torch.ones(_FEATURES, dtype=floats, device="cpu")
    total = torch.zeros(_FEATURES, dtype=torch.int64, device="cpu")
    out = torch.empty(_BATCH, _FEATURES, dtype=floats, device="cpu")
    products, gradients = [], []
    rows: ProductRows
    for rows in (as_list, _dense_rows(crow, col, g)):
        weights = torch.ones(rows.slots, dtype=torch.int8, device="cpu")
        products.append(_nanoseconds(functools.partial(
            _matmul.spmm, planes, weights, scale, total, one, zero, rows, None, out, 1)))
        gradients.append(_nanoseconds(functools.partial(
            _matmul.sddmm, planes, planes, one, zero, one, rows, _BATCH, col.numel(), 1)))  # fmt: skip
    # a layer of few rows, whose time is that of preparing planes for them
    few = 8
    g = linear_geometry(_FEATURES, few)
    rows = _dense_rows(crow[: few + 1], col[: int(crow[few])], g)
    weights = torch.ones(rows.slots, dtype=torch.int8, device="cpu")
    out = torch.empty(_BATCH, few, dtype=floats, device="cpu")
    short = _nanoseconds(functools.partial(
        _matmul.spmm, planes, weights, scale[:few], total[:few], one, zero, rows, None, out, 1))  # fmt: skip
    units, entries = _BATCH / UNIT, _FEATURES * _FEATURES
    # two equations: rows * dense + interleave for each of the table's entries
    dense = (products[1] - short) / (units * _FEATURES * (_FEATURES - few))
    if dense <= 0:  # something else ran during one of them
        dense = products[1] / (units * entries)
    return Costs(
        spmm_list=products[0] / (units * col.numel()),
        spmm_dense=dense,
        sddmm_list=gradients[0] / (units * col.numel()),
        sddmm_dense=gradients[1] / (units * entries),
        interleave=max(0.0, short / (units * _FEATURES) - few * dense),
    )
