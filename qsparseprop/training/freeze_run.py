"""From the checkpoint of a run of the ``finetune`` command to a frozen model in a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qsparseprop.inference import freeze, save
from qsparseprop.inference.module import FrozenModule
from qsparseprop.inference.report import FreezeReport, measure_accuracy
from qsparseprop.utils._classes import check_classes, classes_in
from qsparseprop.utils.errors import ConfigurationError

from .finetuner import read_checkpoint
from .run import RunConfig, stored_settings, swap_like
from .setup_run import make_loaders, prepare_network
from .weights import load_state

__all__ = ["FreezeConfig", "freeze_checkpoint", "load_run_model"]


@dataclass(frozen=True)
class FreezeConfig:
    """What `freeze_checkpoint` does.

    Attributes
    ----------
    data : str or None
        Images to calibrate with and to measure the accuracy on; None: those of the run.
    samples : int
        Training images to calibrate with.
    observer : str
    per_channel : bool
    keep_float : tuple of str
        As `qsparseprop.inference.freeze` takes them.
    """

    data: str | None = None
    samples: int = 512
    observer: str = "minmax"
    per_channel: bool = True
    keep_float: tuple[str, ...] = ()


def load_run_model(checkpoint: str | os.PathLike[str], data: str | None = None) -> tuple[nn.Module, Any, RunConfig]:
    """The network of a checkpoint of a run, with its weights, and its images.

    Parameters
    ----------
    checkpoint : path-like
        ``best.pt`` or ``last.pt`` of a run.
    data : str, optional
        Other images than those of the run.

    Returns
    -------
    model : torch.nn.Module
    data : ImageData
    config : RunConfig
        Of the run.

    Raises
    ------
    CheckpointError, ConfigurationError
        If the file is not a checkpoint, does not lie in the folder of a run, or the images do not go with it.
    """
    try:
        state = read_checkpoint(checkpoint)
    except OSError as error:
        which = ": name a file in it, best.pt of a run" if os.path.isdir(checkpoint) else ""
        raise ConfigurationError(f"cannot read the checkpoint {os.fspath(checkpoint)}: {error.strerror or error}"
                                 f"{which}") from error  # fmt: skip
    config = RunConfig(**stored_settings(Path(checkpoint).absolute().parent))
    config = config if data is None else replace(config, data=data)
    model, images = prepare_network(config, load_weights_too=False)
    classes = classes_in(state)
    check_classes(images.classes, classes, (f"the weights in {os.fspath(checkpoint)}", f"the images in {config.data}"),
                  "take images of the same classes, in folders of the same names")  # fmt: skip
    swap_like(model, state["model"], config)
    load_state(model, state["model"], None, f"the weights in {os.fspath(checkpoint)}")
    return model.eval(), images if images.classes is not None else replace(images, classes=classes), config


def freeze_checkpoint(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: FreezeConfig | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Freeze the network of a checkpoint and write it to a file.

    Parameters
    ----------
    checkpoint : path-like
        ``best.pt`` or ``last.pt`` of a run.
    out : path-like
        Where the frozen model goes, see `qsparseprop.inference.save`.
    config : FreezeConfig, optional
    say : callable
        Told how far it is.

    Returns
    -------
    dict
        ``top1_before`` and ``top1_after`` in percent, ``layers`` (rows of the report), ``bytes`` of the file,
        ``config``.

    Raises
    ------
    CheckpointError, ConfigurationError
        As from `load_run_model`, or for settings that make no sense.
    OSError
        If the file cannot be written.
    """
    config = FreezeConfig() if config is None else config
    if not Path(out).absolute().parent.is_dir():
        raise ConfigurationError(f"{os.fspath(out)} lies in a folder that is not there")
    model, images, run = load_run_model(checkpoint, config.data)
    train, test = make_loaders(images, run.batch_size, run.seed)
    say(f"Freezing {run.model} with {min(config.samples, len(images.train_labels))} images ...")
    try:
        frozen = freeze(model, list(_first(train, config.samples)), observer=config.observer,
                        per_channel=config.per_channel, keep_float=config.keep_float,
                        metric=lambda one: measure_accuracy(one, test))  # fmt: skip
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    if isinstance(frozen, FrozenModule):
        frozen.classes = images.classes
    save(frozen, out)
    report = frozen.freeze_report
    assert isinstance(report, FreezeReport)
    say(str(report))
    return {"top1_before": report.metric_before, "top1_after": report.metric_after,
            "layers": [asdict(layer) for layer in report], "bytes": Path(out).stat().st_size,
            "config": asdict(config)}  # fmt: skip


def _first(loader: Any, samples: int) -> Iterator[Sequence[Tensor]]:
    """Images of the first batches, so many in all."""
    left = samples
    for images, _ in loader:
        if left <= 0:
            return
        yield (images[:left],)
        left -= len(images)
