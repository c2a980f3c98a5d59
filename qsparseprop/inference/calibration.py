"""Scales of codes, from what values are when a model computes on examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from qsparseprop.inference.coding import Coding
from qsparseprop.inference.draft import Draft, Flat, Joined, Layer, Node, Pooling, run_draft
from qsparseprop.inference.steps import Codes

__all__ = ["OBSERVERS", "MinMax", "MovingAverage", "Observer", "Percentile", "calibrate", "codes_of", "token_codes"]

#: Elements of a channel, without room for more, beyond whose extremes others lie so rarely that it costs nothing.
RARE = 4096
#: Largest code behind the zero point, by zero point.
_LEVELS = {0: 255.0, 128: 127.0}


class Observer(Protocol):
    """Looks at batches of a value, as (channels, elements), and tells the range of each channel."""

    def see(self, values: Tensor) -> None:
        """Look at a batch.

        Parameters
        ----------
        values : Tensor
            (channels, elements).
        """

    def ranges(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of each channel that is to be coded.

        Returns
        -------
        Tensor, Tensor
            float64, (channels,).
        """

    def enough(self) -> int:
        """Elements of a channel from which on what was seen of it tells its range.

        Returns
        -------
        int
        """


class MinMax:
    """The smallest and the largest value that was seen, and what more examples would have added to that.

    Channels of their own see few elements, of a linear layer one a sample, and what comes later goes beyond the largest
    of them often: with some hundred samples that cost more than all rounding. How much the largest one grows with twice
    the examples is seen from two halves of them, on average over the channels; the ranges are those of `DOUBLINGS`
    more. Where values have an end of their own, as those of ReLU6, nothing grows.
    """

    #: How often the examples are thought to be doubled.
    DOUBLINGS = 5
    #: Times that ranges grow at most: two bits.
    MOST = 4.0
    #: Channels that tell how they grow; of fewer nothing is concluded.
    CHANNELS = 16
    #: Elements of a channel that tell its range where that grows, and where it does not.
    ENOUGH, MANY = 32, 512

    def __init__(self) -> None:
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._halves: list[Tensor | None] = [None, None]

    def see(self, values: Tensor) -> None:
        """See `Observer.see`."""
        low, high = values.amin(1).double(), values.amax(1).double()
        if self._low is None or self._high is None:
            self._low, self._high = low, high
        else:
            self._low = self._joined(self._low, low, torch.minimum)
            self._high = self._joined(self._high, high, torch.maximum)
        for half in values.chunk(2, 1):
            size = half.abs().amax(1).double()
            first, second = self._halves
            # in turn, for batches of one element
            self._halves = [second, size if first is None else torch.maximum(first, size)]

    def _joined(self, old: Tensor, new: Tensor, extreme: Any) -> Tensor:
        return extreme(old, new)

    def _growth(self) -> float:
        """What the ranges are multiplied by."""
        one, other = self._halves
        if other is None or len(other) < self.CHANNELS:
            return 1.0
        if one is None:  # a single element of each channel
            return self.MOST
        used = torch.maximum(one, other) > 0
        if not bool(used.any()):
            return 1.0
        growth = float((2 * torch.maximum(one, other) / (one + other))[used].mean())
        return min(growth**self.DOUBLINGS, self.MOST)

    def ranges(self) -> tuple[Tensor, Tensor]:
        """See `Observer.ranges`."""
        assert self._low is not None
        assert self._high is not None
        growth = self._growth()
        return self._low * growth, self._high * growth

    def enough(self) -> int:
        """See `Observer.enough`."""
        assert self._low is not None
        return self.ENOUGH if len(self._low) >= self.CHANNELS else self.MANY


class MovingAverage(MinMax):
    """The average of the extremes of batches, of which each one counts a tenth and what was before nine tenths."""

    #: What is left of the average after a batch.
    CONSTANT = 0.9

    def _joined(self, old: Tensor, new: Tensor, extreme: Any) -> Tensor:
        return self.CONSTANT * old + (1 - self.CONSTANT) * new

    def _growth(self) -> float:
        return 1.0

    def enough(self) -> int:
        """See `Observer.enough`: of a batch, whose extreme what lies beyond is cut off at."""
        return RARE


class Percentile:
    """What all but a few elements of a channel lie within, of a sample of them.

    Parameters
    ----------
    percentile : float
        Of the elements, in (50, 100].
    """

    #: Elements of a channel that are kept at most.
    SAMPLE = 1 << 15

    def __init__(self, percentile: float = 99.99) -> None:
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must lie in (50, 100], got {percentile}")
        self.percentile = percentile
        self._sample: Tensor | None = None
        self._step = 1

    def see(self, values: Tensor) -> None:
        """See `Observer.see`."""
        values = values[:, :: self._step].float()
        self._sample = values if self._sample is None else torch.cat([self._sample, values], 1)
        while self._sample.shape[1] > self.SAMPLE:
            self._sample = self._sample[:, ::2].clone()
            self._step *= 2

    def ranges(self) -> tuple[Tensor, Tensor]:
        """See `Observer.ranges`."""
        assert self._sample is not None
        ordered = self._sample.sort(1).values.double()
        last = ordered.shape[1] - 1
        position = self.percentile / 100 * last
        high, low = ordered[:, round(position)], ordered[:, last - round(position)]
        # a channel of which nothing is left would have no range at all
        empty = torch.maximum(high.abs(), low.abs()) == 0
        return torch.where(empty, ordered[:, 0], low), torch.where(empty, ordered[:, -1], high)

    def enough(self) -> int:
        """See `Observer.enough`: of fewer the percentile is their largest."""
        return RARE


