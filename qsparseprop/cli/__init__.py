"""Command line: ``python -m qsparseprop {info,finetune}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import finetune

__all__ = ["main"]


def _build_parser() -> argparse.ArgumentParser:
    from qsparseprop._version import __version__

    parser = argparse.ArgumentParser(
        prog="python -m qsparseprop", description="Training of unstructured-sparse, int8-quantised networks on CPUs."
    )
    parser.add_argument("--version", action="version", version=f"qsparseprop {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser(
        "info",
        help="show what was built, what this CPU offers and what is used",
        description="Show which instruction sets were built, which of them this CPU has, and which one is used.",
    )
    info.set_defaults(run=_info)
    finetune.add_parser(commands)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    import qsparseprop

    qsparseprop.show_config()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; ``None`` takes those of the process.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 wrong use or something missing, 130 interrupted (Ctrl-C).

    Raises
    ------
    SystemExit
        From argparse: with code 0 after ``--help`` and ``--version``, with code 2 for arguments it does not accept.
    """
    arguments = _build_parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
