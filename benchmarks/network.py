"""A training step of a ResNet: qsparseprop against torch's dense layers.

A step is forward, loss, backward, the update by SGD with momentum (torch's fused one, for all alike) and setting the
gradients to None. Three networks: ResNet-18 as "cifar" (32x32 images, batch 64, 3x3 stem) and "imagenet" (224x224,
batch 16, 7x7 stem of stride 2 and max-pooling), and "resnet20", of 16 to 64 channels (32x32, batch 128). All
convolutions but the first have the given fraction of zeros, at random positions, and are sparse modules in our
network; the rest of it is torch's, or with ``--all-layers`` the first convolution and the classifier are swapped,
too, zeros or not. Dense networks run in float32 and under bfloat16 autocast, contiguous and channels_last (cl); ours
channels_last, with the dense rest in float32 (int8 cl) or under bfloat16 autocast (int8 cl bf16), and with batch
normalisation, additions and ReLU in blocks with the convolutions (fused cl, fused cl bf16). Dense networks do not pay
for keeping their zeros.

  python benchmarks/network.py --json network.json              allow a quarter of an hour
  python benchmarks/network.py --only cifar --threads 1 --sparsity 0.9
  python benchmarks/network.py --all-layers                    min_sparsity=0: also layers that have no zeros
  python benchmarks/network.py --profile --threads 1            where our milliseconds go
  python benchmarks/network.py --profile "bf16 cl" --threads 1  the same of a dense network
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import _common as common
import torch
import torch.nn.functional as F
from _profile import profile_step, show_rows
from torch import nn
from torch.profiler import record_function

from qsparseprop.training.models import resnet18, resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse

#: Layers without zeros, which stay dense but for ``--all-layers``.
KEPT_DENSE = ("conv1", "linear")


@dataclass(frozen=True)
class Network:
    """A ResNet and its data.

    Attributes
    ----------
    name : str
    architecture : callable
        Of `qsparseprop.training.models`.
    batch, size : int
        Images of a step, and their height and width.
    classes : int
    width : int
        Channels of the first stage.
    large_stem : bool
        7x7 convolution of stride 2 and max-pooling, in place of a 3x3 convolution of stride 1.
    """

    name: str
    architecture: Callable[..., nn.Module]
    batch: int
    size: int
    classes: int
    large_stem: bool
    width: int

    def build(self) -> nn.Module:
        """Randomly initialised from torch's default generator."""
        model = self.architecture(self.classes, width=self.width)
        if self.large_stem:
            model.conv1 = nn.Conv2d(3, self.width, 7, stride=2, padding=3, bias=False)
            # the activation of the stem, where the pooling follows
            model.relu = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1))
        return model


NETWORKS = (
    Network("cifar", resnet18, 64, 32, 10, False, 64),
    Network("imagenet", resnet18, 16, 224, 1000, True, 64),
    Network("resnet20", resnet20, 128, 32, 10, False, 16),
)
QUICK_NETWORKS = (
    Network("cifar", resnet18, 4, 16, 10, False, 8),
    Network("imagenet", resnet18, 4, 64, 10, True, 8),
    Network("resnet20", resnet20, 4, 16, 10, False, 8),
)


@dataclass(frozen=True)
class Setting:
    """How a network is run: memory format, autocast, and which layers replace the sparse convolutions, if any."""

    name: str
    group: str = common.DENSE
    channels_last: bool = False
    bf16: bool = False
    quantize: bool = True
    fuse: bool = False

    @property
    def swapped(self) -> bool:
        return self.group != common.DENSE


SETTINGS = (
    Setting("fp32"),
    Setting("fp32 cl", channels_last=True),
    Setting("bf16", bf16=True),
    Setting("bf16 cl", channels_last=True, bf16=True),
    Setting("int8 cl", "int8", channels_last=True),
    Setting("int8 cl bf16", "int8", channels_last=True, bf16=True),
    Setting("fused cl", "int8", channels_last=True, fuse=True),
    Setting("fused cl bf16", "int8", channels_last=True, bf16=True, fuse=True),
)
FLOAT_SETTING = Setting("sparse fp32 cl", "sparse fp32", channels_last=True, quantize=False)


def sparse_network(network: Network, sparsity: float) -> nn.Module:
    """The dense network with zeros."""
    torch.manual_seed(0)
    model = network.build()
    for seed, (name, module) in enumerate(model.named_modules()):
        if isinstance(module, nn.Conv2d) and name not in KEPT_DENSE:
            common.put_zeros(module.weight, sparsity, seed)
    return model


