"""Forward + backward of single layers: qsparseprop against torch's dense layers.

Every competitor is a module under autograd: its input requires a gradient, the gradient of its output is given, and
all gradients are set to None before each step. Dense layers run in float32 and under bfloat16 autocast, convolutions
also channels_last (cl); their weights carry the same zeros. "fp32 oneDNN" is a float32 Linear whose three products go
through oneDNN, where torch itself may take MKL. Ours is measured in 8 bits (int8; int8 bf16 under the same autocast as
the dense layer, whose output and its gradient then are bfloat16) and in float32 (sparse fp32), convolutions with inputs
of both memory formats. A ratio is the time of the fastest dense competitor over that of our fastest one.

  python benchmarks/layers.py --json layers.json             everything: allow half an hour
  python benchmarks/layers.py --only linear --threads 1
  python benchmarks/layers.py --shape 3x3 b128 --sparsity 0.9
  python benchmarks/layers.py --overhead --small-batches     what a call costs, and time per sample by batch
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _common import (
    DENSE,
    Competitor,
    Table,
    geometric_mean,
    make_parser,
    ms_cells,
    put_zeros,
    race,
    remark_noise,
    say,
    start,
    training_step,
    write_json,
)
from _overhead import measure_overhead
from torch import Tensor, nn

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.utils.measurement_utils import interleaved_times

#: Speed-up over the best dense layer that int8 aims at on one thread: of each linear layer (the small one aside, which
#: aims at 1.5, 2, 3 and 4), and of the convolutions' geometric mean.
TARGETS: dict[tuple[str, float], float] = {
    ("linear", 0.8): 3.0,
    ("linear", 0.9): 5.0,
    ("linear", 0.95): 8.0,
    ("linear", 0.98): 11.0,
    ("conv 3x3", 0.8): 2.0,
    ("conv 3x3", 0.9): 4.0,
    ("conv 3x3", 0.95): 6.0,
    ("conv 3x3", 0.98): 8.0,
}

SMALL_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 17, 24, 32, 33, 48, 63, 64)


@dataclass(frozen=True)
class Layer:
    """A layer and the size of its input.

    Attributes
    ----------
    batch, inputs, outputs : int
        Batch and features or channels.
    size : int
        Height and width of the images; 0 for a linear layer.
    kernel, stride : int
        Of a convolution, whose padding is ``kernel // 2``.
    """

    batch: int
    inputs: int
    outputs: int
    size: int = 0
    kernel: int = 1
    stride: int = 1

    @property
    def kind(self) -> str:
        return "conv" if self.size else "linear"

    @property
    def name(self) -> str:
        if not self.size:
            return f"linear {self.batch}x{self.inputs}x{self.outputs}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        outputs = f">{self.outputs}" if self.outputs != self.inputs else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.inputs}@{self.size}{outputs} b{self.batch}"

    def build(self, sparsity: float) -> nn.Module:
        """The dense layer, with zeros."""
        if self.size:
            module: nn.Module = nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2,
                                          bias=False)
        else:
            module = nn.Linear(self.inputs, self.outputs)
        put_zeros(module.weight, sparsity)
        return module

    def input(self) -> Tensor:
        """A random input."""
        return torch.randn(self.batch, self.inputs, *([self.size] * 2 if self.size else []))


def resnet_layers(batch: int, size: int) -> list[Layer]:
    """The convolutions of a ResNet-18 but its first: `size` is the first stage's, with 64 channels."""
    layers = []
    for stage in range(4):
        channels, side = 64 << stage, size >> stage
        layers.append(Layer(batch, channels, channels, side, 3))
        if stage < 3:
            layers += [Layer(batch, channels, 2 * channels, side, kernel, 2) for kernel in (3, 1)]
    return layers


LAYERS = [
    Layer(512, 768, 3072), Layer(1024, 1024, 1024), Layer(2048, 768, 768), Layer(128, 512, 256),
    *resnet_layers(16, 56), *resnet_layers(128, 32),
]  # fmt: skip
QUICK_LAYERS = [Layer(8, 16, 12), Layer(2, 8, 8, 6, 3), Layer(2, 8, 16, 6, 1, 2)]


class _OneDnnProduct(torch.autograd.Function):
    """A float32 linear layer of which all three products go through oneDNN (torch.nn.Linear may take MKL)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        product = torch.ops.mkldnn._linear_pointwise
        bias_grad = dy.sum(0) if ctx.needs_input_grad[2] else None
        return product(dy, weight.t(), None, "none", [], ""), product(dy.t(), x.t(), None, "none", [], ""), bias_grad


class OneDnnLinear(nn.Linear):
    """torch.nn.Linear on `_OneDnnProduct`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, in_features]`` to ``[batch, out_features]``."""
        return _OneDnnProduct.apply(x, self.weight, self.bias)


def has_onednn_linear() -> bool:
    """Whether this build of torch has the operator that `OneDnnLinear` is made of."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def load_sparseprop() -> tuple[Any, str]:
    """Return SparseProp's modules, or None, and a sentence for the report."""
    try:
        import sparseprop.modules as modules

        return modules, f"SparseProp {importlib.metadata.version('sparseprop')}"
    except Exception as error:  # a compiled top-level module called `backend` may fail in many ways
        return None, (f"left out, since it cannot be imported ({type(error).__name__}: {error}); to have it, run "
                      "`pip install setuptools wheel pybind11 scipy && pip install --no-build-isolation --no-deps "
                      "sparseprop`")  # fmt: skip


