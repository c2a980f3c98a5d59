"""Frozen modules in files: the program, and what the module takes, gives and reports beside it."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from qsparseprop.inference.capture import Signature
from qsparseprop.inference.files import read_program, save_program
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.reading import refuse
from qsparseprop.inference.report import FreezeReport, LayerReport
from qsparseprop.utils.errors import ConfigurationError

__all__ = ["load", "save"]

_REPORTED = ("whole", "reason", "metric_before", "metric_after")


def save(frozen: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a frozen model to a file, which appears whole or not at all; `load` reads it without the model's class.

    Parameters
    ----------
    frozen : FrozenModule
        From `freeze`.
    path : path-like
        What it held before stays until the new content has reached the disk.

    Raises
    ------
    ConfigurationError
        (a ValueError) If it is not frozen as a whole, or takes arguments or gives results that cannot be written.
    OSError
        If the file cannot be written; it names `path`.
    """
    if not isinstance(frozen, FrozenModule):
        kind = type(frozen).__name__
        raise ConfigurationError(f"a {kind} is not frozen as a whole, so that loading it would need its class; its "
                                 "parts that are can be saved one by one")  # fmt: skip
    signature, report = frozen.signature, frozen.report
    _check_results(signature.results)
    about = {
        "arguments": signature.arguments, "results": signature.results, "others": signature.others,
        "shapes": list(signature.shapes), "dtypes": list(signature.dtypes), "rows": frozen.rows,
        "report": {"layers": report.as_dicts(), **{name: getattr(report, name) for name in _REPORTED}},
        **({} if frozen.classes is None else {"classes": _checked_classes(frozen.classes)}),
    }  # fmt: skip
    try:
        save_program(frozen.program, path, about)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(f"the model cannot be saved: {error}") from error


def _check_results(results: Any) -> None:
    """Refuse results of types that a file has no name for."""
    if results is None or type(results) is int:
        return
    if type(results) not in (tuple, list, dict, OrderedDict):
        kind = type(results).__name__
        raise ConfigurationError(f"the model cannot be saved: its result is a {kind}, whose class loading would need; "
                                 "tuples, lists, dicts and OrderedDicts can be saved")  # fmt: skip
    for each in results.values() if isinstance(results, dict) else results:
        _check_results(each)


def load(path: str | os.PathLike[str]) -> FrozenModule:
    """Read a frozen model from a file. Everything is checked before it is used.

    Parameters
    ----------
    path : path-like
        Written by `save`. It may be replaced while the model is used, but not written to.

    Returns
    -------
    FrozenModule

    Raises
    ------
    ConfigurationError
        (a ValueError) If it is no such file, is damaged, or has been written by a later version.
    OSError
        If it cannot be read.
    ImportError
        If safetensors is not installed.
    """
    loaded = read_program(path)
    program = loaded.program
    try:
        about = _Plain(loaded.about, "what is said about the model")
        signature = _signature(about)
        count = len([leaf for leaf in _leaves(signature.arguments) if leaf not in signature.others])
        if count != len(program.inputs) or not len(signature.shapes) == len(signature.dtypes) == count:
            raise ConfigurationError(f"the program takes {len(program.inputs)} tensors, the model others")
        results = list(_leaves(signature.results, or_none=True))
        if not all(0 <= number < len(program.outputs) for number in results):
            raise ConfigurationError(f"the program gives {len(program.outputs)} tensors, the model others")
        frozen = FrozenModule(program, signature, _report(about), about.take("rows", bool))
        if "classes" in about:
            frozen.classes = _checked_classes(about.take("classes", tuple))
        return frozen
    except ConfigurationError as error:
        raise ConfigurationError(f"{os.fspath(path)} holds no frozen model: {error}") from error


class _Plain:
    """A dict of plain data, whose entries are of the types that they must be."""

    def __init__(self, value: Any, where: str) -> None:
        if type(value) is not dict:
            refuse(where, "a dict", value)
        self._value, self._where = value, where

    def __contains__(self, name: str) -> bool:
        return name in self._value

    def take(self, name: str, *types: type) -> Any:
        if name not in self._value or (types and type(self._value[name]) not in types):
            refuse(f"{name!r} of {self._where}", " or ".join(t.__name__ for t in types), self._value.get(name))
        return self._value[name]


def _leaves(tree: Any, or_none: bool = False) -> Iterator[int]:
    """The numbers of a structure; anything else in it is refused, but for None where that may be there."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for each in tree:
            yield from _leaves(each, or_none)
    elif type(tree) is int:
        yield tree
    elif tree is not None or not or_none:
        refuse("a structure", "of numbers", tree)


def _checked_classes(classes: Any) -> tuple[str, ...]:
    if not isinstance(classes, list | tuple) or not all(type(one) is str for one in classes):
        refuse("the classes", "names", classes)
    return tuple(classes)


def _signature(about: _Plain) -> Signature:
    arguments, results = about.take("arguments", tuple), about.take("results")
    numbers = list(_leaves(arguments))
    if numbers != list(range(len(numbers))):
        refuse("the structure of the arguments", "numbered in order", arguments)
    others = about.take("others", dict)
    if any(type(key) is not int or key not in numbers for key in others):
        refuse("arguments that are no tensors", "some of the arguments", others)
    shapes, dtypes = about.take("shapes", list), about.take("dtypes", list)
    for shape in shapes:
        if type(shape) is not tuple or not all(n is None or (type(n) is int and n >= 0) for n in shape):
            refuse("the shape of an input", "a tuple of sizes", shape)
    for dtype in dtypes:
        if not isinstance(dtype, torch.dtype):
            refuse("the dtype of an input", "a dtype", dtype)
    return Signature(arguments, results, others, tuple(shapes), tuple(dtypes))


def _report(about: _Plain) -> FreezeReport:
    plain = _Plain(about.take("report", dict), "the report")
    layers = []
    for each in plain.take("layers", list):
        layer = _Plain(each, "a layer of the report")
        numbers = {name: layer.take(name, float, int, type(None)) for name in ("zeros", "error")}
        texts = {name: layer.take(name, str) for name in ("name", "kind", "reason")}
        layers.append(LayerReport(quantised=layer.take("quantised", bool), **texts, **numbers))
    report = FreezeReport(layers)
    report.whole, report.reason = plain.take("whole", bool), plain.take("reason", str)
    report.metric_before = plain.take("metric_before", float, int, type(None))
    report.metric_after = plain.take("metric_after", float, int, type(None))
    return report
