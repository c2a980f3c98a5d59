"""Networks that have learned their task, pruned and fine-tuned, dense and sparse: accuracy, time and memory.

A section is a data set. Its dense network is trained, or taken as it was published, pruned to several shares of zeros,
and fine-tuned from there with several seeds: dense with masks in float32, and with sparse layers in int8. Each training
is a ``finetune`` command in a folder below --work; all of them may take hours, can be stopped (Ctrl-C), and go on where
they were when the same command is given again. Then steps are timed in turns, which wants a machine that does nothing
else, and docs/results.md is written anew, with figures and pictures in docs/results/.

  python benchmarks/results.py digits --work runs                                       needs no data from elsewhere
  python benchmarks/results.py cifar10 --data ../shared/data --weights ../shared/weights --work runs --jobs 2
  python benchmarks/results.py text --work runs --parts train
  python benchmarks/results.py --parts page                                             only the page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _common import say
from _results_page import summarise, write_curves, write_page
from _results_runs import SETTINGS, Run, Setting, carry_out, plan, read_result
from _results_text import TEXT, about, text_plan, text_times

from qsparseprop.benchmarking.compare import CompareConfig, compare
from qsparseprop.benchmarking.compare_report import write_json
from qsparseprop.training.reporter import SilentReporter
from qsparseprop.utils.measurement_utils import environment

DOCS = Path(__file__).resolve().parents[1] / "docs"

#: Steps that are timed of each way to train.
TIMED_STEPS = 24

SECTIONS = (*SETTINGS, TEXT)


def settings_of(args: argparse.Namespace) -> dict[str, Setting]:
    """The settings, smaller ones where it is only shown that everything runs."""
    if not args.quick:
        return SETTINGS
    return {name: replace(setting, model="resnet20", width=4, epochs=2, start_epochs=min(2, setting.start_epochs),
                          image_size=16, sparsity=setting.sparsity[1:2])
            for name, setting in SETTINGS.items()}  # fmt: skip


def planned(args: argparse.Namespace, settings: dict[str, Setting]) -> tuple[Run | None, list[Run]]:
    """The trainings of a section."""
    if args.name == TEXT:
        return text_plan(args.work, args.seeds, args.quick)
    return plan(args.name, settings[args.name], args.data, args.weights, args.work, args.seeds)


class _Messages(SilentReporter):
    """Says what comparisons have to say, without bars."""

    def message(self, text: str) -> None:
        say(text)


def image_times(setting: Setting, weights: Sequence[str], sparsity: float, args: argparse.Namespace) -> dict[str, Any]:
    """Times of steps and memory of a training of images, by way of training."""
    data = setting.data if setting.data == "digits" else str(args.data / setting.data)
    steps = 4 if args.quick else TIMED_STEPS
    result = compare(CompareConfig(
        model=setting.model, width=setting.width, weights=weights[1], data=data, normalize=setting.normalize,
        image_size=setting.image_size, sparsity=sparsity, prune="uniform", augment=setting.augment, workers=0,
        batch_size=setting.batch_size, max_images=steps * setting.batch_size, evaluations=1, threads=args.threads,
    ), _Messages())  # fmt: skip
    runs = {"fp32": result["runs"]["dense_fp32"], "best": result["runs"]["dense_best"],
            "int8": result["runs"]["qsparseprop"]}  # fmt: skip
    return {
        "step_ms": {name: run["step_ms"] for name, run in runs.items()},
        "added_mb": {name: run["peak_rss_mb"] - run["rss_before_training_mb"] for name, run in runs.items()},
        "busy": max(run["mean_to_median_step"] for run in runs.values()),
        "best_mode": runs["best"]["config"], "environment": result["environment"],
    }  # fmt: skip


def times(args: argparse.Namespace, settings: dict[str, Setting], runs: Sequence[Run]) -> None:
    """Time the steps of each sparsity that has not been timed."""
    for run in {run.sparsity: run for run in runs}.values():
        path = run.folder.parent / f"times-{100 * run.sparsity:.0f}.json"
        if path.exists() and not args.again:
            continue
        say(f"{args.name}, {100 * run.sparsity:g} % zeros: timing steps")
        if args.name == TEXT:
            found = text_times(run.sparsity, args.threads, args.quick)
        else:
            found = image_times(settings[args.name], run.weights, run.sparsity, args)
        write_json(found, path)


def document_of(args: argparse.Namespace, settings: dict[str, Setting], runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that is known of a section, in figures; a training that has not ended is left out."""
    by_loss = args.name == TEXT
    parts: dict[str, Any] = {}
    start_value = None
    for run in runs:
        result = read_result(run)
        path = run.folder.parent / f"times-{100 * run.sparsity:.0f}.json"
        if result is None:
            continue
        key = "loss" if by_loss else "top1"
        first = result["pruned_loss" if by_loss else "pruned_top1"]
        start_value = result["dense_loss" if by_loss else "dense_top1"]
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"step_ms": {}, "added_mb": {}}
        part = parts.setdefault(str(run.sparsity), {"curves": {}, **known})
        curve = [[0, first], *([e["step"], e[key]] for e in result["evaluations"])]
        part["curves"].setdefault(run.kind, {})[str(run.seed)] = curve
    parts = {name: part for name, part in parts.items() if {"dense", "int8"} <= part["curves"].keys()}
    found = [part.pop("environment") for part in parts.values() if "environment" in part]
    setting = None if by_loss else settings[args.name]
    described = about(args.quick) if setting is None else (
        f"{setting.model}, {setting.start}; fine-tuned for {setting.epochs} epochs, batch {setting.batch_size}"
        f"{', changed by ' + setting.augment if setting.augment else ''}.")  # fmt: skip
    command = f"python benchmarks/results.py {args.name} --work DIR"
    command += " --data DIR" if setting is not None and setting.data != "digits" else ""
    command += " --weights DIR" if setting is not None and setting.weights else ""
    return {
        "name": args.name, "command": f"{command} --seeds {args.seeds} --threads {args.threads}", "by_loss": by_loss,
        "model": "transformer" if setting is None else setting.model.rpartition(":")[2], "about": described,
        "note": "" if setting is None else setting.note, "start_value": start_value, "parts": parts,
        "environment": found[-1] if found else environment(),
    }  # fmt: skip


