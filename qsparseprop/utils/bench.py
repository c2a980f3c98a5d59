"""Training steps of layers and models, dense and sparse, at several sparsities: behind the ``bench`` command."""

from __future__ import annotations

import ast
import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qsparseprop import nn as sparse_nn

from ._errors import ConfigurationError
from .cost_model import layer_cost, model_costs
from .measurement_utils import environment, interleaved_medians
from .models import build_model
from .network_utils import swap_modules_with_sparse
from .pruning_utils import prunable_modules
from .setup_run import TrainingMode

__all__ = ["BenchConfig", "bench", "break_even", "parse_layer"]

#: Measured where nothing is asked for.
DEFAULT_LAYERS = (("Conv2d(128, 128, 3, padding=1)", (64, 128, 16, 16)), ("Linear(1024, 1024)", (1024, 1024)))

#: Short steps are timed more often: until a comparison has taken so long, but not more often than that.
_SECONDS, _MOST_STEPS = 0.5, 100

_MODES = tuple(TrainingMode(bf16, channels_last) for bf16 in (False, True) for channels_last in (False, True))
_SPARSE_KINDS = {nn.Linear: "QuantizedSparseLinear", nn.Conv1d: "QuantizedSparseConv1d",
                 nn.Conv2d: "QuantizedSparseConv2d"}  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` measures.

    Attributes
    ----------
    layers : tuple of str
        See `parse_layer`; with no model either, `DEFAULT_LAYERS`.
    model : str or None
        See `qsparseprop.utils.models.build_model`.
    inputs : tuple of shapes
        One a layer, or that of the model.
    by_layer : bool
        Measure the model's layers one by one.
    sparsities : tuple of float
        Ascending.
    threads : int or None
        torch's threads; None for its own choice.
    repeats : int
        Timed steps at least.
    """

    layers: tuple[str, ...] = ()
    model: str | None = None
    inputs: tuple[tuple[int, ...], ...] = ()
    by_layer: bool = False
    sparsities: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    threads: int | None = None
    repeats: int = 5


def parse_layer(text: str) -> nn.Module:
    """Make a layer from what PyTorch prints of one, like ``Conv2d(64, 64, 3, padding=1)``.

    Raises
    ------
    ConfigurationError
        If it is no call of ``Linear``, ``Conv1d`` or ``Conv2d`` with numbers, tuples, strings and the like, or one that
        PyTorch refuses.
    """
    kinds = {kind.__name__: kind for kind in _SPARSE_KINDS}
    wrong = ConfigurationError(f"{text!r} is no layer; write it like \"Linear(768, 3072)\" or \"Conv2d(64, 64, 3, "
                               f"padding=1)\", one of {', '.join(kinds)}")  # fmt: skip
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in kinds:
            raise wrong
        args = [ast.literal_eval(value) for value in call.args]
        kwargs = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise error if error is wrong else wrong from error
    try:
        return kinds[call.func.id](*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"{text!r}: {str(error).splitlines()[0]}") from error


def bench(config: BenchConfig, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure.

    Parameters
    ----------
    config : BenchConfig
    say : callable
        Told how far it is.

    Returns
    -------
    dict
        ``results``: one entry a layer (or model) and sparsity, with ``name``, ``sparsity``, ``ms`` by setting,
        ``best_dense``, ``best_sparse``, ``speedup`` and, of layers, ``dense`` and ``sparse`` (``operations`` and
        ``bytes`` of a step); ``break_even``: sparsity by name (None: not within what was measured); ``limits``: what
        this machine reaches, in operations or bytes a second (layers only); ``config``, ``environment``.

    Raises
    ------
    ConfigurationError
        If layers, model and inputs do not go together.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    jobs = _jobs(config)
    results = []
    for name, module, x, x_grad in jobs:
        for sparsity in config.sparsities:
            say(f"{name} at {100 * sparsity:g} % ...")
            results.append(_measure(name, module, x, x_grad, sparsity, config.repeats))
    names = list(dict.fromkeys(result["name"] for result in results))
    curves = {n: [(r["sparsity"], r["speedup"]) for r in results if r["name"] == n] for n in names}
    layers = config.model is None or config.by_layer
    if layers:
        say("machine limits ...")
    return {
        "results": results,
        "break_even": {name: break_even(curve) for name, curve in curves.items()},
        "limits": machine_limits() if layers else {},
        "config": asdict(config),
        "environment": environment(),
    }


def _jobs(config: BenchConfig) -> list[tuple[str, nn.Module, Tensor, bool]]:
    """Name, module, input, and whether the input needs a gradient."""
    if config.model is not None:
        shape = config.inputs[0]
        extra = {"in_channels": shape[1], "image_size": shape[-1]} if len(shape) == 4 else {}
        model = build_model(config.model, **extra).train()
        try:
            costs = model_costs(model, shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise ConfigurationError(f"{config.model} cannot take an input of shape {shape}: {error}") from error
        if not config.by_layer:
            return [(config.model, model, torch.randn(shape), False)]
        jobs: dict[tuple[str, tuple[int, ...]], tuple[str, nn.Module, Tensor, bool]] = {}
        for cost in costs:
            module = model.get_submodule(cost.name)
            # one of each kind and size
            if type(module) in _SPARSE_KINDS:
                jobs.setdefault((str(module), cost.input_shape), (cost.name, module, torch.randn(cost.input_shape),
                                                                  cost is not costs[0]))  # fmt: skip
        return list(jobs.values())
    pairs = list(zip(config.layers, config.inputs, strict=True)) or DEFAULT_LAYERS
    jobs_of_layers = []
    for text, shape in pairs:
        module = parse_layer(text)
        try:
            layer_cost(module, shape)
        except ValueError as error:
            raise ConfigurationError(f"{text} with an input of shape {shape}: {error}") from error
        jobs_of_layers.append((f"{text} on {'x'.join(map(str, shape))}", module, torch.randn(shape), True))
    return jobs_of_layers


@torch.no_grad()
def _put_zeros(weight: Tensor, sparsity: float) -> None:
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(weight.numel())
    mask[order[: round(sparsity * weight.numel())]] = 0
    weight.mul_(mask.view(weight.shape))


def _step(module: nn.Module, x: Tensor, x_grad: bool, mode: TrainingMode) -> Callable[[], None]:
    """Forward and backward pass of a module in a mode."""
    module = copy.deepcopy(module)
    if mode.channels_last and x.ndim == 4:
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    # what autocast has made of it before
    x = x.detach().to(torch.bfloat16 if mode.bf16 and x_grad else torch.float32).requires_grad_(x_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16), torch.no_grad():
        grad = torch.ones_like(module(x.detach()))

    def step() -> None:
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16):
            y = module(x)
        y.backward(grad)

    return step


def _measure(name: str, module: nn.Module, x: Tensor, x_grad: bool, sparsity: float, repeats: int) -> dict[str, Any]:
    pruned = copy.deepcopy(module)
    layer = type(module) in _SPARSE_KINDS
    if layer:
        _put_zeros(pruned.weight, sparsity)
        sparse = getattr(sparse_nn, _SPARSE_KINDS[type(module)]).from_dense(pruned)
    else:
        for part in prunable_modules(pruned).values():
            _put_zeros(part.weight, sparsity)
        sparse = swap_modules_with_sparse(copy.deepcopy(pruned), x, include_dense=False, verbose=False,
                                          min_sparsity=sparsity - 0.02)  # fmt: skip
    modes = _MODES if x.ndim == 4 else tuple(mode for mode in _MODES if not mode.channels_last)
    steps = {f"dense {mode.name}": _step(pruned, x, x_grad, mode) for mode in modes}
    fast = [mode for mode in modes if mode.channels_last or x.ndim != 4]
    steps |= {f"int8 {mode.name}": _step(sparse, x, x_grad, mode) for mode in fast}
    turn = sum(interleaved_medians(steps, repeats=1, warmup=2).values())
    medians = interleaved_medians(steps, max(repeats, min(_MOST_STEPS, int(_SECONDS / turn))), warmup=0)
    ms = {key: 1e3 * seconds for key, seconds in medians.items()}
    best = {kind: min((k for k in ms if k.startswith(kind)), key=ms.__getitem__) for kind in ("dense", "int8")}
    result = {
        "name": name, "sparsity": sparsity, "input": list(x.shape), "ms": ms, "best_dense": best["dense"],
        "best_sparse": best["int8"], "speedup": ms[best["dense"]] / ms[best["int8"]],
    }  # fmt: skip
    if layer:
        for kind, of in (("dense", pruned), ("sparse", sparse)):
            setting = result[f"best_{kind}"]
            dtype = torch.bfloat16 if "bf16" in setting else torch.float32
            cost = layer_cost(of, x.shape, dtype=dtype, input_grad=x_grad).total
            result[kind] = {"operations": cost.operations, "bytes": cost.bytes, "seconds": ms[setting] / 1e3}
    return result


def break_even(curve: Sequence[tuple[float, float]]) -> float | None:
    """Sparsity at which a speed-up is 1, between measured points (straight lines in its logarithm).

    Parameters
    ----------
    curve : sequence of (sparsity, speed-up)
        Sorted by sparsity.

    Returns
    -------
    float or None
        None where it does not rise through 1; if it does so several times, the last one.
    """
    found = None
    for (s0, y0), (s1, y1) in itertools.pairwise(curve):
        if y0 < 1 <= y1:
            found = s0 + (s1 - s0) * (0 - math.log(y0)) / (math.log(y1) - math.log(y0))
    return found


def machine_limits() -> dict[str, float]:
    """What this machine reaches with torch's threads: the ceilings of a roofline.

    Returns
    -------
    dict
        ``fp32`` and ``bf16``: operations a second of a large matrix product; ``memory``: bytes a second, read and
        written, of adding to a tensor that no cache holds.
    """
    size = 1024
    a = torch.randn(size, size)
    limits = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matrix = a.to(dtype)
        seconds = interleaved_medians({name: lambda m=matrix: m @ m}, repeats=5, warmup=2)[name]
        limits[name] = 2 * size**3 / seconds
    large = torch.zeros(64_000_000)
    limits["memory"] = 2 * large.nbytes / interleaved_medians({"add": lambda: large.add_(1)}, repeats=5)["add"]
    return limits
