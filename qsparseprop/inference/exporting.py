"""Models by torch.export, for batches of any size."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qsparseprop._torch_compat import size_guards

__all__ = ["NotCapturable", "export_model"]

#: Sizes of the batch for which what a model asks of it must hold.
_BATCHES = (*range(2, 66), 100, 127, 128, 129, 255, 256, 257, 1000, 1021, 4096)


class NotCapturable(Exception):
    """A model is no graph of operators, or one for some inputs only; says why."""


def export_model(model: nn.Module, args: Any, kwargs: Any, dynamic: Any) -> torch.export.ExportedProgram:
    """A model by torch.export, without in-place operators, those of ATen as the model calls them.

    Parameters
    ----------
    model : torch.nn.Module
    args, kwargs : tuple, dict
        Example inputs.
    dynamic : tuple
        Which of their sizes may be any, as torch.export takes it, in the same structure.

    Returns
    -------
    torch.export.ExportedProgram

    Raises
    ------
    NotCapturable
        If torch.export does not take it, it writes to what it holds or gets, or works for some sizes only.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(), _quiet():
            warnings.simplefilter("ignore")  # torch's, of its own
            shapes = _by_name(model, dynamic)
            exported = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
            exported = exported.run_decompositions({})
    except Exception as error:
        # whatever the model does that cannot be traced
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        raise NotCapturable(lines[0] if lines else type(error).__name__) from error
    signature = exported.graph_signature
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise NotCapturable(f"it writes to {written[0]!r}")
    for symbol, constraint in exported.range_constraints.items():
        if constraint.lower > 2 or constraint.upper < 1 << 30:
            raise NotCapturable(f"it works for some sizes of the batch only ({symbol}: {constraint})")
    _check_sizes(exported)
    return exported


def _check_sizes(exported: torch.export.ExportedProgram) -> None:
    """Check that what was taken for granted of the batch holds for any: torch.export tells, and goes on."""
    for guard in size_guards(exported):
        expression = re.sub(r"L(\[[^\]]*\])+\.size\(\)\[0\]", "batch", guard)
        names = {node.id for node in ast.walk(ast.parse(expression)) if isinstance(node, ast.Name)}
        if names != {"batch"} or not all(_holds(expression, n) for n in _BATCHES):
            raise NotCapturable(f"it works for some sizes of the batch only ({expression})")


def _holds(expression: str, batch: int) -> bool:
    try:
        return bool(eval(expression, {"__builtins__": {}}, {"batch": batch}))
    except ArithmeticError:  # a division by zero
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs of models that it cannot trace, which are not its callers' business."""
    names = ("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _by_name(model: nn.Module, dynamic: Any) -> dict[str, Any]:
    """Dynamic shapes as torch.export takes them: by name, those of `*args` as one tuple."""
    positional, keyword = dynamic
    return dict(inspect.signature(model.forward).bind(*positional, **keyword).arguments)
