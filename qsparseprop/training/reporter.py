"""Where long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Reporter", "SilentReporter"]


class Reporter(Protocol):
    """Where `run_training` and `qsparseprop.benchmarking.compare.compare` tell how far they are."""

    def message(self, text: str) -> None:
        """Show one or more lines."""

    def stage(self, text: str, until: float) -> None:
        """Begin a part of the work, at whose end the share `until` of all work is done; the one before has ended."""

    def progress(self, name: str, total: int) -> Callable[[str], None]:
        """Count `total` steps of the present part; the returned function is called at each, with a note on it."""


class SilentReporter:
    """A `Reporter` that shows nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def stage(self, text: str, until: float) -> None:
        """Show nothing."""

    def progress(self, name: str, total: int) -> Callable[[str], None]:
        """Return a function that shows nothing."""
        return lambda note: None
