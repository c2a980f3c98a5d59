"""Which precision and memory layout trains a dense network fastest on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from qsparseprop.training.finetuner import Finetuner
from qsparseprop.training.recipe import Recipe, make_finetuner
from qsparseprop.training.setup_run import TrainingMode
from qsparseprop.utils.measurement_utils import interleaved_times

__all__ = ["DENSE_MODES", "MODE_STEPS", "time_dense_modes"]

DENSE_MODES = (
    TrainingMode(bf16=False, channels_last=False),
    TrainingMode(bf16=False, channels_last=True),
    TrainingMode(bf16=True, channels_last=False),
    TrainingMode(bf16=True, channels_last=True),
)

#: How many times as long as the fastest mode's step the fastest one of a mode may take for the mode to be timed again:
#: after the first pass, in which caches are cold and other work of the machine may be taken for slowness, and after the
#: second one.
_FAR_BEHIND = (4.0, 1.5)
#: What no cold start explains: the first pass rules nothing out that takes less.
_COLD_STEP_SECONDS = 1.5
#: The part of a batch that is tried first, and the seconds that it may take in any case.
_PART, _COLD_SECONDS = 16, 1.0

#: The most steps that `time_dense_modes` makes.
MODE_STEPS = (1 + len(_FAR_BEHIND)) * len(DENSE_MODES)


def time_dense_modes(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, on_step: Callable[[str], None] = lambda name: None
) -> dict[str, float]:
    """Seconds of a training step of a copy of the model in each mode, by the mode's name.

    A mode in which a sixteenth of the batch takes longer than another one's whole step, and a second, twice is not run
    any further (bfloat16 on a processor without instructions for it takes minutes); its time is that of the part,
    sixteen times. The others take turns, in which those that are far behind drop out. The fastest step of a mode
    counts: cold caches, and what else the machine does, can only make a step longer.

    Parameters
    ----------
    model : nn.Module
    inputs, targets : torch.Tensor
        A batch.
    on_step : callable
        Called with the name of a mode before each of its steps.
    """
    # Copies, because each step changes weights and statistics; one a layout, because converting is not to be timed.
    copies = {channels_last: copy.deepcopy(model) for channels_last in (False, True)}
    recipe = Recipe(learning_rate=1e-4)
    trainers = {mode.name: make_finetuner(copies[mode.channels_last], mode, recipe, 1, 100) for mode in DENSE_MODES}

    def step(name: str, trainer: Finetuner) -> Callable[[], None]:
        def run() -> None:
            on_step(name)
            trainer.train_step(inputs, targets)

        return run

    steps = {name: step(name, trainer) for name, trainer in trainers.items()}
    seconds: dict[str, float] = {}
    part = len(inputs) // _PART
    for name, trainer in trainers.items():
        if seconds and part > 1:
            for _ in range(2):  # the first one may be slow for its cold start
                start = time.perf_counter()
                trainer.train_step(inputs[:part], targets[:part])
                spent = time.perf_counter() - start
                if spent <= max(min(seconds.values()), _COLD_SECONDS):
                    break
            else:
                seconds[name] = _PART * spent
                del steps[name]
                continue
        (seconds[name],) = interleaved_times({name: steps[name]}, 1, warmup=0)[name]
    for factor, least in zip(_FAR_BEHIND, (_COLD_STEP_SECONDS, 0.0), strict=True):
        limit = max(factor * min(seconds[name] for name in steps), least)
        steps = {name: step for name, step in steps.items() if seconds[name] <= limit}
        for name, (spent,) in interleaved_times(steps, 1, warmup=0).items():
            seconds[name] = min(spent, seconds[name])
    return seconds
