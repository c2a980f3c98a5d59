"""What is compiled: `.pyx` files check tensors and deal out tasks, C headers compute."""

import importlib.machinery as _machinery
import os as _os


def _check_built(folder: str, suffixes: list[str]) -> None:
    """Say what is missing where the modules are not compiled: Python would speak of a circular import.

    That is what whoever has downloaded the sources meets first, since Python looks in the current folder before it
    looks where packages are installed.
    """
    if not _os.path.isdir(folder):
        raise ImportError(f"{folder} lies in an archive, from which compiled modules cannot be imported: install "
                          "qsparseprop, or unpack it")  # fmt: skip
    names = [name for name in _os.listdir(folder) if name.startswith("_dispatch.") and name.endswith((".so", ".pyd"))]
    if any(f"_dispatch{suffix}" in names for suffix in suffixes):
        return
    others = f" for this Python, but as {', '.join(sorted(names))}" if names else ""
    raise ImportError(f"the kernels of qsparseprop are not built in {folder}{others}: go to another folder if it is "
                      "installed (pip install .), or build them in this one (pip install -e .)")  # fmt: skip


_check_built(__path__[0], _machinery.EXTENSION_SUFFIXES)

from qsparseprop._kernels import _dispatch, _runtime  # noqa: E402

# Before all modules that have loops; this one has none.
if _dispatch.openmp_of == "torch":
    _runtime.share_torchs_runtime()
