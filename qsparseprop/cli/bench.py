"""``python -m qsparseprop bench``: arguments and printing; the work is in ``qsparseprop.benchmarking.bench``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._arguments import missing_package, model_name, number_between, prepare_directory, shape, whole_number

__all__ = ["add_parser"]

_DESCRIPTION = """\
Measure from which sparsity on sparse int8 training pays on this machine: training steps (forward and backward) of
layers or of a whole model at several sparsities, against the fastest of {fp32, bf16} x {contiguous, channels_last} of
dense PyTorch, measured in turn. A crossing is only named where the spread of the steps allows it."""

_EPILOG = """\
examples:
  python -m qsparseprop bench                                          a convolution and a linear layer
  python -m qsparseprop bench --layer "Conv2d(64, 128, 3, padding=1)" --input 64,64,32,32
  python -m qsparseprop bench --model resnet18 --input 64,3,32,32 --out bench      the whole training step
  python -m qsparseprop bench --model resnet18 --by-layer --sparsity 0.9 --out bench
  python -m qsparseprop bench --inference --model resnet18 --input 16,3,32,32 --batches 1 16     frozen, requests

exit codes: 0 done, 1 failed, 2 wrong arguments or a missing package, 130 interrupted (Ctrl-C)"""


def add_parser(commands: Any) -> None:
    """Add the ``bench`` command to the sub-parsers of the program."""
    parser = commands.add_parser(
        "bench",
        help="measure layers or a model, dense and sparse, at several sparsities",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layer", action="append", default=[], metavar="LAYER",
        help='a layer as PyTorch prints it, like "Linear(768, 3072)" or "Conv2d(64, 64, 3, padding=1)"; may be given '
        "several times, with an --input for each")
    add("--model", type=model_name, metavar="NAME",
        help="a model instead: resnet18, resnet20, vgg11, mlp, vit-tiny, or package.module:function")
    add("--input", action="append", default=[], type=shape, metavar="SHAPE",
        help="shape of the input, batch included, like 64,3,32,32")
    add("--inference", action="store_true",
        help="measure the latency of requests to the frozen model, or layer, beside dense PyTorch, ONNX Runtime and "
        "OpenVINO in 8 bits where they are installed")
    add("--batches", nargs="+", type=whole_number(1), metavar="N",
        help="with --inference: samples of a request (default: that of --input)")
    add("--compile", action="store_true",
        help="with --inference: torch.compile takes part, which needs a C++ compiler and a minute for each batch")
    add("--by-layer", action="store_true", help="with --model: measure its layers one by one, at their inputs' sizes")
    add("--sparsity", nargs="+", type=number_between(0, 1), default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.98], metavar="S",
        help="shares of zeros, at random places (default: %(default)s)")
    add("--threads", type=whole_number(1), metavar="N",
        help="threads to compute with, no more than processors (default: PyTorch's choice)")
    add("--repeats", type=whole_number(1), default=5, metavar="N",
        help="timed steps of each, at least (default: %(default)s)")
    add("--out", type=Path, metavar="DIR",
        help="write bench.json, speedup.png (speed-up against sparsity, its spread and what follows) and, for layers, "
        "roofline.png there; made if need be")
    parser.set_defaults(run=run, parser=parser)


def run(arguments: argparse.Namespace) -> int:
    """Check the arguments, measure, print the table and write the files; return the exit code."""
    parser: argparse.ArgumentParser = arguments.parser
    if arguments.model is not None and arguments.layer:
        parser.error("--model and --layer exclude each other")
    if arguments.by_layer and arguments.model is None:
        parser.error("--by-layer needs --model")
    if arguments.input and arguments.model is None and not arguments.layer:
        parser.error("--input is the shape for a --layer or a --model: name one, like "
                     '--layer "Linear(768, 3072)" --input 64,768')
    _check_inference(arguments)
    wanted = 1 if arguments.model is not None else len(arguments.layer)
    if len(arguments.input) != wanted:
        parser.error(f"--input must be given {wanted} time(s), once a layer or model, got {len(arguments.input)}")
    if arguments.inference:
        return _serve(arguments)
    if arguments.out is not None:
        problem = missing_package("bench", ("matplotlib", "matplotlib"))
        if problem:
            parser.exit(2, f"{parser.prog}: error: {problem}\n")
        problem = prepare_directory(arguments.out)
        if problem:
            parser.error(problem)
    from qsparseprop.benchmarking.bench import BenchConfig, bench
    from qsparseprop.benchmarking.bench_report import format_table, plot_roofline, plot_speedup
    from qsparseprop.benchmarking.compare_report import write_json

    result = bench(
        BenchConfig(tuple(arguments.layer), arguments.model, tuple(arguments.input), arguments.by_layer,
                    tuple(sorted(set(arguments.sparsity))), arguments.threads, arguments.repeats),
        lambda text: print(text, flush=True),
    )  # fmt: skip
    print(format_table(result))
    if arguments.out is not None:
        written = [arguments.out / "bench.json", arguments.out / "speedup.png"]
        write_json(result, written[0])
        plot_speedup(result, written[1])
        if result["limits"]:
            written.append(arguments.out / "roofline.png")
            plot_roofline(result, written[2])
        print("Written: " + ", ".join(map(str, written)))
    return 0


def _check_inference(arguments: argparse.Namespace) -> None:
    parser: argparse.ArgumentParser = arguments.parser
    if not arguments.inference and (arguments.batches or arguments.compile):
        parser.error("--batches and --compile need --inference")
    if arguments.inference and (arguments.by_layer or (arguments.model is None and len(arguments.layer) != 1)):
        parser.error("--inference measures one --model or one --layer, with an --input")


def _serve(arguments: argparse.Namespace) -> int:
    """Requests to frozen models, at each sparsity."""
    if arguments.out is not None and (problem := prepare_directory(arguments.out)):
        arguments.parser.error(problem)
    import torch

    from qsparseprop.benchmarking.bench import pruned_for_inference
    from qsparseprop.benchmarking.compare_report import write_json
    from qsparseprop.benchmarking.serving import ServingConfig, format_serving, serve

    (given,) = arguments.input
    threads = (arguments.threads or torch.get_num_threads(),)
    config = ServingConfig(tuple(arguments.batches or given[:1]), threads, compiled=arguments.compile)
    results = []
    for sparsity in sorted(set(arguments.sparsity)):
        name, model = pruned_for_inference(arguments.model, arguments.layer, given, sparsity)
        results.append(serve(f"{name}, {100 * sparsity:g} % zeros", model, given[1:], config,
                             lambda text: print(text, flush=True)))  # fmt: skip
        print(format_serving(results[-1]))
    if arguments.out is not None:
        write_json({"inference": results}, arguments.out / "inference.json")
        print(f"Written: {arguments.out / 'inference.json'}")
    return 0
