"""Linear layers and their activations: training steps of networks made of them, with and without blocks.

"mlp gelu" and "mlp relu" are the feed-forward part of a transformer (768 -> 3072 -> 768 features at 2,048 rows), "vit"
is a whole one (four layers of width 384, 64 tokens of each of 64 images). "gated" is a feed-forward part with a gate,
``down(silu(gate(x)) * up(x))`` (2,048 features inside), as language models have it. All linear layers but the
classifier have the given fraction of zeros, at random positions, and are sparse modules in our network: one after the
other with torch's activations (int8), or in blocks with them, which read packed results (fused). Dense networks run in
float32 and under bfloat16 autocast, and do not pay for keeping their zeros. The step of "mlp" and "gated" is forward
and backward, that of "vit" also loss and update.

  python benchmarks/mlp.py --json mlp.json
  python benchmarks/mlp.py --only "mlp gelu" --threads 1 --sparsity 0.95
  python benchmarks/mlp.py --no-bf16            on a processor that emulates bfloat16, half a minute a step
  python benchmarks/mlp.py --profile --only gated vit --threads 1      where our milliseconds go
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import _common as common
import torch
import torch.nn.functional as F
from _networks import vit
from _profile import profile_step, show_rows
from torch import nn
from torch.autograd.graph import increment_version
from torch.profiler import record_function

from qsparseprop.utils.measurement_utils import saved_for_backward_bytes
from qsparseprop.utils.network_utils import swap_modules_with_sparse

NETWORKS = ("mlp gelu", "mlp relu", "gated", "vit")
#: Name, group, bfloat16 autocast, blocks.
SETTINGS = (("fp32", common.DENSE, False, False), ("bf16", common.DENSE, True, False), ("int8", "int8", False, False),
            ("fused", "fused", False, True))  # fmt: skip


class Gated(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def build(name: str, quick: bool) -> tuple[nn.Module, torch.Tensor]:
    """A network and its input."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    if name == "vit":
        return vit(), torch.randn(2 if quick else 64, 3, 32, 32, generator=generator)
    width, rows = (16, 8) if quick else (768, 2048)
    if name == "gated":
        return Gated(width, width * 8 // 3), torch.randn(rows, width, generator=generator)
    activation = nn.GELU() if name == "mlp gelu" else nn.ReLU()
    model = nn.Sequential(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))
    return model, torch.randn(rows, width, generator=generator)


def training_step(
    name: str, model: nn.Module, x: torch.Tensor, bf16: bool, swapped: bool, fuse: bool, sparsity: float
) -> tuple[Callable[[], None], float]:
    """A step of a copy of the network, and the megabytes that it keeps for the backward pass."""
    model = copy.deepcopy(model).train()
    if swapped:
        swap_modules_with_sparse(model, x, verbose=False, min_sparsity=max(sparsity - 0.01, 0.0), include_dense=False,
                                 skip_modules=("head", "patches") if name == "vit" else (), fuse=fuse)  # fmt: skip
    if name == "vit":
        labels = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def forward() -> torch.Tensor:
            with common.precision(bf16):
                return F.cross_entropy(model(x), labels)

        def step() -> None:
            with record_function("forward"):
                loss = forward()
            with record_function("backward"):
                loss.backward()
            with record_function("update"):
                optimizer.step()
                optimizer.zero_grad()
    else:
        x = x.requires_grad_()  # as within a network
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

        def forward() -> torch.Tensor:
            with common.precision(bf16):
                return model(x)

        def step() -> None:
            with record_function("forward"):
                y = forward()
            with record_function("backward"):
                y.backward(grad.to(y.dtype))
            model.zero_grad()
            x.grad = None
            increment_version(model.parameters())  # as an optimizer would: codes of an unchanged weight are kept

    forward()  # from which layers guess what will become of their results
    return step, saved_for_backward_bytes(forward, model) / 1e6


def with_zeros(model: nn.Module, sparsity: float) -> nn.Module:
    """A copy with zeros in all linear layers but the classifier."""
    pruned = copy.deepcopy(model)
    for seed, (layer, module) in enumerate(pruned.named_modules()):
        if isinstance(module, nn.Linear) and layer != "head":
            common.put_zeros(module.weight, sparsity, seed)
    return pruned


def show_profiles(args: argparse.Namespace, networks: Sequence[str]) -> list[dict[str, Any]]:
    """Profile one setting for each network, thread count and sparsity."""
    setting, group, bf16, fuse = next(s for s in SETTINGS if s[0] == args.profile)
    results = []
    for name, threads, sparsity in itertools.product(networks, args.threads, args.sparsity):
        torch.set_num_threads(threads)
        model, x = build(name, args.quick)
        step, _ = training_step(name, with_zeros(model, sparsity), x, bf16, group != common.DENSE, fuse, sparsity)
        ms = common.race([common.Competitor(setting, group, step)], args)["ms"][setting]
        rows = profile_step(step, args.quick)
        show_rows(f"{name}, {setting}", rows, ms, sparsity, threads)
        results.append({"network": name, "setting": setting, "threads": threads, "sparsity": sparsity, "step_ms": ms,
                        "rows_ms": rows})  # fmt: skip
    return results


def compare(args: argparse.Namespace, networks: Sequence[str]) -> list[dict[str, Any]]:
    """Race all settings for each network, thread count and sparsity."""
    settings = [s for s in SETTINGS if not (args.no_bf16 and s[2])]
    results = []
    for name, threads in itertools.product(networks, args.threads):
        torch.set_num_threads(threads)
        model, x = build(name, args.quick)
        common.say(f"\n{name}: training step in ms and MB saved for the backward pass, {threads} "
                   f"thread{'s' if threads > 1 else ''}\n")
        table = common.Table(["zeros", *(s[0] for s in settings), "best dense", "x int8", "x fused",
                              *(f"MB {s[0]}" for s in settings)], 6)  # fmt: skip
        for sparsity in args.sparsity:
            pruned = with_zeros(model, sparsity)
            steps = {n: training_step(name, pruned, x, bf16, group != common.DENSE, fuse, sparsity)
                     for n, group, bf16, fuse in settings}  # fmt: skip
            result = common.race([common.Competitor(n, group, steps[n][0]) for n, group, *_ in settings], args)
            result = {"network": name, "threads": threads, "sparsity": sparsity,
                      "saved_mb": {n: saved for n, (_, saved) in steps.items()}, **result}  # fmt: skip
            results.append(result)
            table.row(f"{100 * sparsity:g} %", *common.ms_cells(result), result["best"][common.DENSE],
                      result["ratio"]["int8"], result["ratio"]["fused"], *result["saved_mb"].values())
    common.say("\nx: time of the best dense setting / time of ours")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.make_parser(__doc__, repeats=5, sparsity=(0.9, 0.95), threads=(1, 2))
    parser.add_argument("--only", choices=NETWORKS, nargs="+", default=NETWORKS, help="networks (default: all)")
    parser.add_argument("--no-bf16", action="store_true",
                        help="leave out dense bfloat16 (for processors that emulate it)")  # fmt: skip
    parser.add_argument("--profile", nargs="?", const="fused", metavar="SETTING", choices=[s[0] for s in SETTINGS],
                        help="instead: time by kind of operator, of this column of the table (default: %(const)s)")
    args, document = common.start("mlp", parser, argv)
    if args.profile:
        document["profiles"] = show_profiles(args, args.only)
    else:
        document["results"] = compare(args, args.only)
        common.remark_noise(document["results"])
    common.write_json(args.json, document)


if __name__ == "__main__":
    main()
