"""Training steps of layers and models, dense and sparse, at several sparsities: behind the ``bench`` command."""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from qsparseprop import nn as sparse_nn
from qsparseprop.config import usable_processors
from qsparseprop.nn._dense import held
from qsparseprop.nn.deferred import ordinary
from qsparseprop.training.models import MODELS, build_model
from qsparseprop.training.setup_run import TrainingMode
from qsparseprop.utils.cost_model import LayerCost, layer_cost, model_costs
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.measurement_utils import (
    Spread,
    environment,
    interleaved_medians,
    interleaved_times,
    machine_memory_bytes,
    ratio_spread,
)
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import prunable_modules

from .break_even import break_even

__all__ = ["BenchConfig", "bench", "break_even", "parse_layer"]

#: Measured where nothing is asked for.
DEFAULT_LAYERS = (("Conv2d(128, 128, 3, padding=1)", (64, 128, 16, 16)), ("Linear(1024, 1024)", (1024, 1024)))

#: Short steps are timed more often: until a comparison has taken so long, but not more often than that.
_SECONDS, _MOST_STEPS = 0.5, 100

#: A larger share of the machine's memory is not asked for.
_MOST_MEMORY = 0.5

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
        See `qsparseprop.training.models.build_model`.
    inputs : tuple of shapes
        One a layer, or that of the model.
    by_layer : bool
        Measure the model's layers one by one.
    sparsities : tuple of float
        Ascending.
    threads : int or None
        torch's threads, no more than processors; None for its own choice.
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
        If it is no call of ``Linear``, ``Conv1d`` or ``Conv2d`` with numbers, tuples, strings and the like, one that
        PyTorch refuses, one without weights, or with more than half of the machine's memory would hold.
    """
    kinds = {kind.__name__: kind for kind in _SPARSE_KINDS}
    wrong = ConfigurationError(f"{text!r} is no layer; write it like \"Linear(768, 3072)\" or \"Conv2d(64, 64, 3, "
                               f"padding=1)\", one of {', '.join(kinds)}")  # fmt: skip
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in kinds:
            raise wrong
        args = [ast.literal_eval(value) for value in call.args]
        kwargs: dict[Any, Any] = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise error if error is wrong else wrong from error
    if "device" in kwargs or "dtype" in kwargs:
        raise ConfigurationError(f"{text!r}: layers are measured on the CPU in float32 and bfloat16; leave out device "
                                 "and dtype")  # fmt: skip
    try:
        with warnings.catch_warnings(), torch.device("meta"):  # sizes first: nothing is allocated there
            warnings.simplefilter("ignore")  # of empty layers
            weight = kinds[call.func.id](*args, **kwargs).weight
        if not weight.numel():
            raise ConfigurationError(f"{text!r} has no weights")
        _check_memory(text, weight.nbytes)
        return kinds[call.func.id](*args, **kwargs)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{text!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _check_memory(what: str, size: float) -> None:
    memory = machine_memory_bytes()
    if memory is not None and size > _MOST_MEMORY * memory:
        raise ConfigurationError(f"{what} needs about {size / 1e9:,.0f} GB to be measured, more than half of the "
                                 f"memory ({memory / 1e9:,.0f} GB)")  # fmt: skip


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
        ``results``: one entry a layer (or model) and sparsity, with ``name``, ``sparsity``, ``ms`` by setting
        (medians), ``best_dense``, ``best_sparse``, ``samples`` (milliseconds of each step of these two, in the order of
        the turns), ``speedup`` (ratio of their medians), ``spread`` (its lower and upper end, see `Spread`) and, of
        layers, ``dense`` and ``sparse`` (``operations`` and ``bytes`` of a step); ``break_even``: a `BreakEven` as
        dict, by name; ``limits``: what this machine reaches, in operations or bytes a second (layers only);
        ``config``, ``environment``.

    Raises
    ------
    ConfigurationError
        If layers, model and inputs do not go together or are too large, a layer would be left without weights, or
        threads are more than processors. Nothing has been measured then.
    """
    if config.threads is not None:
        if config.threads > usable_processors():
            raise ConfigurationError(f"{config.threads} threads would wait for each other: this process may use "
                                     f"{usable_processors()} processors")  # fmt: skip
        torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    jobs = _jobs(config, say)
    results = []
    for name, module, shape, x_grad in jobs:
        x = torch.randn(shape)
        for sparsity in config.sparsities:
            say(f"{name} at {100 * sparsity:g} % ...")
            results.append(_measure(name, module, x, x_grad, sparsity, config.repeats))
    names = list(dict.fromkeys(result["name"] for result in results))
    curves = {n: [(r["sparsity"], Spread(r["speedup"], *r["spread"])) for r in results if r["name"] == n]
              for n in names}  # fmt: skip
    layers = config.model is None or config.by_layer
    if layers:
        say("machine limits ...")
    return {
        "results": results,
        "break_even": {name: asdict(break_even(curve)) for name, curve in curves.items()},
        "limits": machine_limits() if layers else {},
        "config": asdict(config),
        "environment": environment(),
    }


