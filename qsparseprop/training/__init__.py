"""Training: the Finetuner, and what a training from images to a checkpoint needs beside it (data, networks, runs)."""

from .finetuner import CheckpointError, Evaluation, Finetuner, FitResult, History, NonFiniteLossError

__all__ = ["CheckpointError", "Evaluation", "Finetuner", "FitResult", "History", "NonFiniteLossError"]
