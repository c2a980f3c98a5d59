"""The page of results: a table of all sections on top, and for each its figures and its pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qsparseprop.utils.files import replacing

__all__ = ["LABELS", "SAME", "summarise", "write_curves", "write_page"]

HEAD = """\
# Results

Networks that have learned their task are pruned, each layer to the same share of zeros, and fine-tuned: dense, with
masks that hold the zeros, in float32, and with qsparseprop (int8, blocks). Both begin with the same weights and see the
same images, changed in the same random ways. Every section is one command; `benchmarks/results.py` writes the page.

- *dense*: top-1 of the network before it is pruned; *masked* and *ours*: after the fine-tuning, mean of the seeds;
  *ratio*: ours to masked, whose goal is 99.7 %, of equal seeds; *difference*: in points, mean of these pairs with its
  standard error.
- *time*: until the mean of the seeds, tested after each epoch, has 99.7 % of what the masked ones end with: so many
  steps, times the median time of a step of this kind. Accuracies were measured by several trainings at a time on a busy
  machine; steps were timed in turns, in one run with fp32 and the *best dense* one of {fp32,
  bf16} x {contiguous, channels_last}, which is taken to need the steps of fp32. With sparse layers: in the best dense
  one's precision.
- *memory*: what training adds to the memory of its process.
- For language models it is the loss of the validation text that counts: the goal is 100.3 % of the masked ones', the
  ratio the other way round.
