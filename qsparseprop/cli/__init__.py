"""Command line: ``python -m qsparseprop {info,bench,finetune,freeze}``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import bench, finetune, freeze, info
from ._arguments import Parser, warnings_in_a_line
from ._openmp import prepare_threads
from ._streams import prepare_streams

__all__ = ["main"]


def _build_parser() -> Parser:
    from qsparseprop._version import __version__

    parser = Parser(
        prog="python -m qsparseprop", description="Training of unstructured-sparse, int8-quantised networks on CPUs."
    )
    parser.add_argument("--version", action="version", version=f"qsparseprop {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    info.add_parser(commands)
    bench.add_parser(commands)
    finetune.add_parser(commands)
    freeze.add_parser(commands)
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
        Exit code: 0 done, 1 failed, 2 wrong use or something missing, 130 interrupted (Ctrl-C), 129 or
        143 terminated (SIGHUP, SIGTERM).

    Raises
    ------
    SystemExit
        From argparse: with code 0 after ``--help`` and ``--version``, with code 2 for arguments it does not accept.
    """
    prepare_streams()
    arguments = _build_parser().parse_args(argv)
    prepare_threads()
    from qsparseprop.utils.errors import ConfigurationError

    parser: Parser = arguments.parser
    try:
        with warnings_in_a_line(parser.prog):
            return arguments.run(arguments)
    # ImportError: of something optional; what is always needed was imported with the package.
    except (ConfigurationError, ImportError) as error:
        parser.refuse(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except MemoryError as error:
        reason = f"not enough memory: {error}" if str(error) else "not enough memory"
    except OSError as error:
        named = error.filename is not None and error.strerror
        reason = f"{os.fsdecode(error.filename)}: {error.strerror}" if named else str(error)
    except (FloatingPointError, RuntimeError) as error:
        reason = str(error)
    print(f"{parser.prog}: failed: {reason}", file=sys.stderr)
    return 1
