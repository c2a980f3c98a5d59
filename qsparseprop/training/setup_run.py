"""The parts of which the trainings of the ``finetune`` command are put together."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qsparseprop.nn._dense import held
from qsparseprop.quantization import QuantConfig
from qsparseprop.utils._classes import check_classes, classes_in
from qsparseprop.utils._prunable import check_prunable
from qsparseprop.utils.errors import ConfigurationError, reason_of
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import (
    collect_masks,
    global_magnitude_prune,
    layer_sparsity,
    layerwise_magnitude_prune,
    make_pruning_permanent,
    prunable_modules,
)
from qsparseprop.utils.swap_report import SwapReport

from .data import Augmentation, ImageData, ImageKind, ImageLoader, image_kind, image_loader, load_data
from .data.loaders import Share
from .models import build_model
from .weights import load_state, read_weights

__all__ = [
    "PRUNERS",
    "TrainingMode",
    "load_weights",
    "make_loaders",
    "make_network",
    "parse_augment",
    "parse_scheme",
    "prepare_network",
    "prune_model",
    "swap_model",
]

#: How `prune_model` makes zeros; None takes those that are there.
PRUNERS = {"global": global_magnitude_prune, "uniform": layerwise_magnitude_prune, "none": None}


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


def make_network(name: str, width: int | None, images: ImageKind) -> nn.Module:
    """Return the randomly initialised network for some images; `width` as in `CompareConfig`.

    Raises
    ------
    ConfigurationError
        If there is no such network, or it cannot take such images.
    """
    model = build_model(name, num_classes=images.num_classes, in_channels=images.channels, image_size=images.height,
                        **({} if width is None else {"width": width}))  # fmt: skip
    _try_out(model, name, images)
    return model


def _try_out(model: nn.Module, name: str, images: ImageKind) -> None:
    """Run a network once, before anybody waits for the images to be read."""
    sizes = f"{images.channels} x {images.height} x {images.width}"
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            output = model(torch.zeros(2, images.channels, images.height, images.width))
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise ConfigurationError(f"{name} cannot take images of {sizes}, try another image size (--image-size): "
                                 f"{reason_of(error)}") from error  # fmt: skip
    finally:
        for module, mode in training.items():
            module.training = mode
    output = getattr(output, "logits", output)
    expected = (2, images.num_classes)
    if not isinstance(output, torch.Tensor) or tuple(output.shape) != expected:
        got = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ConfigurationError(f"{name} must return [images, classes], {expected} for two images of {sizes}, "
                                 f"got {got}")  # fmt: skip


def _check_prunable(model: nn.Module, name: str) -> None:
    """Tell what pruning is going to refuse before the network is trained for it."""
    modules = prunable_modules(model)
    if not modules:
        raise ConfigurationError(f"{name} has nothing to prune: the first and the last Conv2d or Linear stay dense, "
                                 "and there is no other")  # fmt: skip
    try:
        for layer, module in modules.items():
            check_prunable(layer, module)
    except ValueError as error:
        raise ConfigurationError(f"{name} cannot be pruned: {error}") from error


def make_loaders(
    data: ImageData, batch_size: int, seed: int, augment: str | None = None, workers: int | None = None,
    share: Share | None = None,
) -> tuple[ImageLoader, ImageLoader]:
    """Return the loader of the training images, shuffled by `seed`, and that of the test images.

    `augment` has names as `Augmentation` takes them, with commas between; for `workers` and `share` see `image_loader`.
    """
    augmentation = None if augment is None else parse_augment(augment)
    return (
        image_loader(data, "train", batch_size, seed=seed, augment=augmentation, workers=workers, share=share),
        image_loader(data, "test", batch_size, workers=workers, share=share),
    )


def parse_augment(text: str) -> Augmentation:
    """The augmentation that is called by names with commas between.

    Raises
    ------
    ConfigurationError
        If there is no such one.
    """
    return Augmentation([name.strip() for name in text.split(",") if name.strip()])


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
    settings: dict[str, Any] = {}
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


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], new_head: bool = False, images: ImageKind | None = None
) -> None:
    """Load trained weights of a dense model, in place; `new_head` as in `load_state`, `images` are for whom it is.

    Raises
    ------
    ConfigurationError
        If the file holds none, or those of another model or for other classes; it is unchanged then.
    """
    try:
        state, content = read_weights(path)
    except OSError as error:
        raise ConfigurationError(f"cannot read the weights {os.fspath(path)}: {error.strerror or error}") from error
    if images is not None and not new_head:
        check_classes(images.classes, classes_in(content),
                      (f"the weights in {os.fspath(path)}", "the images"),
                      "call the folders of the images as those of the weights were called, or give the network a new "
                      "classifier, by new_head (--new-head)")  # fmt: skip
    load_state(model, state, new_head, f"the weights in {os.fspath(path)}",
               None if images is None else images.num_classes)  # fmt: skip


def prepare_network(
    config: Any, load_weights_too: bool = True, max_images: int | None = None
) -> tuple[nn.Module, ImageData]:
    """Return the network of a `RunConfig` or `CompareConfig`, and the images.

    What can be wrong with model and weights is told before the images are read, which may take minutes.

    Raises
    ------
    ConfigurationError, ImportError
        As from `load_data`, `make_network` and `load_weights`, and if zeros are to be made, but no layer can have any.
    """
    def load() -> ImageData:
        # not the seed of the training: weights of one would be tested on images that another has seen
        split = getattr(config, "test_split", 0)
        return load_data(config.data, config.image_size, split, config.normalize, max_images)

    kind = image_kind(config.data, config.image_size)
    data = None
    if kind is None:
        data = load()
        kind = data.kind
    torch.manual_seed(config.seed)
    model = make_network(config.model, config.width, kind)
    if config.sparsity and config.prune != "none":
        _check_prunable(model, config.model)
    if config.weights is not None and load_weights_too:
        load_weights(model, config.weights, config.new_head, kind)
    data = data or load()
    if config.batch_size > len(data.train_labels):
        raise ConfigurationError(f"the batch size must be at most the number of training images, "
                                 f"{len(data.train_labels)}, got {config.batch_size}")  # fmt: skip
    return model, data


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
        masks = {name: held(module, "weight").detach() != 0 for name, module in modules.items()}
    else:
        modules = pruner(model, sparsity)
        masks = collect_masks(model)
        make_pruning_permanent(model)
    kept = sum(int(mask.sum()) for mask in masks.values())
    total = sum(mask.numel() for mask in masks.values())
    return {"masks": masks, "layers": layer_sparsity(model, modules), "sparsity": 1 - kept / max(total, 1)}


def swap_model(
    model: nn.Module, input_shape: tuple[int, ...], mode: TrainingMode, scheme: str, min_sparsity: float,
    include_dense: bool = True, fuse: bool = True, on_layer: Callable[[str], None] | None = None,
) -> tuple[list[str], str]:
    """Swap a model in place, in the memory format that it is going to be trained in; see `swap_modules_with_sparse`.

    With `fuse`, quantised layers form blocks with what follows them, see `qsparseprop.utils.fusion`; `on_layer` is
    called with the name of each layer before it is timed.

    Returns
    -------
    replaced : list of str
        Names of the layers.
    table : str
        The decisions. Without the hint at weight decay: recipes take care of that.
    """
    quantize, qconfig = parse_scheme(scheme)
    before = {name: type(module) for name, module in model.named_modules()}
    if mode.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it without
    swap_modules_with_sparse(model, input_shape, min_sparsity=min_sparsity, quantize=quantize, qconfig=qconfig,
                             include_dense=include_dense, fuse=quantize and fuse, verbose=False,
                             on_layer=on_layer)  # fmt: skip
    report = model.swap_report
    assert isinstance(report, SwapReport)
    after = {name: type(module) for name, module in model.named_modules()}
    return [name for name, kind in before.items() if after.get(name) is not kind], report.table()