#: By the names that `qsparseprop.inference.freeze` takes.
OBSERVERS: dict[str, Any] = {"minmax": MinMax, "moving_average": MovingAverage, "percentile": Percentile}


def calibrate(
    draft: Draft, coding: Coding, batches: Iterable[Sequence[Tensor]], observer: str, per_channel: bool,
    names: Mapping[str, str],
) -> dict[str, Codes]:  # fmt: skip
    """Scales and zero points of all values that are coded.

    Parameters
    ----------
    draft : Draft
    coding : Coding
    batches : iterable of sequence of Tensor
        Inputs.
    observer : str
        Of `OBSERVERS`.
    per_channel : bool
        Whether each channel has a scale of its own.
    names : mapping
        For people, of values.

    Returns
    -------
    dict
        Codes by value.

    Raises
    ------
    ValueError
        If a value is not finite, naming its layer.
    """
    sources = _sources(draft, coding)
    own = [name for name in sorted(coding.values) if name not in sources]
    observers: dict[str, Observer] = {name: OBSERVERS[observer]() for name in own}
    # others may be infinite, as masks of attention are
    numbers = coding.values.union(node.output for node in draft.nodes if isinstance(node, Layer))
    negative: dict[str, bool] = dict.fromkeys(observers, False)
    elements: dict[str, int] = {}
    # an average is of what batches show, each by itself
    counted = min if observer == "moving_average" else int.__add__

    def see(name: str, value: Any) -> None:
        if name in numbers and not bool(value.isfinite().all()):
            raise ValueError(f"{names.get(name) or name!r} gives NaN or infinity on the calibration data")
        if name not in observers or not value.numel():
            return
        negative[name] = negative[name] or bool((value < 0).any())
        rows = value.transpose(0, 1).flatten(1) if per_channel else value.reshape(1, -1)
        elements[name] = counted(elements[name], rows.shape[1]) if name in elements else rows.shape[1]
        observers[name].see(rows)

    for batch in batches:
        run_draft(draft, batch, see)
    zero_points = _zero_points(draft, coding, sources, negative)
    found: dict[str, Codes] = {}
    for name, seen in observers.items():
        channels = draft.shapes[name][1]
        assert channels is not None
        low, high = seen.ranges()
        if name in draft.inputs and not bool(low.any()) and not bool(high.any()):
            raise ValueError(f"the calibration data is zero all over ({name!r}), which tells no scale")
        if elements[name] < seen.enough():  # all have the range of the largest
            low, high = low.min(), high.max()
        low, high = low.expand(channels), high.expand(channels)
        found[name] = codes_of(low, high, zero_points[name])
    for node in draft.nodes:
        if node.output in sources and node.output not in found:
            found[node.output] = _derived(draft, node, found)
    return found


def _sources(draft: Draft, coding: Coding) -> dict[str, tuple[str, ...]]:
    """Values that have the codes of others, and which."""
    return {node.output: node.inputs for node in draft.nodes if id(node) in coding.coded and (
        isinstance(node, Joined | Flat) or (isinstance(node, Pooling) and node.kind == "max"))}  # fmt: skip


def _zero_points(
    draft: Draft, coding: Coding, sources: Mapping[str, tuple[str, ...]], negative: Mapping[str, bool]
) -> dict[str, int]:
    """128 where a value, or one that must have the same zero point, is negative somewhere, otherwise 0."""
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while group.get(name, name) != name:
            name = group[name]
        return name

    for name, others in sources.items():
        for other in others:
            group[root(other)] = root(name)
    below = {root(name) for name, is_negative in negative.items() if is_negative}
    return {name: 128 if root(name) in below else 0 for name in negative}


def codes_of(low: Tensor, high: Tensor, zero_point: int) -> Codes:
    """Codes of a range of each channel.

    Parameters
    ----------
    low, high : Tensor
        float64, (channels,).
    zero_point : int
        0, or 128 of ranges that are symmetric.

    Returns
    -------
    Codes
        Those of channels that are always zero have the least scale of the others.
    """
    size = torch.maximum(low.abs(), high.abs()) if zero_point else high.clamp(min=0)
    scale = (size / _LEVELS[zero_point]).float()
    tiny = torch.finfo(torch.float32).tiny * 256  # whose inverse is finite
    used = scale >= tiny
    least = scale[used].min() if bool(used.any()) else torch.ones(())
    return Codes(torch.where(used, scale, least), zero_point)


def token_codes(codes: Codes, per_channel: bool) -> Codes:
    """Codes of features of tokens that have scales of their own.

    A channel's scale is the square root of what it was on examples, so that channels that are larger than others cost
    these some precision, but not all of it, in activations and in weights alike (SmoothQuant, Xiao et al., 2022, with
    alpha = 0.5); at least a sixteenth of the largest.

    Parameters
    ----------
    codes : Codes
        Of the examples.
    per_channel : bool
        Otherwise all scales are 1.

    Returns
    -------
    Codes
    """
    scale = codes.scale if codes.zero_point else codes.scale * (_LEVELS[0] / _LEVELS[128])
    smooth = (scale / scale.max()).sqrt().clamp(min=1 / 16)
    return Codes(smooth if per_channel else torch.ones_like(smooth), 128)


def _derived(draft: Draft, node: Node, found: Mapping[str, Codes]) -> Codes:
    given = [found[name] for name in node.inputs]
    if isinstance(node, Joined):
        return Codes(torch.cat([codes.scale for codes in given]), given[0].zero_point)
    if isinstance(node, Flat):
        height, width = draft.shapes[node.inputs[0]][2:]
        assert height is not None
        assert width is not None
        return Codes(given[0].scale.repeat_interleave(height * width), given[0].zero_point)
    return given[0]
