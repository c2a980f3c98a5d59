"""``python -m qsparseprop freeze``: arguments and printing; the work is in ``qsparseprop.training.freeze_run``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._arguments import missing_package, whole_number

__all__ = ["add_parser"]

_DESCRIPTION = """\
Make the network of a checkpoint one that only serves, on int8 codes from one layer to the next, and write it to a file:
scales are fixed by images of the training, weights are quantised once. Prints the error of each layer and the accuracy
before and after. `qsparseprop.inference.load` reads the file."""

_EPILOG = """\
examples:
  python -m qsparseprop finetune --out run
  python -m qsparseprop freeze run/best.pt --out model.qsp
  python -m qsparseprop freeze run/best.pt --out model.qsp --keep-float conv1 linear

exit codes: 0 done, 1 failed, 2 wrong arguments or a missing package, 130 interrupted (Ctrl-C)"""


def add_parser(commands: Any) -> None:
    """Add the ``freeze`` command to the sub-parsers of the program."""
    parser = commands.add_parser(
        "freeze",
        help="make a trained network one that serves, in one file",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="best.pt or last.pt in the folder of a finetune run")
    add("--out", type=Path, required=True, metavar="FILE", help="where the frozen model goes")
    add("--data", metavar="NAME", help="images to calibrate with and to test on (default: those of the run)")
    add("--samples", type=whole_number(1), default=512, metavar="N",
        help="images to calibrate with (default: %(default)s)")
    add("--observer", choices=("minmax", "moving_average", "percentile"), default="minmax",
        help="what of the values that were seen is coded (default: %(default)s)")
    add("--per-tensor", action="store_true", help="one scale for all channels of an activation")
    add("--keep-float", nargs="+", default=[], metavar="LAYER", help="names of layers that are not quantised")
    add("--threads", type=whole_number(1), metavar="N", help="threads to compute with (default: PyTorch's choice)")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Freeze, print and write; return the exit code."""
    problem = missing_package("freeze", ("safetensors", "safetensors"), extra="inference")
    if problem:
        arguments.parser.exit(2, f"{arguments.parser.prog}: error: {problem}\n")
    import torch

    from qsparseprop.training.freeze_run import FreezeConfig, freeze_checkpoint

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    config = FreezeConfig(arguments.data, arguments.samples, arguments.observer, not arguments.per_tensor,
                          tuple(arguments.keep_float))  # fmt: skip
    result = freeze_checkpoint(arguments.checkpoint, arguments.out, config, lambda text: print(text, flush=True))
    print(f"top-1 {result['top1_before']:.2f} % before, {result['top1_after']:.2f} % after")
    print(f"Written: {arguments.out} ({result['bytes'] / 1e6:.2f} MB)")
    return 0
