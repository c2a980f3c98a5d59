"""Where a command prints to: closed outputs, those that nobody reads, and those that have not all characters."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import sys
from typing import Any

__all__ = ["prepare_streams"]


class _Output(io.FileIO):
    """A descriptor that swallows what is written once nobody reads: ``finetune | head``, or a lost terminal."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        # a lost terminal is none any more, but still a device
        device = stat.S_ISCHR(os.fstat(descriptor).st_mode)
        self._lost = (errno.EPIPE, errno.EIO) if device else (errno.EPIPE,)

    def write(self, data: Any, /) -> int:
        """Bytes written, or dropped; see `io.FileIO`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in self._lost:
                raise
            return memoryview(data).nbytes


def prepare_streams() -> None:
    """Let every text be printed: a name of a file must not end a training of hours, nor an output that nobody reads.

    Names of folders may have characters that the output has not (``LC_ALL=C``, pipes on Windows), or be no text at
    all; those are written as ``\\xe4``. Python has None where an output was closed before it began.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            # not what somebody has put in its place
            own = stream is getattr(sys, f"__{name}__")
            if own and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:
                setattr(sys, name, _unbreakable(stream))


def _unbreakable(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same output by an `_Output`, buffered as it was."""
    with contextlib.suppress(BrokenPipeError):
        stream.flush()
    raw: Any = _Output(stream.fileno())
    # python -u writes past all buffers
    buffer = raw if isinstance(stream.buffer, io.FileIO) else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=stream.line_buffering,
                            write_through=stream.write_through)  # fmt: skip
