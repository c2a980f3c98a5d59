"""A transformer of the size of a small language model, pruned: training steps, saved memory and memory of weights.

Six blocks of width 512 (pre-LayerNorm, causal attention of eight heads, GELU), a vocabulary of 8,192 tokens, eight
sequences of 256 tokens. All linear layers, the head included, have the given fraction of zeros at random positions. A
step is forward, loss, backward, and the update by AdamW. Dense networks do not pay for keeping their zeros; they run in
float32 (torch's own linear layers, which may take MKL, and oneDNN's) and under bfloat16 autocast. Ours are swapped with
min_sparsity=0, each layer as swap_modules_with_sparse's stopwatch finds best, and trained one after the other (int8) or
in blocks (fused), in float32 beside the products or under the same autocast. "products" says how each layer's three
products (input, gradient, weight gradient) walk the weight: lists or dense rows.

Memory of weights is what a process of its own has more than before it made the network, when what is free has been
given back to the system: after steps of SGD (weights, gradients, patterns, lists; "weights"), and after one of AdamW
(two moments a weight more; "with AdamW"). Products take there what plans choose by themselves. Embeddings (17 MB with
their gradients) are dense and part of all.

  python benchmarks/language_model.py --threads 1 --json language_model.json
  python benchmarks/language_model.py --parts memory --threads 1
  python benchmarks/language_model.py --profile --threads 1 --sparsity 0.7      where our milliseconds go
  python benchmarks/language_model.py --no-bf16           on a processor that emulates bfloat16
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _common as common
import torch
import torch.nn.functional as F
from _networks import LanguageModel
from _profile import profile_step, show_rows
from layers import OneDnnLinear, has_onednn_linear
from torch import Tensor, nn
from torch.profiler import record_function

from qsparseprop.nn._base import SparseModule
from qsparseprop.utils.measurement_utils import current_rss_mb, release_free_memory, saved_for_backward_bytes
from qsparseprop.utils.network_utils import swap_modules_with_sparse


@dataclass(frozen=True)
class Size:
    """A network, and the tokens of a step."""

    vocabulary: int = 8192
    width: int = 512
    depth: int = 6
    heads: int = 8
    sequences: int = 8
    length: int = 256

    def build(self, sparsity: float) -> LanguageModel:
        """With zeros in all linear layers."""
        torch.manual_seed(0)
        model = LanguageModel(self.vocabulary, self.length, self.width, self.depth, self.heads)
        for seed, module in enumerate(model.modules()):
            if isinstance(module, nn.Linear):
                common.put_zeros(module.weight, sparsity, seed)
        return model.train()

    def tokens(self) -> Tensor:
        """Random ones, one more than the network reads: what follows the last is a target."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.sequences, self.length + 1), generator=generator)


FULL, QUICK = Size(), Size(64, 16, 2, 2, 2, 8)
#: Trained in a process before anything is measured, so that what kernels and torch load once does not count.
WARM_UP = Size(64, 64, 1, 2, 2, 32)


@dataclass(frozen=True)
class Setting:
    """A column of the table: a group of the race, and how the network is run."""

    name: str
    group: str
    bf16: bool = False
    swapped: bool = False
    fuse: bool = False
    onednn: bool = False


SETTINGS = (
    Setting("fp32", common.DENSE), Setting("fp32 oneDNN", common.DENSE, onednn=True),
    Setting("bf16", common.DENSE, bf16=True),
    Setting("int8", "int8", swapped=True), Setting("int8 bf16", "int8", swapped=True, bf16=True),
    Setting("fused", "fused", swapped=True, fuse=True),
    Setting("fused bf16", "fused", swapped=True, fuse=True, bf16=True),
)  # fmt: skip


