"""What int8 training without zeros does to accuracy, first layer included: dense networks, swapped at 0 % zeros.

Cases: a small CNN, an MLP and a ResNet-20, trained from scratch on the digits that scikit-learn brings along (a seed
also decides which of them are the test); a trained ResNet-20, fine-tuned on CIFAR-10 (--shared names the folder with
both); and a byte-level language model, trained from scratch on the source of Python's standard library.

Every setting of a seed has the same start and the same batches. Training is chaotic, so two settings differ by chance
even then: "fp32, nudged" is float32 whose weights start a millionth off, and shows how much. Printed are means over
seeds, and the mean of the differences from fp32 of the same seed with its standard error. "loss" is that of the test
set in nats; top-1 of the language model is of the next byte.

  python benchmarks/dense_int8.py --cases digits --seeds 16 --threads 1
  python benchmarks/dense_int8.py --cases cifar10 text --seeds 5 --threads 1 --json dense_int8.json

With --json results are written after every run, and runs that the file already holds are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import Table, say
from _networks import LanguageModel
from accuracy import Case as ImageCase
from accuracy import build, load, train
from torch import Tensor, nn

from qsparseprop.quantization import QuantConfig
from qsparseprop.training.data import ImageData, load_digits_data
from qsparseprop.training.models import load_checkpoint, resnet20
from qsparseprop.utils.measurement_utils import environment
from qsparseprop.utils.network_utils import swap_modules_with_sparse

BASE = "fp32"
#: Bytes of a sequence, and sequences of a step.
CONTEXT, SEQUENCES = 128, 16
#: Sequences of the validation text that are looked at, at most.
VALIDATION = 1024


@dataclass(frozen=True)
class Setting:
    """What becomes of the dense network before it is trained.

    Attributes
    ----------
    first, others : bool
        Whether its first layer, and all others, are swapped.
    fuse : bool
        Blocks.
    qconfig : QuantConfig
    nudge : float
        Relative change of the weights at the start, at random.
    """

    first: bool = False
    others: bool = False
    fuse: bool = False
    qconfig: QuantConfig = field(default_factory=QuantConfig)
    nudge: float = 0.0

    def apply(self, model: nn.Module) -> nn.Module:
        """A changed copy of a network."""
        model = copy.deepcopy(model)
        if self.nudge:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1 + self.nudge * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        skipped = ([] if self.first else names[:1]) + ([] if self.others else names[1:])
        if len(skipped) < len(names):
            swap_modules_with_sparse(model, None, verbose=False, include_dense=False, min_sparsity=0.0,
                                     skip_modules=skipped, qconfig=self.qconfig, fuse=self.fuse)  # fmt: skip
        return model


SETTINGS = {
    BASE: Setting(),
    "fp32, nudged": Setting(nudge=1e-6),
    "int8, first fp32": Setting(others=True),
    "int8": Setting(first=True, others=True),
    "int8, blocks": Setting(first=True, others=True, fuse=True),
    "first int8": Setting(first=True),
    "int8, standard inputs": Setting(first=True, others=True, qconfig=QuantConfig(input="standard")),
    "int8, per tensor": Setting(first=True, others=True, qconfig=QuantConfig(granularity="tensor")),
    "int8, nearest gradients": Setting(first=True, others=True, qconfig=QuantConfig(grad="absmax")),
    "int8, grad_weight float32": Setting(first=True, others=True, qconfig=QuantConfig(grad_weight="float32")),
}
DEFAULT_SETTINGS = tuple(SETTINGS)[:6]


def digits(network: str, seed: int, args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """An untrained network for the digits, and what trains and tests it."""
    data = load_digits_data(size=16, channels=1, seed=seed)
    torch.manual_seed(seed)
    model = resnet20(10, 1) if network == "resnet20" else build(ImageCase("digits", network, 0.0), data, args.shared)
    return model, lambda model: _images(model, data, args.digits_epochs, 0.05, seed)


def cifar10(network: str, seed: int, args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """The trained ResNet-20, and what trains it on and tests it."""
    model = load_checkpoint(resnet20(), args.shared / "weights" / "resnet20-12fca82f.th")
    data = load("cifar10", args.shared, args.train_images, args.test_images)
    return model, lambda model: _images(model, data, args.cifar_epochs, 0.02, seed)


def _images(model: nn.Module, data: ImageData, epochs: int, rate: float, seed: int) -> dict[str, float]:
    train(model, data, epochs, rate, seed)
    return tested(model, list(zip(data.test_images.split(500), data.test_labels.split(500), strict=True)))


@torch.no_grad()
def tested(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Percentage of the labels that a model gets right, and its mean loss."""
    model.eval()
    right, loss, count = 0, 0.0, 0
    for x, labels in batches:
        logits = model(x).flatten(0, -2)
        labels = labels.flatten()
        right += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += labels.numel()
    return {"top1": 100 * right / count, "loss": loss / count}


