"""Where a command prints to: closed outputs, and those that have not all characters."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["prepare_streams"]


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
