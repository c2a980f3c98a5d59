"""What it is worth to keep the codes of a weight: evaluation and accumulated gradients of linear layers.

"anew" counts the weight as changed before each call, as a step of an optimizer does, so that it is quantised again. One
layer finds its weight in the caches; of several in turn none does where all together are larger than these.

  python benchmarks/kept.py
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _common import Competitor, Table, make_parser, put_zeros, race, say, start, write_json
from torch import nn
from torch.autograd.graph import increment_version

from qsparseprop.layout.modes import Modes
from qsparseprop.nn import QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig

BATCHES = (1, 16, 64, 256)
#: Layers that take turns, and calls that are timed together.
LAYERS = (1, 16)
CALLS = 16
#: Forward and backward passes between two steps, where gradients are accumulated.
PARTS = 4


def make_layers(dense: nn.Linear, count: int, mode: str) -> list[QuantizedSparseLinear]:
    """Layers of one weight each, whose products go one way."""
    layers = []
    for _ in range(count):
        layer = QuantizedSparseLinear.from_dense(dense, qconfig=QuantConfig(granularity="tensor"))
        layer.product_modes = Modes(mode, mode, mode)
        layers.append(layer)
    return layers


def evaluation(layers: list[QuantizedSparseLinear], batch: int, anew: bool) -> Callable[[], None]:
    """Calls of layers in turn, on inputs that differ."""
    inputs = [torch.randn(batch, layers[0].in_features) for _ in range(2)]

    def calls() -> None:
        with torch.no_grad():
            for i in range(CALLS):
                layer = layers[i % len(layers)]
                if anew:
                    increment_version(layer.weight)
                layer(inputs[i % 2])

    return calls


def accumulation(layers: list[QuantizedSparseLinear], batch: int, anew: bool) -> Callable[[], None]:
    """Forward and backward passes of layers in turn, and after `PARTS` of each what counts as a step."""
    x = torch.randn(batch, layers[0].in_features, requires_grad=True)
    dy = torch.randn(batch, layers[0].out_features)

    def calls() -> None:
        for i in range(CALLS):
            layer = layers[i % len(layers)]
            if anew or i // len(layers) % PARTS == 0:
                increment_version(layer.weight)
            layer(x).backward(dy)
            x.grad = None

    return calls


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser(__doc__, repeats=25, sparsity=(0.5, 0.9), threads=(1, 2))
    args, document = start("kept", parser, argv)
    features = 32 if args.quick else 1024
    document["results"] = []
    for threads, sparsity in itertools.product(args.threads, args.sparsity):
        torch.set_num_threads(threads)
        mode = "dense" if sparsity < 0.6 else "list"
        say(f"\nmicroseconds of a layer, linear {features}x{features}, {100 * sparsity:g} % zeros ({mode}), {threads} "
            f"thread{'s' if threads > 1 else ''}\n")  # fmt: skip
        dense = nn.Linear(features, features)
        put_zeros(dense.weight, sparsity)
        table = None
        for count, batch in itertools.product(LAYERS, BATCHES):
            kinds: list[tuple[str, Any, int]] = [("evaluation", evaluation, count)]
            if count * PARTS <= CALLS:
                kinds.append((f"{PARTS} parts", accumulation, count))
            competitors = []
            for (name, make, number), anew in itertools.product(kinds, (True, False)):
                key = f"{name}, {'anew' if anew else 'kept'}"
                competitors.append(Competitor(key, key, make(make_layers(dense, number, mode), batch, anew)))
            us = {name: 1e3 * ms / CALLS for name, ms in race(competitors, args)["ms"].items()}
            document["results"].append({"threads": threads, "sparsity": sparsity, "layers": count, "batch": batch,
                                        "us": us})  # fmt: skip
            if table is None:
                table = Table(["layers", "batch", *us])
            table.row(str(count), str(batch), *us.values(), *[None] * (4 - len(us)))
    write_json(args.json, document)


if __name__ == "__main__":
    main()
