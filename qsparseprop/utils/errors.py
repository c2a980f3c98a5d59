"""Mistakes of the user."""

from __future__ import annotations

import pickle
from typing import TypeVar

__all__ = ["ConfigurationError", "reason_of", "refuse_more_than_memory", "several"]

_Names = TypeVar("_Names")


class ConfigurationError(ValueError):
    """What was asked for makes no sense; the message says why."""


def reason_of(error: Exception) -> str:
    """What an error of torch's says, in a sentence: without the advice and the stack that may follow.

    Parameters
    ----------
    error : Exception

    Returns
    -------
    str
    """
    if isinstance(error, pickle.UnpicklingError):
        return "it is not what torch.save has made of tensors and plain containers"
    return str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__


def refuse_more_than_memory(needed: int, what: str) -> None:
    """Raise a `ConfigurationError` if so many bytes are more than the machine has: the system would end the process.

    Parameters
    ----------
    needed : int
        Bytes.
    what : str
        What needs them, for the message.
    """
    from .measurement_utils import machine_memory_bytes  # which itself has errors to raise

    memory = machine_memory_bytes()
    if memory is not None and needed > memory:
        raise ConfigurationError(f"{what} would take {needed / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB")


def several(names: _Names, argument: str) -> _Names:
    """Give back what was given as names; one string is none of these, since its letters would be taken for them.

    Parameters
    ----------
    names : collection
        What was given.
    argument : str
        Its name, for the message.

    Returns
    -------
    collection
        The same.

    Raises
    ------
    TypeError
        For a string.
    """
    if isinstance(names, str):
        meant = [name.strip() for name in names.split(",")]
        raise TypeError(f"{argument} must be several names, got the string {names!r}: write {argument}={meant}")
    return names
