"""Whole fine-tuning runs on real data: time, memory and accuracy, written to docs/results.md.

Each section is one command. For each sparsity and seed a network is trained dense, pruned, and fine-tuned from one
point on the same batches: dense in fp32 and in the best dense configuration (zeros held by masks), with sparse layers
in float32 and in int8, the latter with compress_saved_tensors, and with packed blocks (convolution, BatchNorm and ReLU,
or linear layer and GELU). The runs take turns, each in a process of its own.

  python benchmarks/results.py digits
  python benchmarks/results.py mnist --data ../shared/data           also: fashion_mnist, cifar10, vit
  python benchmarks/results.py pose --data ../shared/data --weights ../shared/weights
  python benchmarks/results.py mnist --data ../shared/data --minutes 10 --threads 1

"vit" is a transformer with 64 x 64 tokens in a step, on CIFAR-10. "pose" is the backbone of a sparse production network
at its own input size, whose zeros stay where they are; it gets a classifier and CIFAR-10, scaled up, so that there is
an accuracy to compare: how good it is as a detector is not measured.

The first line says how long the command is going to take; --minutes takes as many images as fit. A run adds or replaces
its section in the document; figures and settings stay beside it as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _networks import POSE_FILE

from qsparseprop.benchmarking.compare import RUN_LABELS, CompareConfig, Shared, compare
from qsparseprop.benchmarking.compare_report import write_bars, write_json, write_plot
from qsparseprop.benchmarking.dense_modes import DENSE_MODES
from qsparseprop.training.data import load_data
from qsparseprop.training.recipe import Recipe, make_finetuner
from qsparseprop.training.setup_run import make_loaders, make_network

DOCS = Path(__file__).resolve().parents[1] / "docs"

HEAD = """\
# Results

