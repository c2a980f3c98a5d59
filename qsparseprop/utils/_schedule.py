"""How many weights a gradual pruning leaves at a step."""

from __future__ import annotations

from qsparseprop import arguments

__all__ = ["cubic_sparsity"]


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
