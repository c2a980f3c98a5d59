"""The language model of docs/results.md: bytes of the source of Python's standard library, which every machine has.

A decoder of four blocks of width 256 is trained dense, pruned, and fine-tuned. Run as a script it is one of these
trainings, which ``benchmarks/results.py text`` starts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _networks import LanguageModel
from _results_runs import KINDS, Run
from dense_int8 import library_source
from language_model import SETTINGS, Size, Step, measure_memory
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from qsparseprop.training.finetuner import Finetuner
from qsparseprop.utils.measurement_utils import environment, interleaved_medians
from qsparseprop.utils.network_utils import sparsity as zeros_of
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import (
    collect_masks,
    layerwise_magnitude_prune,
    make_mask_enforcer,
    make_pruning_permanent,
)

__all__ = ["TEXT", "about", "text_plan", "text_times"]

TEXT = "text"
SPARSITY = (0.5, 0.7, 0.9)
SIZE = Size(vocabulary=256, width=256, depth=4, heads=4, sequences=16, length=128)
QUICK = Size(vocabulary=256, width=32, depth=1, heads=2, sequences=4, length=32)
#: Steps of the dense training and of a fine-tuning, and steps between tests.
STEPS, TUNING, BETWEEN = 2000, 400, 50
#: Peaks of the learning rate.
RATE, TUNING_RATE = 1e-3, 5e-4
#: Sequences of the validation text.
VALIDATION = 256


def about(quick: bool) -> str:
    """What the section says of its network."""
    size = QUICK if quick else SIZE
    return (f"A decoder of {size.depth} blocks of width {size.width}, which reads {size.length} bytes; trained for "
            f"{STEPS} steps of {size.sequences} sequences on the modules of Python's standard library, of which every "
            f"tenth is the validation text; pruned in all linear layers, and fine-tuned for {TUNING} steps. The loss "
            "is in nats.")  # fmt: skip


class _Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Parts of a text that begin anywhere: bytes, and those that follow them."""

    def __init__(self, text: Tensor, length: int, stride: int = 1) -> None:
        self.text, self.length, self.stride = text, length, stride

    def __len__(self) -> int:
        return (len(self.text) - self.length - 1) // self.stride

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        part = self.text[index * self.stride : index * self.stride + self.length + 1].long()
        return part[:-1], part[1:]


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _batches(size: Size, steps: int, seed: int, quick: bool) -> tuple[DataLoader[Any], DataLoader[Any]]:
    training, validation = library_source()
    train = _Sequences(training, size.length)
    order = RandomSampler(train, num_samples=steps * size.sequences, generator=torch.Generator().manual_seed(seed))
    test = _Sequences(validation, size.length, (len(validation) - size.length) // (8 if quick else VALIDATION))
    return DataLoader(train, size.sequences, sampler=order), DataLoader(test, size.sequences)


def train(args: argparse.Namespace) -> None:
    """One training, up to its result.json."""
    torch.set_num_threads(1)
    size, folder = QUICK if args.quick else SIZE, args.out
    torch.manual_seed(args.seed)
    model: nn.Module = LanguageModel(size.vocabulary, size.length, size.width, size.depth, size.heads)
    dense, tuning = args.kind == "dense", args.sparsity > 0
    masks: dict[str, Tensor] = {}
    if tuning:
        model.load_state_dict(torch.load(args.weights, weights_only=True)["model"])
        original = Finetuner(model, torch.optim.SGD(model.parameters(), 0.0), loss_function=_loss)
        between = 2 if args.quick else BETWEEN
        batches, test = _batches(size, between, args.seed, args.quick)
        dense_loss = original.measure(test).loss
        layerwise_magnitude_prune(model, args.sparsity)
        masks = collect_masks(model)
        make_pruning_permanent(model)
        pruned_loss = original.measure(test).loss
        epochs = 2 if args.quick else TUNING // BETWEEN
        if not dense and (folder / "last.pt").exists():
            swap_modules_for_state(model, torch.load(folder / "last.pt", weights_only=True)["model"], fuse=True)
        elif not dense:
            # without timing: the same layers wherever it runs
            swap_modules_with_sparse(model, None, include_dense=False, min_sparsity=0.4, verbose=False, fuse=True)
    else:
        batches, test = _batches(size, 10 if args.quick else 100, args.seed, args.quick)
        epochs = 2 if args.quick else STEPS // 100
    optimizer = torch.optim.AdamW(model.parameters(), TUNING_RATE if tuning else RATE, fused=True)
    steps = epochs * len(batches)
    tuner = Finetuner(
        model, optimizer, loss_function=_loss, max_grad_norm=1.0,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], total_steps=steps,
                                                      pct_start=0.1, cycle_momentum=False),
        # the reference is float32; ours computes in bfloat16 beside its products, as images do
        autocast_dtype=None if tuning and dense else torch.bfloat16,
        after_step=make_mask_enforcer(model, masks) if tuning and dense else None,
    )  # fmt: skip
    result = tuner.fit(batches, epochs, evaluation_batches=test, folder=folder, resume=True, progress=False)
    if result.stopped_by is not None:
        raise SystemExit(128 + result.stopped_by)
    evaluations = [{"step": e.step, "loss": e.loss} for e in tuner.history.evaluations]
    document = {"loss": evaluations[-1]["loss"], "evaluations": evaluations, "zeros": zeros_of(model)}
    if tuning:
        document |= {"dense_loss": dense_loss, "pruned_loss": pruned_loss}
    (folder / "result.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def text_plan(work: Path, seeds: int, quick: bool) -> tuple[Run, list[Run]]:
    """The dense training, and the fine-tunings that begin with what it has learned."""
    folder = work / TEXT
    script = (str(Path(__file__).resolve()), *(("--quick",) if quick else ()))
    start = Run(folder / "start", (*script, "--out", str(folder / "start")))
    weights = ("--weights", str(folder / "start" / "last.pt"))

    def run(sparsity: float, kind: str, seed: int) -> Run:
        place = folder / f"{100 * sparsity:.0f}-{kind}-{seed}"
        command = (*script, *weights, "--sparsity", str(sparsity), "--kind", kind, "--seed", str(seed),
                   "--out", str(place))  # fmt: skip
        return Run(place, command, weights, sparsity, kind, seed)

    sparsities = SPARSITY[-1:] if quick else SPARSITY
    return start, [run(sparsity, kind, seed) for seed in range(1, seeds + 1) for sparsity in sparsities
                   for kind in ("dense", "int8")]  # fmt: skip


def text_times(sparsity: float, threads: int, quick: bool) -> dict[str, Any]:
    """Times of steps, interleaved, and memory of weights, gradients and AdamW's moments."""
    torch.set_num_threads(threads)
    size = QUICK if quick else SIZE
    model, tokens = size.build(sparsity), size.tokens()
    wanted = ("fp32", "bf16", "fused", "fused bf16")
    steps = {s.name: Step(s, model, tokens, quick) for s in SETTINGS if s.name in wanted}
    ms = {name: 1000 * seconds for name, seconds in interleaved_medians(steps, 3 if quick else 15, warmup=2).items()}
    best = min(("fp32", "bf16"), key=ms.__getitem__)
    ours = min(("fused", "fused bf16"), key=ms.__getitem__)
    memory = {swapped: measure_memory(size, sparsity, swapped)["with_adamw_mb"] for swapped in (False, True)}
    added = {"fp32": memory[False] + steps["fp32"].saved_mb, "best": memory[False] + steps[best].saved_mb,
             "int8": memory[True] + steps[ours].saved_mb}  # fmt: skip
    return {"step_ms": {"fp32": ms["fp32"], "best": ms[best], "int8": ms[ours]}, "added_mb": added, "busy": 1.0,
            "best_mode": best, "environment": environment()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.0)
    parser.add_argument("--kind", choices=list(KINDS), default="dense")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="as always")
    parser.add_argument("--quick", action="store_true")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
