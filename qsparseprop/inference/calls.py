"""Operators of torch in programs: by name, from the namespace of ATen alone, with arguments that are data."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch

from qsparseprop._torch_compat import OverloadPacket
from qsparseprop.inference.operators import is_pure
from qsparseprop.inference.steps import Call
from qsparseprop.inference.trusting import TRUSTING, check_trusting

__all__ = ["Name", "call_operator", "find_operator"]


class Name(NamedTuple):
    """An argument that is a value of the program."""

    name: str


def find_operator(name: str) -> Any:
    """The operator of a name such as ``aten.softmax.int``, or of ``getitem``, which takes one of several results.

    Parameters
    ----------
    name : str

    Returns
    -------
    Overload or callable

    Raises
    ------
    ValueError
        If there is none, or it is not one of ATen that computes and does nothing else.
    """
    if name == "getitem":
        return operator.getitem
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten" or not all(part.isidentifier() for part in parts):
        raise ValueError(f"{name!r} is not an operator of ATen, such as 'aten.softmax.int'")
    packet = getattr(torch.ops.aten, parts[1], None)
    if not isinstance(packet, OverloadPacket) or parts[2] not in packet.overloads():
        raise ValueError(f"this version of torch, {torch.__version__}, has no operator {name!r}")
    overload = getattr(packet, parts[2])
    if not is_pure(parts[1], overload):
        raise ValueError(f"{name!r} is not among the operators that programs may call (inference/operators.py)")
    return overload


def _resolved(argument: Any, values: dict[str, Any]) -> Any:
    if isinstance(argument, Name):
        return values[argument.name]
    if isinstance(argument, list | tuple):
        return type(argument)(_resolved(each, values) for each in argument)
    return argument


def call_operator(step: Call, values: dict[str, Any]) -> Any:
    """What a call gives.

    Parameters
    ----------
    step : Call
    values : dict
        The values that its arguments name.

    Returns
    -------
    Tensor or tuple of Tensor
    """
    function = find_operator(step.operator)
    arguments = [_resolved(argument, values) for argument in step.arguments]
    keywords = {key: _resolved(value, values) for key, value in step.keywords.items()}
    if step.operator.removeprefix("aten.").split(".")[0] in TRUSTING:
        check_trusting(function, arguments, keywords)
    return function(*arguments, **keywords)
