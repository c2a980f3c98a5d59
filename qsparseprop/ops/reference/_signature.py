"""References take what their operators take: an operator says it, its reference only names the arguments."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from qsparseprop.ops._registration import Operator

_P = ParamSpec("_P")
_R = TypeVar("_R")


def reference_of(operator: Callable[_P, _R]) -> Callable[[Callable[..., Any]], Callable[_P, _R]]:
    """A function as the reference of an operator, with its types and defaults.

    Parameters
    ----------
    operator : callable
        An `Operator`, or a function that takes a plan or a part of one.

    Returns
    -------
    callable
        A decorator of a function with the same name and arguments, all of which it is given.

    Raises
    ------
    TypeError
        By the decorator, if name or arguments are others.
    """
    original: Callable[..., Any] = operator.function if isinstance(operator, Operator) else operator
    signature = inspect.signature(original)

    def decorate(function: Callable[..., Any]) -> Callable[_P, _R]:
        names = function.__name__, *inspect.signature(function).parameters
        wanted = original.__name__, *signature.parameters
        if names != wanted:
            raise TypeError(f"the reference of {wanted[0]}{wanted[1:]} must be called so, got {names[0]}{names[1:]}")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            return function(*given.args)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate
