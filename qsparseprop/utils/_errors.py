"""Mistakes of the user."""

from __future__ import annotations

__all__ = ["ConfigurationError"]


class ConfigurationError(ValueError):
    """What was asked for makes no sense; the message says why."""
