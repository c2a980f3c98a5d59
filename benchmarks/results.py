"""Whole fine-tuning runs on real data: time, memory and accuracy, written to docs/results.md.

Each data set is one command. For each sparsity and seed a network is trained dense, pruned, and fine-tuned from one
point on the same batches: dense in fp32 and in the best dense configuration (zeros held by masks), with sparse layers
in float32 and in int8, and the latter with compress_saved_tensors. The runs take turns, each in a process of its own.

  python benchmarks/results.py digits
  python benchmarks/results.py mnist --data ../shared/data           also: fashion_mnist, cifar10
  python benchmarks/results.py mnist --data ../shared/data --images 5000 --seeds 1 --threads 1

A run adds or replaces its section in the document; figures and settings stay beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qsparseprop.utils.compare import RUN_LABELS, CompareConfig, compare
from qsparseprop.utils.compare_report import write_json, write_plot

DOCS = Path(__file__).resolve().parents[1] / "docs"

HEAD = """\
# Results

Every section is one command and was measured by it on the machine that it names; `benchmarks/results.py` writes the
page. Runs of a section start from the same pruned network and see the same batches, in turns of four steps. *ms/step*
is the median of whole training steps, *saved* what one step keeps from forward to backward, *peak RSS* the largest
memory of the run's own process while it trains, *added* what of it was not there before. *Best dense* is the fastest of
{fp32, bf16} x {contiguous, channels_last}, measured in the same run. Accuracies are the mean of the seeds, and their
standard deviation where there are several.
"""


@dataclass(frozen=True)
class Setting:
    """What is trained on a data set."""

    model: str
    epochs: int
    pretrain_epochs: int
    batch_size: int = 64
    image_size: int | None = None


SETTINGS = {
    "digits": Setting("resnet18", 4, 2),
    "mnist": Setting("resnet18", 1, 1, image_size=32),
    "fashion_mnist": Setting("resnet18", 2, 2, image_size=32),
    "cifar10": Setting("resnet18", 10, 10),
}


class Messages:
    def message(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, name: str, total: int) -> Any:
        return lambda loss: None

    def close(self) -> None:
        pass


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures by run, of several seeds: medians of times and memory, mean and deviation of accuracies."""
    summary = {}
    for name in results[0]["runs"]:
        runs = [result["runs"][name] for result in results]
        top1 = [run["top1"] for run in runs]
        summary[name] = {
            "config": runs[0]["config"], "top1": statistics.fmean(top1),
            "top1_deviation": statistics.stdev(top1) if len(top1) > 1 else None,
            "added_mb": statistics.median(run["peak_rss_mb"] - run["rss_before_training_mb"] for run in runs),
            **{key: statistics.median(run[key] for run in runs)
               for key in ("step_ms", "train_s", "setup_s", "saved_mb", "peak_rss_mb", "mean_to_median_step")},
        }  # fmt: skip
    return summary