class _TokensOneDnn(OneDnnLinear):
    """Of a batch of sequences."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _through_onednn(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                layer = _TokensOneDnn(child.in_features, child.out_features, child.bias is not None)
                layer.load_state_dict(child.state_dict())
                setattr(parent, name, layer)


class Step:
    """A training step of a copy of a network in one setting.

    Attributes
    ----------
    model : nn.Module
    saved_mb : float
        What the step keeps for the backward pass.
    layers : list of dict
        The report of the swap, without what the modules say; empty where nothing was swapped.
    """

    def __init__(self, setting: Setting, model: nn.Module, tokens: Tensor, quick: bool) -> None:
        self.model = copy.deepcopy(model)
        self._bf16 = setting.bf16
        self._inputs, self._targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
        self.layers: list[dict[str, Any]] = []
        if setting.onednn:
            _through_onednn(self.model)
        if setting.swapped:
            self._swap(setting.fuse, stopwatch=not quick)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.forward()  # from which layers guess what will become of their results
        self.saved_mb = saved_for_backward_bytes(self.forward, self.model) / 1e6

    def _swap(self, fuse: bool, stopwatch: bool) -> None:
        def run(model: nn.Module) -> Tensor:
            return self._loss(model)

        swap_modules_with_sparse(self.model, run, verbose=False, min_sparsity=0.0, fuse=fuse, include_dense=stopwatch)
        for decision in self.model.swap_report:
            keys = ("name", "shape", "dense_ms", "sparse_ms", "products", "swapped", "reason")
            self.layers.append({key: getattr(decision, key) for key in keys})

    def _loss(self, model: nn.Module) -> Tensor:
        with common.precision(self._bf16):
            return F.cross_entropy(model(self._inputs).flatten(0, 1), self._targets)

    def forward(self) -> Tensor:
        """The loss."""
        return self._loss(self.model)

    def __call__(self) -> None:
        with record_function("forward"):
            loss = self.forward()
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            self._optimizer.step()
            self._optimizer.zero_grad()


def _kind(name: str) -> str:
    """Which of a block's layers it is, or the head."""
    return ".".join(name.split(".")[2:]) or name


def products_of(step: Step) -> dict[str, str]:
    """How the products of each kind of layer walk the weight, as "dense", "list" or one for each of the three."""
    found: dict[str, dict[str, int]] = {}
    for name, module in step.model.named_modules():
        if isinstance(module, SparseModule):
            ways, way = found.setdefault(_kind(name), {}), str(module.product_modes)
            ways[way] = ways.get(way, 0) + 1
    for layer in step.layers:
        if not layer["swapped"]:
            ways = found.setdefault(_kind(layer["name"]), {})
            ways["stays dense"] = ways.get("stays dense", 0) + 1
    return {kind: ", ".join(f"{way}" + (f" ({n})" if len(ways) > 1 else "") for way, n in ways.items())
            for kind, ways in found.items()}  # fmt: skip


def chosen(args: argparse.Namespace) -> list[Setting]:
    """The settings that this run has."""
    return [s for s in SETTINGS
            if s.name in args.only and not (args.no_bf16 and s.bf16) and (has_onednn_linear() or not s.onednn)]


def compare(args: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """Race all settings for each thread count and sparsity."""
    settings, results = chosen(args), []
    for threads in args.threads:
        torch.set_num_threads(threads)
        common.say(f"\ntraining step in ms, {threads} thread{'s' if threads > 1 else ''}\n")
        groups = list(dict.fromkeys(s.group for s in settings if s.swapped))
        table = common.Table(["zeros", *(s.name for s in settings), "best dense", *(f"x {g}" for g in groups)], 6)
        for sparsity in args.sparsity:
            model, tokens = size.build(sparsity), size.tokens()
            steps = {s.name: Step(s, model, tokens, args.quick) for s in settings}
            result = common.race([common.Competitor(s.name, s.group, steps[s.name]) for s in settings], args)
            result = {"threads": threads, "sparsity": sparsity, **result,
                      "saved_mb": {name: step.saved_mb for name, step in steps.items()},
                      "products": {name: products_of(step) for name, step in steps.items() if step.layers},
                      "layers": {name: step.layers for name, step in steps.items() if step.layers}}  # fmt: skip
            results.append(result)
            table.row(f"{100 * sparsity:g} %", *common.ms_cells(result), result["best"].get(common.DENSE),
                      *(result["ratio"].get(g) for g in groups))  # fmt: skip
    common.say("\nx: time of the best dense setting / time of our best in the group")
    return results


def show_saved_and_products(results: Sequence[dict[str, Any]]) -> None:
    """Print what waits for the backward pass, and how products were computed."""
    common.say("\nMB saved for the backward pass\n")
    table = common.Table(["zeros", *results[0]["saved_mb"]], 6)
    for result in {r["sparsity"]: r for r in results}.values():
        table.row(f"{100 * result['sparsity']:g} %", *result["saved_mb"].values())
    common.say("\nproducts (input / gradient / weight gradient)\n")
    for result in results:
        for name, products in result["products"].items():
            ways = "; ".join(f"{kind} {way}" for kind, way in products.items())
            common.say(f"{100 * result['sparsity']:g} %, {result['threads']} thread(s), {name}: {ways}")


def show_profiles(args: argparse.Namespace, size: Size) -> list[dict[str, Any]]:
    """Profile one setting for each thread count and sparsity."""
    setting, results = next(s for s in SETTINGS if s.name == args.profile), []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for sparsity in args.sparsity:
            step = Step(setting, size.build(sparsity), size.tokens(), args.quick)
            ms = common.race([common.Competitor(setting.name, setting.group, step)], args)["ms"][setting.name]
            rows = profile_step(step, args.quick)
            show_rows(f"language model, {setting.name}", rows, ms, sparsity, threads)
            results.append({"setting": setting.name, "threads": threads, "sparsity": sparsity, "step_ms": ms,
                            "rows_ms": rows})  # fmt: skip
    return results


def _resident_mb() -> float:
    release_free_memory()
    return current_rss_mb()


def _trained(size: Size, sparsity: float, swapped: bool, then: Callable[[], float]) -> tuple[float, float, nn.Module]:
    """What `then` gives after steps of SGD and after one of AdamW; and the network, so that it is there meanwhile."""
    model, tokens = size.build(sparsity), size.tokens()
    if swapped:
        swap_modules_with_sparse(model, None, verbose=False, min_sparsity=0.0, include_dense=False)
    measured = []
    for make, steps in ((torch.optim.SGD, 2), (torch.optim.AdamW, 1)):
        optimizer = make(model.parameters(), lr=1e-6)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=False)
            F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
        measured.append(then())
    return measured[0], measured[1], model


