"""A trained model becomes one that serves: `freeze`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qsparseprop import arguments
from qsparseprop.contents import check_memory_of
from qsparseprop.inference.batches import Batch, batches_of
from qsparseprop.inference.capture import NotCapturable, float_copy
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.parts import freeze_parts
from qsparseprop.inference.report import FreezeReport
from qsparseprop.inference.whole import Options, freeze_module, freeze_rows

__all__ = ["freeze"]


def freeze(
    model: nn.Module,
    calibration: Iterable[Any],
    *,
    observer: str = "minmax",
    per_channel: bool = True,
    correct_bias: bool = True,
    keep_float: Iterable[str | type[nn.Module]] = (),
    token_scales: bool = True,
    example: Any = None,
    metric: Callable[[nn.Module], float] | None = None,
) -> nn.Module:
    """Make a trained model one that only serves, on codes of 8 bits from one layer to the next.

    Scales of activations are fixed by examples, weights are quantised once, and batch normalisation, activations and
    residual additions are folded into layers. What has no form on codes, as attention and layer normalisation, computes
    as it did on ordinary tensors. The model is traced by torch.export, and the graph is checked against it; where that
    cannot be done, parts of the model are frozen, as large as can be, and the rest runs as it is.

    Parameters
    ----------
    model : torch.nn.Module
        Swapped or dense, pruned or not, on the CPU. It is left as it is.
    calibration : iterable
        Batches of what the model will get: tensors, tuples of arguments, mappings of arguments by name, or a
        DataLoader, whose batches may have labels behind what the model takes. Some hundred samples are enough. They are
        kept while the model is frozen.
    observer : str
        What of the values that were seen is coded: "minmax", all of them, and what more examples would add where
        channels have scales of their own, as far as these ones tell; "moving_average", the average of the
        extremes of batches, each of which counts 0.1 and those before it 0.9; "percentile", all but 0.01 % of them.
    per_channel : bool
        A scale for each channel of activations.
    correct_bias : bool
        Correct the bias of each layer by the mean of its error on the calibration data.
    keep_float : iterable of str or type
        Layers that are not quantised: qualified names, of modules as well whose layers then are all meant, or of
        parameters, or types.
    token_scales : bool
        Whether the inputs of linear layers on tokens, as transformers have them, get a scale for each token, found when
        it is there; otherwise, and for all other values, scales are those of the calibration.
    example : any, optional
        A batch to trace the model with in the place of the first one of `calibration`.
    metric : callable, optional
        Called with the model, and with the frozen one; what it gives is in the report.

    Returns
    -------
    FrozenModule or torch.nn.Module
        The frozen model; where only parts of it could be frozen a copy of the model with `FrozenModule` in their
        places. Either has the `FreezeReport` in ``freeze_report``.

    Raises
    ------
    TypeError, ValueError
        For arguments that make no sense, no calibration data, or weights or values that are not finite, with the name
        of their layer.
    """
    arguments.model(model)
    check_memory_of(model)
    if any(isinstance(module, FrozenModule) for module in model.modules()):
        raise ValueError("the model is frozen already")
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model must be on the CPU")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a model that torch.jit has compiled cannot be frozen: freeze the one that it was made of")
    if metric is not None and (isinstance(metric, nn.Module) or not callable(metric)):
        raise TypeError(f"metric must be a function of the model, got {arguments.shown(metric)}")
    dense = float_copy(model)
    options = Options(observer, per_channel, correct_bias, _names(model, dense, keep_float), token_scales)
    options.check()
    batches = batches_of(model, calibration)
    before = None if metric is None else float(metric(model))
    try:
        if type(dense) is nn.Linear:
            frozen: nn.Module = freeze_rows(dense, batches, options)
        else:
            frozen = freeze_module(dense, batches, options, _traced(model, dense, example))
    except NotCapturable as error:
        frozen = freeze_parts(dense, batches, options, str(error))
    if metric is not None:
        report = frozen.freeze_report
        assert isinstance(report, FreezeReport)
        report.metric_before, report.metric_after = before, float(metric(frozen))
    return frozen


def _traced(model: nn.Module, dense: nn.Module, example: Any) -> Batch | None:
    """The batch to trace with, with which the model runs."""
    if example is None:
        return None
    batch = batches_of(model, [example])[0]
    with torch.no_grad():
        dense(*batch.args, **batch.kwargs)
    return batch


def _names(model: nn.Module, dense: nn.Module, keep_float: Iterable[str | type[nn.Module]]) -> tuple[str, ...]:
    """Names of the layers that stay as they are; types are those of the model, or of its dense copy."""
    modules = dict(dense.named_modules(remove_duplicate=False))
    types = {name: (module, modules.get(name)) for name, module in model.named_modules(remove_duplicate=False)}
    parameters = dict(dense.named_parameters(remove_duplicate=False))
    names: list[str] = []
    for kept in arguments.names(keep_float, "keep_float"):
        if isinstance(kept, str):
            if kept not in modules and kept not in parameters:
                raise ValueError(f"keep_float names {kept!r}, which the model does not have")
            names.append(kept)
        elif isinstance(kept, type) and issubclass(kept, nn.Module):
            names.extend(name for name, pair in types.items() if any(isinstance(module, kept) for module in pair))
        else:
            raise TypeError(f"keep_float takes names and types of modules, got {arguments.shown(kept)}")
    # a module that is there under several names is meant by each
    meant = {id(module) for name in names if name in modules for module in modules[name].modules()}
    return (*names, *(name for name, module in modules.items() if id(module) in meant and name not in names))
