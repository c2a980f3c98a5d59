"""What freezing costs in accuracy: networks that were pruned and fine-tuned with our modules, float against frozen.

Cases: the ResNet-20 with 80 % zeros as it is, and pruned on to 90 % and fine-tuned (--shared names the folder with it
and with CIFAR-10); a small CNN, an MLP and a ResNet-18 on the digits that scikit-learn brings along, at 80 and 90 %.
Scales come from the first images of the training data. A case whose data is missing is left out with a remark. The
summary has means over seeds: one image of the digits' test set is 0.28 points.

  python benchmarks/frozen_accuracy.py --cases digits --seeds 5
  python benchmarks/frozen_accuracy.py --cases cifar10

With --json results are written after every case, and those that the file already holds are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Table, say
from accuracy import Case, build, finetuned_model, load, pruned_start
from torch import nn

from qsparseprop.inference import freeze, measure_accuracy
from qsparseprop.training.data import ImageData
from qsparseprop.utils.measurement_utils import environment
from qsparseprop.utils.network_utils import sparsity

CASES = [
    *(Case("cifar10", "resnet20", s) for s in (0.8, 0.9)),
    *(Case("digits", network, s) for network in ("cnn", "mlp", "resnet18") for s in (0.8, 0.9)),
]

#: How models are frozen, by name.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "biases as they are": {"correct_bias": False},
    "percentile": {"observer": "percentile"},
    "moving average": {"observer": "moving_average"},
    "per tensor": {"per_channel": False},
}


def trained(case: Case, data: ImageData, seed: int, args: argparse.Namespace) -> nn.Module:
    """The sparse network of a case; the one with 80 % zeros is there already."""
    if case.network == "resnet20" and case.sparsity == 0.8:
        return build(case, data, args.shared).eval()
    start, masks = pruned_start(case, data, args.shared, seed, args)
    return finetuned_model(start, masks, "blocks", data, seed, args).eval()


def measure(case: Case, data: ImageData, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of a case as it is, and frozen with each setting."""
    model = trained(case, data, seed, args)
    test = list(zip(data.test_images.split(args.batch), data.test_labels.split(args.batch), strict=True))
    calibration = data.train_images[: args.calibration].split(args.batch)
    zeros = sparsity(model)
    # the modules that trained compute on codes as well, with scales of each batch
    before = measure_accuracy(model, test)
    runs = []
    for name in args.settings:
        frozen = freeze(model, calibration, **SETTINGS[name])
        report = frozen.freeze_report
        after = measure_accuracy(frozen, test)
        worst = report.worst(1)[0]
        say(f"{case.name}, seed {seed}, {name}: {before:.2f} % -> {after:.2f} %")
        runs.append({"case": case.name, "seed": seed, "setting": name, "zeros": zeros, "images": len(data.test_labels),
                     "before": before, "after": after, "loss": before - after, "worst_layer": worst.name,
                     "worst_error": worst.error, "layers": report.as_dicts()})  # fmt: skip
    return runs


def print_summary(runs: Sequence[dict[str, Any]]) -> None:
    """Print what is lost in each case: means over seeds, and the layer with the largest error of any."""
    table = Table(["case", "setting", "seeds", "before %", "frozen %", "points lost", "layer with the largest error"])
    together: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        together.setdefault((run["case"], run["setting"]), []).append(run)
    for (case, setting), some in together.items():
        before, after = (statistics.mean(run[key] for run in some) for key in ("before", "after"))
        worst = max(some, key=lambda run: run["worst_error"])
        table.row(case, setting, str(len(some)), f"{before:.2f}", f"{after:.2f}", f"{before - after:+.2f}",
                  f"{worst['worst_layer']}, {100 * worst['worst_error']:.1f} %")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    default = os.environ.get("QSPARSEPROP_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(default), metavar="FOLDER",
                        help="folder with data/ and weights/ (default: the one beside the project)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT",
                        help="only cases in whose name one of the texts occurs: "
                             + ", ".join(c.name for c in CASES).replace("%", "%%"))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=["default"], metavar="NAME",
                        help="of " + ", ".join(SETTINGS) + " (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=512, metavar="N",
                        help="images that scales come from (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--dense-epochs", type=int, default=3, metavar="N",
                        help="of training before pruning (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of fine-tuning (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=60000, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=10000, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there, and go on from it")
    parser.add_argument("--quick", action="store_true",
                        help="one epoch and 2,000 images for testing at most: shows in minutes that everything works")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.dense_epochs = 1, 1
        args.train_images, args.test_images = min(args.train_images, 1000), min(args.test_images, 2000)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "shared")}
    document: dict[str, Any] = {
        "benchmark": "frozen_accuracy", "environment": {**environment(), "threads": torch.get_num_threads()},
        "arguments": settings, "runs": [],
    }  # fmt: skip
    if args.json and args.json.exists():
        document["runs"] = json.loads(args.json.read_text(encoding="utf-8"))["runs"]
    done = {(run["case"], run["seed"]) for run in document["runs"]}
    wanted = [case for case in CASES if not args.cases or any(text in case.name for text in args.cases)]
    for case, seed in itertools.product(wanted, range(args.seeds)):
        if (case.name, seed) in done:
            continue
        try:
            data = load(case.data, args.shared, args.train_images, args.test_images)
            document["runs"] += measure(case, data, seed, args)
        except FileNotFoundError as error:
            say(f"{case.name}: left out, {error}")
            continue
        if args.json:
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_summary(document["runs"])


if __name__ == "__main__":
    main()
