"""Reading descriptions that may be anything: what is read is of the kind, and within the limits, that it must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["Fields", "read_list", "read_number", "read_text", "read_whole", "refuse"]

_LONGEST_NAME = 4096
_LARGEST = (2 - 2**-23) * 2.0**127
_T = TypeVar("_T")


def refuse(where: str, wanted: str, value: object) -> NoReturn:
    """Say what was expected, and what is there.

    Parameters
    ----------
    where, wanted : str
    value : object

    Raises
    ------
    ConfigurationError
    """
    text = repr(value)
    raise ConfigurationError(f"{where} must be {wanted}, not {text if len(text) <= 60 else text[:57] + '...'}")


class Fields:
    """The fields of an object, each of which is taken once.

    Parameters
    ----------
    value : any
        From JSON.
    where : str
        What it is, for messages.
    """

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where, "an object", value)
        self.where = where
        self._left = dict(value)

    def take(self, name: str, read: Callable[[Any, str], _T]) -> _T:
        """Read a field.

        Parameters
        ----------
        name : str
        read : callable
            Takes the field and what it is.

        Returns
        -------
        any
            What `read` gives.
        """
        if name not in self._left:
            raise ConfigurationError(f"{self.where} has no {name!r}")
        return read(self._left.pop(name), f"{name!r} of {self.where}")

    @property
    def names(self) -> list[str]:
        """Those that are left."""
        return list(self._left)

    def has(self, name: str) -> bool:
        """Whether a field is there, and not yet taken."""
        return name in self._left

    def close(self) -> None:
        """Refuse fields that nobody has taken."""
        if self._left:
            raise ConfigurationError(f"{self.where} has {sorted(self._left)[0]!r:.60}, which means nothing")


def read_text(value: Any, where: str) -> str:
    """A name, which can be printed.

    Parameters
    ----------
    value : any
    where : str

    Returns
    -------
    str
    """
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST_NAME or not value.isprintable():
        refuse(where, "a name", value)
    return value


def read_whole(low: int, high: int) -> Callable[[Any, str], int]:
    """A reader of whole numbers.

    Parameters
    ----------
    low, high : int
        The smallest and the largest.

    Returns
    -------
    callable
    """

    def read(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            refuse(where, f"a whole number in [{low:,}, {high:,}]", value)
        return value

    return read


def read_number(value: Any, where: str) -> float:
    """A number that float32 has, or is near one.

    Parameters
    ----------
    value : any
    where : str

    Returns
    -------
    float
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        refuse(where, "a finite number of float32", value)
    return float(value)


def read_list(
    read: Callable[[Any, str], _T], least: int = 0, most: int | None = None
) -> Callable[[Any, str], tuple[_T, ...]]:
    """A reader of lists.

    Parameters
    ----------
    read : callable
        Reads each.
    least : int
        How many there must be.
    most : int, optional
        How many there may be.

    Returns
    -------
    callable
    """

    def read_all(value: Any, where: str) -> tuple[_T, ...]:
        if not isinstance(value, list) or len(value) < least or (most is not None and len(value) > most):
            count = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
            refuse(where, f"a list of {count}", value)
        return tuple(read(each, where) for each in value)

    return read_all