#: Name, module, shape of the input, and whether the input needs a gradient.
_Job = tuple[str, nn.Module, tuple[int, ...], bool]


def _jobs(config: BenchConfig, say: Callable[[str], None]) -> list[_Job]:
    if config.model is not None:
        if len(config.inputs) != 1:
            raise ConfigurationError(f"{config.model} needs the shape of one input, got {len(config.inputs)}")
        return _jobs_of_model(config, config.model, config.inputs[0], say)
    if len(config.layers) != len(config.inputs):
        raise ConfigurationError(f"each layer needs the shape of its input, got {len(config.layers)} layers and "
                                 f"{len(config.inputs)} shapes")  # fmt: skip
    jobs = []
    for text, shape in list(zip(config.layers, config.inputs, strict=True)) or DEFAULT_LAYERS:
        module, name = parse_layer(text), f"{text} on {_times(shape)}"
        try:
            _check_memory(name, len(_MODES) * 1.5 * layer_cost(module, shape).total.bytes)
        except ConfigurationError:
            raise
        except ValueError as error:
            raise ConfigurationError(f"{text} with an input of shape {_times(shape)}: {error}") from error
        if (problem := _problem(module, shape, config.sparsities)) is not None:
            raise ConfigurationError(f"{text} with an input of shape {_times(shape)}: {problem}")
        jobs.append((name, module, shape, True))
    return jobs


def _jobs_of_model(
    config: BenchConfig, name: str, shape: tuple[int, ...], say: Callable[[str], None]
) -> list[_Job]:
    model, costs = _model_and_costs(name, shape)
    for path, module in prunable_modules(model).items():
        _check_rest(f"{path} of {name}", module, config.sparsities)
    if not config.by_layer:
        return [(name, model, shape, False)]
    jobs: dict[tuple[str, tuple[int, ...]], _Job] = {}
    for cost in costs:
        module = model.get_submodule(cost.name)
        key = str(module), cost.input_shape  # one of each kind and size
        if key in jobs or type(module) not in _SPARSE_KINDS:
            continue
        if (problem := _problem(module, cost.input_shape, config.sparsities)) is not None:
            say(f"{cost.name} is left out: {problem}")
            continue
        jobs[key] = (cost.name, module, cost.input_shape, cost is not costs[0])
    if not jobs:
        raise ConfigurationError(f"{name} has no layer that can be sparse: Linear, Conv1d or Conv2d")
    return list(jobs.values())


def _model_and_costs(name: str, shape: tuple[int, ...]) -> tuple[nn.Module, list[LayerCost]]:
    """A model that takes inputs of a shape, and what its layers have to do."""
    if name in MODELS and len(shape) != 4:
        raise ConfigurationError(f"{name} takes images, batch,channels,height,width, like 64,3,32,32; got an input of "
                                 f"shape {_times(shape)}")  # fmt: skip
    if name in MODELS and "image_size" in inspect.signature(MODELS[name]).parameters and shape[2] != shape[3]:
        raise ConfigurationError(f"{name} takes square images, got an input of shape {_times(shape)}")
    what = f"{name} with an input of shape {_times(shape)}"
    _check_memory(what, 4 * len(_MODES) * math.prod(shape))
    extra = {"in_channels": shape[1], "image_size": shape[-1]} if len(shape) == 4 else {}
    if name in MODELS:
        with torch.device("meta"):
            _check_memory(what, 3 * len(_MODES) * _bytes_of_parameters(build_model(name, **extra)))
    model = build_model(name, **extra).train()
    try:
        # of one example first, which tells how much memory all of them need
        costs = model_costs(model, (1, *shape[1:]))
        _check_memory(what, shape[0] * sum(cost.forward.bytes for cost in costs)
                      + 3 * len(_MODES) * _bytes_of_parameters(model))  # fmt: skip
        return model, model_costs(model, shape)
    except ConfigurationError:
        raise
    except Exception as error:  # a model of one's own may raise anything
        reason = _first_line(error)
        raise ConfigurationError(f"{name} cannot take an input of shape {_times(shape)}: {reason}") from error


