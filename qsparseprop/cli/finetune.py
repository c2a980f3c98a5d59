"""``python -m qsparseprop finetune``: arguments, checks and printing; the work is in training and benchmarking."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qsparseprop.utils.errors import ConfigurationError

from ._arguments import Parser, missing_package, model_name, number_between, prepare_directory, whole_number
from ._progress import Progress

__all__ = ["add_parser"]

_DESCRIPTION = """\
Train, prune and fine-tune a network with sparse int8 layers, or compare that with dense training.

Without arguments: show what sparse int8 training brings on this machine. Needs no download and takes one to two minutes
on two cores. A ResNet-18 learns the handwritten digits that scikit-learn ships (1,797 images, scaled up to 32x32), is
pruned, and is then fine-tuned three times from the same point on the same batches:
  dense fp32    plain PyTorch, pruned weights held at zero by masks
  dense best    the same in the fastest of {fp32, bf16} x {contiguous, channels_last}, which is measured first
  qsparseprop   after swap_modules_with_sparse(model, input_shape, fuse=True)
At the end a table compares accuracy, time and memory; the table's figures and two pictures of them are in the folder
qsparseprop-finetune then, or in that of --out. The same for other networks and data: --compare.

With --no-compare, or an option that only a single training has (they are marked with *): one training with sparse
layers, which can be stopped with Ctrl-C and resumed."""

_EPILOG = """\
examples:
  python -m qsparseprop finetune
  python -m qsparseprop finetune --data cifar10.npz --model resnet20 --weights resnet20.th --normalize imagenet \\
      --sparsity 0.9 --epochs 5 --no-compare --out run
  python -m qsparseprop finetune --resume --out run
  python -m qsparseprop finetune --data photos/ --model vgg11 --prune gradual --sparsity 0.95 --out run2

