"""Packages that some inputs need: where one is missing, or does not work, a sentence says so."""

from __future__ import annotations

import importlib
from typing import Any

from qsparseprop.utils.errors import ConfigurationError, reason_of

__all__ = ["import_optional"]


def import_optional(module: str, who: str) -> Any:
    """Import a module of a package that may not be installed.

    Parameters
    ----------
    module : str
        Such as ``torchvision.models``.
    who : str
        What needs it: the beginning of the sentence.

    Returns
    -------
    module

    Raises
    ------
    ConfigurationError
        If the package is missing or does not work.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ConfigurationError(f"{who} needs {package}, which is not installed: pip install {package}") from error
        reason = str(error)
    # a compiled half that does not go with this torch raises whatever it likes
    except Exception as error:
        reason = reason_of(error)
    raise ConfigurationError(f"{who} needs {package}, which is installed but cannot be imported: {reason}")
