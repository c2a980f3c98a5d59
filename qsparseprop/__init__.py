"""Training sparse neural networks fast on CPUs."""

import importlib as _importlib
import sys as _sys
from typing import Any as _Any

from qsparseprop._version import __version__

__all__ = ["QuantConfig", "__version__", "show_config"]

_HOMES = {"QuantConfig": "qsparseprop.quantization", "show_config": "qsparseprop.config"}


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(_importlib.import_module(_HOMES[name]), name)
    return value


def _is_program() -> bool:
    """Whether this is ``python -m qsparseprop``, which imports the package before it runs it."""
    command = _sys.orig_argv
    return _sys.argv[:1] == ["-m"] and "-m" in command and command[command.index("-m") + 1 :][:1] == [__name__]


# Torch takes seconds to import: the command line says so meanwhile. Everybody else gets all operators registered here.
if not _is_program():
    import torch as _torch  # noqa: F401 - before the compiled modules: they then share torch's OpenMP runtime

    from qsparseprop.config import show_config
    from qsparseprop.quantization import QuantConfig
