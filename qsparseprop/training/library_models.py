"""Networks of torchvision and timm by name, where these packages are installed."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from qsparseprop.utils.errors import ConfigurationError, reason_of

from ._packages import import_optional

__all__ = ["LIBRARIES", "find_in_libraries", "from_library", "suggest"]

#: Packages in the order in which a bare name is looked up, with the module that knows the networks.
LIBRARIES = {"torchvision": "torchvision.models", "timm": "timm"}


def from_library(library: str, name: str) -> Callable[..., nn.Module]:
    """What builds a network of a library.

    Parameters
    ----------
    library : str
        One of `LIBRARIES`.
    name : str
        As the library calls it.

    Returns
    -------
    callable
        Takes ``num_classes``, ``in_channels``, ``image_size`` and ``width`` by keyword, and refuses by a
        `ConfigurationError` what the network cannot be given. Weights are random.

    Raises
    ------
    ConfigurationError
        If the package is missing or does not work, or has no such network.
    """
    module = import_optional(LIBRARIES[library], f"the network {library}:{name}")
    known = _names(library, module)
    if name not in known:
        raise ConfigurationError(f"{library} has no network {name!r}{suggest(name, known)}")
    builder = _build_torchvision if library == "torchvision" else _build_timm

    def build(**arguments: int) -> nn.Module:
        if "width" in arguments:
            raise ConfigurationError(f"{library}:{name} has the width that its name says: leave out the width "
                                     "(--width)")  # fmt: skip
        return builder(module, name, arguments)

    return build


def find_in_libraries(name: str, ours: Sequence[str]) -> Callable[..., nn.Module]:
    """What builds the network of a bare name: that of the first library which is installed and has it.

    Parameters
    ----------
    name : str
    ours : sequence of str
        Names of other networks, for the message.

    Returns
    -------
    callable
        See `from_library`.

    Raises
    ------
    ConfigurationError
        If there is none; it says what was looked at.
    """
    names, looked_at = list(ours), []
    for library in LIBRARIES:
        if importlib.util.find_spec(library) is None:
            looked_at.append(f"{library} (not installed)")
            continue
        module = import_optional(LIBRARIES[library], f"looking for the network {name!r}")
        known = _names(library, module)
        if name in known:
            return from_library(library, name)
        names += known
        looked_at.append(library)
    raise ConfigurationError(f"unknown model {name!r}: it is none of {', '.join(ours)}, nor of "
                             f"{' and '.join(looked_at)}; a function of your own is package.module:function"
                             f"{suggest(name, names)}")  # fmt: skip


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: those that are written alike.

    Parameters
    ----------
    name : str
    known : iterable of str
    """
    close = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _names(library: str, module: Any) -> Sequence[str]:
    """Those of networks that classify images."""
    listed = module.list_models(module=module) if library == "torchvision" else module.list_models()
    return [str(name) for name in listed]


def _build_torchvision(module: Any, name: str, arguments: dict[str, int]) -> nn.Module:
    channels = arguments.pop("in_channels", 3)
    if channels != 3:
        raise ConfigurationError(f"torchvision:{name} takes images of 3 channels, not {channels}: choose a network of "
                                 "timm, which can have any number, or another one")  # fmt: skip
    return _with_size_if_taken(lambda **options: module.get_model(name, weights=None, **options), "image_size",
                               arguments)  # fmt: skip


def _build_timm(module: Any, name: str, arguments: dict[str, int]) -> nn.Module:
    if "in_channels" in arguments:
        arguments["in_chans"] = arguments.pop("in_channels")
    if "image_size" in arguments:
        arguments["img_size"] = arguments.pop("image_size")
    return _with_size_if_taken(lambda **options: module.create_model(name, pretrained=False, **options), "img_size",
                               arguments)  # fmt: skip


def _with_size_if_taken(build: Callable[..., nn.Module], size: str, arguments: dict[str, int]) -> nn.Module:
    """Networks whose weights depend on the size of the images, such as transformers, take it; others refuse it."""
    try:
        try:
            return build(**arguments)
        except TypeError as error:
            if size not in arguments or repr(size) not in str(error):
                raise
            return build(**{key: value for key, value in arguments.items() if key != size})
    except (AssertionError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"the network cannot be made with {arguments}: {reason_of(error)}") from error
