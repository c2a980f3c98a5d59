"""What a layer's weights cost in memory: a Linear of 4096 x 4096 (--features), after training steps and at most.

Each figure is of a process of its own: the layer is made, pruned and swapped, trains for some steps of SGD with a
batch of 64, and what the process has more than before is measured when all that is free has been given back to the
system. The peak is the largest that the process had during these steps, the plan's making included; the old gradient is
there besides the new one then, since `zero_grad` sets gradients to zero here.

A dense weight with its gradient has 8 bytes an entry. A sparse one has 8 bytes a nonzero for these two; for the pattern
2 for the column, or a bit an entry where a third or more are there, or nothing where all are; and where products walk
lists 6 more for the list of the input gradient, and 2 for that of other products where the pattern has bits (small
layers some more, to save time). What figures have above that are activations and buffers, which do not grow with
the weight. The codes of dense rows, a byte an entry, are there during a product only, in memory that waits for the next
gradient if there is any.

"chosen" is what plans choose for each product, "lists" and "dense rows" are forced (QSPARSEPROP_PRODUCTS). "bytes" are
per nonzero.

  python benchmarks/weights_memory.py --threads 1          two minutes
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from _common import Table, make_parser, put_zeros, say, start, write_json
from torch import nn

from qsparseprop.nn import QuantizedSparseLinear
from qsparseprop.utils.measurement_utils import current_rss_mb, peak_rss_mb, release_free_memory, reset_peak_rss

BATCH, STEPS = 64, 3
#: Columns, and the products that they force.
KINDS = {"dense": None, "chosen": "auto", "lists": "list", "dense rows": "dense"}
#: What a plan makes for products that ask for it.
ROWS = ("forward", "backward", "dense_forward", "dense_backward")
#: Bytes of a value and its gradient; of its column and of the list of the input gradient.
OWN, LISTS = 4 + 4, 2 + 6


def _train(layer: nn.Module, features: int) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    x = torch.randn(BATCH, features, requires_grad=True)  # as in a network: the input wants its gradient, too
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        layer(x).square().mean().backward()
        optimizer.step()


def _resident_mb() -> float:
    release_free_memory()
    return current_rss_mb()


def measure(features: int, sparsity: float, swapped: bool) -> dict[str, Any]:
    """MB that a layer adds to this process, after training steps and at most, and which rows its products have made."""

    def made(size: int) -> nn.Module:
        layer = nn.Linear(size, size, bias=False)
        with torch.no_grad():
            layer.weight[layer.weight == 0] = 1e-6  # of so many random numbers one or two are zero
        put_zeros(layer.weight, sparsity)
        return QuantizedSparseLinear.from_dense(layer) if swapped else layer

    _train(made(128), 128)  # what the first use of the kernels loads
    before = _resident_mb()
    layer = made(features)
    release_free_memory()
    reset_peak_rss()  # what making the layer took is over
    _train(layer, features)
    peak = peak_rss_mb() - before
    added = _resident_mb() - before
    plans = layer._plans._kept.plans.values() if swapped else ()
    rows = sorted({name for plan in plans for name in ROWS if name in vars(plan)})
    return {"mb": added, "peak_mb": peak, "rows": rows}


def _in_a_process(threads: int, features: int, sparsity: float, kind: str) -> dict[str, Any]:
    products = KINDS[kind]
    environment = {**os.environ, "QSPARSEPROP_PRODUCTS": products or "auto"}
    call = [features, sparsity, products is not None, threads]
    command = [sys.executable, __file__, "--measure", json.dumps(call)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = make_parser(__doc__, repeats=1, sparsity=(0.0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95), threads=(1,))
    parser.add_argument("--features", type=int, default=4096, metavar="N",
                        help="inputs and outputs of the layer (default: %(default)s)")
    parser.add_argument("--measure", metavar="JSON", help="print the MB of one layer: what processes are started with")
    given, _ = parser.parse_known_args(argv)
    if given.measure is not None:
        features, sparsity, swapped, threads = json.loads(given.measure)
        torch.set_num_threads(threads)
        print(json.dumps(measure(features, sparsity, swapped)))
        return
    args, document = start("weights_memory", parser, argv)
    features = 256 if args.quick else args.features
    document["results"] = []
    for threads in args.threads:
        say(f"\nLinear {features} x {features}, batch {BATCH}, {threads} thread(s): MB after training steps, bytes per "
            "nonzero, and the peak meanwhile\n")  # fmt: skip
        table = Table(["zeros", "dense", "peak", *(t for kind in list(KINDS)[1:] for t in (kind, "bytes", "peak"))],
                      first=8)  # fmt: skip
        for sparsity in args.sparsity:
            nonzeros = features * features - round(sparsity * features * features)
            measured = {kind: _in_a_process(threads, features, sparsity, kind) for kind in KINDS}
            mb = {kind: result["mb"] for kind, result in measured.items()}
            peak = {kind: result["peak_mb"] for kind, result in measured.items()}
            per = {kind: 1e6 * mb[kind] / nonzeros for kind in list(KINDS)[1:]}
            table.row(f"{100 * sparsity:g} %", mb["dense"], peak["dense"],
                      *(cell for kind in per for cell in (mb[kind], per[kind], peak[kind])))  # fmt: skip
            rows = {kind: result["rows"] for kind, result in measured.items()}
            document["results"].append({"threads": threads, "features": features, "sparsity": sparsity,
                                        "nonzeros": nonzeros, "mb": mb, "peak_mb": peak, "bytes_per_nonzero": per,
                                        "rows": rows})  # fmt: skip
    say(f"\nbytes that a nonzero has of its own: {OWN}, and {LISTS} more where products walk lists")
    write_json(args.json, document)


if __name__ == "__main__":
    main()
