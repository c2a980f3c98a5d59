"""Gradual pruning of a ResNet-20 on CIFAR-10, dense with masks and swapped: accuracy and time of the same schedule.

A network that is 80 % zeros is pruned on to 95 % along the cubic schedule while it trains, then trained on. All runs
see the same batches; they take turns epoch by epoch, so that other load on the machine meets all of them, and what is
reported is processor time. Needs the files that the options --weights and --data name, by default in the folder that
QSPARSEPROP_SHARED names (../shared if unset).

    python benchmarks/gradual.py
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _common import huge_pages, precision, say, write_json
from torch import Tensor, nn
from torch.nn.utils import prune

from qsparseprop.training.models import load_checkpoint, resnet20
from qsparseprop.utils.measurement_utils import environment
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import GradualPruner, layerwise_magnitude_prune, make_pruning_permanent

SHARED = Path(os.environ.get("QSPARSEPROP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
#: What the checkpoint's images were normalised with.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Run:
    """One model on its way through the schedule."""

    name: str
    model: nn.Module
    bf16: bool
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: torch.optim.lr_scheduler.LRScheduler = field(init=False)
    pruner: GradualPruner = field(init=False)
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)

    def prepare(self, args: argparse.Namespace, steps: int) -> None:
        """Optimizer and schedules for a number of steps an epoch."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, args.epochs * steps)
        self.pruner = GradualPruner(self.model, self.optimizer, args.final_sparsity, interval=max(steps // 2, 1),
                                    end_step=args.pruning_epochs * steps)

    def train(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One epoch."""
        self.model.train()
        for images, labels in batches:
            start = time.process_time()
            with precision(self.bf16):
                loss = F.cross_entropy(self.model(images).float(), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.pruner.step()
            self.losses.append(loss.item())
            self.seconds += time.process_time() - start

    @torch.no_grad()
    def evaluate(self, images: Tensor, labels: Tensor) -> None:
        """Share of right answers, in %."""
        self.model.eval()
        right = 0
        with precision(self.bf16):
            for x, y in zip(images.split(500), labels.split(500), strict=True):
                right += (self.model(x).argmax(1) == y).sum().item()
        self.top1.append(100 * right / len(labels))


def load_data(path: Path, quick: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, normalised, channels_last, and their labels."""
    if quick:
        images, labels = torch.randn(64, 3, 32, 32), torch.randint(10, (64,))
        return images, labels, images, labels
    with np.load(path) as file:
        arrays = [torch.from_numpy(file[key]) for key in ("x_train", "y_train", "x_test", "y_test")]
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    for i in (0, 2):  # stored as pixels with channels innermost
        arrays[i] = ((arrays[i] / 255 - mean) / std).permute(0, 3, 1, 2)
    return tuple(arrays)


def augmented(images: Tensor, labels: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in random order, each image moved by up to 4 pixels and mirrored or not; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    for indices in order.split(batch_size):
        if len(indices) < batch_size:
            return
        padded = F.pad(images[indices], (4, 4, 4, 4))
        dy, dx = torch.randint(9, (2, batch_size, 1), generator=generator) + torch.arange(32)
        dx = torch.where(torch.rand(batch_size, 1, generator=generator) < 0.5, dx, dx.flip(1))
        batch = padded.permute(0, 2, 3, 1)[torch.arange(batch_size)[:, None, None], dy[:, :, None], dx[:, None]]
        yield batch.permute(0, 3, 1, 2), labels[indices]


def make_runs(args: argparse.Namespace) -> list[Run]:
    """The competitors, from the same weights."""
    torch.manual_seed(0)
    start = resnet20(width=8 if args.quick else 16)
    if args.quick:
        layerwise_magnitude_prune(start, 0.8)
        make_pruning_permanent(start)
    else:
        load_checkpoint(start, args.weights)
    start = start.to(memory_format=torch.channels_last)

    def dense() -> nn.Module:
        model = copy.deepcopy(start)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and (module.weight == 0).float().mean() > 0.1:
                prune.custom_from_mask(module, "weight", module.weight != 0)
        return model

    def sparse() -> nn.Module:
        return swap_modules_with_sparse(copy.deepcopy(start), (16, 3, 32, 32), include_dense=False, min_sparsity=0.1,
                                        fuse=True, verbose=False)  # fmt: skip

    runs = [Run("dense with masks, fp32", dense(), False), Run("dense with masks, bf16", dense(), True),
            Run("qsparseprop int8", sparse(), True)]  # fmt: skip
    return [run for run in runs if any(text in run.name for text in args.runs)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=SHARED / "weights/resnet20_cifar10_sparse80.pth")
    parser.add_argument("--data", type=Path, default=SHARED / "data/cifar10.npz")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--pruning-epochs", type=int, default=10, help="during which weights go (default: %(default)s)")
    parser.add_argument("--final-sparsity", type=float, default=0.95)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of order and augmentation (default: %(default)s)")
    parser.add_argument("--runs", nargs="+", metavar="TEXT", default=[""], help="only those whose names contain one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--quick", action="store_true", help="random images, two tiny epochs: only shows that it runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.pruning_epochs, args.batch_size = 2, 1, 16
    torch.set_num_threads(args.threads)
    machine = {**environment(), "threads": args.threads, "huge_pages": huge_pages()}
    for key, value in machine.items():
        say(f"{key:<12} {value}")

    train_images, train_labels, test_images, test_labels = load_data(args.data, args.quick)
    runs = make_runs(args)
    for run in runs:
        run.prepare(args, len(train_images) // args.batch_size)
        run.evaluate(test_images, test_labels)
    say(f"\ntop-1 at {100 * runs[0].pruner.sparsity:.1f} % zeros: "
        + ", ".join(f"{run.name} {run.top1[0]:.2f}" for run in runs))
    for epoch in range(args.epochs):
        for run in runs:
            torch.manual_seed(1000 * args.seed + epoch)
            run.train(augmented(train_images, train_labels, args.batch_size, 1000 * args.seed + epoch))
        if epoch + 1 in (args.pruning_epochs, args.epochs):
            for run in runs:
                run.evaluate(test_images, test_labels)
        say(f"epoch {epoch + 1}: {100 * runs[0].pruner.sparsity:.1f} % zeros; " + "; ".join(
            f"{run.name}: loss {np.mean(run.losses[-10:]):.3f}, {run.seconds:.0f} s" for run in runs))

    say(f"\n{'run':<26}{'zeros %':>9}{'top-1 % before':>16}{'pruned':>9}{'at the end':>12}{'CPU s':>9}{'vs fp32':>9}")
    for run in runs:
        say(f"{run.name:<26}{100 * run.pruner.sparsity:>9.1f}{run.top1[0]:>16.2f}{run.top1[1]:>9.2f}"
            f"{run.top1[-1]:>12.2f}{run.seconds:>9.0f}{runs[0].seconds / run.seconds:>8.2f}x")
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.json, {"benchmark": "gradual", "environment": machine, "arguments": settings, "runs": [
        {"name": r.name, "top1": r.top1, "seconds": r.seconds, "losses": r.losses, "zeros": r.pruner.sparsity}
        for r in runs]})  # fmt: skip


if __name__ == "__main__":
    main()
