"""What quantisation does to accuracy: fine-tuning with every scheme, from the same starts and on the same batches.

Cases: a ResNet-20 that has 80 % zeros, pruned on and fine-tuned on CIFAR-10 (--shared names the folder with both);
a small CNN and an MLP, trained dense, pruned and fine-tuned on Fashion-MNIST and MNIST (same folder), and, with
a ResNet-18, on the digits that scikit-learn brings along (nothing else needed). Each is run with every setting and
seed; a seed decides the start, the order of the images and all random numbers of quantisation. A case whose data is
missing is left out with a remark.

With --json results are written after every run, and runs that the file already holds are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _common import Table, say
from torch import Tensor, nn

from qsparseprop.quantization import QuantConfig
from qsparseprop.training.data import ImageData, load_digits_data
from qsparseprop.training.models import load_checkpoint, resnet18, resnet20
from qsparseprop.utils.measurement_utils import environment
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import (
    collect_masks,
    global_magnitude_prune,
    make_mask_enforcer,
    make_pruning_permanent,
)

BATCH = 64

#: Setting by name; None is dense float32 with a mask, "float" the sparse modules in float32, "blocks" the default with
#: convolutions and BatchNorm, and linear layers and ReLU, in blocks.
SETTINGS: dict[str, QuantConfig | str | None] = {
    "fp32 masked dense": None,
    "fp32 sparse": "float",
    "default": QuantConfig(),
    "default, blocks": "blocks",
    "per tensor": QuantConfig(granularity="tensor"),
    "ancestor": QuantConfig.ancestor(),
    "grad_weight float32": QuantConfig(grad_weight="float32"),
    "standard inputs": QuantConfig(input="standard"),
    "dithered": QuantConfig(grad="dithered"),
    "luq": QuantConfig(grad="luq"),
}


@dataclass(frozen=True)
class Case:
    """A network, its data and how sparse it becomes."""

    data: str
    network: str
    sparsity: float

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return f"{self.data} {self.network} {100 * self.sparsity:g} %"


CASES = [
    *(Case("cifar10", "resnet20", s) for s in (0.9, 0.95)),
    *(Case(data, network, s) for data in ("fashion_mnist", "mnist", "digits") for network in ("cnn", "mlp")
      for s in (0.9, 0.95)),
    Case("digits", "resnet18", 0.9),
]  # fmt: skip


def load(name: str, shared: Path, train_images: int, test_images: int) -> ImageData:
    """Images of a data set, normalised; FileNotFoundError where the folder does not hold it."""
    if name == "digits":
        return load_digits_data(size=16, channels=1)
    with np.load(shared / "data" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in ("x_train", "y_train", "x_test", "y_test")}
    images = {key: arrays[key][:n].movedim(-1, 1).to(torch.float32) / 255
              for key, n in (("x_train", train_images), ("x_test", test_images))}  # fmt: skip
    if name == "cifar10":  # what the checkpoint was trained with
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    else:
        mean, std = images["x_train"].mean(), images["x_train"].std()
    return ImageData((images["x_train"] - mean) / std, arrays["y_train"][:train_images],
                     (images["x_test"] - mean) / std, arrays["y_test"][:test_images], 10, name)  # fmt: skip


def build(case: Case, data: ImageData, shared: Path) -> nn.Module:
    """The dense network, untrained unless there is a checkpoint."""
    channels, size = data.train_images.shape[1:3]
    if case.network == "resnet20":
        return load_checkpoint(resnet20(), shared / "weights" / "resnet20_cifar10_sparse80.pth")
    if case.network == "resnet18":
        return resnet18(data.num_classes, channels)
    if case.network == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 256), nn.ReLU(), nn.Linear(256, 128),
                             nn.ReLU(), nn.Linear(128, 10))  # fmt: skip
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored or not, and moved by up to four pixels."""
    mirrored = torch.rand(images.shape[0], generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    y, x = torch.randint(9, (2, images.shape[0]), generator=generator).unbind()
    rows = y[:, None] + torch.arange(images.shape[2])
    columns = x[:, None] + torch.arange(images.shape[3])
    padded = F.pad(images, (4, 4, 4, 4))
    return padded[torch.arange(len(images))[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def train(model: nn.Module, data: ImageData, epochs: int, rate: float, seed: int,
          masks: dict[str, Tensor] | None = None) -> None:  # fmt: skip
    """Momentum SGD, the rate falling to zero; the order of the images depends on the seed only."""
    enforce = make_mask_enforcer(model, masks) if masks else None
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of random rounding
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(data.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_images), generator=generator)
        for batch in order.split(BATCH):
            if len(batch) < BATCH:
                continue
            images = data.train_images[batch]
            if data.name == "cifar10":
                images = augmented(images, generator)
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train_labels[batch]).backward()
            optimizer.step()
            if enforce:
                enforce()
            schedule.step()


@torch.no_grad()
def top1(model: nn.Module, data: ImageData) -> float:
    """Percentage of the test images that the model gets right."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum())
                for x, y in zip(data.test_images.split(500), data.test_labels.split(500), strict=True))  # fmt: skip
    return 100 * right / len(data.test_labels)


def pruned_start(case: Case, data: ImageData, shared: Path, seed: int, args: argparse.Namespace,
                 ) -> tuple[nn.Module, dict[str, Tensor]]:  # fmt: skip
    """What all settings of a seed start from: the network with zeros, and its masks."""
    torch.manual_seed(seed)
    model = build(case, data, shared)
    if case.network != "resnet20":
        train(model, data, args.dense_epochs, 0.05, seed + 1000)
    # all layers but the one that reads the image
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear))
    global_magnitude_prune(model, case.sparsity, skip=[first] if case.network != "mlp" else None)
    masks = collect_masks(model)
    make_pruning_permanent(model)
    return model, masks


def finetuned(start: nn.Module, masks: dict[str, Tensor], setting: QuantConfig | str | None, data: ImageData,
              seed: int, args: argparse.Namespace) -> float:  # fmt: skip
    """Accuracy after fine-tuning with a setting."""
    return top1(finetuned_model(start, masks, setting, data, seed, args), data)


def finetuned_model(start: nn.Module, masks: dict[str, Tensor], setting: QuantConfig | str | None, data: ImageData,
                    seed: int, args: argparse.Namespace) -> nn.Module:  # fmt: skip
    """A copy that was fine-tuned with a setting."""
    model = copy.deepcopy(start)
    if setting is not None:
        qconfig = setting if isinstance(setting, QuantConfig) else None
        shape = (BATCH, *data.train_images.shape[1:])
        swap_modules_with_sparse(model, shape, verbose=False, min_sparsity=0.3, include_dense=False,
                                 quantize=setting != "float", qconfig=qconfig, fuse=setting == "blocks")  # fmt: skip
    train(model, data, args.epochs, args.rate, seed, masks if setting is None else None)
    return model


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread of each case and setting, and the mean's ratio to masked dense training."""
    by_key: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        by_key.setdefault((run["case"], run["setting"]), {})[run["seed"]] = run["top1"]
    summary = []
    for (case, setting), found in by_key.items():
        base = by_key.get((case, "fp32 masked dense"), {})
        common = sorted(set(found) & set(base))
        ratio = sum(found[s] for s in common) / sum(base[s] for s in common) if common else None
        values = list(found.values())
        summary.append({"case": case, "setting": setting, "seeds": len(values), "top1": statistics.mean(values),
                        "spread": max(values) - min(values), "ratio": ratio})  # fmt: skip
    return summary


def print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """Print the table of docs/numerics.md."""
    case = None
    for row in summary:
        if row["case"] != case:
            case = row["case"]
            say(f"\n{case}\n")
            table = Table(["setting", "top-1 %", "spread", "of fp32", "seeds"])
        ratio = None if row["ratio"] is None else f"{100 * row['ratio']:.2f} %"
        table.row(row["setting"], f"{row['top1']:.2f}", f"{row['spread']:.2f}", ratio, str(row["seeds"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    default = os.environ.get("QSPARSEPROP_SHARED", Path(__file__).resolve().parents[2] / "shared")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path(default), metavar="FOLDER",
                        help="folder with data/ and weights/ (default: the one beside the project)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT",
                        help="only cases in whose name one of the texts occurs: " + ", ".join(c.name for c in CASES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME",
                        help="of " + ", ".join(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of fine-tuning (default: %(default)s)")
    parser.add_argument("--dense-epochs", type=int, default=3, metavar="N",
                        help="of training before pruning (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate of fine-tuning (default: %(default)s)")
    parser.add_argument("--train-images", type=int, default=60000, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--test-images", type=int, default=10000, metavar="N", help="at most (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there, and go on from it")
    parser.add_argument("--quick", action="store_true", help="a tiny run that shows that everything works")
    args = parser.parse_args(argv)
    if args.quick:
        args.seeds, args.epochs, args.dense_epochs, args.train_images, args.test_images = 1, 1, 1, 128, 100
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("json", "shared")}
    document: dict[str, Any] = {
        "benchmark": "accuracy", "environment": {**environment(), "threads": torch.get_num_threads()},
        "arguments": settings, "configs": {name: asdict(value) if isinstance(value, QuantConfig) else value
                                           for name, value in SETTINGS.items()}, "runs": [],
    }  # fmt: skip
    own = ("epochs", "dense_epochs", "rate", "train_images", "test_images")
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        if any(before["arguments"][key] != settings[key] for key in own):
            parser.error(f"{args.json} holds results of other arguments; name another file")
        document["runs"] = before["runs"]
    done = {(run["case"], run["setting"], run["seed"]) for run in document["runs"]}
    for case in CASES:
        if args.cases and not any(text in case.name for text in args.cases):
            continue
        wanted = [(seed, name) for seed in range(args.seeds) for name in args.settings
                  if (case.name, name, seed) not in done]  # fmt: skip
        if not wanted:
            continue
        try:
            data = load(case.data, args.shared, args.train_images, args.test_images)
            starts = {seed: pruned_start(case, data, args.shared, seed, args) for seed in {s for s, _ in wanted}}
        except FileNotFoundError as error:
            say(f"{case.name}: left out, {error}")
            continue
        for seed, name in wanted:
            accuracy = finetuned(*starts[seed], SETTINGS[name], data, seed, args)
            say(f"{case.name}, seed {seed}, {name}: {accuracy:.2f} %")
            document["runs"].append({"case": case.name, "setting": name, "seed": seed, "top1": accuracy})
            document["summary"] = summarise(document["runs"])
            if args.json:
                args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_summary(summarise(document["runs"]))


if __name__ == "__main__":
    main()
