"""Arguments of public functions: whether they are of the kind that is asked for, and what is said otherwise."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Iterable
from typing import TypeVar

import numpy as np
from torch import Tensor, nn

__all__ = ["flag", "instance", "model", "names", "number", "one_of", "shown", "whole_number"]

_Names = TypeVar("_Names")
_LONGEST = 100


def shown(value: object) -> str:
    """An argument in a sentence: plain ones as they are written, others by their type.

    Who looks into an argument that makes no sense may read memory that is not there (tensors whose storage was freed),
    or fill the screen.

    Parameters
    ----------
    value : object

    Returns
    -------
    str
    """
    plain = value is None or type(value) in (bool, int, float, complex, str, bytes)
    if type(value) in (tuple, list) and len(value) <= 8:  # type: ignore[arg-type]
        plain = all(type(item) in (bool, int, float, str, type(None)) for item in value)  # type: ignore[attr-defined]
    if not plain or (isinstance(value, int) and value.bit_length() > _LONGEST):
        kind = type(value)
        return f"a {kind.__qualname__}" if kind.__module__ == "builtins" else f"a {kind.__module__}.{kind.__qualname__}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def instance(value: object, kind: type | tuple[type, ...], name: str, wanted: str) -> None:
    """Raise a TypeError unless an argument is of a type.

    Parameters
    ----------
    value : object
    kind : type or tuple of type
    name : str
        Of the argument.
    wanted : str
        What it must be, for the message.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")


def model(value: object, name: str = "model") -> None:
    """Raise a TypeError unless an argument is a module whose constructor has run.

    Parameters
    ----------
    value : object
    name : str
        Of the argument.
    """
    instance(value, nn.Module, name, "a torch.nn.Module")
    if not hasattr(value, "_modules"):  # torch.jit's modules have theirs elsewhere than vars()
        raise TypeError(f"{name} must be a torch.nn.Module that was made by its constructor, this {shown(value)} lacks "
                        "what super().__init__() gives it")  # fmt: skip


def flag(value: object, name: str) -> None:
    """Raise a TypeError unless an argument is True or False.

    Parameters
    ----------
    value : object
        NumPy's count. A number is none: it may have been meant for the argument beside it.
    name : str
        Of the argument.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def number(value: object, name: str, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise an error unless an argument is a number within limits.

    Parameters
    ----------
    value : object
        NumPy's numbers count, tensors do not.
    name : str
        Of the argument.
    low, high : float
        The least and the largest that is accepted. NaN is not.

    Raises
    ------
    TypeError
        For what is no real number.
    ValueError
        For one beyond the limits.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    if not low <= float(value) <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {shown(value)}")


def whole_number(value: object, name: str, least: int = 0, most: int | None = None) -> None:
    """Raise an error unless an argument is a whole number within limits.

    Parameters
    ----------
    value : object
        NumPy's count, True and False do not.
    name : str
        Of the argument.
    least, most : int
        The limits; without the second there is only one.

    Raises
    ------
    TypeError
        For what is no whole number.
    ValueError
        For one beyond the limits.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    if int(value) < least or (most is not None and int(value) > most):
        limits = f"at least {least:,}" if most is None else f"in [{least:,}, {most:,}]"
        raise ValueError(f"{name} must be {limits}, got {shown(value)}")


def one_of(value: object, choices: Collection[str], name: str) -> None:
    """Raise a ValueError unless an argument is one of some names.

    Parameters
    ----------
    value : object
    choices : collection of str
    name : str
        Of the argument.
    """
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")


def names(value: _Names, name: str, optional: bool = False) -> _Names:
    """Give back what was given as names; one string is none of these, since its letters would be taken for them.

    Parameters
    ----------
    value : collection
        What was given.
    name : str
        Of the argument, for the message.
    optional : bool
        Whether it may be None.

    Returns
    -------
    collection
        The same.

    Raises
    ------
    TypeError
        For a string, and for what cannot be gone through, or holds what cannot be compared.
    """
    if isinstance(value, str):
        meant = [part.strip() for part in value.split(",")]
        raise TypeError(f"{name} must be several names, got the string {shown(value)}: write {name}={meant}")
    if (not isinstance(value, Iterable) or isinstance(value, Tensor)) and not (optional and value is None):
        raise TypeError(f"{name} must be several names, got {shown(value)}")
    return value
