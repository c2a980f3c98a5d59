"""Arguments of calls, and other plain data, as JSON: what has no kind there is an object with one key, its kind."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch

from qsparseprop.inference.calls import Name

__all__ = ["from_json", "to_json"]

#: Deeper than any argument of an operator, or a model's inputs and outputs.
_DEEPEST = 16
_MEMORY_FORMATS = {str(f).removeprefix("torch."): f for f in (
    torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)}  # fmt: skip
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool)}  # fmt: skip
_DICTS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered_dict": OrderedDict}
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_CONSTANTS: dict[str, dict[str, Any]] = {"float": _FLOATS, "dtype": _DTYPES, "memory_format": _MEMORY_FORMATS,
                                         "device": {"cpu": torch.device("cpu")},
                                         "layout": {"strided": torch.strided}}  # fmt: skip


def to_json(value: Any) -> Any:
    """Plain data for `json.dumps`.

    Parameters
    ----------
    value : any
        None, bool, int, float, str, a `Name`, a dtype, memory format, layout or the device "cpu"; lists, tuples, dicts
        and OrderedDicts of these.

    Returns
    -------
    any

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(1 << 63) <= value < 1 << 63:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Name):
        return {"name": value.name}
    if type(value) in (tuple, torch.Size):  # named ones would lose their names
        return {"tuple": [to_json(each) for each in value]}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if type(value) in _DICTS.values():  # others would lose what they are
        [kind] = [kind for kind, each in _DICTS.items() if each is type(value)]
        return {kind: [[to_json(key), to_json(each)] for key, each in value.items()]}
    for kind, known in _CONSTANTS.items():
        for name, constant in known.items():
            if type(constant) is type(value) and constant == value:
                return {kind: name}
    raise ValueError(f"{value!r} cannot be written: it is a {type(value).__name__}")


def from_json(value: Any, deepest: int = _DEEPEST) -> Any:
    """What `to_json` was given.

    Parameters
    ----------
    value : any
        From `json.loads`.
    deepest : int
        How deeply containers may be nested.

    Returns
    -------
    any

    Raises
    ------
    ValueError
        If it is not what `to_json` gives.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number has more than 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number is not finite")
        return value
    if deepest == 0:
        raise ValueError(f"containers are nested more than {_DEEPEST} times")
    if isinstance(value, list):
        return [from_json(each, deepest - 1) for each in value]
    return _of_kind(value, deepest - 1)


def _of_kind(value: Any, deepest: int) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"{str(value)[:60]!r} is no plain data")
    [(kind, content)] = value.items()
    if kind == "name" and isinstance(content, str):
        return Name(content)
    if kind == "tuple" and isinstance(content, list):
        return tuple(from_json(each, deepest) for each in content)
    if kind in _DICTS and isinstance(content, list):
        pairs = [from_json(each, deepest) for each in content]
        if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str | int) for p in pairs):
            return _DICTS[kind](pairs)
    if kind in _CONSTANTS and isinstance(content, str) and content in _CONSTANTS[kind]:
        return _CONSTANTS[kind][content]
    raise ValueError(f"{str(value)[:60]!r} is no plain data")
