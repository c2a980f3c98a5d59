"""What the benchmarks share: command line, zeros in weights, racing competitors, tables and JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qsparseprop.nn.deferred import conditions
from qsparseprop.utils.measurement_utils import environment, interleaved_times

#: Makes torch's own CPU allocator ask for huge pages from 2 MB on; read by torch when it first allocates.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
#: Turns of a race at most, however short they are.
MAX_TURNS = 1000
#: Distance of the quartiles, relative to the median, from which a measurement counts as noisy.
NOISY = 0.2

#: A competitor that takes so many times as long as the fastest of its group is timed once.
SLOW = 5.0

DENSE = "dense"


def make_parser(description: str, *, repeats: int, sparsity: Sequence[float],
                threads: Sequence[int]) -> argparse.ArgumentParser:  # fmt: skip
    """Return an argument parser with the options of all benchmarks.

    Parameters
    ----------
    description : str
        Docstring of the script.
    repeats : int
        Default of ``--repeats``.
    sparsity, threads : sequence
        Defaults of ``--sparsity`` (empty: the script decides by shape) and ``--threads``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=_positive, nargs="+", default=list(threads), metavar="N",
                        help="thread counts, one after the other (default: %(default)s)")
    parser.add_argument("--sparsity", type=_fraction, nargs="+", default=list(sparsity), metavar="S",
                        help="fractions of zeros in the weights "
                             + ("(default: %(default)s)" if sparsity else "(default: those listed with each shape)"))
    parser.add_argument("--repeats", type=_positive, default=repeats, metavar="N",
                        help="timed calls of each competitor at least (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, metavar="T",
                        help="go on until a comparison has taken this long, so that short calls are timed more often "
                             "(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--huge-pages", action="store_true",
                        help=f"start anew with {HUGE_PAGES}=1: torch's allocator then asks for transparent huge pages "
                             "(Linux), as qsparseprop's kernels do by themselves for large buffers, so that dense "
                             "competitors have the same advantage")
    parser.add_argument("--quick", action="store_true",
                        help="tiny shapes, one repeat: only shows that the script runs; the figures mean nothing")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def start(
    name: str, parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parse the command line, print the header and return the arguments and the JSON document to fill.

    With ``--huge-pages`` the process replaces itself by one in whose environment the variable is set.

    Parameters
    ----------
    name : str
        Of the benchmark.
    parser : ArgumentParser
        From `make_parser`.
    argv : sequence of str, optional
        Arguments; None takes those of the process.
    """
    args = parser.parse_args(argv)
    if args.huge_pages and os.environ.get(HUGE_PAGES) != "1":
        if argv is not None:
            parser.error(f"--huge-pages works from the command line only; set {HUGE_PAGES}=1 before the start")
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, HUGE_PAGES: "1"})
    if args.quick:
        args.repeats, args.seconds = 1, 0.0
    args.threads = list(dict.fromkeys(args.threads))
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    machine = {**environment(), "threads": args.threads, "huge_pages": huge_pages()}
    if hasattr(os, "getloadavg"):
        machine["load"] = round(os.getloadavg()[0], 2)
    for key, value in machine.items():
        say(f"{key:<12} {value}")
    if args.quick:
        say("\n--quick: the figures below mean nothing")
        conditions.LEAST_ELEMENTS = 0  # the small networks do what large ones do
    return args, {"benchmark": name, "environment": machine, "arguments": settings}


def huge_pages() -> str:
    """Describe who gets transparent huge pages: the kernel's setting, and whether torch's allocator asks for them."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
        kernel = text.partition("[")[2].partition("]")[0]
    except OSError:
        kernel = "unknown"
    return f"kernel: {kernel}, torch's allocator asks for them: {'yes' if os.environ.get(HUGE_PAGES) == '1' else 'no'}"


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe: a sweep takes minutes."""
    print(text, flush=True)


def write_json(path: Path | None, document: dict[str, Any]) -> None:
    """Write the document, if a path was given."""
    if path is not None:
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        say(f"\nwritten: {path}")


class Table:
    """A table that is printed row by row.

    Parameters
    ----------
    titles : sequence of str
        Of the columns; all but the first are aligned to the right.
    first : int
        Width of the first column.
    """

    def __init__(self, titles: Sequence[str], first: int = 28) -> None:
        self._widths = [first, *(max(8, len(title)) for title in titles[1:])]
        self.row(*titles)
        say("-" * (sum(self._widths) + 2 * (len(titles) - 1)))

    def row(self, *cells: str | float | None) -> None:
        """Print cells: floats with three or four significant digits, None as a dash."""
        text = [_cell(cell) for cell in cells]
        say("  ".join([text[0].ljust(self._widths[0]),
                       *(cell.rjust(width) for cell, width in zip(text[1:], self._widths[1:], strict=True))]))


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


@torch.no_grad()
def put_zeros(weight: Tensor, sparsity: float, seed: int = 0) -> None:
    """Set a fraction of a weight to zero in place, at uniformly random positions."""
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(weight.numel())
    mask[order[: round(sparsity * weight.numel())]] = 0
    weight.mul_(mask.view(weight.shape))


def precision(bf16: bool) -> contextlib.AbstractContextManager:
    """Autocast to bfloat16, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


@dataclass(frozen=True)
class Competitor:
    """One way to do a step.

    Attributes
    ----------
    name : str
        Of its column.
    group : str
        Within a group the fastest counts; `DENSE` is what the others are compared with.
    step : callable
        The work, called without arguments.
    """

    name: str
    group: str
    step: Callable[[], Any]


def race(competitors: Sequence[Competitor], args: argparse.Namespace) -> dict[str, Any]:
    """Time competitors in turn (a, b, c, a, b, c, ...), warm, in this process.

    One that takes more than `SLOW` times as long as the fastest of its group, in its warm-up and in the timed call that
    follows, is not timed again: bfloat16 without instructions for it may take a hundred times as long. Whichever turns
    out faster than that in the timed call takes part as all others do, so that none is left out that could be the best.

    Returns
    -------
    dict
        ``ms`` (median milliseconds by name), ``quartiles_ms``, ``min_ms``, ``best`` (fastest name by group), ``ratio``
        (time of the best dense one / time of the group's best, by group other than dense), ``repeats``, ``once`` (names
        of those timed once) and ``noisy`` (whether the quartiles of a group's best lie far apart).
    """
    steps = {c.name: c.step for c in competitors}
    group = {c.name: c.group for c in competitors}

    def slow(seconds: dict[str, list[float]], warm: dict[str, list[float]]) -> set[str]:
        best = {g: min(t[0] for name, t in warm.items() if group[name] == g) for g in set(group.values())}
        return {name for name, taken in seconds.items() if taken[0] > SLOW * best[group[name]]}

    warm = interleaved_times(steps, 1, warmup=0)
    once: dict[str, list[float]] = {}
    if not args.quick:
        suspects = slow(warm, warm)
        warm.update(interleaved_times({n: f for n, f in steps.items() if n not in suspects}, 1, warmup=1))
        suspects |= slow(warm, warm)
        if suspects:
            once = interleaved_times({name: steps[name] for name in suspects}, 1, warmup=0)
            confirmed = slow(once, {**warm, **once})
            once = {name: once[name] for name in steps if name in confirmed}
    turn = sum(taken[0] for name, taken in warm.items() if name not in once)
    repeats = max(args.repeats, min(MAX_TURNS, int(args.seconds / turn)))
    seconds = interleaved_times({n: f for n, f in steps.items() if n not in once}, repeats, warmup=0) | once
    times = {name: [1e3 * t for t in seconds[name]] for name in steps}
    ms = {name: statistics.median(taken) for name, taken in times.items()}
    quartiles = {name: statistics.quantiles(t, method="inclusive")[::2] if len(t) > 1 else [t[0]] * 2
                 for name, t in times.items()}  # fmt: skip
    best: dict[str, str] = {}
    for c in competitors:
        if c.group not in best or ms[c.name] < ms[best[c.group]]:
            best[c.group] = c.name
    ratio = {group: ms[best[DENSE]] / ms[name] for group, name in best.items() if group != DENSE and DENSE in best}
    noisy = any(quartiles[name][1] - quartiles[name][0] > NOISY * ms[name] for name in best.values())
    return {"ms": ms, "quartiles_ms": quartiles, "min_ms": {name: min(taken) for name, taken in times.items()},
            "best": best, "ratio": ratio, "repeats": repeats, "once": list(once), "noisy": noisy}  # fmt: skip


def ms_cells(result: dict[str, Any], factor: float = 1.0) -> list[str]:
    """Cells of a table with the times in a result of `race`; those timed once end in an asterisk."""
    return [_cell(factor * ms) + "*" * (name in result["once"]) for name, ms in result["ms"].items()]


def remark_noise(results: Sequence[dict[str, Any]]) -> None:
    """Say in how many of the results of `race` the times scatter, if there are any, and what was timed once."""
    if any(result.get("once") for result in results):
        say(f"\n*: timed once, since it takes more than {SLOW:g} times as long as the fastest of its group")
    noisy = sum(result["noisy"] for result in results)
    if noisy:
        say(f"\nnoise: in {noisy} of {len(results)} comparisons the quartiles of a time lie more than "
            f"{100 * NOISY:.0f} % of the median apart (is the machine busy?)")


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean of positive numbers."""
    return math.exp(statistics.fmean(math.log(v) for v in values))


def training_step(module: nn.Module, x: Tensor, dy: Tensor, bf16: bool = False) -> Callable[[], None]:
    """Return a function that runs forward and backward once; `dy` is of the dtype of the module's output."""
    parameters = list(module.parameters())

    def step() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        with precision(bf16):
            y = module(x)
        y.backward(dy)
        increment_version(parameters)  # as an optimizer would: codes of an unchanged weight are kept

    return step
