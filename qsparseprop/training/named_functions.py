"""Functions of users, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["import_function"]


def import_function(name: str, what: str) -> Callable[..., Any]:
    """The function of a name.

    Parameters
    ----------
    name : str
        ``package.module:function``.
    what : str
        What the function is, for messages.

    Returns
    -------
    callable

    Raises
    ------
    ConfigurationError
        If there is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(f"cannot import the {what} {name}: {error}") from error
    if not callable(function):
        raise ConfigurationError(f"{name} is not a function")
    return function
