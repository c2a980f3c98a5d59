"""How much of common architectures runs in chains, written to docs/architectures.md.

Each network, small and with few inputs, is pruned in every layer and swapped (include_dense=False, fuse=True), and does
one training step. Its operations are counted, and its gradients compared with those of the dense network and of the
same sparse layers without chains. Networks of packages that are not installed are left out.

  python benchmarks/architectures.py                             five minutes
  python benchmarks/architectures.py --only resnet --output -    some of them, printed only
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _architectures import ARCHITECTURES, Architecture
from _common import say
from _differential import distance, existing, flops, pruned, run_step, swapped

from qsparseprop.nn.deferred import conditions
from qsparseprop.utils.fusion import Chain
from qsparseprop.utils.measurement_utils import environment

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
PACKAGES = ("torchvision", "timm", "transformers")
TITLES = ("network", "layers swapped", "of the FLOPs", "in chains", "input packed", "gradients, unfused",
          "gradients, in chains", "what follows the layers")  # fmt: skip

HEAD = """\
# Architectures

What becomes of common networks: `{command}` has written this page ({versions}; {date}).

Every network is made small, with random weights and few inputs ({zeros} of each layer's weights are pruned, the
smallest ones), swapped with `include_dense=False, fuse=True`, and does one training step as its package makes it, with
dropout where it has any.

- *layers swapped*: of all linear, convolutional and transposed convolutional layers.
- *of the FLOPs*: the share of these layers' operations (two for each weight and place, zeros counted) that swapped
  layers do.
- *in chains*: of the swapped layers' operations, the share of layers that something was taken up behind (batch
  normalisation, addition, activation), or that took their input packed from the chain before.
- *input packed*: the share of the latter.
- *gradients*: relative distance of all gradients together from those of the same network in dense float32. Where it is
  near 1 and more, a network with so many zeros and so few pixels for each batch normalisation multiplies the noise of
  8 bits (or any other) from layer to layer, and gradients of a single step cannot be compared; what counts is that
  chains add nothing to it. To have less of that, batch normalisations are given an eps of 0.1 here.
- *what follows the layers*: the most frequent chains, by operations; a dash stands for layers that nothing was taken up
  behind.

`tests/test_architectures.py` runs the same networks, and wants outputs, gradients and running statistics that are the
same, deferred or computed one by one.
"""

TAIL = """\
## What is not in chains

- Linear layers that only LayerNorm or RMSNorm stands before and only attention behind, queries, keys and values above
  all: a quarter of a transformer's operations, more where keys and values are many.
- What stands behind an active dropout (BERT, GPT-2 and T5 in training) or an active stochastic depth: random numbers
  are drawn in between, so that the addition that follows sees an ordinary tensor.
