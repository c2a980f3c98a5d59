"""Whether the learning rate schedule of a checkpoint is that of a training: torch loads any into any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from .checkpoint import CheckpointError

__all__ = ["check_schedule", "describe_schedule"]

#: What torch's schedules are made with and never change, and what those made of several keep these in.
_SETTINGS = ("total_steps", "T_max", "T_mult", "T_0", "eta_min", "step_size", "milestones", "_milestones", "gamma",
             "total_iters", "start_factor", "end_factor", "factor", "power")  # fmt: skip
_PARTS = "_schedulers"


def describe_schedule(scheduler: LRScheduler) -> list[str]:
    """Names of the class of a schedule and of those that it is made of.

    Parameters
    ----------
    scheduler : LRScheduler
    """
    parts = getattr(scheduler, _PARTS, ())
    return [type(scheduler).__name__, *(name for part in parts for name in describe_schedule(part))]


def _settings(state: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a schedule this one, of its state."""
    found: dict[str, Any] = {}
    for key in _SETTINGS:
        if key in state:
            value = state[key]
            found[key] = sorted(dict(value).items()) if isinstance(value, Mapping) else value
    for index, part in enumerate(state.get(_PARTS, ())):
        found |= {f"{key} of part {index + 1}": value for key, value in _settings(part).items()}
    return found


def check_schedule(scheduler: LRScheduler | None, state: Mapping[str, Any]) -> None:
    """Raise a `CheckpointError` if a checkpoint was written with another schedule.

    Parameters
    ----------
    scheduler : LRScheduler or None
    state : mapping
        The checkpoint; older ones have no names of schedules.
    """
    theirs = state["scheduler"]
    if (theirs is None) != (scheduler is None):
        raise CheckpointError("only one of both has a learning rate schedule")
    if scheduler is None:
        return
    names, ours = state.get("schedule"), describe_schedule(scheduler)
    if names is not None and names != ours:
        raise CheckpointError(f"its learning rate schedule is {' of '.join(names[:1])}, this training's {ours[0]}"
                              if names[:1] != ours[:1] else
                              f"its learning rate schedule is made of {', '.join(names[1:])}, this training's of "
                              f"{', '.join(ours[1:])}")  # fmt: skip
    was, now = _settings(theirs), _settings(scheduler.state_dict())
    steps = "total_steps"
    if steps in was and steps in now and was[steps] != now[steps]:
        # torch takes the checkpoint's, and refuses to go on when they are over
        raise CheckpointError(f"its learning rate schedule is one of {was[steps]} steps, this training's of "
                              f"{now[steps]}")  # fmt: skip
    for key in dict.fromkeys([*was, *now]):
        if was.get(key) != now.get(key):
            raise CheckpointError(f"its learning rate schedule has {key} {was.get(key)}, this training's "
                                  f"{now.get(key)}")  # fmt: skip
