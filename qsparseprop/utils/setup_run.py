"""The parts of which the trainings of the ``finetune`` command are put together."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from qsparseprop.quantization import QuantConfig

from ._errors import ConfigurationError
from .data import ImageData, evaluation_loader, training_loader
from .finetuner import Finetuner
from .models import build_model, read_state_dict
from .network_utils import swap_modules_with_sparse
from .pruning_utils import (
    collect_masks,
    global_magnitude_prune,
    layer_sparsity,
    layerwise_magnitude_prune,
    make_mask_enforcer,
    make_pruning_permanent,
    prunable_modules,
)
from .saved_tensors import compress_saved_tensors

__all__ = [
    "PRUNERS",
    "TrainingMode",
    "load_weights",
    "make_finetuner",
    "make_loaders",
    "make_network",
    "parse_scheme",
    "prune_model",
    "swap_model",
]

#: How `prune_model` makes zeros; None takes those that are there.
PRUNERS = {"global": global_magnitude_prune, "uniform": layerwise_magnitude_prune, "none": None}

#: Dense layers whose zeros are held by masks.
_MASKED = (nn.Linear, nn.Conv2d)

#: Steps of the shortest one-cycle schedule that torch can compute: one fourth of them, less one, is its rise.
_SHORTEST = 5


@dataclass(frozen=True)
class TrainingMode:
    """Precision and memory layout of a training.

    Attributes
    ----------
    bf16 : bool
        Run under bfloat16 autocast.
    channels_last : bool
        Lay out images and convolution weights channels_last.
    """

    bf16: bool
    channels_last: bool

    @property
    def name(self) -> str:
        """For reports, like ``bf16 channels_last``."""
        return f"{'bf16' if self.bf16 else 'fp32'} {'channels_last' if self.channels_last else 'contiguous'}"


def make_finetuner(
    model: nn.Module,
    mode: TrainingMode,
    learning_rate: float,
    steps: int,
    masks: Mapping[str, torch.Tensor] | None = None,
    compress_saved: bool = False,
) -> Finetuner:
    """Return a `Finetuner` with the optimizer and the schedule that all trainings of the ``finetune`` command share."""
    memory_format = torch.channels_last if mode.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    # After the conversion, which gives the weights other memory. Sparse layers need no mask.
    held = {name: mask for name, mask in (masks or {}).items() if isinstance(model.get_submodule(name), _MASKED)}
    # The fused AdamW is the fastest of torch's; anything else would slow down the dense network, which has ten times as
    # many weights to update.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    return Finetuner(
        model,
        optimizer,
        scheduler=torch.optim.lr_scheduler.OneCycleLR(
            optimizer, learning_rate, total_steps=max(steps, _SHORTEST), pct_start=0.25, cycle_momentum=False
        ),
        autocast_dtype=torch.bfloat16 if mode.bf16 else None,
        memory_format=memory_format,
        after_step=make_mask_enforcer(model, held) if held else None,
        forward_context=compress_saved_tensors if compress_saved else None,
    )


def make_network(name: str, width: int | None, data: ImageData) -> nn.Module:
    """Return the randomly initialised network for some data; `width` as in `CompareConfig`."""
    _, channels, size, _ = data.train_images.shape
    model = build_model(name, num_classes=data.num_classes, in_channels=channels, image_size=size,
                        **({} if width is None else {"width": width}))  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            # In so few steps torch's 0.1 would leave the running statistics far behind the weights.
            module.momentum = 0.3
    return model


def make_loaders(data: ImageData, batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Return the loader of the training images, shuffled by `seed`, and that of the test images."""
    return (
        training_loader(data.train_images, data.train_labels, batch_size, seed),
        evaluation_loader(data.test_images, data.test_labels, batch_size),
    )


def parse_scheme(text: str) -> tuple[bool, QuantConfig | None]:
    """Read how swapped layers compute.

    Parameters
    ----------
    text : str
        ``int8`` for the defaults of `QuantConfig`, ``float32`` for no quantisation, or settings of `QuantConfig` like
        ``input=standard,grad=absmax``.

    Returns
    -------
    quantize : bool
    qconfig : QuantConfig or None
        As `swap_modules_with_sparse` takes them.

    Raises
    ------
    ConfigurationError
        For something else.
    """
    if text in ("int8", "float32"):
        return text == "int8", None
    settings = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigurationError(f"a scheme is int8, float32, or settings like input=standard,grad=absmax; "
                                     f"got {text!r}")  # fmt: skip
        settings[name.strip()] = {"true": True, "false": False}.get(value.strip(), value.strip())
    try:
        return True, QuantConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"no such scheme: {error}") from error


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load trained weights of a dense model, in place.

    Raises
    ------
    ConfigurationError
        If the file holds none, or those of another model; it is unchanged then.
    """
    try:
        state = read_state_dict(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read the weights {os.fspath(path)}: {error.strerror or error}") from error
    wanted = model.state_dict()
    wrong = sorted(wanted.keys() ^ state.keys())
    wrong = wrong or [key for key, value in wanted.items() if value.shape != state[key].shape]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise ConfigurationError(f"the weights in {os.fspath(path)} do not go with this model and data: {listed}")
    model.load_state_dict(state)


def prune_model(model: nn.Module, kind: str, sparsity: float) -> dict[str, Any]:
    """Prune a dense model for good, or take its zeros as they are.

    Parameters
    ----------
    model : nn.Module
    kind : str
        A key of `PRUNERS`.
    sparsity : float
        Share of zeros.

    Returns
    -------
    dict
        ``masks`` (see `collect_masks`), ``layers`` (sparsity by name) and ``sparsity`` of all these weights.
    """
    pruner = PRUNERS[kind]
    if pruner is None:
        modules = prunable_modules(model)
        masks = {name: module.weight.detach() != 0 for name, module in modules.items()}
    else:
        modules = pruner(model, sparsity)
        masks = collect_masks(model)
        make_pruning_permanent(model)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return {"masks": masks, "layers": layer_sparsity(model, modules), "sparsity": 1 - kept / max(total, 1)}


def swap_model(
    model: nn.Module, input_shape: tuple[int, ...], mode: TrainingMode, scheme: str, min_sparsity: float,
    include_dense: bool = True, fuse: bool = True,
) -> tuple[list[str], str]:
    """Swap a model in place, in the memory format that it is going to be trained in; see `swap_modules_with_sparse`.

    With `fuse`, quantised layers become blocks with their BatchNorm and activation where the model can be traced.

    Returns
    -------
    replaced : list of str
        Names of the layers.
    table : str
        What `swap_modules_with_sparse` prints.
    """
    quantize, qconfig = parse_scheme(scheme)
    before = {name: type(module) for name, module in model.named_modules()}
    if mode.channels_last:
        model.to(memory_format=torch.channels_last)
    table = io.StringIO()
    with contextlib.redirect_stdout(table):
        swap_modules_with_sparse(model, input_shape, min_sparsity=min_sparsity, quantize=quantize, qconfig=qconfig,
                                 include_dense=include_dense, fuse=quantize and fuse, verbose=True)  # fmt: skip
    after = {name: type(module) for name, module in model.named_modules()}
    return [name for name, kind in before.items() if after.get(name) is not kind], table.getvalue().rstrip()
