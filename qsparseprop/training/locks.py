"""One process at a time writes to a folder."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import errors_name

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "locked"]

#: The file whose lock stands for the folder's; it is there as long as somebody writes to the folder.
LOCK = ".lock"

#: Folders that this process has locked: the descriptor of each, and the thread that may lock it again.
_held: dict[str, tuple[int, int]] = {}

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keep every other process and thread from writing to a folder in the meantime.

    The lock is the operating system's, which ends it with the process, however that ends. Where there are no such
    locks, the mere existence of the file is one, and what a killed process has left must be removed by hand. A thread
    that holds a lock may take it again.

    Parameters
    ----------
    folder : path-like
        Exists.

    Raises
    ------
    ConfigurationError
        If somebody else has it.
    OSError
        If the folder cannot be written to.
    """
    key = os.path.realpath(folder)
    holder = _held.get(key)
    if holder is not None and holder[1] == threading.get_ident():
        yield
        return
    path = Path(folder) / LOCK
    with errors_name(folder, instead_of=path):
        descriptor = None if holder is not None else _acquire(path)
    if descriptor is None:
        raise ConfigurationError(f"{os.fspath(folder)} is in use by another training{_owner(path)}: wait until it has "
                                 "ended, or choose another folder")  # fmt: skip
    _held[key] = descriptor, threading.get_ident()
    try:
        yield
    finally:
        del _held[key]
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path) -> int | None:
    """Descriptor of the locked file; None if somebody else has it."""
    while True:
        made = True
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            made = False
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free = _lock(descriptor)
        # Without locks of the system the file itself is the lock.
        if free or (free is None and made):
            # The holder before has removed its file with the lock; a lock on what has no name keeps nobody out.
            if _same_file(descriptor, path):
                # for messages only: on a full disk it is not worth an error
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                return descriptor
            os.close(descriptor)
            continue
        os.close(descriptor)
        return None


def _lock(descriptor: int) -> bool | None:
    """Whether the file is locked by us now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _WITHOUT_LOCKS:
            return None
        raise
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(path: Path) -> str:
    try:
        number = path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        number = ""
    if not number.isdigit():
        return ""
    return f" (process {number}; {path} is its lock)" if fcntl is None else f" (process {number})"


def _let_go_in_child() -> None:
    """A forked child (a data loader's worker) that outlives its parent must not keep what the parent had."""
    for descriptor, _ in _held.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
