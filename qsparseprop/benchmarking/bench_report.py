"""The result of `qsparseprop.benchmarking.bench` as a table and as pictures.

In the pictures what was measured has one colour, and what was derived from it another; layers have a panel each, so
that neither needs a legend.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from qsparseprop.utils.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["format_table", "plot_roofline", "plot_speedup"]

# Two of Okabe and Ito's colours, which stay apart for all kinds of colour blindness; markers and lines do so in black
# and white.
_MEASURED, _DERIVED = "#0072B2", "#D55E00"
_COLUMNS, _PIXELS, _DPI = 2, 800, 100


def format_table(result: dict[str, Any]) -> str:
    """Return a table of milliseconds and speed-ups with their spread, and what follows for each layer."""
    rows = [("what", "zeros", "best dense", "ms", "best int8", "ms", "speed-up", "spread")]
    for r in result["results"]:
        dense, sparse = r["best_dense"], r["best_sparse"]
        low, high = r["spread"]
        rows.append((r["name"], f"{100 * r['sparsity']:g} %", dense.removeprefix("dense "), f"{r['ms'][dense]:.2f}",
                     sparse.removeprefix("int8 "), f"{r['ms'][sparse]:.2f}", f"{r['speedup']:.2f}x",
                     f"{low:.2f}-{high:.2f}"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 2, 4)
    lines = ["  ".join(cell.ljust(w) if i in left else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    lines.insert(1, "-" * len(lines[0]))
    lines.append("")
    lines += [f"{name}: {found['finding']}" for name, found in result["break_even"].items()]
    return "\n".join(lines)


def _panels(names: Sequence[str], height: float) -> tuple[Figure, list[Axes]]:
    """A figure with axes for each name."""
    # Not pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(_PIXELS / _DPI, 0.7 + height * rows), dpi=_DPI, layout="constrained")
    grid = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    panels = grid[: len(names)]
    for axes in grid[len(names) :]:
        axes.remove()
    for axes, name in zip(panels, names, strict=True):
        axes.set_title(textwrap.fill(name, 96 // columns), fontsize=9)
        axes.tick_params(labelsize=9, labelbottom=True, labelleft=True)
        axes.grid(True, which="major", alpha=0.3)
    return figure, panels


_Line = Sequence[tuple[float, float]]


def _label(axes: Axes, points: Sequence[tuple[float, float, str]], lines: Sequence[_Line]) -> None:
    """Write beside points where there is room: not on other points or texts, nor on the lines that were drawn."""
    from matplotlib.transforms import Bbox

    places = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in places]
    strokes: list[tuple[Any, int]] = [(line, 4) for line in map(axes.transData.transform, lines)]
    for text in axes.texts:
        box = text.get_window_extent()
        if text.get_rotation():  # a stroke from corner to corner, as thick as letters are high
            strokes.append(((box.min, box.max), 12))
        else:
            taken.append(box)
    for line, width in strokes:
        for (x0, y0), (x1, y1) in itertools.pairwise(line):
            steps = int(max(abs(x1 - x0), abs(y1 - y0)) / 4) + 1
            taken += [Bbox.from_bounds(x0 + (x1 - x0) * i / steps - width / 2, y0 + (y1 - y0) * i / steps - width / 2,
                                       width, width) for i in range(steps + 1)]  # fmt: skip
    inside = axes.get_window_extent()
    directions = ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    for x, y, label in points:
        text = axes.annotate(label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=9, color=_MEASURED)
        text.set_in_layout(False)  # axes keep the place for which the labels' were found
        for distance, (dx, dy) in itertools.product((8, 12), directions):
            text.set(position=(distance * dx, distance * dy), ha=("center", "left", "right")[dx],
                     va=("center", "bottom", "top")[dy])  # fmt: skip
            box = text.get_window_extent()
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            text.remove()


def _spaced(values: Iterable[float], least: float) -> list[float]:
    """Those of ascending values that are at least a factor apart."""
    kept: list[float] = []
    for value in values:
        if not kept or value >= least * kept[-1]:
            kept.append(value)
    return kept


#: Round numbers of a decade, from many to few.
_ROUND = ((1, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
          (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))  # fmt: skip


def _round_numbers(low: float, high: float) -> list[float]:
    """Round numbers of a range, 1 among them, few enough to be read on an axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in _ROUND:
        found = [m * 10.0**decade for decade in decades for m in mantissas if low <= m * 10.0**decade <= high]
        if len(found) <= 8:
            break
    return found


