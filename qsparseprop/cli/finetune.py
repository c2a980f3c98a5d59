"""``python -m qsparseprop finetune``: arguments, checks and printing; the work is in ``qsparseprop.utils.compare``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]

_DESCRIPTION = """\
Show what sparse int8 training brings on this machine. Needs no download and takes about two minutes on two cores.

A ResNet-18 learns the handwritten digits that scikit-learn ships (1,797 images, scaled up to 32x32), is pruned, and is
then fine-tuned three times from the same point on the same batches:
  dense fp32    plain PyTorch, pruned weights held at zero by masks
  dense best    the same in the fastest of {fp32, bf16} x {contiguous, channels_last}, which is measured first
  qsparseprop   after swap_modules_with_sparse(model, input_shape)
At the end a table compares accuracy, time and memory."""

_EPILOG = """\
exit codes: 0 done, 1 failed, 2 wrong arguments or a missing package, 130 interrupted (Ctrl-C)"""


def _whole_number(minimum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return parse


def _number_between(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        # Written so that NaN fails too.
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must lie between {low:g} and {high:g}, both excluded, got {text}")
        return value

    return parse


def add_parser(commands: Any) -> None:
    """Add the ``finetune`` command to the sub-parsers of the program."""
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a pruned network dense and with qsparseprop, and compare",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--sparsity",
        type=_number_between(0, 1),
        default=0.9,
        metavar="S",
        help="share of the weights that are pruned to zero, between 0 and 1; the first convolution and the classifier "
        "stay dense (default: %(default)s)",
    )
    parser.add_argument(
        "--scope",
        choices=("global", "layer"),
        default="global",
        help="global: one magnitude threshold for the whole network, so wide layers become sparser than narrow ones; "
        "layer: the same sparsity in every layer (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=_whole_number(1),
        default=2,
        metavar="N",
        help="passes over the training images in each of the three fine-tunings (default: %(default)s)",
    )
    parser.add_argument(
        "--pretrain-epochs",
        type=_whole_number(1),
        default=1,
        metavar="N",
        help="passes over the training images before pruning (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_whole_number(1),
        default=64,
        metavar="N",
        help="images in a training step, at most 1437 (default: %(default)s)",
    )
    parser.add_argument(
        "--model", choices=("resnet18", "resnet20"), default="resnet18", help="network (default: %(default)s)"
    )
    parser.add_argument(
        "--width",
        type=_whole_number(4),
        metavar="N",
        help="channels of the network's first stage, which scale all others (default: resnet18 64, resnet20 16)",
    )
    parser.add_argument(
        "--threads", type=_whole_number(1), metavar="N", help="threads to compute with (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--seed",
        type=_whole_number(0),
        default=0,
        metavar="N",
        help="seed of initial weights, test split, order of the batches and stochastic rounding (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write result.json and result.png (loss and accuracy against time) into this directory, which is made if "
        "need be",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but the table")
    parser.set_defaults(run=run, parser=parser)


def _require(*modules: tuple[str, str]) -> str | None:
    """Return what to tell the user if one of the (module, package) pairs cannot be imported."""
    for module, package in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return (
                f"the finetune command needs {package}, which cannot be imported ({error})\n"
                'install it with:  pip install "qsparseprop[finetune]"'
            )
    return None


class _Terminal:
    """Prints messages and shows tqdm's bars, which appear only where the output is a terminal."""

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def message(self, text: str) -> None:
        print(text, flush=True)

    def progress(self, name: str, total: int) -> Callable[[float], None]:
        from tqdm import tqdm

        bar = tqdm(
            total=total,
            desc=name.ljust(11),
            position=len(self._bars),
            # No bars in a log file.
            disable=None,
            # Without tqdm's rate: that would count the time in which the other runs have their turn.
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
        )
        self._bars.append(bar)

        def advance(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        return advance

    def close(self) -> None:
        for bar in self._bars:
            bar.close()
        self._bars.clear()


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, run the comparison, print the table and write the files; return the exit code."""
    parser: argparse.ArgumentParser = arguments.parser
    needed = [("sklearn", "scikit-learn")]
    if not arguments.quiet:
        needed.append(("tqdm", "tqdm"))
    if arguments.out is not None:
        # Before minutes of work, not after.
        needed.append(("matplotlib", "matplotlib"))
        problem = _prepare_directory(arguments.out)
        if problem:
            parser.error(problem)
    problem = _require(*needed)
    if problem:
        parser.exit(2, f"{parser.prog}: error: {problem}\n")

    from qsparseprop.utils.compare import CompareConfig, ConfigurationError, compare
    from qsparseprop.utils.compare_report import format_table, write_json, write_plot

    config = CompareConfig(
        model=arguments.model,
        width=arguments.width,
        sparsity=arguments.sparsity,
        scope=arguments.scope,
        epochs=arguments.epochs,
        pretrain_epochs=arguments.pretrain_epochs,
        batch_size=arguments.batch_size,
        threads=arguments.threads,
        seed=arguments.seed,
    )
    terminal = None if arguments.quiet else _Terminal()
    try:
        result = compare(config, terminal)
    except ConfigurationError as error:
        parser.error(str(error))
    except (RuntimeError, FloatingPointError) as error:
        print(f"{parser.prog}: failed: {error}", file=sys.stderr)
        return 1
    finally:
        if terminal is not None:
            terminal.close()
    print(format_table(result))
    if arguments.out is not None:
        try:
            write_json(result, arguments.out / "result.json")
            write_plot(result, arguments.out / "result.png")
        except OSError as error:
            print(f"{parser.prog}: cannot write the results: {error}", file=sys.stderr)
            return 1
        if not arguments.quiet:
            print(f"Written: {arguments.out / 'result.json'} and {arguments.out / 'result.png'}")
    return 0


def _prepare_directory(path: Path) -> str | None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"argument --out: cannot make the directory {path}: {error.strerror}"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"argument --out: cannot write to {path}"
    return None
