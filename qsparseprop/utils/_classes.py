"""What the classes of images are called, and whether those of a network are those of other images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import ConfigurationError

__all__ = ["check_classes", "classes_in"]

#: So many differing classes are named.
_NAMED = 3


def classes_in(content: Any) -> tuple[str, ...] | None:
    """The names of the classes that a checkpoint's network tells apart.

    Parameters
    ----------
    content : any
        What a file of weights holds, trusted in nothing.

    Returns
    -------
    tuple of str or None
        None where it does not say it.
    """
    about = content.get("about") if isinstance(content, Mapping) else None
    classes = about.get("classes") if isinstance(about, Mapping) else None
    if isinstance(classes, list | tuple) and all(isinstance(one, str) for one in classes):
        return tuple(classes)
    return None


def check_classes(here: Sequence[str] | None, there: Sequence[str] | None, what: tuple[str, str], way_out: str) -> None:
    """Refuse classes of other names, or in another order: a network's outputs would mean something else.

    Parameters
    ----------
    here : sequence of str or None
        Of the images, in the order of their labels; None where nobody knows them: nothing is refused then.
    there : sequence of str or None
        Of the network. Another number of them is for others to refuse: its shapes do not fit.
    what : tuple of str
        Whose classes `there` are, and whose `here`.
    way_out : str
        Its end.

    Raises
    ------
    ConfigurationError
        If they differ though they are as many.
    """
    if here is None or there is None or len(here) != len(there) or tuple(here) == tuple(there):
        return
    other = [index for index, (one, another) in enumerate(zip(here, there, strict=True)) if one != another]
    named = ", ".join(f"class {index} is {there[index]!r} there and {here[index]!r} here" for index in other[:_NAMED])
    more = f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
    order = "the same, in another order" if sorted(here) == sorted(there) else "others"
    raise ConfigurationError(f"the classes of {what[0]} and those of {what[1]} are {order}: {named}{more}; {way_out}")