exit codes: 0 done, 1 failed, 2 wrong arguments or a missing package, 130 interrupted (Ctrl-C), 129 or 143
terminated (a lost terminal, SIGTERM); a single training with --out has left a checkpoint then"""

#: Where a comparison puts its results unless told otherwise.
_OUT = Path("qsparseprop-finetune")

#: Options of a single training, with the values that ask for none.
_SINGLE = {"resume": False, "layer_times": False, "precision": None, "accumulate": 1, "evaluate_every": 1,
           "blocks": True}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add the ``finetune`` command to the sub-parsers of the program."""
    parser = commands.add_parser(
        "finetune",
        help="train, prune and fine-tune a network, with sparse layers or compared with dense ones",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    # Checked in run(): argparse would check the default value too, and import torch for it before anything is shown.
    add("--model", default="resnet18", metavar="NAME",
        help="resnet18, resnet20 (32, 44, 56, 110), vgg11, mlp, vit-tiny; where they are installed, a network of "
        "torchvision or timm by its name, or clearly as torchvision:resnet50, timm:convnext_tiny; or "
        "package.module:function for one of your own, which gets num_classes, in_channels, image_size and width "
        "where it has such parameters (default: %(default)s)")
    add("--width", type=whole_number(4), metavar="N",
        help="channels of the network's first stage, which scale all others (default: the network's own)")
    add("--weights", metavar="FILE",
        help="trained weights to start from: a state dict (.pt, .pth, .th), .safetensors, or best.pt of a run; "
        "otherwise the network is trained first")
    add("--new-head", action="store_true",
        help="with --weights of a network for other classes, however many: do not take its classifier, begin a new one")
    add("--data", default="digits", metavar="SOURCE",
        help="digits; FILE.npz with x_train, y_train, x_test, y_test; a folder with one of images for each class; or, "
        "where torchvision is installed, the name of one of its data sets (default: %(default)s)")
    add("--normalize", choices=("data", "imagenet"), default="data",
        help="scale pixels by mean and standard deviation of the training images, or by those of ImageNet, with which "
        "published weights were mostly trained (default: %(default)s)")
    add("--image-size", type=whole_number(8), metavar="N", help="scale images to N x N pixels")
    add("--augment", metavar="NAMES",
        help="what is done to training images at random, with commas: flip, crop, resized-crop; where torchvision is "
        "installed, the name of a transform of its, such as TrivialAugmentWide; or package.module:function for one of "
        "your own, which gets an image as bytes and returns one (default: nothing)")
    add("--workers", type=whole_number(0, 256), metavar="N",
        help="processes that read images (default: for images in files as many as threads, at most 4, otherwise none)")
    add("--sparsity", type=number_between(0, 1, with_low=True), default=0.9, metavar="S",
        help="share of the weights that are pruned to zero, between 0 and 1; the first layer and the classifier "
        "stay dense (default: %(default)s); 0 with --scheme dense*: train a dense network, to start others from")
    add("--prune", choices=("global", "uniform", "gradual", "none"), default="global",
        help="global: one magnitude threshold for the whole network, so wide layers become sparser than narrow ones; "
        "uniform: the same sparsity in every layer; gradual*: globally, more and more during the fine-tuning; none: "
        "take the zeros in --weights (default: %(default)s)")
    add("--scope", choices=("global", "layer"), help="older spelling of --prune global and --prune uniform")
    add("--scheme", default="int8", metavar="SCHEME",
        help="how sparse layers compute: int8; float32; settings of QuantConfig such as input=standard,grad=absmax; "
        "dense*: no sparse layers, zeros are held by masks (default: %(default)s)")
    _add_training(add)
    parser.set_defaults(run=run, parser=parser)


def _add_training(add: Callable[..., Any]) -> None:
    """How long and how it trains, and where results go."""
    add("--blocks", action=argparse.BooleanOptionalAction, default=True,
        help="* 8-bit layers compute together with the normalisation and activation behind them (default: yes)")
    add("--compress-saved", action="store_true",
        help="keep what other layers save for the backward pass in 8 bits or less (with --compare: a fourth run)")
    add("--epochs", type=whole_number(1), default=1, metavar="N",
        help="passes over the training images in each fine-tuning (default: %(default)s)")
    add("--pretrain-epochs", type=whole_number(1), default=1, metavar="N",
        help="passes over the training images before pruning, without --weights (default: %(default)s)")
    add("--batch-size", type=whole_number(1), default=64, metavar="N",
        help="images in a training step, at most as many as there are (default: %(default)s)")
    _add_recipe(add)
    add("--precision", choices=("bf16", "fp32"),
        help="* of everything but the 8-bit layers: bfloat16 autocast or float32 (default: bf16)")
    add("--threads", type=whole_number(1, 1024), metavar="N",
        help="threads to compute with (default: PyTorch's choice)")
    add("--seed", type=whole_number(0, 2**32 - 2), default=0, metavar="N",
        help="seed of initial weights, order of the batches and stochastic rounding; which images are for the test "
        "does not depend on it (default: %(default)s)")
    add("--compare", action=argparse.BooleanOptionalAction, default=None,
        help="fine-tune dense as well and compare (default: unless an option marked with * is given)")
    add("--resume", action="store_true", help="* go on with the run in --out; its settings count")
    add("--layer-times", action="store_true", help="* show how long each layer takes, forward and backward")
    add("--out", type=Path, metavar="DIR",
        help="directory for results, made if need be: result.json, result.png (time and memory) and training.png "
        "(accuracy against time) of a comparison, which replaces the result of another one and nothing else (default: "
        f"{_OUT}); result.json, log.jsonl and checkpoints of a single training (default: none are kept)")
    add("--quiet", action="store_true", help="print nothing but the table")


def _add_recipe(add: Callable[..., Any]) -> None:
    """Optimizer and learning rates: fields of `Recipe`, and what only a single training has beside them."""
    add("--optimizer", choices=("adamw", "sgd"), default="adamw",
        help="of all trainings, dense and sparse; sgd is that with Nesterov's momentum (default: %(default)s)")
    add("--learning-rate", type=number_between(0, 100), metavar="R",
        help="peak of the schedule (default: 0.002 with adamw, 0.05 with sgd)")
    add("--pretrain-learning-rate", type=number_between(0, 100), metavar="R",
        help="the same before pruning (default: as in the fine-tuning)")
    add("--momentum", type=number_between(0, 1, with_low=True), metavar="M", help="with sgd (default: 0.9)")
    add("--weight-decay", type=number_between(0, 10, with_low=True), metavar="W",
        help="of weights; biases, normalisations and embeddings have none then (default: AdamW's 0.01 of all "
        "parameters, or none with sgd)")
    add("--schedule", choices=("onecycle", "cosine", "step", "constant"), default="onecycle",
        help="of the learning rate, from step to step: onecycle: up for a fourth of them, then down to nothing; "
        "cosine: down to nothing; step: a tenth after half of them, a hundredth after three fourths; constant "
        "(default: %(default)s)")
    add("--warmup", type=number_between(0, 1000, with_low=True), default=0.0, metavar="EPOCHS",
        help="let the learning rate rise for so many epochs first, which may be a part of one; with cosine, step and "
        "constant (default: %(default)s)")
    add("--accumulate", type=whole_number(1), default=1, metavar="N",
        help="* make one step of N batches, in the memory of one (default: %(default)s)")
    add("--evaluate-every", type=whole_number(1), default=1, metavar="N",
        help="* measure the accuracy on the test images after every N epochs, and at the end (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, do the work, print the table and write the files; return the exit code."""
    parser: Parser = arguments.parser
    if arguments.scope is not None:
        arguments.prune = {"global": "global", "layer": "uniform"}[arguments.scope]
        arguments.given.add("prune")
    single = [name for name, default in _SINGLE.items() if getattr(arguments, name) != default]
    alone = (("prune", "gradual"), ("scheme", "dense"), ("sparsity", 0))
    single += [name for name, value in alone if getattr(arguments, name) == value]
    compare = not single if arguments.compare is None else arguments.compare
    if compare and single:
        parser.error(f"--{single[0].replace('_', '-')} is for a single training and does not go with --compare")
    if compare and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("a comparison is for one process; several (torchrun) train with --no-compare")
    if arguments.sparsity == 0 and arguments.scheme != "dense":
        parser.error("--sparsity 0 trains a dense network and goes with --scheme dense only")
    before = sorted(arguments.given & {"pretrain_epochs", "pretrain_learning_rate"})
    if arguments.weights is not None and before:
        parser.error(f"--{before[0].replace('_', '-')} is for the training before pruning, which there is none of with "
                     "--weights")  # fmt: skip
    if arguments.resume and arguments.out is None:
        parser.error("--resume needs --out, the directory of the run")
    # one of several processes speaks for all
    silent = arguments.quiet or int(os.environ.get("RANK", "0")) > 0
    with _told_on(silent) as progress:
        _check_model(arguments.model)
        needed = [("sklearn", "scikit-learn")] if arguments.data == "digits" else []
        if compare:
            # Before minutes of work, not after.
            needed.append(("matplotlib", "matplotlib"))
        _refuse_missing(*needed)
        with contextlib.nullcontext() if arguments.resume else _folder(arguments, compare):
            return (_compare if compare else _train)(arguments, progress)


@contextlib.contextmanager
def _told_on(quiet: bool) -> Iterator[Progress | None]:
    """Show what goes on, unless nobody wants to know."""
    if quiet:
        yield None
        return
    _refuse_missing(("tqdm", "tqdm"))
    with contextlib.closing(Progress("finetune")) as progress:
        progress.stage("importing packages", 0.02)
        yield progress


def _refuse_missing(*needed: tuple[str, str]) -> None:
    problem = missing_package("finetune", *needed)
    if problem:
        raise ConfigurationError(problem)


def _check_model(name: str) -> None:
    try:
        model_name(name)
    except argparse.ArgumentTypeError as error:
        raise ConfigurationError(f"argument --model: {error}") from None


@contextlib.contextmanager
def _folder(arguments: argparse.Namespace, compare: bool) -> Iterator[None]:
    """Make the folder for results; one of our making that nothing has come into does not stay."""
    if compare and arguments.out is None:
        arguments.out = _OUT
    if arguments.out is None:
        yield
        return
    made = not arguments.out.exists()
    problem = prepare_directory(arguments.out)
    if problem:
        raise ConfigurationError(problem)
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # it has contents
                arguments.out.rmdir()


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What both kinds of work are configured with."""
    names = ("model", "width", "weights", "data", "normalize", "image_size", "sparsity", "prune", "scheme",
             "compress_saved", "epochs", "pretrain_epochs", "batch_size", "threads", "seed", "new_head",
             "optimizer", "learning_rate", "pretrain_learning_rate", "momentum", "weight_decay", "schedule",
             "warmup", "augment", "workers")  # fmt: skip
    return {name: getattr(arguments, name) for name in names}


def _compare(arguments: argparse.Namespace, progress: Progress | None) -> int:
    import torch  # noqa: F401 - takes the longest of what follows

    from qsparseprop.benchmarking.compare import CompareConfig, compare
    from qsparseprop.benchmarking.compare_report import check_folder, format_table, write_results
    from qsparseprop.training.locks import locked

    config, out = CompareConfig(**_settings(arguments)), arguments.out
    with locked(out):
        former = check_folder(out)
        result = compare(config, progress)
        if progress is not None:
            progress.stage("drawing the pictures", 1.0)
        written = write_results(result, out)
    if progress is not None:
        progress.close()
    print(format_table(result))
    if not arguments.quiet:
        replaced = ", in place of an older comparison" if former else ""
        print(f"Written to {out}: {', '.join(written)}{replaced}")
    return 0


def _train(arguments: argparse.Namespace, progress: Progress | None) -> int:
    from qsparseprop.training.processes import joined
    from qsparseprop.training.run import RunConfig, Stopped, format_result, run_training

    if progress is not None:
        # the training has bars of its own
        progress.close()
    alone = ("accumulate", "evaluate_every", "blocks")
    settings = _settings(arguments) | {name: getattr(arguments, name) for name in alone}
    if arguments.precision is not None:
        settings["precision"] = arguments.precision
    chosen = {name: value for name, value in settings.items() if name in arguments.given}
    with joined() as together:
        try:
            result = run_training(
                RunConfig(**settings), arguments.out, resume=arguments.resume, chosen=chosen, reporter=progress,
                progress=False if arguments.quiet else None, time_layers=5 if arguments.layer_times else 0,
            )  # fmt: skip
        except Stopped as stop:
            command = f"{arguments.parser.prog} --resume --out {arguments.out}"
            where = "" if arguments.out is None else f"; go on with:  {command}"
            if together.first:
                print(f"\n{stop}{where}", file=sys.stderr)
            return 128 + stop.signal
        if not together.first:
            return 0
        print(format_result(result))
        if arguments.out is not None and not arguments.quiet:
            print(f"Written: {arguments.out / 'result.json'}")
        return 0
