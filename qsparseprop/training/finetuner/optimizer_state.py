"""The state of an optimizer in a checkpoint: matched with the parameters by name and shape, before anything is loaded.

torch matches it by position and looks at no shape. A model that registers its parameters in another order then trains
with the moments of other weights, and the fused optimizers, which go through memory without looking, write beyond its
end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .checkpoint import CheckpointError

__all__ = ["describe_parameters", "laid_out", "match_optimizer_state"]

#: What torch's optimizers keep for a parameter as a whole; everything else is kept for each of its elements.
_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})


class _Parameter(NamedTuple):
    """What a checkpoint says of a parameter of its optimizer."""

    name: str
    shape: tuple[int, ...]


def describe_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[Any]]:
    """Name and shape of each parameter, in the optimizer's order, in plain containers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names.get(id(parameter), _unnamed(group, place)), list(parameter.shape)]
            for group, place, parameter in _parameters(optimizer)]  # fmt: skip


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[int, int, torch.Tensor]]:
    return [(index, place, parameter) for index, group in enumerate(optimizer.param_groups)
            for place, parameter in enumerate(group["params"])]  # fmt: skip


def _unnamed(group: int, place: int) -> str:
    """Stands for the name of a parameter that is not the model's."""
    return f"<{place} of group {group}>"


def _names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """All names of each of the optimizer's parameters; a shared one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [names.get(id(p), [_unnamed(group, place)]) for group, place, p in _parameters(optimizer)]


def match_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, content: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a checkpoint's state of the optimizer in the order of this optimizer.

    Parameters
    ----------
    model : nn.Module
    optimizer : torch.optim.Optimizer
        Over the model's parameters. Nothing is changed.
    content : mapping
        The checkpoint: ``optimizer``, ``model`` and, unless it is an old one, ``parameters``
        (see `describe_parameters`). Without them the order is that of the model's state where this optimizer has its
        model's order, else this optimizer's.

    Raises
    ------
    CheckpointError
        If a parameter is missing in one of both, or what is kept for it has other sizes than it will have when the
        checkpoint's model is loaded; the message names it.
    """
    state = content["optimizer"]
    if not {"state", "param_groups"} <= optimizer.state_dict().keys():
        return state  # of a kind of its own, which knows itself what fits
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise CheckpointError("the checkpoint's optimizer state is none of such an optimizer")
    groups = _checked_groups(state.get("param_groups"))
    names = _names_of(model, optimizer)
    saved = _saved_parameters(content, groups, model, optimizer, names)
    places = {parameter.name: index for index, parameter in enumerate(saved)}
    group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
    order = []
    for (group, _, _), aliases in zip(_parameters(optimizer), names, strict=True):
        place = next((places[alias] for alias in aliases if alias in places), None)
        if place is None or group_of[place] != group:
            raise CheckpointError(f"group {group} of the checkpoint's optimizer lacks the parameter {aliases[0]!r}")
        order.append(place)
    if (extra := set(range(len(saved))) - set(order)) or len(groups) != len(optimizer.param_groups):
        listed = ", ".join(repr(saved[place].name) for place in sorted(extra)[:3])
        raise CheckpointError(f"the checkpoint's optimizer trains what this one does not: {listed or 'empty groups'}")
    if isinstance(optimizer, torch.optim.LBFGS) and order != sorted(order):
        raise CheckpointError("LBFGS keeps its state for all parameters together, and the checkpoint has them in "
                              "another order")  # fmt: skip
    matched: dict[Any, Any] = {k: v for k, v in state["state"].items() if k not in set(range(len(saved)))}
    for index, place in enumerate(order):
        if place in state["state"]:
            matched[index] = state["state"][place]
            _check_entry(matched[index], saved[place], optimizer)
    if _keeps_by_element(optimizer):
        _check_complete(state["state"], groups, saved)
        _check_options(groups, optimizer)
    return {**state, "state": matched, "param_groups": _reordered(groups, saved, order)}


def laid_out(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a copy of a matched state for the parameters as they are now, laid out in memory like these.

    Fused optimizers pair what lies at the same place in memory.

    Raises
    ------
    CheckpointError
        If a tensor has not its parameter's size.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        return state
    entries = dict(state["state"])
    for index, (group, place, parameter) in enumerate(_parameters(optimizer)):
        if index not in entries:
            continue
        _check_entry(entries[index], _Parameter(_unnamed(group, place), tuple(parameter.shape)), optimizer)
        entries[index] = {key: _copy_for(parameter, value) for key, value in entries[index].items()}
    return {**state, "state": entries}


def _copy_for(parameter: torch.Tensor, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.clone()


def _checked_groups(groups: Any) -> list[Mapping[str, Any]]:
    plain = isinstance(groups, Sequence) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), Sequence) for group in groups
    )
    numbers = [number for group in groups for number in group["params"]] if plain else None
    if numbers != list(range(len(numbers or ()))):
        raise CheckpointError("the checkpoint's optimizer state has no proper parameter groups")
    return list(groups)


