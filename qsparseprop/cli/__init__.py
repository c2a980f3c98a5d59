"""Command line: ``python -m qsparseprop {info,bench,finetune}``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import bench, finetune, info

__all__ = ["main"]


def _build_parser() -> argparse.ArgumentParser:
    from qsparseprop._version import __version__

    parser = argparse.ArgumentParser(
        prog="python -m qsparseprop", description="Training of unstructured-sparse, int8-quantised networks on CPUs."
    )
    parser.add_argument("--version", action="version", version=f"qsparseprop {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    info.add_parser(commands)
    bench.add_parser(commands)
    finetune.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; ``None`` takes those of the process.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 wrong use or something missing, 130 interrupted (Ctrl-C), 143
        terminated.

    Raises
    ------
    SystemExit
        From argparse: with code 0 after ``--help`` and ``--version``, with code 2 for arguments it does not accept.
    """
    arguments = _build_parser().parse_args(argv)
    from qsparseprop.utils._errors import ConfigurationError

    prog = arguments.parser.prog
    try:
        return arguments.run(arguments)
    except ConfigurationError as error:
        arguments.parser.error(str(error))
    except ImportError as error:
        # of something optional: what is always needed was imported with the package
        arguments.parser.exit(2, f"{prog}: error: {error}\n")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (FloatingPointError, OSError, RuntimeError) as error:
        print(f"{prog}: failed: {error}", file=sys.stderr)
        return 1