Every section is one command and was measured by it on the machine that it names; `benchmarks/results.py` writes the
page. Runs of a section start from the same pruned network and see the same batches, in turns of four steps. *ms/step*
is the median of whole training steps, *saved* what one step keeps from forward to backward, *peak RSS* the largest
memory of the run's own process while it trains, *added* what of it was not there before; percentages are of dense fp32.
*Best dense* is the fastest of {fp32, bf16} x {contiguous, channels_last}, measured in the same run. Accuracies are the
mean of the seeds, and their standard deviation where there are several.
"""


@dataclass(frozen=True)
class Setting:
    """What is trained in a section.

    Attributes
    ----------
    note : str
        What the section says of it.
    blocks : bool
        Whether the network has blocks to pack.
    """

    model: str
    epochs: int
    pretrain_epochs: int
    batch_size: int = 64
    image_size: int | None = None
    data: str | None = None
    images: int | None = None
    learning_rate: float = 2e-3
    sparsity: tuple[float, ...] = (0.9, 0.95)
    prune: str = "uniform"
    min_sparsity: float | None = None
    blocks: bool = True
    note: str = ""


SETTINGS = {
    "digits": Setting("resnet18", 2, 2),
    "mnist": Setting("resnet20", 1, 1, image_size=32, images=10_000),
    "fashion_mnist": Setting("resnet20", 2, 2, image_size=32, images=10_000),
    "cifar10": Setting("resnet20", 4, 4),
    "vit": Setting(
        "_networks:vit", 2, 2, data="cifar10", images=4000, learning_rate=5e-4,
        note="A transformer of width 384 with four layers, 64 tokens of each of 64 images: 4,096 tokens a step. Its "
             "packed blocks are of linear layers and GELU.",
    ),
    "pose": Setting(
        "_networks:pose", 2, 1, batch_size=16, image_size=224, data="cifar10", images=320, learning_rate=5e-4,
        sparsity=(0.75,), prune="none", min_sparsity=0.7, blocks=False,
        note="The backbone of a pose detector (MediaPipe) as it is in production: 1 x 1 convolutions with 75 % zeros, "
             "swapped with `min_sparsity=0.7`; depthwise convolutions stay dense. A new classifier is trained on it, "
             "with all weights, on CIFAR-10 scaled up to its 224 x 224 pixels; what it is worth as a detector is not "
             "measured. BatchNorm is part of its weights already, so there are no packed blocks.",
    ),
}  # fmt: skip


class Messages:
    def message(self, text: str) -> None:
        print(text, flush=True)

    def stage(self, text: str, until: float) -> None:
        pass

    def progress(self, name: str, total: int) -> Callable[[str], None]:
        return lambda note: None


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


def _of(value: float, whole: float, digits: int) -> str:
    return f"{value:.{digits}f} ({100 * value / whole:.0f} %)" if whole > 0 else f"{value:.{digits}f}"


def section(document: dict[str, Any]) -> str:
    """Markdown of a section."""
    config, environment = document["config"], document["environment"]
    lines = [f"## {document['name']}", "", f"`{document['command']}`", ""]
    seeds = "1 seed" if document["seeds"] == 1 else f"{document['seeds']} seeds"
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    size = f" of {config['image_size']} x {config['image_size']} pixels" if config["image_size"] else ""
    dense = "trained weights" if config["weights"] else f"{config['pretrain_epochs']} epoch(s) dense"
    if document.get("note"):
        lines += [document["note"], ""]
    model, data = config["model"].rpartition(":")[2], document["data"]
    lines += [f"{model}, batch {config['batch_size']}, {data['train']} training and {data['test']} test images{size}, "
              f"{dense}, {config['epochs']} fine-tuned, {seeds}; {environment['cpu']}, {threads}, "
              f"PyTorch {environment['torch']}, {environment['date'][:10]}.", ""]  # fmt: skip
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
                f"{run['train_s'] + run['setup_s']:.1f} | {_of(run['saved_mb'], fp32['saved_mb'], 1)} | "
                f"{run['peak_rss_mb']:.0f} | {_of(run['added_mb'], fp32['added_mb'], 0)} | "
                f"{fp32['step_ms'] / run['step_ms']:.2f}x | {best['step_ms'] / run['step_ms']:.2f}x |"
            )
        stem = f"{document['name']}-{100 * float(sparsity):g}"
        lines += ["", f"![Accuracy against time]({stem}.png)", ""]
        if document.get("bars"):
            lines += [f"![Time of a step and memory]({stem}-bars.png)", ""]
    return "\n".join(lines)


def write_page(folder: Path) -> None:
    """Make the page of all sections that have been measured."""
    documents = [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]
    text = "\n".join([HEAD, *(section(d).replace("](", "](results/") for d in documents)])
    (folder / "results.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")


class Estimate:
    """How long a section takes, from the time of a dense step.

    The other runs' shares of a dense step are rough; so is the result.
    """

    #: Dense fp32 and best, sparse fp32, and two or three in int8, together, in dense fp32 steps.
    RUNS = 3.7
    #: Starting processes and measuring layers, for each comparison.
    START = 40.0
    #: A step without a backward pass.
    FORWARD = 1 / 3

    def __init__(self, config: CompareConfig) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        data = load_data(config.data, config.image_size, config.seed, max_images=2 * config.batch_size)
        loader, _ = make_loaders(data, config.batch_size, 0)
        model = make_network(config.model, config.width, data.kind)
        trainer = make_finetuner(model, DENSE_MODES[0], Recipe(learning_rate=1e-4), 1, 5)
        batch = next(iter(loader))
        trainer.train_step(*batch)
        start = time.perf_counter()
        trainer.train_step(*batch)
        self.step = time.perf_counter() - start

    def seconds(self, config: CompareConfig, train: int, test: int, seeds: int, sparsities: int) -> float:
        """Of a whole section."""
        steps, tests = train // config.batch_size, math.ceil(test / config.batch_size)
        one = self.RUNS * (config.epochs * steps + config.evaluations * self.FORWARD * tests) * self.step + self.START
        dense = 0.0 if config.weights else config.pretrain_epochs * steps * self.step
        return 15 * self.step + seeds * (dense + sparsities * one)

    def images(self, config: CompareConfig, sizes: tuple[int, int], seeds: int, sparsities: int, limit: float) -> int:
        """The most training and test images with which a section takes `limit` seconds; two steps' at least."""
        low, high = 2 * config.batch_size, max(sizes)
        while high - low > config.batch_size:
            middle = (low + high) // 2
            fits = self.seconds(config, *(min(middle, n) for n in sizes), seeds, sparsities) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return low


