"""One OpenMP runtime in the process, torch's: the compiled modules name none, and take the functions of that one.

A module that names ``libgomp.so.1`` gets the system's copy beside the one that torch brings along, if that has another
name there, and cannot be imported where the system has none. A second runtime keeps threads of its own, which spin
while those of the first compute. So functions of OpenMP are left undefined in the modules (setup.py), and are looked up
where the dynamic linker looks first for everybody: in the libraries that were loaded for all. Most builds of torch have
loaded their runtime so; where one has not, it is done here.
"""

import ctypes
import os
import sys
from collections.abc import Iterable

#: What every runtime that the modules can use has: GNU's and LLVM's know the first, only LLVM's, on macOS, the second.
_ENTRY = "__kmpc_fork_call" if sys.platform == "darwin" else "GOMP_parallel"
#: Where torch calls its runtime from, and runtimes of the system, for a torch that was built without one.
_TORCH = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
_SYSTEM = ("libomp.dylib",) if sys.platform == "darwin" else ("libgomp.so.1", "libomp.so.5", "libomp.so")


class _Symbol(ctypes.Structure):
    """``Dl_info``: the library that an address lies in."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _home(library: ctypes.CDLL) -> str | None:
    """Path of the runtime that a library, or what it was linked with, calls; None where it calls none."""
    try:
        entry = ctypes.cast(getattr(library, _ENTRY), ctypes.c_void_p)
    except AttributeError:
        return None
    found = _Symbol()
    found_any = ctypes.CDLL(None).dladdr(entry, ctypes.byref(found))
    return os.fsdecode(found.file) if found_any and found.file else None


def share_runtime(callers: Iterable[str], system: Iterable[str] = _SYSTEM) -> str | None:
    """Have a runtime among the libraries that are loaded for all: one that is there, else that of the callers.

    Parameters
    ----------
    callers
        Paths of libraries that call the runtime wanted.
    system
        Names of runtimes for the case that none of the callers has one.

    Returns
    -------
    str or None
        Path, or name, of the runtime; None if there is none to be had.
    """
    present = _home(ctypes.CDLL(None))
    if present is not None:
        return present
    for caller in callers:
        if os.path.exists(caller):
            home = _home(ctypes.CDLL(caller))
            if home is not None:
                ctypes.CDLL(home, mode=ctypes.RTLD_GLOBAL)
                return home
    for name in system:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def share_torchs_runtime() -> None:
    """The same with torch for the caller, which is imported.

    Raises
    ------
    ImportError
        If neither torch nor the system has a runtime.
    """
    import torch

    if share_runtime([os.path.join(os.path.dirname(torch.__file__), "lib", _TORCH)]) is None:
        raise ImportError(
            "qsparseprop computes with torch's OpenMP runtime, and this build of torch brings none: install the "
            "system's (`apt install libgomp1`, `dnf install libgomp`, `brew install libomp`), or build qsparseprop "
            "single-threaded, with QSPARSEPROP_NO_OPENMP=1"
        )
