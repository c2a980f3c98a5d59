"""The result of `qsparseprop.utils.compare` as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ._files import replacing
from .compare import RUN_LABELS

__all__ = ["format_table", "write_bars", "write_json", "write_plot"]

# Okabe and Ito's colours stay apart for all kinds of colour blindness, and the line styles on a black and white print.
_STYLES = {
    "dense_fp32": {"color": "#000000", "linestyle": ":", "marker": "s"},
    "dense_best": {"color": "#0072B2", "linestyle": "--", "marker": "^"},
    "qsparseprop": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "compressed": {"color": "#009E73", "linestyle": "-.", "marker": "D"},
    "sparse_fp32": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    "blocks": {"color": "#E69F00", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
}

# Steps do equal work, so that on a quiet machine mean and median differ by a few percent.
_BUSY = 1.25


def format_table(result: dict[str, Any]) -> str:
    """Return the table that the ``finetune`` command prints, with a line on what its columns mean.

    Parameters
    ----------
    result : dict
        What `qsparseprop.utils.compare.compare` returns.

    Returns
    -------
    str
        Several lines, without a newline at the end.
    """
    header = ("run", "top-1 %", "ms/step", "saved MB", "peak RSS MB", "vs fp32", "vs best")
    runs = result["runs"]
    rows = [header]
    for name, run in runs.items():
        label = RUN_LABELS[name]
        rows.append(
            (
                f"{label} ({run['config']})",
                f"{run['top1']:.1f}",
                f"{run['step_ms']:.1f}",
                f"{run['saved_mb']:.1f}",
                f"{run['peak_rss_mb']:.0f}",
                f"{runs['dense_fp32']['step_ms'] / run['step_ms']:.2f}x",
                f"{runs['dense_best']['step_ms'] / run['step_ms']:.2f}x",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.insert(1, "-" * len(lines[0]))
    timed = runs["qsparseprop"]["timed_steps"]
    lines.append("")
    lines.append(f"ms/step: median of {timed} whole training steps. saved MB: kept from forward to backward in a step.")
    scope = "while it trained" if runs["qsparseprop"]["peak_rss_of"] == "training" else "since its start"
    lines.append(f"peak RSS MB: largest resident memory of the run's own process {scope}, torch itself included.")
    lines.append(
        f"Not in ms/step: {runs['qsparseprop']['setup_s']:.1f} s, once, to measure and swap "
        f"{len(runs['qsparseprop']['replaced_layers'])} layers."
    )
    busy = _busy(result)
    if busy:
        lines.append(f"{busy}. Better measure again.")
    return "\n".join(lines)


def _busy(result: dict[str, Any]) -> str:
    """Return a warning if something else kept the machine busy meanwhile."""
    ratio = max(run["mean_to_median_step"] for run in result["runs"].values())
    return f"The machine was busy: a mean step took up to {ratio:.1f} times the median one" if ratio > _BUSY else ""


def write_json(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the result as JSON; the file appears complete or not at all.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(_without_nan(result), indent=1) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: a figure that the system does not tell becomes null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def write_plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw loss and accuracy against training time as a PNG; the file appears complete or not at all.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    # Not pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    # Two captions are as much as a line holds: longer ones would be cut off at the edges.
    lines = math.ceil(len(result["runs"]) / 2)
    figure = Figure(figsize=(9, 3.4 + 0.22 * lines), dpi=120, layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, run in result["runs"].items():
        label, style = RUN_LABELS[name], _STYLES[name]
        ends = _running_sum(run["step_s"])
        plain = {key: value for key, value in style.items() if key != "marker"}
        loss_axes.plot(ends, _smooth(run["losses"]), linewidth=2, **plain)
        seconds = [evaluation["train_s"] for evaluation in run["evaluations"]]
        top1 = [evaluation["top1"] for evaluation in run["evaluations"]]
        caption = f"{label}: {run['step_ms']:.0f} ms/step"
        if name == "dense_best":
            caption = f"{label} ({run['config']}): {run['step_ms']:.0f} ms/step"
        accuracy_axes.plot(seconds, top1, linewidth=2, markersize=6, label=caption, **style)
    loss_axes.set(ylabel="training loss (mean of 3 steps)")
    loss_axes.set_ylim(0, 1.05 * max(loss_axes.get_ylim()[1], 1e-9))
    accuracy_axes.set(ylabel="test accuracy, top-1 (%)", ylim=(0, 103))
    for axes in (loss_axes, accuracy_axes):
        axes.set_xlabel("training time (s)")
        axes.set_xlim(left=0)
        axes.grid(True, alpha=0.3)
    figure.suptitle("\n".join(filter(None, (_title(result), _busy(result)))), fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, fontsize=10, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write_bars(summary: Mapping[str, Mapping[str, Any]], title: str, path: str | os.PathLike[str]) -> None:
    """Draw time of a step, saved memory and added memory of runs as bars, as a PNG.

    Parameters
    ----------
    summary : mapping
        By a key of `RUN_LABELS`: ``step_ms``, ``saved_mb``, ``added_mb`` and ``config``; one is ``dense_fp32``.
    title : str
    path : path-like
        Appears complete or not at all.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.32 * len(summary)), dpi=120, layout="constrained")
    panels = (("step_ms", "time of a step (ms)"), ("saved_mb", "saved for backward (MB)"),
              ("added_mb", "peak RSS added by training (MB)"))  # fmt: skip
    names = [RUN_LABELS[name] for name in summary]
    for axes, (key, label) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        values = [run[key] if run[key] == run[key] else 0.0 for run in summary.values()]
        whole = summary["dense_fp32"][key]
        bars = axes.barh(names, values, color=[_STYLES[name]["color"] for name in summary], height=0.7)
        shares = [f"{100 * value / whole:.0f} %" if whole else "" for value in values]
        axes.bar_label(bars, shares, padding=3, fontsize=9)
        axes.set_xlim(0, 1.25 * max(*values, 1e-9))
        axes.set_xlabel(label)
        axes.grid(True, axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    axes.invert_yaxis()
    figure.suptitle(title, fontsize=11)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _title(result: dict[str, Any]) -> str:
    config = result["config"]
    model = config["model"].rpartition(":")[2]
    return (
        f"Fine-tuning {model} at {100 * result['sparsity']:g} % sparsity, batch {config['batch_size']}, "
        f"{config['threads']} thread{'s' if config['threads'] > 1 else ''}: same start, same batches, same steps"
    )


def _running_sum(values: list[float]) -> list[float]:
    total, sums = 0.0, []
    for value in values:
        total += value
        sums.append(total)
    return sums


def _smooth(values: list[float], window: int = 3) -> list[float]:
    """Mean of each value and the ones before it, `window` at most."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
