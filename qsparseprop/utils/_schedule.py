"""How many weights a gradual pruning leaves at a step, and which step it has come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qsparseprop import arguments

__all__ = ["cubic_sparsity", "progress_in"]


def cubic_sparsity(step: int, initial: float, final: float, begin: int, end: int) -> float:
    """Sparsity that a gradual schedule wants at a step.

    ``final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3`` between `begin` and `end`, and constant
    outside (M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, equation 1): fast at first, when
    most weights are redundant, and slow towards the end.

    Parameters
    ----------
    step : int
    initial, final : float
        Fractions of zeros.
    begin, end : int
        Steps of the first and the last change, ``begin < end``.

    Returns
    -------
    float
    """
    for name, value in (("step", step), ("initial", initial), ("final", final), ("begin", begin), ("end", end)):
        arguments.number(value, name)
    if begin >= end:
        raise ValueError(f"begin must come before end, got {begin} and {end}")
    progress = min(max((step - begin) / (end - begin), 0.0), 1.0)
    return final + (initial - final) * (1 - progress) ** 3


def progress_in(state: Mapping[str, Any], groups: int) -> tuple[int, list[float]]:
    """Where a schedule was, from the state of a `GradualPruner`.

    Parameters
    ----------
    state : mapping
        Trusted in nothing.
    groups : int
        Of layers that are pruned together.

    Returns
    -------
    steps : int
    initial : list of float
        Fractions of zeros.

    Raises
    ------
    ValueError, TypeError, KeyError
        If it is none, or one of another model.
    """
    arguments.instance(state, Mapping, "state_dict", "a mapping")
    steps, initial = state["steps"], state["initial_sparsity"]
    arguments.whole_number(steps, "steps")
    arguments.instance(initial, (list, tuple), "initial_sparsity", "a list of numbers")
    if len(initial) != groups:
        raise ValueError(f"initial_sparsity must have {groups} numbers, got {len(initial)}")
    for value in initial:
        arguments.number(value, "initial_sparsity", 0, 1)
    return int(steps), [float(value) for value in initial]
