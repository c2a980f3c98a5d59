"""``python -m qsparseprop info``: the configuration, or what is in a file of weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]

_DESCRIPTION = """\
Without a file: show versions, processor, instruction sets (built, supported, chosen), threads, compilers and OpenMP
runtimes: what a report of a bug needs.

With a file - a checkpoint of `finetune` or of a Finetuner, a state dict of PyTorch, or .safetensors: show shape,
sparsity and size of each weight; with a frozen model: what became of each layer. Any file may be given: nothing in it
is run, and what is no file of weights is refused.

exit codes: 0 done, 2 no such file, or none of weights"""


def add_parser(commands: Any) -> None:
    """Add the ``info`` command to the sub-parsers of the program."""
    parser = commands.add_parser(
        "info",
        help="show what was built and is used, or what is in a file of weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE",
                        help="checkpoint, state dict, .safetensors or frozen model")  # fmt: skip
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for; return the exit code."""
    from qsparseprop.config import show_config

    if arguments.file is None:
        show_config()
        return 0
    from qsparseprop.inference.files import holds_program
    from qsparseprop.utils.errors import ConfigurationError
    from qsparseprop.utils.state_files import read_state_dict
    from qsparseprop.utils.state_report import format_weights, weight_infos

    try:
        if holds_program(arguments.file):
            # its tensors are codes in the order that kernels read them in, and tell nothing of shapes and zeros
            from qsparseprop.inference import load

            print(load(arguments.file).freeze_report)
            return 0
        state = read_state_dict(arguments.file)
    except OSError as error:
        raise ConfigurationError(f"cannot read {arguments.file}: {error.strerror or error}") from error
    print(format_weights(weight_infos(state)))
    return 0