def write(args: argparse.Namespace, settings: dict[str, Setting], runs: Sequence[Run]) -> None:
    """Write the figures and pictures of a section."""
    document = document_of(args, settings, runs)
    if not document["parts"]:
        say(f"{args.name}: no pair of trainings has ended")
        return
    folder = args.docs / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(document, folder / f"{args.name}.json")
    for sparsity, part in document["parts"].items():
        write_curves(document, sparsity, folder / f"{args.name}-{100 * float(sparsity):g}.png")
        for kind, row in summarise(part, document["by_loss"]).items():
            say(f"{args.name} {100 * float(sparsity):g} % {kind}: {[round(v, 3) for v in row['final']]}, ratio "
                f"{100 * row['ratio']:.2f} %, {row['seconds'] and round(row['seconds'])} s")  # fmt: skip


PARTS = ("train", "time", "page")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=SECTIONS, help="section; without: only the page is written")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of mnist.npz, caltech101/ and the like")
    parser.add_argument("--weights", type=Path, metavar="DIR", help="folder of published weights")
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder of the trainings, outside of the repository")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is done (default: all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="trainings at a time (default: 1)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the steps that are timed (default: 1)")
    parser.add_argument("--again", action="store_true", help="time steps that have been timed")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where to write (default: docs/)")
    parser.add_argument("--quick", action="store_true", help="a tiny network: only shows that it runs")
    args = parser.parse_args(argv)
    settings = settings_of(args)
    if args.name is not None:
        setting = settings.get(args.name)
        wanted = {"--work": args.work}
        if setting is not None:
            wanted |= {"--data": args.data} if setting.data != "digits" else {}
            wanted |= {"--weights": args.weights} if setting.weights else {}
        missing = [name for name, value in wanted.items() if value is None]
        if missing:
            parser.error(f"{args.name} needs {' and '.join(missing)}")
        args.work = args.work.absolute()
        start, runs = planned(args, settings)
        if "train" in args.parts:
            carry_out([] if start is None else [start], args.jobs, say)
            carry_out(runs, args.jobs, say)
        if "time" in args.parts:
            times(args, settings, runs)
        if "page" in args.parts:
            write(args, settings, runs)
    if "page" in args.parts:
        write_page(args.docs, SECTIONS)


if __name__ == "__main__":
    sys.exit(main())
