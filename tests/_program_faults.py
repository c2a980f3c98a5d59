"""Compares the runs of a program: what blocks of deferred tensors do to it that they must not do."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._program_runs import Log, Runner, norm_of

#: Parts of what torch says where blocks, and layers, may go on: it has saved a tensor that was changed, or is of
#: inference mode, and they have saved something else; it takes results for views that are none.
_STRICTER = ("modified by an inplace operation", "Inference tensors cannot be saved", "Can't detach views in-place",
             "is a view and is being modified inplace", "have different metadata",
             "detached in-place", "is a view and its base or another view of its base has been modified")
#: What changes values past autograd: torch's gradients are those of the new values where it has saved these.
#: Under hooks that save the tensor itself, that is so of every change.
_UNSEEN = (".data.", ".data +=", "detach().mul_", "log.numpy(", "save_on_cpu", "compress_saved_tensors")
#: What blocks refuse, with a way out.
_REFUSED = ("can be differentiated once only", "modified by an inplace operation: a tensor of shape",
            # torch's, where the history of a view is asked for that was changed in inference mode
            "new_fn INTERNAL ASSERT FAILED")  # fmt: skip


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _sizes(log: Log) -> tuple[float, float]:
    """The greatest norm of a gradient, and of anything else."""
    sizes = {True: [log.size], False: [0.0]}
    for name, _, x in log.entries:
        if x is not None and x.is_floating_point() and math.isfinite(norm_of(x)):
            sizes["gradient" in name].append(norm_of(x))
    return max(sizes[True]), max(sizes[False])


def _structure(a: list[Log], b: list[Log], values: bool) -> str | None:
    """The first thing that is not the same in two runs; with `values`, of these as well."""
    for call, (one, other) in enumerate(zip(a, b, strict=True)):
        for i in range(max(len(one.entries), len(other.entries))):
            x = one.entries[i] if i < len(one.entries) else ("end", None, None)
            y = other.entries[i] if i < len(other.entries) else ("end", None, None)
            if x[:2] != y[:2] and "error" in (x[0], y[0]) and one.error_type == other.error_type:
                return None  # what has been done before it fails may differ
            if x[:2] != y[:2]:
                return f"call {call}, entry {i}: {x[:2]} {one.message} / {y[:2]} {other.message}"
            if values and x[2] is not None and not _equal(x[2], y[2]):
                return (f"call {call}, entry {i}: values of {x[0]}, difference {norm_of(x[2] - y[2]):.3g} of "
                        f"{norm_of(y[2]):.3g}")  # fmt: skip
    return None


def _until_lenient(deferred: list[Log], plain: list[Log]) -> tuple[list[Log], list[Log]]:
    """Both up to where torch refuses what blocks can do, or they what torch can."""
    for call, (one, other) in enumerate(zip(deferred, plain, strict=True)):
        if any(text in other.message and text not in one.message for text in _STRICTER) or any(
            text in one.message and text not in other.message for text in _REFUSED
        ):
            return deferred[:call], plain[:call]
    return deferred, plain


def _far(found: list[Log], plain: list[Log], exact: list[Log] | None = None) -> str | None:
    """The first values that are further from those without blocks than quantisation explains.

    What quantisation does to a program is seen in the difference to the same in float32 (with 8 bits where blocks keep
    8 bits), where that is given.
    """
    for call, logs in enumerate(zip(found, plain, exact or plain, strict=True)):
        gradients, others = _sizes(logs[1])
        for (name, _, x), (other, _, y), (_, _, z) in zip(*(log.entries for log in logs), strict=False):
            if name != other:  # one has failed earlier than the other
                return None
            if x is None or y is None or z is None or not x.is_floating_point() or not x.numel():
                continue
            size, usual, far = norm_of(y), norm_of(y - z), norm_of(x - y)
            least = gradients if "gradient" in name else others
            # what is small beside the others is a sum that cancels, such as the gradient of a bias
            share, floor = (0.15, 0.02) if size > 0.5 * least else (0.65, 0.15)
            if math.isfinite(size + usual) and not far <= 6 * usual + share * size + floor * least:
                return f"call {call}: values of {name}, difference {far:.3g} of {size:.3g}, usual {usual:.3g}"
    return None


def _hangs_on_roundings(source: str) -> bool:
    """Whether 8 bits make as much of a difference to a program in bfloat16 when it computes in float32."""
    other = source.replace(", dtype=torch.bfloat16", "")
    if other == source:
        return False
    runner = Runner(other)
    return _far(runner.run(False), runner.run(False, quantize=False)) is not None


def _changes_unseen(source: str) -> bool:
    """Whether torch has saved what a program changes where torch does not look.

    That is through another name, made by ``.data``, and within what is checkpointed, whose tensors are made anew.
    """
    runner = Runner(source.replace(".data", ".detach()"))
    runner._names.update(checkpoint=lambda f, *args, **_: f(*args), checkpoint_sequential=lambda f, _, x, **__: f(x))
    logs = runner.run(False)
    return any("modified by an inplace operation" in log.message for log in logs)


def fault(source: str) -> str | None:
    """What deferring does to a program that it must not do, if anything."""
    runner = Runner(source)
    deferred, stepwise = runner.run(True), runner.run(True, True)
    # in these, values are rounded to bfloat16 more often one by one, or their range is known better
    rounds = any(name in source.lower() for name in ("bfloat16", "gelu", "silu", "hardswish"))
    found = _structure(deferred, stepwise, not rounds)
    if found:
        return "deferred / one by one: " + found
    deferred, plain = _until_lenient(deferred, runner.run(False))
    found = _structure(deferred, plain, False)
    if found:
        return "deferred / without blocks: " + found
    if any(text in source for text in _UNSEEN):
        return None
    for name, logs in ("deferred", deferred), ("one by one", stepwise[: len(plain)]):
        if not _far(logs, plain):
            continue
        exact = runner.run(False, quantize=False)[: len(plain)]
        if _structure(exact, plain, False) or not (found := _far(logs, plain, exact)):
            continue
        # as the sign of what is constant, behind a normalisation
        by_chance = any(_far(runner.run(False, shaken=part)[: len(plain)], plain, exact) for part in (1e-6, 1e-4))
        if not by_chance and not _hangs_on_roundings(source) and not _changes_unseen(source):
            return f"{name} / without blocks: {found}"
    return None
