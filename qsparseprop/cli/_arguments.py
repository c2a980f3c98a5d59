"""Types of command line arguments, and checks that all commands share."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Parser", "missing_package", "model_name", "number_between", "prepare_directory", "shape",
           "warnings_in_a_line", "whole_number"]  # fmt: skip


class _Absent(list[Any]):
    """Stands where an option was not given."""


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line; argparse would put all options of the command before it.

    What it returns knows which options were given, under ``given``: the value of one may be its default's.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and say which of the options were given."""
        # argparse leaves alone what is there already, and appends to a copy of it
        absent = _Absent()
        places = {action.dest: absent for action in self._actions if action.dest != argparse.SUPPRESS}
        found, _ = super().parse_known_args(args, argparse.Namespace(**places))
        given = {name for name in places if getattr(found, name) is not absent}
        result, rest = super().parse_known_args(args, namespace)
        # the parser of a command comes before that of the program, which knows none of its options
        result.given = given | getattr(result, "given", set())
        return result, rest

    def error(self, message: str) -> NoReturn:
        """End the process with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help shows the options)\n")

    def refuse(self, message: str) -> NoReturn:
        """End the process with code 2 for something that the list of options would not help with."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


@contextlib.contextmanager
def warnings_in_a_line(program: str) -> Iterator[None]:
    """Have warnings of this package say what they say, without the place in its code that they come from."""
    plain, package = warnings.formatwarning, Path(__file__).resolve().parents[1]

    def in_a_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if Path(filename).is_relative_to(package):
            return f"{program}: warning: {' '.join(str(message).split())}\n"
        return plain(message, category, filename, lineno, line)

    warnings.formatwarning = in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = plain


def whole_number(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """Whole numbers from a minimum on, and up to a maximum."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"must be at most {maximum}, got {value}")
        return value

    return parse


def number_between(low: float, high: float, with_low: bool = False) -> Callable[[str], float]:
    """Numbers between two others, both excluded unless the lower one is wanted."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        # Written so that NaN fails too.
        if not (low < value < high or (with_low and value == low)):
            bounds = "of which only the first is possible" if with_low else "both excluded"
            raise argparse.ArgumentTypeError(f"must lie between {low:g} and {high:g}, {bounds}, got {text}")
        return value

    return parse


def shape(text: str) -> tuple[int, ...]:
    """Sizes like ``64,3,32,32`` or ``64x3x32x32``."""
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 64,3,32,32") from None
    if not all(size > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"all sizes must be positive, got {text}")
    return sizes


def model_name(text: str) -> str:
    """Name of a model, one of a library's, or module:function (which is looked up later)."""
    from qsparseprop.training.library_models import LIBRARIES
    from qsparseprop.training.models import find_builder

    if ":" in text and text.partition(":")[0] not in LIBRARIES:
        return text
    try:
        find_builder(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid choice: {error}") from None
    return text


def missing_package(command: str, *modules: tuple[str, str], extra: str = "finetune") -> str | None:
    """Return what to tell the user if one of the (module, package) pairs of an extra cannot be imported."""
    for module, package in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return (
                f"the {command} command needs {package}, which cannot be imported ({error}); "
                f'install it with:  pip install "qsparseprop[{extra}]"'
            )
    return None


def prepare_directory(path: Path) -> str | None:
    """Make a directory; returns what is wrong, if anything."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"argument --out: cannot make the directory {path}: {error.strerror or error}"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"argument --out: cannot write to {path}"
    return None