def _names(result: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(r["name"] for r in result["results"]))


def _rows(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return sorted((r for r in result["results"] if r["name"] == name), key=lambda r: r["sparsity"])


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _threads(result: dict[str, Any]) -> str:
    threads = result["environment"]["threads"]
    return f"{threads} thread{'s' if threads > 1 else ''}"


def plot_speedup(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw speed-up against sparsity with its spread, and from where on it is above 1 as far as that is known.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = _names(result)
    figure, panels = _panels(names, 2.8 if len(names) > 1 else 3.8)
    ends = [end for r in result["results"] for end in (*r["spread"], 1.0)]
    low, high = min(ends), max(ends)
    room = max(2.0, high / low) ** 0.22  # for labels above, and what was found below
    low, high = low / room**1.5, high * room
    heights = _round_numbers(low, high)
    # the share of weights that are left, on a logarithmic axis: twice the zeros' effect is the same step everywhere
    left = sorted({1 - r["sparsity"] for r in result["results"]})
    first, last = left[-1] * 1.25, left[0] / 1.25
    lines: list[list[_Line]] = []
    for axes, name in zip(panels, names, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(first, last)
        axes.set_ylim(low, high)
        axes.axhline(1, color="#777777", linewidth=1)
        rows = _rows(result, name)
        x, y = [1 - r["sparsity"] for r in rows], [r["speedup"] for r in rows]
        errors = [[r["speedup"] - r["spread"][0] for r in rows], [r["spread"][1] - r["speedup"] for r in rows]]
        axes.errorbar(x, y, yerr=errors, color=_MEASURED, marker="o", linewidth=1.8, markersize=5, capsize=4)
        lines.append([[(first, 1), (last, 1)], list(zip(x, y, strict=True)),
                      *([(1 - r["sparsity"], end) for end in r["spread"]] for r in rows)])  # fmt: skip
        found = result["break_even"][name]
        if found["sparsity"] is not None:
            axes.axvline(1 - found["sparsity"], color=_DERIVED, linewidth=1.5, linestyle="--")
            lines[-1].append([(1 - found["sparsity"], low), (1 - found["sparsity"], high)])
        elif found["above"] is not None and found["up_to"] is not None:
            axes.axvspan(1 - found["above"], 1 - found["up_to"], color=_DERIVED, alpha=0.15, linewidth=0)
        finding = textwrap.fill(found["finding"], 88 // min(_COLUMNS, len(names)))
        axes.text(0.5, 0.03, finding, transform=axes.transAxes, ha="center", va="bottom", color=_DERIVED, fontsize=9,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
        axes.xaxis.set_major_locator(FixedLocator(_spaced(left, 1.15)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{round(100 * (1 - share), 6):g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(FixedLocator(heights))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        axes.yaxis.set_minor_locator(NullLocator())
    figure.supxlabel("zeros in the weights (%)", fontsize=10)
    figure.supylabel("speed-up over the best dense setting", fontsize=10)
    figure.suptitle(f"Sparse int8 training steps against dense PyTorch, {_threads(result)}\n"
                    "blue: measured, with the spread of neighbouring steps; orange: what follows",
                    fontsize=10)  # fmt: skip
    figure.draw_without_rendering()
    for axes, name, drawn in zip(panels, names, lines, strict=True):
        _label(axes, [(1 - r["sparsity"], r["speedup"], f"{r['speedup']:.2f}x") for r in _rows(result, name)], drawn)
    _save(figure, path)


def plot_roofline(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw each layer's operations a second against its operations a byte, below what the machine reaches.

    Only products with nonzeros count as operations of a sparse layer.

    Raises
    ------
    ImportError, OSError
        As `plot_speedup`.
    """
    names, limits = _names(result), result["limits"]
    figure, panels = _panels(names, 3.2 if len(names) > 1 else 4.2)
    points = {name: _roofline_points(result, name) for name in names}
    flat = [point for found in points.values() for point in found]
    low, high = min(0.5, *(p[0] for p in flat)) / 1.5, max(1000, *(4 * p[0] for p in flat))
    top = max(limits["fp32"] / 1e9, limits["bf16"] / 1e9, *(p[3] for p in flat))
    bottom = min(limits["memory"] * low / 1e9, *(p[2] for p in flat))
    lines: list[list[_Line]] = []
    for axes, name in zip(panels, names, strict=True):
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom / 1.5, top * 3))
        lines.append(_draw_roof(axes, limits, low, high))
        for x, y, least, most, label in points[name]:
            face = "white" if label == "dense" else _MEASURED
            axes.errorbar([x], [y], yerr=[[y - least], [most - y]], color=_MEASURED, marker="o", markersize=6,
                          capsize=3, markerfacecolor=face, linestyle="none")  # fmt: skip
            lines[-1].append([(x, least), (x, most)])
    figure.supxlabel("operations / byte (forward + backward; of sparse layers at nonzeros only)", fontsize=10)
    figure.supylabel("10⁹ operations / s", fontsize=10)
    figure.suptitle(f"Layers, dense and int8 at their share of zeros, {_threads(result)}\n"
                    "blue: measured, with the spread of the steps; orange: large dense products and memory here",
                    fontsize=10)  # fmt: skip
    figure.draw_without_rendering()
    for axes, name, drawn in zip(panels, names, lines, strict=True):
        _name_memory(axes, limits, low)
        _label(axes, [(x, y, label) for x, y, _, _, label in points[name]], drawn)
    _save(figure, path)


def _roofline_points(result: dict[str, Any], name: str) -> list[tuple[float, float, float, float, str]]:
    """Operations a byte; 10⁹ operations a second, at least and at most; and what it is, of one layer."""
    rows, points = _rows(result, name), []
    # dense layers do the same at every sparsity
    for r, kind in [(rows[0], "dense"), *((r, "sparse") for r in rows)]:
        work, seconds = r[kind]["operations"], r[kind]["seconds"]
        samples = sorted(sample / 1e3 for sample in r["samples"][r[f"best_{kind}"]])
        quick, slow = samples[0], samples[-1]
        if len(samples) >= 8:
            quick, _, slow = statistics.quantiles(samples, n=4, method="inclusive")
        label = "dense" if kind == "dense" else f"{100 * r['sparsity']:g} %"
        quick, slow = min(quick, seconds), max(slow, seconds)  # equal ones may differ in the last bit
        points.append((work / r[kind]["bytes"], work / seconds / 1e9, work / slow / 1e9, work / quick / 1e9, label))
    return points


def _draw_roof(axes: Axes, limits: dict[str, float], low: float, high: float) -> list[_Line]:
    memory = limits["memory"] / 1e9
    least, most = sorted(("fp32", "bf16"), key=limits.__getitem__)
    lines: list[_Line] = []
    for name, style, va, factor in ((least, "--", "top", 1 / 1.1), (most, "-", "bottom", 1.1)):
        ceiling = limits[name] / 1e9
        lines.append([(max(low, ceiling / memory), ceiling), (high, ceiling)])
        axes.plot(*zip(*lines[-1], strict=True), color=_DERIVED, linewidth=1.5, linestyle=style)
        text = f"{name}: {ceiling:.0f}"
        axes.text(high / 1.2, ceiling * factor, text, ha="right", va=va, fontsize=9, color=_DERIVED)
    knee = limits[most] / 1e9 / memory
    lines.append([(low, memory * low), (knee, memory * knee)])
    axes.plot(*zip(*lines[-1], strict=True), color=_DERIVED, linewidth=1.5)
    return lines


def _name_memory(axes: Axes, limits: dict[str, float], low: float) -> None:
    """Write along the slope, whose angle is known once the axes have their size."""
    memory = limits["memory"] / 1e9
    knee = max(limits["fp32"], limits["bf16"]) / limits["memory"]
    x = (low * knee) ** 0.5
    (x0, y0), (x1, y1) = axes.transData.transform([(low, memory * low), (knee, memory * knee)])
    angle = math.degrees(math.atan2(y1 - y0, x1 - x0))
    text = axes.annotate(f"memory: {memory:.0f} GB/s", (x, memory * x), xytext=(-5, 5), textcoords="offset points",
                         ha="center", va="center", fontsize=9, color=_DERIVED, rotation=angle,
                         rotation_mode="anchor")  # fmt: skip
    text.set_in_layout(False)
