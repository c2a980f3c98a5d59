"""The result of `qsparseprop.utils.bench` as a table and as pictures."""

from __future__ import annotations

import os
from typing import Any

from ._files import replacing

__all__ = ["format_table", "plot_roofline", "plot_speedup"]

# Okabe and Ito's colours stay apart for all kinds of colour blindness; markers and lines do so in black and white.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "o^sDvPX"
_LINES = ("-", "--", "-.", ":")


def format_table(result: dict[str, Any]) -> str:
    """Return a table of milliseconds and speed-ups, and the break-evens."""
    rows = [("what", "zeros", "best dense", "ms", "best int8", "ms", "speed-up")]
    for r in result["results"]:
        dense, sparse = r["best_dense"], r["best_sparse"]
        rows.append((r["name"], f"{100 * r['sparsity']:g} %", dense.removeprefix("dense "), f"{r['ms'][dense]:.2f}",
                     sparse.removeprefix("int8 "), f"{r['ms'][sparse]:.2f}", f"{r['speedup']:.2f}x"))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    left = (0, 2, 4)
    lines = ["  ".join(cell.ljust(w) if i in left else cell.rjust(w)
                       for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows]  # fmt: skip
    lines.insert(1, "-" * len(lines[0]))
    lines.append("")
    lowest = min(r["sparsity"] for r in result["results"])
    for name, value in result["break_even"].items():
        last = [r["speedup"] for r in result["results"] if r["name"] == name][-1]
        if value is not None:
            text = f"pays from {100 * value:.0f} % zeros on"
        else:
            text = f"pays at {100 * lowest:g} % zeros already" if last >= 1 else "does not pay at these sparsities"
        lines.append(f"{name}: {text}")
    return "\n".join(lines)


def _short(name: str) -> str:
    return name.replace(" on ", "\n")


def plot_speedup(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw speed-up against sparsity, with the break-even marked.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    # Not pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(r["name"] for r in result["results"]))
    ticks = sorted({r["sparsity"] for r in result["results"]})
    speedups = [r["speedup"] for r in result["results"]]
    # the share of weights that are left, on a logarithmic axis: twice the zeros' effect is the same step everywhere
    axes.set_xscale("log")
    axes.set_yscale("log", base=2)
    for index, name in enumerate(names):
        points = [(1 - r["sparsity"], r["speedup"]) for r in result["results"] if r["name"] == name]
        color = _COLORS[index % len(_COLORS)]
        axes.plot(*zip(*points, strict=True), color=color, marker=_MARKERS[index % len(_MARKERS)], linewidth=2,
                  linestyle=_LINES[index % len(_LINES)], label=_short(name))  # fmt: skip
        even = result["break_even"][name]
        if even is not None:
            axes.plot([1 - even], [1], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=color,
                      markeredgewidth=2, linestyle="none")  # fmt: skip
            axes.annotate(f"{100 * even:.0f} %", (1 - even, 1), textcoords="offset points", xytext=(6, -17),
                          color=color, fontsize=11)  # fmt: skip
    axes.axhline(1, color="#555555", linewidth=1)
    axes.set_xlim(1 - min(ticks) + 0.05 * (1 - min(ticks)), (1 - max(ticks)) / 1.1)
    axes.set_xticks([1 - t for t in ticks], [f"{100 * t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(min(0.7, *speedups) / 1.15, max(2, *speedups) * 1.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}x"))
    axes.set_xlabel("zeros in the weights (%)")
    axes.set_ylabel("speed-up of a training step\nover the best dense setting")
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize=9, frameon=False, loc="upper left")
    threads = result["environment"]["threads"]
    figure.suptitle(f"Sparse int8 training against dense PyTorch, {threads} thread{'s' if threads > 1 else ''} "
                    "(circles: break-even)", fontsize=11)  # fmt: skip
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def plot_roofline(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw each layer's operations a second against its operations a byte, below what the machine reaches.

    Only products with nonzeros count as operations of a sparse layer.

    Raises
    ------
    ImportError, OSError
        As `plot_speedup`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    limits = result["limits"]
    points = [(r, kind, r[kind]["operations"] / r[kind]["bytes"], r[kind]["operations"] / r[kind]["seconds"])
              for r in result["results"] for kind in ("dense", "sparse")]  # fmt: skip
    low = min(0.5, *(x for _, _, x, _ in points)) / 1.5
    high = max(1000, *(x for _, _, x, _ in points)) * 1.5
    top = max(limits["fp32"], limits["bf16"], *(y for *_, y in points)) / 1e9
    for name, style in (("fp32", "--"), ("bf16", "-")):
        ceiling = limits[name]
        knee = ceiling / limits["memory"]
        axes.plot([max(low, knee), high], [ceiling / 1e9] * 2, color="#555555", linewidth=1.5, linestyle=style)
        axes.text(high / 1.1, ceiling / 1e9 * 1.07, f"dense {name} product, {ceiling / 1e9:.0f}", ha="right",
                  fontsize=9, color="#333333")  # fmt: skip
    knee = max(limits["fp32"], limits["bf16"]) / limits["memory"]
    axes.plot([low, knee], [limits["memory"] * x / 1e9 for x in (low, knee)], color="#555555", linewidth=1.5)
    axes.text(low * 3.2, limits["memory"] * low * 2 / 1e9, f"memory, {limits['memory'] / 1e9:.0f} GB/s",
              fontsize=9, color="#333333")  # fmt: skip
    names = list(dict.fromkeys(r["name"] for r in result["results"]))
    sparsities = sorted({r["sparsity"] for r in result["results"]})
    for r, kind, x, y in points:
        index = names.index(r["name"])
        size = 30 + 90 * sparsities.index(r["sparsity"]) / max(1, len(sparsities) - 1)
        if kind == "dense" and r["sparsity"] != sparsities[0]:
            continue  # the same work at every sparsity
        color = _COLORS[index % len(_COLORS)]
        axes.scatter([x], [y / 1e9], s=50 if kind == "dense" else size, marker=_MARKERS[index % len(_MARKERS)],
                     facecolors="none" if kind == "dense" else color, edgecolors=color, linewidths=1.8,
                     alpha=0.85)  # fmt: skip
    handles = [Line2D([], [], color=_COLORS[i % len(_COLORS)], marker=_MARKERS[i % len(_MARKERS)], linestyle="none",
                      label=_short(name)) for i, name in enumerate(names)]  # fmt: skip
    handles.append(Line2D([], [], color="#000000", marker="o", linestyle="none", markerfacecolor="none", label="dense"))
    axes.legend(handles=handles, fontsize=9, frameon=False, loc="lower right")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(top=top * 2)
    axes.set_xlabel("operations a byte (forward + backward; of sparse layers at nonzeros only)")
    axes.set_ylabel("10⁹ operations / s")
    axes.grid(True, which="major", alpha=0.3)
    shown = ", ".join(f"{100 * s:g}" for s in sparsities)
    figure.suptitle(f"Roofline; filled: int8 at {shown} % zeros, larger is sparser", fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