def library_source() -> tuple[Tensor, Tensor]:
    """Bytes of the modules of Python's standard library, for training, and those of every tenth for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [b"".join(file.read_bytes() for i, file in enumerate(files) if (i % 10 == 9) == validation)
             for validation in (False, True)]  # fmt: skip
    training, validation = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return training, validation


def text(network: str, seed: int, args: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Any]]:
    """An untrained language model, and what trains and tests it."""
    torch.manual_seed(seed)
    model = LanguageModel(256, CONTEXT, width=32 if args.quick else 128, depth=1 if args.quick else 4, heads=4)
    return model, lambda model: _text(model, seed, args)


def _text(model: nn.Module, seed: int, args: argparse.Namespace) -> dict[str, float]:
    training, validation = library_source()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of random rounding
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps, warmup = args.text_steps, max(1, args.text_steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps))))  # fmt: skip
    model.train()
    for _ in range(steps):
        begins = torch.randint(len(training) - CONTEXT - 1, (SEQUENCES,), generator=generator)
        tokens = training[begins[:, None] + torch.arange(CONTEXT + 1)].long()
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    sequences = validation[: len(validation) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1).long()
    sequences = sequences[:: max(1, len(sequences) // (8 if args.quick else VALIDATION))]
    return tested(model, [(batch[:, :-1], batch[:, 1:]) for batch in sequences.split(SEQUENCES)])


#: What makes a network and its training, and which of its networks.
CASES: dict[str, tuple[Callable[..., tuple[nn.Module, Callable[[nn.Module], Any]]], str]] = {
    "digits cnn": (digits, "cnn"), "digits mlp": (digits, "mlp"), "digits resnet20": (digits, "resnet20"),
    "cifar10 resnet20": (cifar10, "resnet20"), "text transformer": (text, "transformer"),
}  # fmt: skip


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each case and setting, and of its differences from float32 of the same seed with their errors."""
    found: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for run in runs:
        found.setdefault((run["case"], run["setting"]), {})[run["seed"]] = run
    summary = []
    for (case, setting), by_seed in found.items():
        base = found.get((case, BASE), {})
        both = sorted(set(by_seed) & set(base))
        row: dict[str, Any] = {"case": case, "setting": setting, "seeds": len(both)}
        for key in ("top1", "loss"):
            values = [by_seed[seed][key] for seed in both]
            row[key] = statistics.fmean(values) if both else None
            row[f"{key}_deviation"] = statistics.stdev(values) if len(both) > 1 else None
            differences = [by_seed[seed][key] - base[seed][key] for seed in both]
            row[f"{key}_difference"], row[f"{key}_error"] = _mean_and_error(differences) if both else (None, None)
        row["loss_percent"] = 100 * row["loss_difference"] / (row["loss"] - row["loss_difference"]) if both else None
        row["minutes"] = statistics.fmean(run["seconds"] for run in by_seed.values()) / 60
        summary.append(row)
    return summary


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def print_summary(summary: Sequence[dict[str, Any]]) -> None:
    """Print the tables of docs/numerics.md."""
    case = None
    for row in sorted(summary, key=lambda row: list(CASES).index(row["case"])):
        if row["case"] != case:
            case = row["case"]
            say(f"\n{case}\n")
            table = Table(["setting", "top-1 %", "deviation", "points from fp32", "test loss", "loss from fp32    ",
                           "in %", "seeds"])  # fmt: skip
        deviation = "-" if row["top1_deviation"] is None else f"{row['top1_deviation']:.2f}"
        table.row(row["setting"], f"{row['top1']:.2f}", deviation,
                  _with_error(row["top1_difference"], row["top1_error"], 2), f"{row['loss']:.4f}",
                  _with_error(row["loss_difference"], row["loss_error"], 4), f"{row['loss_percent']:+.2f}",
                  str(row["seeds"]))  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    default = os.environ.get("QSPARSEPROP_SHARED", Path(__file__).resolve().parents[2] / "shared")
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--shared", type=Path, default=Path(default), metavar="FOLDER",
                        help="folder with data/ and weights/ (default: the one beside the project)")
    result.add_argument("--cases", nargs="+", default=[], metavar="TEXT",
                        help="only cases in whose name one of the texts occurs: " + ", ".join(CASES))
    result.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(DEFAULT_SETTINGS), metavar="NAME",
                        help="of " + ", ".join(map(repr, SETTINGS)) + " (default: the first six)")
    result.add_argument("--seeds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    result.add_argument("--first-seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    result.add_argument("--digits-epochs", type=int, default=10, metavar="N", help="(default: %(default)s)")
    result.add_argument("--cifar-epochs", type=int, default=3, metavar="N", help="(default: %(default)s)")
    result.add_argument("--text-steps", type=int, default=800, metavar="N", help="(default: %(default)s)")
    result.add_argument("--train-images", type=int, default=8000, metavar="N",
                        help="of CIFAR-10, at most (default: %(default)s)")
    result.add_argument("--test-images", type=int, default=10000, metavar="N",
                        help="of CIFAR-10, at most (default: %(default)s)")
    result.add_argument("--threads", type=int, metavar="N")
    result.add_argument("--json", type=Path, metavar="FILE", help="write all results there, and go on from it")
    result.add_argument("--quick", action="store_true", help="a tiny run that shows that everything works")
    return result


#: Arguments on which results depend; those of a file must be the same to go on from it.
OWN = ("digits_epochs", "cifar_epochs", "text_steps", "train_images", "test_images", "quick")


def _document(args: argparse.Namespace) -> dict[str, Any]:
    """What has been measured, of the file or empty."""
    arguments = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items() if key != "shared"}
    document: dict[str, Any] = {
        "benchmark": "dense_int8", "environment": environment(), "arguments": arguments,
        "settings": {name: asdict(setting) for name, setting in SETTINGS.items()}, "runs": [],
    }  # fmt: skip
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        if any(before["arguments"][key] != arguments[key] for key in OWN):
            raise SystemExit(f"{args.json} holds results of other arguments; name another file")
        document["runs"] = before["runs"]
    return document


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    args = parser().parse_args(argv)
    if args.quick:
        args.seeds, args.digits_epochs, args.cifar_epochs, args.text_steps = 1, 1, 1, 2
        args.train_images, args.test_images = 64, 100
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    document = _document(args)
    done = {(run["case"], run["seed"], run["setting"]) for run in document["runs"]}
    for name, (make, network) in CASES.items():
        if args.cases and not any(text in name for text in args.cases):
            continue
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            wanted = [setting for setting in args.settings if (name, seed, setting) not in done]
            if not wanted:
                continue
            try:
                start, run = make(network, seed, args)
            except FileNotFoundError as error:
                say(f"{name}: left out, {error}")
                break
            for setting in wanted:
                began = time.perf_counter()
                result = run(SETTINGS[setting].apply(start))
                seconds = time.perf_counter() - began
                say(f"{name}, seed {seed}, {setting}: {result['top1']:.2f} %, loss {result['loss']:.4f} "
                    f"({seconds:.0f} s)")  # fmt: skip
                document["runs"].append({"case": name, "seed": seed, "setting": setting, **result, "seconds": seconds})
                document["summary"] = summarise(document["runs"])
                if args.json:
                    args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_summary(summarise(document["runs"]))


if __name__ == "__main__":
    main()
