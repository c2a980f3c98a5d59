"""Where the milliseconds of a training step go: torch's profiler, by kind of operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from _common import Table, say
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

#: Steps that are added up.
PROFILED_STEPS = 5

#: Row of the profile by what an event's name starts with.
ROWS = {
    "aten::batch_norm": "BatchNorm",
    "aten::native_batch_norm": "BatchNorm",
    "aten::_batch_norm": "BatchNorm",
    "aten::relu": "ReLU",
    "aten::clamp_min": "ReLU",
    "aten::threshold_backward": "ReLU",
    "aten::max_pool2d": "pooling",
    "aten::adaptive_avg_pool2d": "pooling",
    "aten::_adaptive_avg_pool2d": "pooling",
    "aten::mean": "pooling",
    "aten::conv": "dense convolution",
    "aten::linear": "dense Linear",
    "aten::addmm": "dense Linear",
    "aten::mm": "dense Linear",
    "aten::layer_norm": "LayerNorm",
    "aten::native_layer_norm": "LayerNorm",
    "aten::silu": "gates",
    "aten::mul": "gates",
    "aten::gelu": "GELU",
    "aten::scaled_dot_product_attention": "attention",
    "aten::_scaled_dot_product": "attention",
    "aten::cross_entropy_loss": "loss",
    "aten::log_softmax": "loss",
    "aten::_log_softmax": "loss",
    "aten::nll_loss": "loss",
    "aten::add": "add",
    # nodes of the backward pass; the engine's additions of gradients happen outside of them
    "NativeBatchNormBackward": "BatchNorm",
    "ReluBackward": "ReLU",
    "MaxPool2DWithIndicesBackward": "pooling",
    "MeanBackward": "pooling",
    "NativeLayerNormBackward": "LayerNorm",
    "SiluBackward": "gates",
    "MulBackward": "gates",
    "GeluBackward": "GELU",
    "ScaledDotProduct": "attention",
    "ConvolutionBackward": "dense convolution",
    "AddmmBackward": "dense Linear",
    "AddBackward": "add",
}
#: Events of a sparse module, and the row for what is in none of its kernels: Python, allocation, casts.
SPARSE = ("SparseProduct", "Block", "qsparseprop::")
SPARSE_REST = "sparse modules, rest"
REST = "rest"


def _row(names: Sequence[str]) -> str:
    """Row of an event: the outermost operator that has one, but inside of a sparse module the innermost kernel."""
    if any(name.startswith(SPARSE) for name in names):
        kernels = (name.removeprefix("qsparseprop::") for name in names if name.startswith("qsparseprop::"))
        return next((name for name in kernels if not name.startswith("layer_")), SPARSE_REST)
    return next((row for name in reversed(names) for start, row in ROWS.items() if name.startswith(start)), REST)


def _names(event: FunctionEvent) -> Iterator[str]:
    """Names of an event and of those that it is part of, from the inside out."""
    current: FunctionEvent | None = event
    while current is not None:
        yield current.name
        current = current.cpu_parent


def profile_step(step: Callable[[], None], quick: bool) -> dict[str, dict[str, float]]:
    """Where the milliseconds of a step go.

    Returns
    -------
    dict
        Milliseconds of each row (see `_row`) in the phases "forward", "backward" and "update"; together all the time
        that the profiler saw.
    """
    steps = 1 if quick else PROFILED_STEPS
    step()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    rows: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(("forward", "backward", "update"), 0.0))
    for event in recorded.events():
        *names, phase = _names(event)
        if phase in ("forward", "backward", "update"):
            rows["optimizer" if phase == "update" else _row(names)][phase] += event.self_cpu_time_total / 1e3 / steps
    return dict(rows)


def show_rows(title: str, rows: dict[str, dict[str, float]], ms: float, sparsity: float, threads: int) -> None:
    """Print the rows of `profile_step` of a step that takes `ms` without the profiler."""
    total = sum(sum(row.values()) for row in rows.values())
    say(f"\n{title}, {100 * sparsity:g} % zeros, {threads} thread{'s' if threads > 1 else ''}: {ms:.1f} ms a step, "
        f"{total:.1f} under the profiler, of which in ms\n")
    table = Table(["", "forward", "backward", "together", "share"], 24)
    for name, row in sorted(rows.items(), key=lambda item: -sum(item[1].values())):
        together = sum(row.values())
        table.row(name, row["forward"], row["backward"], together, f"{100 * together / total:.1f} %")
