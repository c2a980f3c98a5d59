"""Training with progress, logs, checkpoints and clean stops; a swapped model trains in it like any other one."""

from .checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from .diagnosis import NonFiniteLossError
from .fit import FitResult
from .history import Evaluation, History
from .layer_times import LayerTime, LayerTimer, layer_table
from .trainer import Finetuner

__all__ = [
    "CheckpointError",
    "Evaluation",
    "Finetuner",
    "FitResult",
    "History",
    "LayerTime",
    "LayerTimer",
    "NonFiniteLossError",
    "layer_table",
    "read_checkpoint",
    "write_checkpoint",
]