- Products of two results, as in `up(x) * silu(gate(x))` (Llama) and in squeeze-and-excitation.
- GELU that is written out as a formula (`gelu_new`, GPT-2's own), and layers of transformers' `Conv1D`.
- Views between a linear layer and its normalisation (LeViT), and the ends of a network, whose results are only read.
"""


@dataclass(frozen=True)
class Row:
    """Of one network; shares are fractions.

    Attributes
    ----------
    swapped_share, chained_share, packed_share : float
        Of all layers' operations, and of the swapped ones'.
    unfused, fused : float
        Distance of gradients from the dense network's.
    apart : float
        Distance of the latter two.
    followed : dict of str to float
        Share of the swapped operations by what was taken up behind the layer.
    """

    name: str
    package: str
    layers: int
    swapped: int
    flops: float
    swapped_flops: float
    swapped_share: float
    chained_share: float
    packed_share: float
    unfused: float
    fused: float
    apart: float
    followed: dict[str, float]


def measure(architecture: Architecture, sparsity: float) -> Row:
    """One training step of a network, dense, unfused and in chains."""
    dense = pruned(architecture.make, sparsity)
    inputs = architecture.inputs()
    work = flops(dense, inputs)
    unfused, fused = swapped(dense, False), swapped(dense, True)
    masks = existing(fused)
    steps = [run_step(model, inputs) for model in (dense, unfused, fused)]
    chains = {name: steps[2].chains.get(name, Chain(False, ())) for name in work if f"{name}.weight" in masks}
    total = sum(work[name] for name in chains)
    followed: Counter[str] = Counter()
    for name, chain in chains.items():
        followed[", ".join(chain.joined)] += work[name] / total

    def share(names: Sequence[str]) -> float:
        return sum(work[name] for name in names) / total

    return Row(
        architecture.name, architecture.package, len(work), len(chains), sum(work.values()), total,
        total / sum(work.values()), share([name for name, chain in chains.items() if chain]),
        share([name for name, chain in chains.items() if chain.packed]), distance(steps[1], steps[0], masks),
        distance(steps[2], steps[0], masks), distance(steps[2], steps[1], masks), dict(followed.most_common()),
    )  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    most = [f"{name or '–'} {100 * share:.0f} %" for name, share in list(row.followed.items())[:3] if share >= 0.005]
    return (row.name, f"{row.swapped} of {row.layers}", _percent(row.swapped_share), _percent(row.chained_share),
            _percent(row.packed_share), f"{row.unfused:.3f}", f"{row.fused:.3f}", "; ".join(most))  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def overall(rows: Sequence[Row]) -> str:
    """The sentence that sums up."""
    total = sum(row.swapped_flops for row in rows)
    weighted = sum(row.swapped_flops * row.chained_share for row in rows) / total
    return (f"Over the {len(rows)} networks, {_percent(statistics.fmean(row.swapped_share for row in rows))} of the "
            f"operations are swapped, and {_percent(statistics.fmean(row.chained_share for row in rows))} of these run "
            f"in chains (mean of the networks; {_percent(weighted)} of all operations together).")  # fmt: skip


def page(rows: Sequence[Row], sparsity: float, versions: str, date: str) -> str:
    """The document."""
    parts = [HEAD.format(command="python benchmarks/architectures.py", versions=versions, date=date,
                         zeros=_percent(sparsity)), overall(rows) + "\n"]  # fmt: skip
    for package in dict.fromkeys(row.package for row in rows):
        own = package == "qsparseprop"
        lines = [f"## {'Own networks' if own else package}\n", _line(TITLES), _line(["---"] * len(TITLES))]
        lines += [_line(_cells(row)) for row in rows if row.package == package]
        parts.append("\n".join(lines) + "\n")
    return "\n".join([*parts, TAIL])


def main(argv: Sequence[str] | None = None) -> None:
    """See the docstring of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="networks whose name or package has one of the words")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of zeros (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--output", default=str(PAGE), metavar="FILE",
                        help="the page; - for none (default: docs/architectures.md)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    conditions.LEAST_ELEMENTS = 0  # chains form as at the networks' real sizes
    warnings.simplefilter("ignore")  # what other packages use is their own affair
    rows = []
    say(_line(TITLES))
    for architecture in ARCHITECTURES:
        words = f"{architecture.package} {architecture.name}"
        if architecture.available and (args.only is None or any(word in words for word in args.only)):
            rows.append(measure(architecture, args.sparsity))
            say(_line(_cells(rows[-1])))
    if not rows:
        parser.error("--only names no network that can be made here")
    say(f"\n{overall(rows)}")
    machine = environment()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES
                         if any(row.package == name for row in rows))  # fmt: skip
    versions = ", ".join(filter(None, [f"torch {machine['torch']}", versions]))
    if args.output != "-":
        Path(args.output).write_text(page(rows, args.sparsity, versions, machine["date"][:10]), encoding="utf-8")
        say(f"written: {args.output}")
    if args.json is not None:
        args.json.write_text(json.dumps({"environment": machine, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
