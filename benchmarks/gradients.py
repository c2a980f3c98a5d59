"""How far gradients of swapped networks are from float32's, batch by batch and in the mean: with blocks and without.

The gradient of every batch is compared with that of the same network in float32. "error" is its relative distance, mean
of the batches. "bias" is the distance of the means over all batches, relative to the mean gradient, and "noise" what it
would be by chance alone, were the errors of the batches independent and without bias: their deviation divided by the
square root of their number. "batches" is how far the gradients of single batches are from their own mean, the noise
that every training has. "slope" is how much longer a gradient is along float32's (an equally long one: -error^2/2).
bf16 is the float32 network under autocast, for comparison. "top-1" and "loss" are what the test images give: the same
weights, rounded in several ways.

The network is pruned, each layer to --sparsity, or has the zeros of a run's checkpoint already (--sparsity 0).
Gradients of the sparse weights and of all others are counted apart.

  python benchmarks/gradients.py --data cifar100.npz --weights run/best.pt --sparsity 0     a minute
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from _common import Table, make_parser, precision, say, start, write_json
from torch import Tensor, nn

from qsparseprop.training import Finetuner
from qsparseprop.training.data import image_kind, load_data
from qsparseprop.training.models import load_checkpoint
from qsparseprop.training.setup_run import make_loaders, make_network
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent

#: Name: swapped, in blocks, under autocast.
KINDS = {
    "bf16": (False, False, True),
    "int8": (True, False, False),
    "int8 in blocks": (True, True, False),
    "int8, bf16": (True, False, True),
    "int8 in blocks, bf16": (True, True, True),
}
#: A weight with as many zeros counts as sparse.
SPARSE = 0.5


def make_networks(dense: nn.Module, shape: tuple[int, ...]) -> dict[str, nn.Module]:
    """The same network in each kind."""
    models = {}
    for name, (swapped, blocks, _) in KINDS.items():
        models[name] = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        if swapped:
            swap_modules_with_sparse(models[name], shape, verbose=False, include_dense=False, min_sparsity=SPARSE,
                                     fuse=blocks)  # fmt: skip
    return {name: model.train() for name, model in models.items()}


def gradients(model: nn.Module, masks: Mapping[str, Tensor], images: Tensor, labels: Tensor,
              bf16: bool) -> dict[str, Tensor]:  # fmt: skip
    """Of the weights that exist, and of all other parameters, as "sparse" and "others"."""
    model.zero_grad()
    with precision(bf16):
        loss = F.cross_entropy(model(images.to(memory_format=torch.channels_last)).float(), labels)
    loss.backward()
    found: dict[str, list[Tensor]] = {"sparse": [], "others": []}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        mask = masks.get(name)
        # a sparse layer's are those that exist, in the order of their positions
        existing = gradient[mask] if mask is not None and gradient.shape == mask.shape else gradient
        found["others" if mask is None else "sparse"].append(existing.detach().flatten().double())
    return {part: torch.cat(some) for part, some in found.items()}


def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], bf16: bool) -> dict[str, float | None]:
    """Top-1 accuracy in percent and mean loss."""
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1), memory_format=torch.channels_last,
                      autocast_dtype=torch.bfloat16 if bf16 else None)  # fmt: skip
    found = tuner.measure(batches)
    model.train()
    return {"top1": found.top1, "loss": found.loss}


def compare(exact: Tensor, others: Tensor) -> dict[str, float]:
    """Figures of the docstring from gradients (batches, parameters)."""
    mean, distance = exact.mean(0), others - exact
    bias, length = distance.mean(0), mean.norm()

    def deviation(x: Tensor) -> float:
        return ((x - x.mean(0)).norm(dim=1).pow(2).sum() / max(len(x) - 1, 1)).sqrt().item()

    return {
        "error": (distance.norm(dim=1) / exact.norm(dim=1)).mean().item(),
        "bias": (bias.norm() / length).item(),
        "noise": deviation(distance) / math.sqrt(len(exact)) / length.item(),
        "slope": ((distance * exact).sum() / exact.pow(2).sum()).item(),
        "batches": deviation(exact) / length.item(),
    }


def measure(args: Any, sparsity: float) -> dict[str, Any]:
    """What each kind of network gives on the test images, and its gradients on some of the others."""
    torch.manual_seed(0)
    images = load_data(args.data, normalize=args.normalize)
    kind = image_kind(args.data)
    assert kind is not None
    dense = make_network(args.model, 8 if args.quick else None, kind)
    if args.weights is not None:
        load_checkpoint(dense, args.weights)
    if sparsity:
        layerwise_magnitude_prune(dense, sparsity)
        make_pruning_permanent(dense)
    masks = {name: p.detach() != 0 for name, p in dense.named_parameters()
             if p.ndim > 1 and (p == 0).float().mean() >= SPARSE}  # fmt: skip
    if not masks:
        raise SystemExit("no weight has zeros: give --sparsity, or the checkpoint of a pruned network")
    batch = 16 if args.quick else 128
    models = make_networks(dense, (batch, kind.channels, kind.height, kind.width))
    dense = dense.to(memory_format=torch.channels_last).train()
    batches, test = make_loaders(images, batch, 1)
    # before the training mode changes running statistics
    tested = {"fp32": evaluate(dense, test, False),
              **{name: evaluate(model, test, KINDS[name][2]) for name, model in models.items()}}  # fmt: skip
    exact: list[dict[str, Tensor]] = []
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in models}
    for x, labels in itertools.islice(batches, 4 if args.quick else args.batches):
        exact.append(gradients(dense, masks, x, labels, False))
        for name, model in models.items():
            found[name].append(gradients(model, masks, x, labels, KINDS[name][2]))
    return {"sparsity": sparsity, "batches_measured": len(exact), "tested": tested, "gradients": [
        {"part": part, "kind": name,
         **compare(torch.stack([one[part] for one in exact]), torch.stack([one[part] for one in found[name]]))}
        for part in ("sparse", "others") for name in models]}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = make_parser(__doc__, repeats=1, sparsity=(0.95,), threads=(1,))
    parser.add_argument("--data", default="digits", help="as for finetune (default: %(default)s)")
    parser.add_argument("--normalize", default="data", help="as for finetune (default: %(default)s)")
    parser.add_argument("--model", default="resnet20", help="as for finetune (default: %(default)s)")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint of the network (default: random weights)")
    parser.add_argument("--batches", type=int, default=60, metavar="N", help="of 128 images (default: %(default)s)")
    args, document = start("gradients", parser, argv)
    torch.set_num_threads(args.threads[0])
    document["results"] = []
    for sparsity in args.sparsity:
        result = measure(args, sparsity)
        say(f"\n{result['batches_measured']} batches, {100 * sparsity:g} % of the weights pruned here\n")
        table = Table(("network", "top-1 %", "loss"), first=30)
        for name, row in result["tested"].items():
            table.row(name, f"{row['top1']:.2f}", f"{row['loss']:.4f}")
        say()
        table = Table(("weights, network", "error %", "bias %", "noise %", "slope %", "batches %"), first=30)
        for row in result["gradients"]:
            table.row(f"{row['part']}, {row['kind']}",
                      *(f"{100 * row[name]:.2f}" for name in ("error", "bias", "noise", "slope", "batches")))
        document["results"].append(result)
    write_json(args.json, document)


if __name__ == "__main__":
    main()
