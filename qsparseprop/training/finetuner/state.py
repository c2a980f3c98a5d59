"""Loading the state of a training: all of it, or nothing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qsparseprop.training.processes import distribute

from .checkpoint import CheckpointError, random_state, set_random_state
from .history import History
from .optimizer_state import laid_out, match_optimizer_state
from .schedules import check_schedule

if TYPE_CHECKING:
    from .trainer import Finetuner

__all__ = ["load_state"]


def load_state(tuner: Finetuner, state: Mapping[str, Any]) -> None:
    """Set what `Finetuner.state_dict` returned.

    Raises
    ------
    CheckpointError
        If it belongs to another model, optimizer or schedule; nothing has changed then.
    """
    try:
        optimizer = _check(tuner, state)
    except Exception as error:
        raise _does_not_go_with_it(error) from error
    before = copy.deepcopy(tuner.state_dict())
    try:
        _apply(tuner, {**state, "optimizer": optimizer})
    # Whatever a damaged file or a foreign state_dict leads to: nothing of it may stay.
    except Exception as error:
        _apply(tuner, before)
        raise _does_not_go_with_it(error) from error


def _does_not_go_with_it(error: Exception) -> CheckpointError:
    # torch lists every key in a line of its own
    sentence = " ".join(str(error).split())
    reason = f"it lacks {sentence}" if isinstance(error, KeyError) else sentence
    return CheckpointError(f"the checkpoint does not go with this training: {reason}")


def _check(tuner: Finetuner, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state's optimizer for this one; raises whatever it is that does not fit."""
    check_schedule(tuner.scheduler, state)
    accumulated = state.get("accumulate", 1)
    if accumulated != tuner.accumulate:
        raise CheckpointError(f"its steps are made of {accumulated} batches, this training's of {tuner.accumulate}")
    if set(state["stateful"]) != set(tuner.stateful):
        raise CheckpointError(f"it has the further states {sorted(state['stateful'])}, this training "
                              f"{sorted(tuner.stateful)}")  # fmt: skip
    History.from_state_dict(state["history"]).check(state["epoch"], state["batch"])
    others = state.get("others", [])
    if not isinstance(others, list) or any(other.keys() != {"random", "epoch_start"} for other in others):
        raise CheckpointError("it does not say how its processes began")
    if state["epoch_start"] is not None and state["epoch_start"].keys() != {"random", "loader"}:
        raise CheckpointError("it does not say how its epoch began")
    return match_optimizer_state(tuner.model, tuner.optimizer, state)


def _memory_of_parameters(tuner: Finetuner) -> list[tuple[int, int]]:
    return [(parameter.data_ptr(), parameter.numel()) for parameter in tuner.model.parameters()]


def _apply(tuner: Finetuner, state: Mapping[str, Any]) -> None:
    for name, item in tuner.stateful.items():
        item.load_state_dict(state["stateful"][name])
    before = _memory_of_parameters(tuner)
    tuner.model.load_state_dict(state["model"])
    if tuner.parallel is not None and _memory_of_parameters(tuner) != before:
        # patterns come with the weights, and what the processes have in common goes by the number of nonzeros
        tuner.parallel = distribute(tuner.model, tuner.parallel)
    tuner.optimizer.load_state_dict(dict(laid_out(tuner.optimizer, state["optimizer"])))
    if tuner.scheduler is not None:
        tuner.scheduler.load_state_dict(state["scheduler"])
    tuner.history = History.from_state_dict(state["history"])
    tuner.epoch, tuner.batch = state["epoch"], state["batch"]
    # of this process; one that was not there before goes on with the random numbers that it has
    together, others = tuner.together, state.get("others", [])
    if together.first:
        own = state
    elif together.count == len(others) + 1:
        own = others[together.rank - 1]
    else:
        start = state["epoch_start"]
        own = {"random": random_state(), "epoch_start": start and {**start, "random": random_state()}}
    tuner.epoch_start = own["epoch_start"]
    tuner.resume_random = own["random"]
    if tuner.epoch_start is not None:
        set_random_state(tuner.epoch_start["random"])  # to be sure that it can be set
    set_random_state(own["random"])