def linear_competitors(dense: nn.Linear, x: Tensor, peer: Any = None) -> list[Competitor]:
    """All ways to compute a linear layer.

    Parameters
    ----------
    dense : nn.Linear
        With zeros; the others are made of it.
    x : Tensor
        ``[batch, in_features]``.
    peer : module, optional
        SparseProp's modules.
    """
    x.requires_grad_()
    dy = torch.randn(x.shape[0], dense.out_features)

    def competitor(name: str, group: str, module: nn.Module, bf16: bool = False) -> Competitor:
        return Competitor(name, group, training_step(module, x, dy.bfloat16() if bf16 else dy, bf16))

    competitors = [competitor("fp32", DENSE, dense), competitor("bf16", DENSE, copy.deepcopy(dense), True)]
    if has_onednn_linear():
        onednn = OneDnnLinear(dense.in_features, dense.out_features)
        onednn.load_state_dict(dense.state_dict())
        competitors.insert(1, competitor("fp32 oneDNN", DENSE, onednn))
    competitors += [
        competitor("int8", "int8", QuantizedSparseLinear.from_dense(dense)),
        competitor("int8 bf16", "int8", QuantizedSparseLinear.from_dense(dense), True),
        competitor("sparse fp32", "sparse fp32", SparseLinear.from_dense(dense)),
    ]
    if peer is not None:
        competitors.append(competitor("SparseProp", "SparseProp", peer.SparseLinear.from_dense(dense)))
    return competitors


def conv_competitors(dense: nn.Conv2d, x: Tensor, peer: Any = None) -> list[Competitor]:
    """All ways to compute a convolution; parameters as in `linear_competitors`."""
    with torch.no_grad():
        dy = torch.randn_like(dense(x))
    competitors = []
    for suffix, memory_format in (("", torch.contiguous_format), (" cl", torch.channels_last)):
        x_format = x.detach().clone(memory_format=memory_format).requires_grad_()
        dy_format = dy.clone(memory_format=memory_format)

        def competitor(name: str, group: str, module: nn.Module, bf16: bool = False, x: Tensor = x_format,
                       dy: Tensor = dy_format, suffix: str = suffix) -> Competitor:  # fmt: skip
            return Competitor(name + suffix, group, training_step(module, x, dy.bfloat16() if bf16 else dy, bf16))

        fp32, bf16 = (copy.deepcopy(dense).to(memory_format=memory_format) for _ in range(2))
        competitors += [
            competitor("fp32", DENSE, fp32),
            competitor("bf16", DENSE, bf16, True),
            competitor("int8", "int8", QuantizedSparseConv2d.from_dense(dense)),
            competitor("int8 bf16", "int8", QuantizedSparseConv2d.from_dense(dense), True),
            competitor("sparse fp32", "sparse fp32", SparseConv2d.from_dense(dense)),
        ]
        if peer is not None and not suffix:  # it reads any tensor as if it were contiguous
            candidates = [competitor("SparseProp", "SparseProp", peer.SparseConv2d.from_dense(dense, over_on))
                          for over_on in (False, True)]  # fmt: skip
            # one of the two is often ten times slower; as SparseProp does, choose before the race
            seconds = interleaved_times({str(i): c.step for i, c in enumerate(candidates)}, 1, warmup=0)
            competitors.append(candidates[seconds["1"] < seconds["0"]])
    order = ("fp32", "bf16", "int8", "int8 bf16", "sparse fp32", "SparseProp")
    return sorted(competitors, key=lambda c: order.index(c.name.removesuffix(" cl")))


def sweep(args: argparse.Namespace, layers: Sequence[Layer], peer: Any) -> list[dict[str, Any]]:
    """Race all layers at all sparsities and thread counts; print a table for each kind and thread count."""
    results = []
    for threads, (kind, members) in itertools.product(args.threads, _by_kind(layers)):
        torch.set_num_threads(threads)
        say(f"\n{kind}, forward + backward in ms, {threads} thread{'s' if threads > 1 else ''}\n")
        table = None
        for layer, sparsity in itertools.product(members, args.sparsity):
            torch.manual_seed(0)
            make = conv_competitors if layer.size else linear_competitors
            competitors = make(layer.build(sparsity), layer.input(), peer)
            result = race(competitors, args)
            results.append({"kind": kind, "layer": layer.name, "sparsity": sparsity, "threads": threads, **result})
            if table is None:
                table = Table(["layer", "zeros", *result["ms"], *(f"x {group}" for group in result["ratio"])])
            table.row(layer.name, f"{100 * sparsity:g} %", *ms_cells(result), *result["ratio"].values())
    return results


