"""The result of `qsparseprop.benchmarking.compare` as a table, as JSON and as a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import replacing

from .compare import RUN_LABELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_folder", "format_table", "write_bars", "write_json", "write_plot", "write_results"]

#: Files of a comparison: everything in figures, time and memory, accuracy against time.
_JSON, _BARS, _CURVES = "result.json", "result.png", "training.png"

# Okabe and Ito's colours stay apart for all kinds of colour blindness, and the line styles on a black and white print.
_STYLES: dict[str, dict[str, Any]] = {
    "dense_fp32": {"color": "#000000", "linestyle": ":", "marker": "s"},
    "dense_best": {"color": "#0072B2", "linestyle": "--", "marker": "^"},
    "qsparseprop": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
    "compressed": {"color": "#009E73", "linestyle": "-.", "marker": "D"},
    "sparse_fp32": {"color": "#CC79A7", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    "blocks": {"color": "#E69F00", "linestyle": (0, (3, 1, 1, 1)), "marker": "P"},
}

#: Height of a caption in the picture of accuracies, in percent.
_CAPTION_HEIGHT = 9

# Steps do equal work, so that on a quiet machine mean and median differ by a few percent.
_BUSY = 1.25


def format_table(result: dict[str, Any]) -> str:
    """Return the table that the ``finetune`` command prints, with a line on what its columns mean.

    Parameters
    ----------
    result : dict
        What `qsparseprop.benchmarking.compare.compare` returns.

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


def write_results(result: dict[str, Any], folder: Path) -> list[str]:
    """Write ``result.json`` and its pictures into a folder; returns the names.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If one cannot be written.
    """
    write_json(result, folder / _JSON)
    runs = {name: {**run, "added_mb": run["peak_rss_mb"] - run["rss_before_training_mb"]}
            for name, run in result["runs"].items()}  # fmt: skip
    write_bars(runs, _title(result), folder / _BARS, _footer(result))
    write_plot(result, folder / _CURVES)
    return [_JSON, _BARS, _CURVES]


def check_folder(folder: Path) -> bool:
    """Whether a folder has the result of an older comparison, which a new one may replace.

    Raises
    ------
    ConfigurationError
        If something else would be overwritten, or the folder is that of a single training.
    """
    if (folder / "run.json").exists():
        raise ConfigurationError(f"{folder} holds a single training: go on with it (--resume), or choose another "
                                 "directory for the comparison (--out)")  # fmt: skip
    there = [name for name in (_JSON, _BARS, _CURVES) if (folder / name).exists()]
    if there and not _is_comparison(folder / _JSON):
        raise ConfigurationError(f"{folder / there[0]} is not the result of a comparison and would be overwritten: "
                                 "choose another directory (--out)")  # fmt: skip
    return bool(there)


def _is_comparison(path: Path) -> bool:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        return {"dense_fp32", "qsparseprop"} <= result["runs"].keys() and "qsparseprop" in result["environment"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw accuracy against training time as a PNG; the file appears complete or not at all.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    # Not pyplot, which would look for a display and keep the figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    longest = max(run["evaluations"][-1]["train_s"] for run in result["runs"].values())
    # Under all curves, of which the slowest run's is the lowest, there is room: the farther to the right the more.
    order = sorted(result["runs"], key=lambda name: result["runs"][name]["evaluations"][-1]["train_s"])
    for place, name in enumerate(order):
        evaluations = result["runs"][name]["evaluations"]
        seconds = [evaluation["train_s"] for evaluation in evaluations]
        top1 = [evaluation["top1"] for evaluation in evaluations]
        style = _STYLES[name]
        axes.plot(seconds, top1, linewidth=2, markersize=6, **style)
        end, height = seconds[-1], 7 + _CAPTION_HEIGHT * place
        axes.plot([end, end], [0, top1[-1]], linewidth=1, alpha=0.6, color=style["color"])
        left = end > longest / 2
        axes.annotate(f"{RUN_LABELS[name]}: {top1[-1]:.1f} % after {end:.1f} s", (end, height),
                      (-6 if left else 6, 0), textcoords="offset points", ha="right" if left else "left", va="center",
                      color=style["color"], fontsize=11, fontweight="bold",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})  # fmt: skip
    axes.set(xlabel="time spent in training steps (s)", ylabel="test accuracy, top-1 (%)", ylim=(0, 103))
    axes.set_xlim(0, 1.04 * longest)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{_title(result)}: accuracy against time", fontsize=12)
    _write_footer(figure, _footer(result))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def write_bars(
    summary: Mapping[str, Mapping[str, Any]], title: str, path: str | os.PathLike[str], footer: str = ""
) -> None:
    """Draw time of a step, saved memory and added memory of runs as bars, as a PNG.

    Parameters
    ----------
    summary : mapping
        By a key of `RUN_LABELS`: ``step_ms``, ``saved_mb``, ``added_mb`` and ``config``; one is ``dense_fp32``.
    title : str
    path : path-like
        Appears complete or not at all.
    footer : str
        In small print below.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    OSError
        If it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.7 + 0.45 * len(summary)), dpi=100, layout="constrained")
    panels = (("step_ms", "time of a training step", "ms"), ("saved_mb", "kept for backward pass", "MB"),
              ("added_mb", "peak memory of training", "MB"))  # fmt: skip
    labels = [f"{RUN_LABELS[name]}\n({run['config']})" for name, run in summary.items()]
    for axes, (key, label, unit) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        values = [run[key] if run[key] == run[key] else 0.0 for run in summary.values()]
        whole = summary["dense_fp32"][key]
        bars = axes.barh(labels, values, color=[_STYLES[name]["color"] for name in summary], height=0.7)
        shares = [f"\n{100 * value / whole:.0f} %" if whole and value else "" for value in values]
        texts = [f"{value:.0f} {unit}{share}" for value, share in zip(values, shares, strict=True)]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
        # room for the longest label beside the longest bar
        axes.set_xlim(0, 1.6 * max(*values, 1e-9))
        axes.set_title(label, fontsize=10, loc="left", pad=8)
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(title, fontsize=12)
    _write_footer(figure, footer)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def _write_footer(figure: Figure, text: str) -> None:
    if text:
        figure.supxlabel(text, fontsize=8, color="#555555")


def _title(result: dict[str, Any]) -> str:
    config = result["config"]
    model = config["model"].rpartition(":")[2]
    return f"Fine-tuning {model} with {100 * result['sparsity']:g} % zeros, batch {config['batch_size']}"


def _footer(result: dict[str, Any]) -> str:
    """What the figures hold for."""
    environment = result["environment"]
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    machine = (f"{environment['cpu']}, {threads}; PyTorch {environment['torch']}, qsparseprop "
               f"{environment['qsparseprop']}; {environment['date'][:10]}")  # fmt: skip
    return "\n".join(filter(None, (machine, _busy(result))))