def training_step(
    network: Network, model: nn.Module, setting: Setting, sparsity: float, args: argparse.Namespace
) -> Callable[[], None]:
    """Return a function that trains a copy of a network by one step, always on the same images.

    Parameters
    ----------
    network, model
        From `sparse_network`; `model` is not changed.
    setting : Setting
    sparsity : float
        Of the layers to replace.
    args : argparse.Namespace
        Of the command line: ``--include-dense`` and ``--all-layers``.
    """
    memory_format = torch.channels_last if setting.channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    shape = (network.batch, 3, network.size, network.size)
    images = torch.randn(shape, generator=generator).to(memory_format=memory_format)
    labels = torch.randint(network.classes, (network.batch,), generator=generator)
    model = copy.deepcopy(model).to(memory_format=memory_format).train()
    if setting.swapped:
        swap_modules_with_sparse(
            model, images, verbose=False, quantize=setting.quantize,
            skip_modules=None if args.all_layers else KEPT_DENSE,
            min_sparsity=0.0 if args.all_layers else sparsity - 0.01, include_dense=args.include_dense,
            fuse=setting.fuse,
        )  # fmt: skip
    # So slow that the network is the same after any number of steps.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)

    def step() -> None:
        with record_function("forward"), common.precision(setting.bf16):
            loss = F.cross_entropy(model(images), labels)
        with record_function("backward"):
            loss.backward()
        with record_function("update"):
            optimizer.step()
            optimizer.zero_grad()

    return step


def compare(args: argparse.Namespace, networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Race all settings for each network, thread count and sparsity."""
    settings = [*SETTINGS, FLOAT_SETTING] if args.sparse_fp32 else SETTINGS
    groups = list(dict.fromkeys(s.group for s in settings if s.swapped))
    results = []
    for network, threads in itertools.product(networks, args.threads):
        torch.set_num_threads(threads)
        common.say(f"\n{network.name}, {network.size}x{network.size}, batch {network.batch}: training step "
                   f"in ms, {threads} thread{'s' if threads > 1 else ''}\n")
        table = common.Table(["zeros", *(s.name for s in settings), "best dense", *(f"x {group}" for group in groups)],
                             6)
        for sparsity in args.sparsity:
            model = sparse_network(network, sparsity)
            result = common.race([
                common.Competitor(s.name, s.group, training_step(network, model, s, sparsity, args))
                for s in settings
            ], args)  # fmt: skip
            result = {"network": network.name, "batch": network.batch, "size": network.size, "threads": threads,
                      "sparsity": sparsity, **result}  # fmt: skip
            result["ratio_to_fp32"] = {name: result["ms"]["fp32"] / ms for name, ms in result["ms"].items()}
            results.append(result)
            table.row(f"{100 * sparsity:g} %", *common.ms_cells(result), result["best"][common.DENSE],
                      *(result["ratio"][group] for group in groups))
    common.say("\nx: time of the best dense setting / time of our best\n")
    table = common.Table(["fp32 (contiguous) time / time", "zeros", "threads", *(s.name for s in settings[1:])], 30)
    for r in results:
        table.row(r["network"], f"{100 * r['sparsity']:g} %", str(r["threads"]),
                  *(r["ratio_to_fp32"][s.name] for s in settings[1:]))
    return results


def show_profiles(args: argparse.Namespace, networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Profile one setting for each network, thread count and sparsity."""
    setting = next(s for s in (*SETTINGS, FLOAT_SETTING) if s.name == args.profile)
    results = []
    for network, threads, sparsity in itertools.product(networks, args.threads, args.sparsity):
        torch.set_num_threads(threads)
        model = sparse_network(network, sparsity)
        step = training_step(network, model, setting, sparsity, args)
        ms = common.race([common.Competitor(setting.name, setting.group, step)], args)["ms"][setting.name]
        rows = profile_step(step, args.quick)
        show_rows(f"{network.name}, {setting.name}", rows, ms, sparsity, threads)
        results.append({"network": network.name, "setting": setting.name, "threads": threads, "sparsity": sparsity,
                        "step_ms": ms, "rows_ms": rows})  # fmt: skip
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = common.make_parser(__doc__, repeats=9, sparsity=(0.9, 0.95, 0.98), threads=(1, 2))
    parser.add_argument("--only", choices=[network.name for network in NETWORKS], help="one of the networks")
    parser.add_argument("--include-dense", action="store_true",
                        help="let swap_modules_with_sparse time each layer and leave it dense where that is faster, as "
                             "it does by default; otherwise all convolutions but the first become sparse")
    parser.add_argument("--all-layers", action="store_true",
                        help="swap the first convolution and the classifier, too, which have no zeros (min_sparsity=0)")
    parser.add_argument("--sparse-fp32", action="store_true", help="also our network with float32 sparse modules")
    parser.add_argument("--profile", nargs="?", const="int8 cl", metavar="SETTING",
                        choices=[s.name for s in (*SETTINGS, FLOAT_SETTING)],
                        help="instead: time by kind of operator, of this column of the table (default: %(const)s)")
    args, document = common.start("network", parser, argv)
    networks = [n for n in (QUICK_NETWORKS if args.quick else NETWORKS) if args.only in (None, n.name)]
    if args.profile:
        document["profiles"] = show_profiles(args, networks)
    else:
        document["results"] = compare(args, networks)
        common.remark_noise(document["results"])
    common.write_json(args.json, document)


if __name__ == "__main__":
    main()
