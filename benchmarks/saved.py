"""What compress_saved_tensors costs, what it saves, and how far it moves gradients: ResNet-18, 32 x 32 pixels.

Forward, loss and backward of the dense network in float32 (contiguous and channels_last), of the swapped one, and of
the swapped one in blocks (fuse=True), each with and without the context, in turns. "costs" is the median of the ratios
of neighbouring steps, "least" the ratio of the fastest ones; "saved" counts what waits for the backward pass, its share
is of the dense network's; "error" is the relative distance of all gradients together. The swapped networks round theirs
at random, with the same random numbers, but a gradient that is a little different may be rounded to the other side.
That is no more than the noise of another seed ("other seed", the distance of two steps without the context) and has no
bias: "mean error" is the distance of the means over --seeds seeds, in which such flips average out.

  python benchmarks/saved.py --threads 1 --sparsity 0.95          four minutes
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _common import Table, make_parser, precision, say, start, write_json
from torch import nn

from qsparseprop.training.models import resnet18, resnet20
from qsparseprop.utils.measurement_utils import saved_for_backward_bytes
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent
from qsparseprop.utils.saved_tensors import compress_saved_tensors

#: The first one is what the others' memory is compared with.
KINDS = ("dense", "dense cl", "swapped cl", "blocks cl")


def networks(sparsity: float, quick: bool) -> dict[str, nn.Module]:
    """The same pruned network in each kind."""
    torch.manual_seed(0)
    dense = (resnet20(width=8) if quick else resnet18()).train()
    layerwise_magnitude_prune(dense, sparsity)
    make_pruning_permanent(dense)
    result = {"dense": dense, "dense cl": copy.deepcopy(dense).to(memory_format=torch.channels_last)}
    for name, fuse in (("swapped cl", False), ("blocks cl", True)):
        model = copy.deepcopy(result["dense cl"])
        result[name] = swap_modules_with_sparse(model, (64, 3, 32, 32), verbose=False, include_dense=False,
                                                min_sparsity=0.5, fuse=fuse)  # fmt: skip
    return result


def _loss(model: nn.Module, x: torch.Tensor, compress: bool, bf16: bool) -> torch.Tensor:
    with compress_saved_tensors() if compress else contextlib.nullcontext(), precision(bf16):
        return F.cross_entropy(model(x), torch.arange(len(x)) % 10)


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def _gradients(loss: Callable[[bool], torch.Tensor], model: nn.Module, compress: bool, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    model.zero_grad()
    loss(compress).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(args: Any, sparsity: float) -> list[dict[str, Any]]:
    """A row for each kind of network."""
    batch = 8 if args.quick else 64
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = networks(sparsity, args.quick)
    steps, rows = {}, []
    for kind, model in models.items():
        images = x if kind == "dense" else x.to(memory_format=torch.channels_last)

        def loss(compress: bool, model: nn.Module = model, images: torch.Tensor = images) -> torch.Tensor:
            return _loss(model, images, compress, args.bf16)

        plain, packed = (_gradients(loss, model, compress) for compress in (False, True))
        row = {"sparsity": sparsity, "kind": kind, "error": _distance(packed, plain), "other_seed": 0.0,
               "mean_error": None}  # fmt: skip
        if kind not in ("dense", "dense cl"):  # the dense ones have no random numbers
            row["other_seed"] = _distance(_gradients(loss, model, False, 2), plain)
            for seed in range(2, args.seeds + 1):
                plain, packed = (mean + _gradients(loss, model, compress, seed)
                                 for mean, compress in ((plain, False), (packed, True)))  # fmt: skip
            row["mean_error"] = _distance(packed, plain)
        saved, kept = (saved_for_backward_bytes(lambda c=c, loss=loss: loss(c), model) / 1e6 for c in (False, True))
        rows.append({**row, "saved_mb": saved, "kept_mb": kept})
        for compress in (False, True):
            steps[kind, compress] = lambda c=compress, loss=loss, model=model: _gradients(loss, model, c)
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in steps}
    for _ in range(args.repeats):
        for key, step in steps.items():
            begin = time.perf_counter()
            step()
            times[key].append(1e3 * (time.perf_counter() - begin))
    for row in rows:
        plain, packed = times[row["kind"], False], times[row["kind"], True]
        row["ms"], row["compressed_ms"] = statistics.median(plain), statistics.median(packed)
        row["cost"] = statistics.median(b / a for a, b in zip(plain, packed, strict=True)) - 1
        row["least_cost"] = min(packed) / min(plain) - 1
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser(__doc__, repeats=7, sparsity=(0.95,), threads=(1,))
    parser.add_argument("--seeds", type=int, default=16, metavar="N", help="of the mean error (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast, all of them")
    args, document = start("saved", parser, argv)
    document["results"] = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for sparsity in args.sparsity:
            say(f"\n{100 * sparsity:g} % zeros, {threads} thread(s)\n")
            rows = measure(args, sparsity)
            whole = rows[0]["saved_mb"]
            table = Table(("network", "ms", "compressed", "costs %", "least %", "saved MB", "compressed", "share %",
                           "error %", "other seed %", "mean error %"), first=12)  # fmt: skip
            for row in rows:
                percent = [None if v is None else 100 * v
                           for v in (row["cost"], row["least_cost"], row["kept_mb"] / whole, row["error"],
                                     row["other_seed"], row["mean_error"])]  # fmt: skip
                table.row(row["kind"], row["ms"], row["compressed_ms"], *percent[:2], row["saved_mb"], row["kept_mb"],
                          *percent[2:])
                document["results"].append({**row, "threads": threads})
    write_json(args.json, document)


if __name__ == "__main__":
    main()
