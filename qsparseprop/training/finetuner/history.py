"""What a training records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Evaluation", "History"]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy at one point of a training.

    Attributes
    ----------
    step : int
        Steps done so far.
    train_seconds : float
        Time spent in these steps.
    top1 : float or None
        Share of correct predictions, in percent; None where nothing is classified.
    loss : float
        Mean loss of a sample.
    """

    step: int
    train_seconds: float
    top1: float | None
    loss: float = float("nan")

    def __str__(self) -> str:
        accuracy = "" if self.top1 is None else f"top-1 {self.top1:.1f} %, "
        return f"{accuracy}loss {self.loss:.4f} on the test data"

    def better_than(self, other: Evaluation | None) -> bool:
        """Whether this is the better one: by accuracy, else (and among equal ones) by loss.

        Parameters
        ----------
        other : Evaluation or None

        Returns
        -------
        bool
        """
        if other is None:
            return True
        if self.top1 is not None and other.top1 is not None and self.top1 != other.top1:
            return self.top1 > other.top1
        return self.loss < other.loss


@dataclass
class History:
    """What a training has recorded, one entry a step.

    Attributes
    ----------
    losses : list of float
        Training loss of each step.
    step_seconds : list of float
        Duration of each step: everything from the zeroed gradients to the updated weights.
    warmup_steps : set of int
        Indices of steps that are no fair measure of speed; they count for everything but `median_step_seconds`.
    evaluations : list of Evaluation
        In the order they were made.
    samples, correct : list of int
        Size of each step's batch, and how many of it were predicted correctly before the update (0 where nothing is
        classified).
    wait_seconds : list of float
        How long each step had waited for its batch, as far as that is known: steps at the end may be missing.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    warmup_steps: set[int] = field(default_factory=set)
    evaluations: list[Evaluation] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    correct: list[int] = field(default_factory=list)
    wait_seconds: list[float] = field(default_factory=list)

    @property
    def train_seconds(self) -> float:
        """Time spent in training steps, in seconds."""
        return sum(self.step_seconds)

    @property
    def best(self) -> Evaluation | None:
        """The best evaluation so far, the first of equal ones; None before the first."""
        best = None
        for evaluation in self.evaluations:
            if evaluation.better_than(best):
                best = evaluation
        return best

    def waited(self, seconds: float) -> None:
        """Record how long the latest step had waited for its batch.

        Parameters
        ----------
        seconds : float
        """
        missing = len(self.losses) - len(self.wait_seconds)
        self.wait_seconds += [0.0] * (missing - 1) + [seconds] * (missing > 0)

    def wait_share(self, steps: int | None = None) -> float:
        """The share of the time that was spent waiting for batches.

        Parameters
        ----------
        steps : int, optional
            Of so many of the last steps; by default of all.

        Returns
        -------
        float
            From 0 to 1.
        """
        first = 0 if steps is None else max(len(self.losses) - steps, 0)
        waited = sum(self.wait_seconds[first:])
        return waited / max(waited + sum(self.step_seconds[first:]), 1e-9)

    def timed_seconds(self) -> list[float]:
        """Return the durations of the steps that are not warm-up; of all steps, if there are no others."""
        timed = [seconds for step, seconds in enumerate(self.step_seconds) if step not in self.warmup_steps]
        return timed or list(self.step_seconds)

    def median_step_seconds(self) -> float:
        """Return the median duration of the steps that are not warm-up, in seconds.

        Returns
        -------
        float

        Raises
        ------
        statistics.StatisticsError
            If no step was made.
        """
        return statistics.median(self.timed_seconds())

    def summary(self, steps: int) -> str:
        """Mean loss, accuracy and time of so many of the last steps, for people.

        Parameters
        ----------
        steps : int

        Returns
        -------
        str
        """
        if not steps:
            return "no steps"
        first = max(len(self.losses) - steps, 0)
        samples, correct = sum(self.samples[first:]), sum(self.correct[first:])
        accuracy = f", accuracy {100 * correct / samples:.1f} %" if correct else ""
        waited = f", {100 * self.wait_share(steps):.0f} % of the time waiting for data" if self.wait_seconds else ""
        return (f"loss {statistics.fmean(self.losses[first:]):.4f}{accuracy}, {sum(self.step_seconds[first:]):.1f} s"
                f"{waited}")  # fmt: skip

    def check(self, epoch: int, batch: int) -> None:
        """Raise a ValueError if this cannot be what a training at a position has recorded.

        Parameters
        ----------
        epoch, batch : int
            The position.
        """
        lists = (self.losses, self.step_seconds, self.samples, self.correct)
        numbers = all(isinstance(values, list) for values in (*lists, self.wait_seconds)) and all(
            isinstance(value, (int, float)) for values in (*lists, self.wait_seconds) for value in values
        )
        if len(self.wait_seconds) > len(self.losses):
            raise ValueError("its history waited for more steps than there were")
        if not numbers or len({len(values) for values in lists if values}) > 1:
            raise ValueError("its history is not one number of each kind a step")
        if not all(isinstance(value, int) and value >= 0 for value in (epoch, batch)) or batch > len(self.losses):
            raise ValueError(f"there is no epoch {epoch!r} and batch {batch!r} after {len(self.losses)} steps")

    def state_dict(self) -> dict[str, Any]:
        """Everything, in plain containers."""
        return {**asdict(self), "warmup_steps": sorted(self.warmup_steps)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> History:
        """The history that `state_dict` was called on.

        Parameters
        ----------
        state : mapping

        Returns
        -------
        History
        """
        evaluations = [Evaluation(**evaluation) for evaluation in state["evaluations"]]
        return cls(**{**state, "warmup_steps": set(state["warmup_steps"]), "evaluations": evaluations})