def _saved_parameters(
    content: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], model: nn.Module,
    optimizer: torch.optim.Optimizer, names: list[list[str]],
) -> list[_Parameter]:  # fmt: skip
    """The checkpoint's parameters, with the shapes that they have in its model, in the order of its optimizer."""
    weights = content["model"]
    described = content.get("parameters")
    if described is None:
        listed: Any = [[name, None] for name in _order_of_old(weights, model, optimizer, names)]
    else:
        listed = described
    count = sum(len(group["params"]) for group in groups)
    try:
        if not isinstance(listed, list):
            raise TypeError
        saved = [_Parameter(str(name), tuple(shape or ())) for name, shape in listed]
    except (TypeError, ValueError) as error:
        raise CheckpointError("the checkpoint's list of parameters is none") from error
    if len(saved) != count or len({parameter.name for parameter in saved}) != count:
        raise CheckpointError(f"the checkpoint's optimizer has {count} parameters and {len(saved)} names for them")
    shapes = {alias: tuple(p.shape) for aliases, (_, _, p) in zip(names, _parameters(optimizer), strict=True)
              for alias in aliases}  # fmt: skip
    result = []
    for parameter in saved:
        there = weights.get(parameter.name) if isinstance(weights, Mapping) else None
        shape = tuple(there.shape) if isinstance(there, torch.Tensor) else shapes.get(parameter.name, parameter.shape)
        if described is not None and shape != parameter.shape:
            raise CheckpointError(f"the checkpoint's optimizer knows {parameter.name!r} with the shape "
                                  f"{parameter.shape}, its model with {shape}")  # fmt: skip
        result.append(_Parameter(parameter.name, shape))
    return result


def _order_of_old(
    weights: Any, model: nn.Module, optimizer: torch.optim.Optimizer, names: list[list[str]]
) -> list[str]:
    """Names for a checkpoint that has none: in the order of its model's state, if that was the optimizer's order."""
    ours = [aliases[0] for aliases in names]
    if len(optimizer.param_groups) != 1 or ours != [name for name, _ in model.named_parameters()]:
        return ours
    primary = {alias: aliases[0] for aliases in names for alias in aliases}
    theirs = list(dict.fromkeys(primary[key] for key in weights if key in primary))
    return theirs if len(theirs) == len(ours) else ours


def _check_entry(entry: Any, parameter: _Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Check the sizes of what is kept for a parameter, as far as they are known."""
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"what the checkpoint's optimizer keeps for {parameter.name!r} is no mapping")
    if not _keeps_by_element(optimizer):
        return
    for key, value in entry.items():
        if value is None and isinstance(optimizer, torch.optim.SGD):
            continue  # no momentum yet
        if key in _SCALARS:
            right = _is_number(value)
        else:
            right = isinstance(value, torch.Tensor) and tuple(value.shape) == parameter.shape
        if not right or (isinstance(value, torch.Tensor) and value.layout != torch.strided):
            kind = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            raise CheckpointError(f"what the checkpoint's optimizer keeps as {key!r} for {parameter.name!r} ({kind}) "
                                  f"does not fit its shape {parameter.shape}")  # fmt: skip


def _keeps_by_element(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is known that all but `_SCALARS` is kept for each element."""
    others = (torch.optim.LBFGS, torch.optim.Adafactor)
    return type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, others)


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number or (isinstance(value, torch.Tensor) and value.numel() == 1)


def _check_options(groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """Refuse the state of another kind of optimizer, which lacks some of this one's numbers."""
    for name, value in optimizer.defaults.items():
        pair = isinstance(value, (tuple, list))
        if not pair and not _is_number(value):
            continue
        for group in groups:
            if name not in group:
                raise CheckpointError(f"the checkpoint is that of another optimizer than {type(optimizer).__name__}: "
                                      f"it has no {name!r}")  # fmt: skip
            numbers = group[name] if pair and isinstance(group[name], (tuple, list)) else [group[name]]
            if len(numbers) != (len(value) if pair else 1) or not all(map(_is_number, numbers)):
                raise CheckpointError(f"{name!r} of the checkpoint's optimizer is none: {group[name]!r}")


def _check_complete(entries: Mapping[Any, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]],
                    saved: Sequence[_Parameter]) -> None:  # fmt: skip
    """Refuse a state that has something for one parameter of a group and not for another that has been trained."""
    for group in groups:
        kept = {place: set(entries[place]) for place in group["params"] if entries.get(place)}
        everything = set().union(*kept.values())
        for place, keys in kept.items():
            if keys != everything:
                raise CheckpointError(f"the checkpoint's optimizer keeps no {min(everything - keys)!r} for "
                                      f"{saved[place].name!r}")  # fmt: skip


def _reordered(
    groups: Sequence[Mapping[str, Any]], saved: Sequence[_Parameter], order: Sequence[int]
) -> list[dict[str, Any]]:
    result, start = [], 0
    for group in groups:
        size = len(group["params"])
        mine = {**group, "params": list(range(start, start + size))}
        if "param_names" in group:
            named = dict(zip(group["params"], group["param_names"], strict=True))
            mine["param_names"] = [named[place] for place in order[start : start + size]]
        result.append(mine)
        start += size
    return result