"""

#: Kinds of fine-tuning for people, in the order of tables.
LABELS = {"dense": "masked dense, fp32", "int8": "qsparseprop", "int8-without-blocks": "qsparseprop without blocks"}

#: Share of the masked dense network's accuracy that counts as the same.
SAME = 0.997

_STYLES = {"dense": ("#0072B2", "--"), "int8": ("#D55E00", "-"), "int8-without-blocks": ("#009E73", "-.")}


def _digits(by_loss: bool) -> int:
    """Behind the point."""
    return 4 if by_loss else 2


def _mean(values: Sequence[float], digits: int) -> str:
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def _final(curve: Sequence[Sequence[float]]) -> float:
    return curve[-1][1]


def _together(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, list[float]]]:
    """Values of all seeds by step."""
    return [(points[0][0], [value for _, value in points]) for points in zip(*curves, strict=False)]


def summarise(part: dict[str, Any], by_loss: bool) -> dict[str, dict[str, Any]]:
    """Figures of one sparsity by kind, from curves and times.

    Parameters
    ----------
    part : dict
        ``curves`` (kind: seed: list of steps and values), ``step_ms`` and ``added_mb`` by way of training.
    by_loss : bool
        Whether values are losses, of which the smaller one is better.

    Returns
    -------
    dict
        By kind: ``final`` (each seed's), ``difference``, ``error`` and ``ratio`` (of equal seeds), ``steps`` to the
        goal, ``seconds``.
    """
    curves = part["curves"]
    masked = {seed: _final(curve) for seed, curve in curves["dense"].items()}
    level = statistics.fmean(masked.values())
    goal = level / SAME if by_loss else level * SAME
    summary: dict[str, dict[str, Any]] = {}
    for kind, of_seeds in curves.items():
        final = {seed: _final(curve) for seed, curve in of_seeds.items()}
        # of the same seeds: others may have been easier
        both = [seed for seed in final if seed in masked] or list(final)
        pairs = [final[seed] - masked[seed] for seed in both if seed in masked]
        mean = statistics.fmean(final[seed] for seed in both)
        theirs = statistics.fmean(masked[seed] for seed in both) if pairs else level
        means = [(step, statistics.fmean(values)) for step, values in _together(list(of_seeds.values()))]
        steps = next((step for step, value in means if (value <= goal if by_loss else value >= goal)), None)
        row = {"final": list(final.values()), "ratio": theirs / mean if by_loss else mean / theirs,
               "difference": statistics.fmean(pairs) if pairs else None, "steps": steps,
               "error": statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None}  # fmt: skip
        way = "fp32" if kind == "dense" else kind
        ms = part["step_ms"].get(way)
        row["seconds"] = None if steps is None or ms is None else steps * ms / 1000
        summary[kind] = row
    best, dense = part["step_ms"].get("best"), summary["dense"]["steps"]
    summary["dense"]["best_seconds"] = None if best is None or dense is None else dense * best / 1000
    return summary


def _seconds(value: float | None) -> str:
    if value is None:
        return "not reached"
    return f"{value:.0f} s" if value < 600 else f"{value / 60:.0f} min"


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(slow: float | None, fast: float | None) -> str:
    return "-" if slow is None or fast is None else f"{slow / fast:.1f}x"


def top_table(documents: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each section and sparsity."""
    columns = ("data", "network", "zeros", "dense", "masked", "ours", "ratio", "time: fp32", "best dense", "ours",
               "vs best", "memory")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for document in documents:
        for sparsity, part in document["parts"].items():
            summary = summarise(part, document["by_loss"])
            masked, ours, added = summary["dense"], summary["int8"], part["added_mb"]
            digits = _digits(document["by_loss"])
            cells = [
                f"[{document['name']}](#{document['name']})", document["model"], f"{100 * float(sparsity):g} %",
                *(f"{value:.{digits}f}" for value in (document["start_value"], statistics.fmean(masked["final"]),
                                                     statistics.fmean(ours["final"]))),
                f"{100 * ours['ratio']:.1f} %", _seconds(masked["seconds"]), _seconds(masked["best_seconds"]),
                _seconds(ours["seconds"]), _times(masked["best_seconds"], ours["seconds"]),
                f"{100 * added['int8'] / added['fp32']:.0f} %" if added.get("fp32") else "-",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def section(document: dict[str, Any]) -> list[str]:
    """Markdown of a section."""
    environment = document["environment"]
    what, digits = "loss" if document["by_loss"] else "top-1 %", _digits(document["by_loss"])
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    timed = f"{environment['cpu']}, {threads}, PyTorch {environment['torch']}, {environment['date'][:10]}"
    about = f"{document['about']} Steps timed on {timed}."
    lines = [f"## {document['name']}", "", f"`{document['command']}`", "", about, ""]
    if document["note"]:
        lines += [document["note"], ""]
    for sparsity, part in document["parts"].items():
        lines += [f"### {document['name']}, {100 * float(sparsity):g} % zeros", "",
                  f"| fine-tuned | {what} | difference | ratio | steps | ms/step | time | added MB |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for kind, row in summarise(part, document["by_loss"]).items():
            way = "fp32" if kind == "dense" else kind
            ms, added = part["step_ms"].get(way), part["added_mb"].get(way)
            error = "" if row["error"] is None else f" ± {row['error']:.{digits}f}"
            paired = kind != "dense" and row["difference"] is not None
            difference = f"{row['difference']:+.{digits}f}{error}" if paired else ""
            ratio = "" if kind == "dense" else f"{100 * row['ratio']:.1f} %"
            time = _seconds(row["seconds"]) if ms else "-"
            seeds = f"{len(row['final'])} seed{'s' if len(row['final']) > 1 else ''}"
            cells = [f"{LABELS[kind]} ({seeds})", _mean(row["final"], digits), difference, ratio,
                     _number(row["steps"]), _number(ms, 1), time, _number(added)]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            if kind == "dense" and "best" in part["step_ms"]:
                cells = [f"best dense ({part['best_mode']})", "", "", "", _number(row["steps"]),
                         _number(part["step_ms"]["best"], 1), _seconds(row["best_seconds"]),
                         _number(part["added_mb"]["best"])]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"![{what} against time](results/{document['name']}-{100 * float(sparsity):g}.png)", ""]
    return lines


def write_curves(document: dict[str, Any], sparsity: str, path: Path) -> None:
    """Draw the values of all seeds against the time in steps of each kind."""
    from matplotlib.figure import Figure

    part = document["parts"][sparsity]
    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.subplots()
    final = [_final(curve) for of_seeds in part["curves"].values() for curve in of_seeds.values()]
    for kind, of_seeds in part["curves"].items():
        colour, line = _STYLES[kind]
        ways = [("fp32" if kind == "dense" else kind, LABELS[kind], line)]
        if kind == "dense" and "best" in part["step_ms"]:
            ways.append(("best", f"the same at the speed of the best dense one ({part['best_mode']})", ":"))
        for way, label, style in ways:
            ms = part["step_ms"].get(way)
            if ms is None:
                continue
            for number, curve in enumerate(of_seeds.values()):
                axes.plot([step * ms / 1000 for step, _ in curve], [value for _, value in curve], style, color=colour,
                          linewidth=1.6, alpha=0.9, label=label if number == 0 else None)  # fmt: skip
    what = "loss of the validation text" if document["by_loss"] else "test accuracy, top-1 (%)"
    axes.set(xlabel="time spent in training steps (s)", ylabel=what)
    axes.set_xlim(left=0)
    if document["by_loss"]:
        axes.set_ylim(0.97 * min(final), 1.25 * max(final))
    else:
        axes.set_ylim(max(0.0, min(final) - 12), min(100.5, max(final) + 2))
    axes.legend(loc="upper right" if document["by_loss"] else "lower right", frameon=False)
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{document['name']}, {document['model']}, {100 * float(sparsity):g} % zeros", fontsize=12)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


#: What stands around the table in README.md.
_BEGIN, _END = "<!-- made by benchmarks/results.py -->\n", "<!-- until here -->\n"


def _write_readme(path: Path, table: Sequence[str]) -> None:
    """Put the table of all sections into a file that has a place for it."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _BEGIN in text and _END in text:
        before, rest = text.split(_BEGIN, 1)
        lines = "\n".join(table).replace("](#", "](docs/results.md#")
        with replacing(path) as temporary:
            temporary.write_text(f"{before}{_BEGIN}\n{lines}\n\n{_END}{rest.split(_END, 1)[1]}", encoding="utf-8")


def write_page(docs: Path, order: Sequence[str]) -> None:
    """Make the page of all sections that have been measured, in an order, and the table of README.md."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((docs / "results").glob("*.json"))]
    documents.sort(key=lambda document: order.index(document["name"]))
    table = top_table(documents)
    lines = [HEAD, *table, ""]
    for document in documents:
        lines += section(document)
    with replacing(docs / "results.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip("\n") + "\n", encoding="utf-8")
    _write_readme(docs.parent / "README.md", table)
