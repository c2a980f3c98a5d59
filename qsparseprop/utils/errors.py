"""Mistakes of the user."""

from __future__ import annotations

import errno
import pickle

__all__ = ["ConfigurationError", "of_contents", "reason_of", "refuse_more_than_memory"]

class ConfigurationError(ValueError):
    """What was asked for makes no sense; the message says why."""


def of_contents(error: BaseException) -> bool:
    """Whether an error of reading a file comes of what is in the file, and not of the system.

    Offsets in a damaged archive lead torch to places before the file's beginning: an OSError as well, of no file.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    bool
    """
    return not isinstance(error, OSError) or (error.errno == errno.EINVAL and error.filename is None)


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