def _bytes_of_parameters(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def _check_rest(name: str, module: nn.Module, sparsities: tuple[float, ...]) -> None:
    size = held(module, "weight").numel()
    if round(max(sparsities) * size) >= size:
        raise ConfigurationError(f"at {100 * max(sparsities):g} % zeros nothing is left of {name}, which has {size} "
                                 f"weight{'s' if size > 1 else ''}")  # fmt: skip


def _problem(module: nn.Module, shape: tuple[int, ...], sparsities: tuple[float, ...]) -> str | None:
    """Why a layer cannot be measured, dense and sparse, at inputs of a shape; tried with one example."""
    try:
        _check_rest(type(module).__name__, module, sparsities)
        batched = len(shape) > (1 if isinstance(module, nn.Linear) else held(module, "weight").ndim - 1)
        x = torch.zeros((1, *shape[1:]) if batched else shape)
        with torch.no_grad():
            module(x)
            _sparse_layer(_pruned(module, max(sparsities)))(x)
    except Exception as error:  # of many types, from torch and from the kernels
        return _first_line(error)
    return None


def _pruned(module: nn.Module, sparsity: float) -> nn.Module:
    pruned = copy.deepcopy(module)
    for part in [pruned] if type(module) in _SPARSE_KINDS else prunable_modules(pruned).values():
        _put_zeros(held(part, "weight"), sparsity)
    return pruned


def pruned_for_inference(
    model: str | None, layers: Sequence[str], shape: tuple[int, ...], sparsity: float
) -> tuple[str, nn.Module]:
    """A model or a layer with zeros at random places, and its name.

    Parameters
    ----------
    model : str or None
        See `qsparseprop.training.models.build_model`.
    layers : sequence of str
        Without a model: one, see `parse_layer`.
    shape : tuple of int
        Of the input, batch included.
    sparsity : float

    Returns
    -------
    str, torch.nn.Module

    Raises
    ------
    ConfigurationError
        If they do not go together.
    """
    torch.manual_seed(0)
    if model is not None:
        return model, _pruned(_model_and_costs(model, shape)[0], sparsity)
    (text,) = layers
    module = parse_layer(text)
    if (problem := _problem(module, shape, (sparsity,))) is not None:
        raise ConfigurationError(f"{text} with an input of shape {_times(shape)}: {problem}")
    return text, _pruned(module, sparsity)


def _sparse_layer(module: nn.Module) -> nn.Module:
    return getattr(sparse_nn, _SPARSE_KINDS[type(module)]).from_dense(module)


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
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it without
        x = x.to(memory_format=torch.channels_last)
    # what autocast has made of it before
    x = x.detach().to(torch.bfloat16 if mode.bf16 and x_grad else torch.float32).requires_grad_(x_grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16), torch.no_grad():
        grad = torch.ones_like(module(x.detach()))

    def step() -> None:
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16):
            y = ordinary(module(x))
        y.backward(grad)
        increment_version(module.parameters())  # as an optimizer would, see `_layer_timing`

    return step


def _measure(name: str, module: nn.Module, x: Tensor, x_grad: bool, sparsity: float, repeats: int) -> dict[str, Any]:
    pruned, layer = _pruned(module, sparsity), type(module) in _SPARSE_KINDS
    if layer:
        sparse = _sparse_layer(pruned)
    else:
        sparse = swap_modules_with_sparse(copy.deepcopy(pruned), x, include_dense=False, verbose=False, fuse=True,
                                          min_sparsity=max(0.0, sparsity - 0.02))  # fmt: skip
    modes = _MODES if x.ndim == 4 else tuple(mode for mode in _MODES if not mode.channels_last)
    steps = {f"dense {mode.name}": _step(pruned, x, x_grad, mode) for mode in modes}
    fast = [mode for mode in modes if mode.channels_last or x.ndim != 4]
    steps |= {f"int8 {mode.name}": _step(sparse, x, x_grad, mode) for mode in fast}
    turn = sum(interleaved_medians(steps, repeats=1, warmup=2).values())
    times = interleaved_times(steps, max(repeats, min(_MOST_STEPS, int(_SECONDS / turn))), warmup=0)
    samples = {key: [1e3 * seconds for seconds in values] for key, values in times.items()}
    ms = {key: statistics.median(values) for key, values in samples.items()}
    dense, int8 = (min((k for k in ms if k.startswith(kind)), key=ms.__getitem__) for kind in ("dense", "int8"))
    spread = ratio_spread(samples[dense], samples[int8])
    result: dict[str, Any] = {
        "name": name, "sparsity": sparsity, "input": list(x.shape), "ms": ms, "best_dense": dense, "best_sparse": int8,
        "samples": {key: samples[key] for key in (dense, int8)}, "speedup": spread.value,
        "spread": [spread.low, spread.high],
    }  # fmt: skip
    if layer:
        for kind, of in (("dense", pruned), ("sparse", sparse)):
            setting = result[f"best_{kind}"]
            dtype = torch.bfloat16 if "bf16" in setting else torch.float32
            cost = layer_cost(of, x.shape, dtype=dtype, input_grad=x_grad).total
            result[kind] = {"operations": cost.operations, "bytes": cost.bytes, "seconds": ms[setting] / 1e3}
    return result


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
        product = functools.partial(torch.matmul, matrix, matrix)
        limits[name] = 2 * size**3 / interleaved_medians({name: product}, repeats=5, warmup=2)[name]
    large = torch.zeros(64_000_000)
    limits["memory"] = 2 * large.nbytes / interleaved_medians({"add": lambda: large.add_(1)}, repeats=5)["add"]
    return limits
