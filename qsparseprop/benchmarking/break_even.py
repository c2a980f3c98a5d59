"""From which sparsity on something pays, and how well measurements tell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qsparseprop.utils.measurement_utils import Spread

__all__ = ["BreakEven", "break_even"]


@dataclass(frozen=True)
class BreakEven:
    """Where a speed-up rises above 1 for good, as far as it is known.

    Attributes
    ----------
    sparsity : float or None
        Where it is 1, between two neighbouring points that are clearly below and above; None where it is not known
        that well.
    above : float or None
        The sparsest point that clearly does not pay; it pays from a sparsity above that on, if at all.
    up_to : float or None
        The point from which on all clearly pay; None if there is none.
    finding : str
        What was found, in words.
    """

    sparsity: float | None
    above: float | None
    up_to: float | None
    finding: str


def break_even(curve: Sequence[tuple[float, Spread]]) -> BreakEven:
    """Find the sparsity from which on a speed-up is above 1, and say what the measured points allow.

    A point is clearly above or below 1 if its spread is. A break-even is named only where all points behind it are
    clearly above and the one in front of it is clearly below; then it lies between these two, on a straight line in
    the speed-up's logarithm.

    Parameters
    ----------
    curve : sequence of (sparsity, speed-up)
        In any order, one or more, each sparsity once.

    Returns
    -------
    BreakEven

    Raises
    ------
    ValueError
        If there is no point, one twice, or a speed-up that is not positive.
    """
    points = sorted(curve, key=lambda point: point[0])
    if not points or any(a == b for (a, _), (b, _) in itertools.pairwise(points)):
        raise ValueError(f"a break-even needs points, each sparsity once, got {[s for s, _ in points]}")
    if not all(0 < ratio.low <= ratio.value <= ratio.high < math.inf for _, ratio in points):
        raise ValueError("speed-ups must be positive, within their spread")
    sides = [ratio.side for _, ratio in points]
    below = max((i for i, side in enumerate(sides) if side < 0), default=None)
    rising = next((i for i in range(len(sides)) if all(side > 0 for side in sides[i:])), None)
    above = None if below is None else points[below][0]
    up_to = None if rising is None else points[rising][0]
    sparsity = None
    if below is not None and rising == below + 1:
        (s0, y0), (s1, y1) = points[below], points[rising]
        share = math.log(y0.value) / (math.log(y0.value) - math.log(y1.value))
        sparsity = s0 + (s1 - s0) * share
    return BreakEven(sparsity, above, up_to, _finding(points, sides, below, rising, sparsity))


def _finding(points: list[tuple[float, Spread]], sides: list[int], below: int | None, rising: int | None,
             sparsity: float | None) -> str:  # fmt: skip
    percent = [f"{100 * s:g}" for s, _ in points]
    last = len(points) - 1
    if sparsity is not None:
        return f"pays from {100 * sparsity:.0f} % zeros on"
    if rising == 0:
        return "pays at every sparsity measured" if last else f"pays at {percent[0]} % zeros"
    if rising is not None:
        noise = "within the noise"
        if below is not None:
            return f"pays from between {percent[below]} and {percent[rising]} % zeros on, {noise} there"
        return f"pays from {percent[rising]} % zeros on, {noise} below"
    if below is None or 1 in sides[below:]:
        unclear = ", ".join(p for p, side in zip(percent, sides, strict=True) if side == 0)
        return f"no clear crossing: within the noise at {unclear} % zeros"
    if 1 in sides:
        best = max((i for i in range(below) if sides[i] > 0), key=lambda i: points[i][1].value)
        return (f"no clear crossing: {points[best][1].value:.2f}x at {percent[best]} % zeros, but "
                f"{points[below][1].value:.2f}x at {percent[below]} %")  # fmt: skip
    return f"does not pay up to {percent[below]} % zeros" + ("" if below == last else ", within the noise above")