def _by_kind(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    kinds = {kind: [layer for layer in layers if layer.kind == kind] for kind in ("linear", "conv")}
    return [(kind, members) for kind, members in kinds.items() if members]


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return geometric mean and minimum of the ratios for each kind, sparsity, thread count and group."""
    say("\nbest dense time / time, over all layers of a kind\n")
    table = Table(["", "zeros", "threads", "layers", "mean", "minimum", "target", "met by", "slowest at"], first=20)
    summary = []
    # convolutions aim at a mean of those of 3x3 and stride 1
    results = results + [{**r, "kind": "conv 3x3"} for r in results if r["layer"].startswith("3x3 ")]
    keys = sorted({(r["kind"], group, r["threads"], r["sparsity"]) for r in results for group in r["ratio"]})
    for kind, group, threads, sparsity in keys:
        members = [r for r in results if (r["kind"], r["threads"], r["sparsity"]) == (kind, threads, sparsity)]
        ratios = {r["layer"]: r["ratio"][group] for r in members}
        worst = min(ratios, key=ratios.__getitem__)
        target = TARGETS.get((kind, sparsity)) if group == "int8" else None
        met = None if target is None else sum(ratio >= target for ratio in ratios.values())
        mean = geometric_mean(ratios.values())
        summary.append({"kind": kind, "group": group, "threads": threads, "sparsity": sparsity, "layers": len(ratios),
                        "geometric_mean": mean, "minimum": ratios[worst], "slowest": worst, "target": target,
                        "target_met_by": met})  # fmt: skip
        table.row(f"{kind} {group}", f"{100 * sparsity:g} %", str(threads), str(len(ratios)), mean, ratios[worst],
                  target, None if met is None else f"{met} of {len(ratios)}", worst)
    say("\nmean: geometric mean")
    return summary


def sweep_small_batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time a linear layer for batches of 1 to 64; a cliff is where the time per sample jumps up."""
    features = 32 if args.quick else 1024
    batches = SMALL_BATCHES[:3] if args.quick else SMALL_BATCHES
    dense = nn.Linear(features, features)
    put_zeros(dense.weight, 0.9)
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        say(f"\nmicroseconds per sample, forward + backward, linear {features}x{features}, 90 % zeros, {threads} "
            f"thread{'s' if threads > 1 else ''}; int8 ms is the whole batch\n")
        table = None
        for batch in batches:
            result = race(linear_competitors(dense, torch.randn(batch, features)), args)
            results.append({"batch": batch, "threads": threads, "sparsity": 0.9, **result})
            if table is None:
                table = Table(["batch", *result["ms"], "int8 ms", *(f"x {g}" for g in result["ratio"])], first=6)
            table.row(str(batch), *ms_cells(result, 1e3 / batch), result["ms"]["int8"],
                      *result["ratio"].values())
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser(__doc__, repeats=15, sparsity=(0.8, 0.9, 0.95, 0.98), threads=(1, 2))
    parser.add_argument("--only", choices=("linear", "conv"), help="one kind of layer")
    parser.add_argument("--shape", nargs="+", metavar="TEXT", default=[],
                        help="only layers in whose name every TEXT occurs; names are like `linear 512x768x3072` "
                             "(batch, inputs, outputs), `3x3 64@56 b16` and `3x3/2 64@56>128 b16` (kernel/stride, "
                             "channels@size>output channels, batch)")
    parser.add_argument("--overhead", action="store_true",
                        help="instead: what a call costs on small layers, above their kernels too, and the import")
    parser.add_argument("--small-batches", action="store_true",
                        help="instead: time per sample of a linear layer, batches of 1 to 64")
    parser.add_argument("--peers", action="store_true",
                        help="add SparseProp (PyPI: sparseprop) if it is installed. It is compiled with -ffast-math, "
                             "which lets the whole process flush denormal numbers to zero")
    args, document = start("layers", parser, argv)
    layers = [layer for layer in (QUICK_LAYERS if args.quick else LAYERS)
              if args.only in (None, layer.kind) and all(text in layer.name for text in args.shape)]
    if not layers:
        parser.error("no layer has such a name")
    peer = None
    if args.peers:
        peer, remark = load_sparseprop()
        say(f"peers        {remark}")
        document["peers"] = remark
    if args.overhead:
        document["overhead"] = measure_overhead(args)
    if args.small_batches:
        document["small_batches"] = sweep_small_batches(args)
    if not (args.overhead or args.small_batches):
        document["results"] = sweep(args, layers, peer)
        document["summary"] = summarise(document["results"])
        remark_noise(document["results"])
    write_json(args.json, document)


if __name__ == "__main__":
    main()