def measure_memory(size: Size, sparsity: float, swapped: bool) -> dict[str, float]:
    """MB that a network adds to this process."""
    _trained(WARM_UP, sparsity, swapped, _resident_mb)
    before = _resident_mb()
    weights, with_adamw, model = _trained(size, sparsity, swapped, _resident_mb)
    parameters = sum(p.numel() for p in model.parameters())
    return {"mb": weights - before, "with_adamw_mb": with_adamw - before, "parameters": parameters}


def _in_a_process(threads: int, quick: bool, sparsity: float, swapped: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", json.dumps([threads, quick, sparsity, swapped])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def weights_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Memory of weights for each sparsity, each figure of a process of its own."""
    common.say("\nMB of weights and gradients, and with AdamW's moments\n")
    table = common.Table(["zeros", "dense", "sparse", "share", "dense, AdamW", "sparse, AdamW", "share"], 6)
    results = []
    for sparsity in args.sparsity:
        dense, sparse = (_in_a_process(args.threads[0], args.quick, sparsity, swapped) for swapped in (False, True))
        both = [(dense[key], sparse[key]) for key in ("mb", "with_adamw_mb")]
        table.row(f"{100 * sparsity:g} %",
                  *(cell for a, b in both for cell in (a, b, f"{100 * b / a:.0f} %" if a > 0 else None)))
        results.append({"sparsity": sparsity, "threads": args.threads[0], "dense": dense, "sparse": sparse})
    return results


PARTS = ("steps", "memory")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.make_parser(__doc__, repeats=5, sparsity=(0.5, 0.7, 0.9), threads=(1, 2))
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="(default: both)")
    names = [s.name for s in SETTINGS]
    parser.add_argument("--only", choices=names, nargs="+", default=names, metavar="SETTING",
                        help="columns of the table, of " + ", ".join(map(repr, names)) + " (default: all)")  # fmt: skip
    parser.add_argument("--no-bf16", action="store_true",
                        help="leave out bfloat16 autocast (for processors that emulate it)")  # fmt: skip
    parser.add_argument("--profile", nargs="?", const="fused", metavar="SETTING", choices=names,
                        help="instead: time by kind of operator, of this column of the table (default: %(const)s)")
    parser.add_argument("--measure", metavar="JSON", help="print the MB of one network: how processes are started")
    given, _ = parser.parse_known_args(argv)
    if given.measure is not None:
        threads, quick, sparsity, swapped = json.loads(given.measure)
        torch.set_num_threads(threads)
        print(json.dumps(measure_memory(QUICK if quick else FULL, sparsity, swapped)))
        return
    args, document = common.start("language_model", parser, argv)
    size = QUICK if args.quick else FULL
    if args.profile:
        document["profiles"] = show_profiles(args, size)
    elif "steps" in args.parts:
        document["results"] = compare(args, size)
        show_saved_and_products(document["results"])
        common.remark_noise(document["results"])
    if "memory" in args.parts and not args.profile:
        document["memory"] = weights_memory(args)
    common.write_json(args.json, document)


if __name__ == "__main__":
    main()
