"""Files that appear complete or not at all, with errors that name them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import torch

__all__ = ["errors_name", "remove_leftovers", "replacing", "save_tensors"]


@contextlib.contextmanager
def errors_name(path: str | os.PathLike[str], instead_of: Path | None = None) -> Iterator[None]:
    """Let an OSError that names no file (a disk is full) or `instead_of` (a temporary one) name `path`.

    Parameters
    ----------
    path : path-like
    instead_of : Path, optional

    Yields
    ------
    None
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(instead_of)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], durable: bool = False) -> Iterator[Path]:
    """Yield a temporary name beside `path` that takes its place at the end, or vanishes if anything goes wrong.

    Parameters
    ----------
    path : path-like
        File to write; what it held before stays until the new content is complete.
    durable : bool
        Wait until content and name have reached the disk, so that a power failure leaves the old file or the new one.

    Yields
    ------
    Path
        The temporary name.

    Raises
    ------
    OSError
        If it cannot be written; it names `path`. Devices, pipes and sockets are not replaced: they would be gone for
        everybody.
    """
    path = Path(path)
    if path.is_dir():  # also "" and "/", which have no name for a temporary one beside
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file, which another one could replace", os.fspath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_name(path, instead_of=temporary):
            yield temporary
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable and os.name == "posix":
                _sync(path.parent)
    finally:
        # An error here would hide the one that matters.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the temporary files of `path` that killed processes have left.

    Parameters
    ----------
    path : path-like
    """
    path = Path(path)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        leftover.unlink(missing_ok=True)


class _Output(io.RawIOBase):
    """A file that remembers why it could not be written: torch's writer does not say."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        # After the first error nothing more: torch's writer goes on to its end whatever happens.
        written = 0
        while written < len(view) and self.error is None:
            try:
                written += os.write(self._descriptor, view[written:])
            except OSError as error:
                self.error = error
        return len(view)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def save_tensors(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` whose error says what is wrong with the file: a full disk is an OSError with its reason.

    Parameters
    ----------
    content : any
        What ``torch.save`` takes.
    path : path-like

    Raises
    ------
    OSError
        If it cannot be written; it names `path`.
    """
    with errors_name(path), _Output(path) as output:
        torch.save(content, cast("IO[bytes]", output))
        if output.error is not None:
            raise output.error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