def section(document: dict[str, Any]) -> str:
    """Markdown of a data set."""
    config, environment = document["config"], document["environment"]
    lines = [f"## {document['name']}", "", f"`{document['command']}`", ""]
    seeds = "1 seed" if document["seeds"] == 1 else f"{document['seeds']} seeds"
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    lines += [f"{config['model']}, batch {config['batch_size']}, {document['data']['train']} training and "
              f"{document['data']['test']} test images, {config['pretrain_epochs']} epoch(s) dense, {config['epochs']} "
              f"fine-tuned, {seeds}; {environment['cpu']}, {threads}, PyTorch {environment['torch']}, "
              f"{environment['date'][:10]}.", ""]  # fmt: skip
    busy = max(run["mean_to_median_step"] for summary in document["summaries"].values() for run in summary.values())
    if busy > 1.25:
        lines += [f"**The machine was busy** (a mean step took {busy:.1f} times the median one): times are rough.", ""]
    for sparsity, summary in document["summaries"].items():
        best, fp32 = summary["dense_best"], summary["dense_fp32"]
        lines += [f"### {100 * float(sparsity):g} % zeros", "",
                  "| run | top-1 % | ms/step | whole run s | saved MB | peak RSS MB | added MB | vs fp32 | vs best |",
                  "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, run in summary.items():
            spread = "" if run["top1_deviation"] is None else f" ± {run['top1_deviation']:.1f}"
            lines.append(
                f"| {RUN_LABELS[name]} ({run['config']}) | {run['top1']:.1f}{spread} | {run['step_ms']:.1f} | "
                f"{run['train_s'] + run['setup_s']:.1f} | {run['saved_mb']:.1f} | {run['peak_rss_mb']:.0f} | "
                f"{run['added_mb']:.0f} | {fp32['step_ms'] / run['step_ms']:.2f}x | "
                f"{best['step_ms'] / run['step_ms']:.2f}x |"
            )
        lines += ["", f"![Loss and accuracy against time]({document['name']}-{100 * float(sparsity):g}.png)", ""]
    return "\n".join(lines)


def write_page(folder: Path) -> None:
    """Make the page of all sections that have been measured."""
    documents = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    text = "\n".join([HEAD, *(section(d).replace("](", "](results/") for d in documents)])
    (folder / "results.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS, help="data set")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of mnist.npz, fashion_mnist.npz, cifar10.npz")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9, 0.95], metavar="S")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--model", metavar="NAME", help="another network")
    parser.add_argument("--width", type=int, metavar="N", help="channels of its first stage")
    parser.add_argument("--epochs", type=int, metavar="N", help="of fine-tuning")
    parser.add_argument("--images", type=int, metavar="N", help="only so many training and test images")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where to write (default: docs/)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and one seed: only shows that it runs")
    args = parser.parse_args(argv)
    if args.name != "digits" and args.data is None:
        parser.error("--data is needed: the folder of the .npz files")
    setting = SETTINGS[args.name]
    config = CompareConfig(
        model=args.model or setting.model, width=args.width, epochs=args.epochs or setting.epochs,
        pretrain_epochs=setting.pretrain_epochs, batch_size=setting.batch_size, image_size=setting.image_size,
        data="digits" if args.name == "digits" else str(args.data / f"{args.name}.npz"), threads=args.threads,
        max_images=args.images, prune="uniform", compress_saved=True, sparse_fp32=True,
    )  # fmt: skip
    if args.quick:
        config = replace(config, model="resnet20", width=4, epochs=1, pretrain_epochs=1, max_images=200, image_size=16)
        args.seeds, args.sparsity = 1, args.sparsity[:1]
    results_folder = args.docs / "results"
    results_folder.mkdir(parents=True, exist_ok=True)
    summaries = {}
    for sparsity in args.sparsity:
        results = []
        for seed in range(args.seeds):
            print(f"\n{args.name}, {100 * sparsity:g} % zeros, seed {seed}", flush=True)
            results.append(compare(replace(config, sparsity=sparsity, seed=seed), Messages()))
        summaries[str(sparsity)] = summarise(results)
        write_plot(results[0], results_folder / f"{args.name}-{100 * sparsity:g}.png")
    # paths of one machine do not belong into the page
    options = {"--sparsity": " ".join(map(str, args.sparsity)), "--seeds": args.seeds, "--model": args.model,
               "--width": args.width, "--epochs": args.epochs, "--images": args.images,
               "--threads": args.threads}  # fmt: skip
    command = f"python benchmarks/results.py {args.name}" + ("" if args.name == "digits" else " --data DIR")
    command += "".join(f" {key} {value}" for key, value in options.items() if value is not None)
    document = {
        "name": args.name, "command": command + (" --quick" if args.quick else ""), "seeds": args.seeds,
        "config": {**asdict(config), "data": args.name}, "data": results[0]["data"], "summaries": summaries,
        "environment": results[0]["environment"],
    }  # fmt: skip
    write_json(document, results_folder / f"{args.name}.json")
    write_page(args.docs)
    print(f"written: {args.docs / 'results.md'}")


if __name__ == "__main__":
    main()