def pose_weights(folder: Path, seed: int) -> Path:
    """The production network's weights, and those of its new classifier, as a file that `compare` starts from."""
    from _networks import pose

    torch.manual_seed(seed)
    path = folder / f"pose-{seed}.pt"
    torch.save(pose().state_dict(), path)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS, help="section")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of mnist.npz, fashion_mnist.npz, cifar10.npz")
    parser.add_argument("--weights", type=Path, metavar="DIR",
                        help="folder of mediapipe_pose_detection_sparse75.npz and mediapipe_sparse.py")  # fmt: skip
    parser.add_argument("--sparsity", type=float, nargs="+", metavar="S")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--model", metavar="NAME", help="another network")
    parser.add_argument("--width", type=int, metavar="N", help="channels of its first stage")
    parser.add_argument("--epochs", type=int, metavar="N", help="of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, metavar="N", help="of the dense training")
    parser.add_argument("--image-size", type=int, metavar="N", help="height and width in pixels")
    parser.add_argument("--images", type=int, metavar="N", help="only so many training and test images")
    parser.add_argument("--minutes", type=float, metavar="M", help="only as many images as fit into so many minutes")
    parser.add_argument("--evaluations", type=int, default=3, metavar="N", help="of each run (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where to write (default: docs/)")
    parser.add_argument("--quick", action="store_true", help="a tiny network and one seed: only shows that it runs")
    args = parser.parse_args(argv)
    setting = SETTINGS[args.name]
    if args.name != "digits" and args.data is None:
        parser.error("--data is needed: the folder of the .npz files")
    if args.name == "pose":
        if args.weights is None:
            parser.error("--weights is needed: the folder of the production network")
        os.environ[POSE_FILE] = str((args.weights / "mediapipe_pose_detection_sparse75.npz").resolve())
    sparsities = args.sparsity or list(setting.sparsity)
    with tempfile.TemporaryDirectory(prefix="qsparseprop-") as folder:
        _measure(args, setting, sparsities, Path(folder))


def _measure(args: argparse.Namespace, setting: Setting, sparsities: list[float], folder: Path) -> None:
    config = CompareConfig(
        model=args.model or setting.model, width=args.width, epochs=args.epochs or setting.epochs,
        pretrain_epochs=args.pretrain_epochs or setting.pretrain_epochs, batch_size=setting.batch_size,
        image_size=args.image_size or setting.image_size, threads=args.threads, learning_rate=setting.learning_rate,
        data="digits" if args.name == "digits" else str(args.data / f"{setting.data or args.name}.npz"),
        max_images=args.images or setting.images, prune=setting.prune, min_sparsity=setting.min_sparsity,
        weights=str(pose_weights(folder, 0)) if args.name == "pose" else None, compress_saved=True, sparse_fp32=True,
        blocks="apart" if setting.blocks else "none", evaluations=args.evaluations,
    )  # fmt: skip
    if args.quick:
        config = replace(config, epochs=1, pretrain_epochs=1, max_images=200)
        if args.name == "pose":
            config = replace(config, max_images=16, batch_size=4, image_size=64)
        elif args.name == "vit":
            config = replace(config, width=48, image_size=16)
        else:
            config = replace(config, model="resnet20", width=4, image_size=16)
        args.seeds, sparsities = 1, sparsities[:1]
    estimate = Estimate(config)
    data = load_data(config.data, 8, max_images=config.max_images)
    sizes = len(data.train_labels), len(data.test_labels)
    if args.minutes is not None:
        images = estimate.images(config, sizes, args.seeds, len(sparsities), 60 * args.minutes)
        config = replace(config, max_images=images)
        sizes = min(images, sizes[0]), min(images, sizes[1])
    seconds = estimate.seconds(config, *sizes, args.seeds, len(sparsities))
    print(f"{args.name}: about {math.ceil(seconds / 60)} minutes for {len(sparsities)} sparsities and {args.seeds} "
          f"seeds on {sizes[0]} training and {sizes[1]} test images ({estimate.step:.2f} s a dense fp32 step)",
          flush=True)  # fmt: skip
    began = time.perf_counter()
    results_folder = args.docs / "results"
    results_folder.mkdir(parents=True, exist_ok=True)
    results: dict[float, list[dict[str, Any]]] = {sparsity: [] for sparsity in sparsities}
    shared = Shared()
    for seed in range(args.seeds):
        if config.weights is not None:
            config = replace(config, weights=str(pose_weights(folder, seed)))
        for sparsity in sparsities:
            print(f"\n{args.name}, {100 * sparsity:g} % zeros, seed {seed}", flush=True)
            results[sparsity].append(compare(replace(config, sparsity=sparsity, seed=seed), Messages(), shared))
    summaries = {}
    for sparsity, of_seeds in results.items():
        summaries[str(sparsity)] = summarise(of_seeds)
        stem = f"{args.name}-{100 * sparsity:g}"
        write_plot(of_seeds[0], results_folder / f"{stem}.png")
        write_bars(summaries[str(sparsity)], f"{args.name}, {100 * sparsity:g} % zeros: percentages of dense fp32",
                   results_folder / f"{stem}-bars.png")  # fmt: skip
    first = results[sparsities[0]][0]
    # paths of one machine do not belong into the page
    options = {"--sparsity": args.sparsity and " ".join(map(str, args.sparsity)), "--seeds": args.seeds,
               "--model": args.model, "--width": args.width, "--epochs": args.epochs,
               "--pretrain-epochs": args.pretrain_epochs, "--image-size": args.image_size,
               "--images": config.max_images if args.minutes or args.images else None,
               "--evaluations": args.evaluations, "--threads": args.threads}  # fmt: skip
    command = f"python benchmarks/results.py {args.name}" + ("" if args.name == "digits" else " --data DIR")
    command += " --weights DIR" if args.name == "pose" else ""
    command += "".join(f" {key} {value}" for key, value in options.items() if value is not None)
    document = {
        "name": args.name, "command": command + (" --quick" if args.quick else ""), "seeds": args.seeds,
        "note": setting.note, "bars": True,
        "config": {**asdict(config), "data": args.name, "weights": config.weights and "pose"}, "data": first["data"],
        "summaries": summaries, "environment": first["environment"], "seconds": time.perf_counter() - began,
    }  # fmt: skip
    write_json(document, results_folder / f"{args.name}.json")
    write_page(args.docs)
    print(f"written: {args.docs / 'results.md'} (after {document['seconds'] / 60:.1f} minutes)")


if __name__ == "__main__":
    main()
