"""Image data for the ``finetune`` job: scikit-learn's digits, which its package ships, or files of the user."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from qsparseprop.utils.errors import ConfigurationError, refuse_more_than_memory

from ._npz import PARTS, NpzFile, count_classes

__all__ = [
    "ImageData",
    "ImageKind",
    "evaluation_loader",
    "image_kind",
    "load_data",
    "load_digits_data",
    "load_folder",
    "load_npz",
    "training_loader",
]

#: Mean and standard deviation by channel with which most published colour networks were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


#: Interpolation may leave the range of pixels by that much.
_TOLERANCE = 0.01

@dataclass(frozen=True)
class ImageKind:
    """What a network has to know of images: number of channels, height and width in pixels, and number of classes."""

    channels: int
    height: int
    width: int
    num_classes: int


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images, split in two and normalised.

    Attributes
    ----------
    train_images, test_images : torch.Tensor
        float32, (images, channels, height, width); mean 0 and standard deviation 1 over the training images.
    train_labels, test_labels : torch.Tensor
        int64, (images,).
    num_classes : int
        Number of different labels.
    name : str
        What the images are, for reports.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    num_classes: int
    name: str

    @property
    def kind(self) -> ImageKind:
        """What a network has to know of the images."""
        _, channels, height, width = self.train_images.shape
        return ImageKind(channels, height, width, self.num_classes)


def image_kind(source: str, image_size: int | None = None, max_images: int | None = None) -> ImageKind | None:
    """What `load_data` is going to return, found without reading images; None where that cannot be known.

    Parameters and errors are those of `load_data`.
    """
    if source == "digits":
        _check_size(1797, 3, image_size or 32, image_size or 32)
        return ImageKind(3, image_size or 32, image_size or 32, 10)
    if source.endswith(".npz"):
        archive = NpzFile(source)
        height, width = archive.sizes if image_size is None else (image_size, image_size)
        _check_size(sum(len(part[:max_images]) for part in archive.labels), archive.channels, height, width)
        return ImageKind(archive.channels, height, width, count_classes(archive.labels))
    if os.path.isdir(source):
        parts = _class_folders(Path(source))
        _check_size(sum(len(files) for part in parts for files in part.values()), 3, image_size or 32, image_size or 32)
        return ImageKind(3, image_size or 32, image_size or 32, len(parts[0]))
    return None


def load_digits_data(size: int = 32, channels: int = 3, test_fraction: float = 0.2, seed: int = 0) -> ImageData:
    """Load the 1,797 handwritten digits of scikit-learn, scaled up to the input size of CIFAR networks.

    Parameters
    ----------
    size : int
        Height and width after bilinear interpolation from 8x8, in pixels.
    channels : int
        The grey image is repeated this often, so that a network for colour images takes it as it is.
    test_fraction : float
        Share of each digit's images that goes to the test set, in (0, 1).
    seed : int
        Decides which images these are.

    Returns
    -------
    ImageData
        1,437 training and 360 test images with the default fraction.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=test_fraction, random_state=seed, stratify=labels)
    train_pixels, test_pixels, train_labels, test_labels = (torch.from_numpy(part) for part in split)
    # Only the training images may shape the normalisation: the test set must stay unseen.
    mean, std = train_pixels.mean(), train_pixels.std()
    _check_size(len(pixels), channels, size, size)

    def to_images(flat: torch.Tensor) -> torch.Tensor:
        grey = ((flat - mean) / std).float().reshape(-1, 1, 8, 8)
        return F.interpolate(grey, size=(size, size), mode="bilinear").repeat(1, channels, 1, 1)

    return ImageData(
        train_images=to_images(train_pixels),
        train_labels=train_labels.long(),
        test_images=to_images(test_pixels),
        test_labels=test_labels.long(),
        num_classes=int(labels.max()) + 1,
        name="scikit-learn digits",
    )


def load_data(
    source: str, image_size: int | None = None, seed: int = 0, normalize: str = "data", max_images: int | None = None
) -> ImageData:
    """Load images from whatever `source` names.

    Parameters
    ----------
    source : str
        ``digits`` (scikit-learn's), a file ``*.npz`` (see `load_npz`), a folder of images (see `load_folder`), or the
        name of a data set of torchvision, such as ``CIFAR10``, which is downloaded to ``./data`` where it is missing.
    image_size : int, optional
        Height and width to scale to; by default 32 for digits and folders, and as they are otherwise.
    seed : int
        Decides which images are the test set, where the source does not.
    normalize : {"data", "imagenet"}
        Subtract the mean and divide by the standard deviation, by channel: of the training images, or of ImageNet.
    max_images : int, optional
        Use only so many training images, the first ones, and as many test images.

    Raises
    ------
    ConfigurationError
        If there is no such thing, or its content does not fit.
    ImportError
        If a package that this source needs is missing.
    """
    if source == "digits":
        data = load_digits_data(image_size or 32, seed=seed)
    elif source.endswith(".npz"):
        data = load_npz(source, image_size, normalize, max_images)
    elif os.path.isdir(source):
        data = load_folder(source, image_size or 32, seed, normalize)
    elif os.sep in source or "." in source:
        raise ConfigurationError(f"there is no folder {source!r}; a file must be *.npz")
    else:
        data = _load_torchvision(source, image_size, normalize)
    first = slice(max_images)
    return replace(data, train_images=data.train_images[first], train_labels=data.train_labels[first],
                   test_images=data.test_images[first], test_labels=data.test_labels[first])  # fmt: skip


def _check_size(images: int, channels: int, height: int, width: int) -> None:
    # twice: while they are scaled and normalised
    refuse_more_than_memory(2 * 4 * images * channels * height * width,
                            f"{images} images of {height} x {width} pixels")  # fmt: skip


def _images(arrays: Sequence[np.ndarray], image_size: int | None, normalize: str) -> list[torch.Tensor]:
    """Turn (images, height, width[, channels]), bytes or floats, into float32 NCHW, normalised like the first."""
    tensors = []
    for array in arrays:
        height, width = array.shape[1:3] if image_size is None else (image_size, image_size)
        _check_size(len(array), array.shape[3] if array.ndim == 4 else 1, height, width)
        x = torch.from_numpy(np.ascontiguousarray(array))
        x = x[..., None] if x.ndim == 3 else x
        x = x.permute(0, 3, 1, 2).float() / (255 if array.dtype.kind in "iu" else 1)
        if array.dtype.kind == "f" and not (finite := torch.isfinite(x).flatten(1).all(1)).all():
            raise ConfigurationError(f"{int((~finite).sum())} of {len(x)} images have NaN or Inf, the first one is "
                                     f"number {int((~finite).nonzero()[0])}")  # fmt: skip
        if image_size is not None and tuple(x.shape[2:]) != (image_size, image_size):
            x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
        tensors.append(x.contiguous())
    if any(x.shape[1:] != tensors[0].shape[1:] for x in tensors):
        sizes = " and ".join(" x ".join(map(str, x.shape[1:])) for x in tensors)
        raise ConfigurationError(f"images for training and for the test have the sizes {sizes}: scale them to one "
                                 "(--image-size)")  # fmt: skip
    channels = tensors[0].shape[1]
    if normalize == "imagenet":
        low, high = min(float(x.min()) for x in tensors), max(float(x.max()) for x in tensors)
        if low < -_TOLERANCE or high > 1 + _TOLERANCE:
            raise ConfigurationError("ImageNet's normalisation is for bytes, or numbers from 0 to 1; pixels go from "
                                     f"{low:g} to {high:g}")  # fmt: skip
        if channels != 3:
            raise ConfigurationError(f"ImageNet's normalisation is for 3 channels, the images have {channels}")
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    else:
        # only the training images: the test set must stay unseen
        mean = tensors[0].mean((0, 2, 3), keepdim=True)
        std = tensors[0].std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    return [x.sub_(mean).div_(std) for x in tensors]


def load_npz(
    path: str | os.PathLike[str], image_size: int | None = None, normalize: str = "data", max_images: int | None = None
) -> ImageData:
    """Load a file written by ``numpy.savez``.

    Parameters
    ----------
    path : path-like
        With the arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``: images, (images, height, width) or
        (images, height, width, channels), integers from 0 to 255 or floats; labels integers from 0. Images of 1,
        3 or 4 channels may be (images, channels, height, width), too. Nothing is unpickled.
    image_size, normalize, max_images
        See `load_data`. Images that are not used are not scaled either, which would take gigabytes.

    Raises
    ------
    ConfigurationError
        If it is no such file, or the order of its dimensions cannot be told.
    """
    archive = NpzFile(path)
    classes = count_classes(archive.labels)
    arrays = [archive.images(part)[:max_images] for part in PARTS]
    try:
        train, test = _images(arrays, image_size, normalize)
    except ConfigurationError as error:
        raise ConfigurationError(f"{os.fspath(path)}: {error}") from error
    return ImageData(train, archive.labels[0], test, archive.labels[1], classes, Path(path).stem)


def load_folder(
    path: str | os.PathLike[str], image_size: int = 32, seed: int = 0, normalize: str = "data"
) -> ImageData:
    """Load images from a folder with one sub-folder a class.

    Parameters
    ----------
    path : path-like
        ``path/class/image``, of which every fifth image of a class is for the test; or ``path/train/class/image`` and
        ``path/test/class/image`` (or ``val``).
    image_size, seed, normalize
        See `load_data`; images are scaled to a square.

    Raises
    ------
    ConfigurationError
        If there are no images, or both parts do not have the same classes.
    ImportError
        If Pillow is missing.
    """
    path = Path(path)
    parts = _class_folders(path)
    split = len(parts) == 2
    if not split:
        order = np.random.default_rng(seed)
        whole = {name: [files[i] for i in order.permutation(len(files))] for name, files in parts[0].items()}
        parts = [{name: [f for i, f in enumerate(files) if (i % 5 == 0) == test_part] for name, files in whole.items()}
                 for test_part in (False, True)]  # fmt: skip
        if not all(parts[0].values()):
            raise ConfigurationError(f"{path} needs at least two images a class")
    arrays = [_read_images([f for files in part.values() for f in files], image_size) for part in parts]
    labels = [torch.tensor([i for i, files in enumerate(part.values()) for _ in files]) for part in parts]
    images = _images(arrays, None, normalize)
    return ImageData(images[0], labels[0], images[1], labels[1], len(parts[0]), path.name)


def _class_folders(path: Path) -> list[dict[str, list[Path]]]:
    """Images by class: of the whole folder, or those for training and those for the test."""
    train = path / "train"
    test = next((path / name for name in ("test", "val") if (path / name).is_dir()), None)
    parts = [_image_files(train), _image_files(test)] if train.is_dir() and test is not None else [_image_files(path)]
    if not parts[0] or any(part.keys() != parts[0].keys() for part in parts):
        raise ConfigurationError(f"{path} must have one folder of images a class, or train/ and test/ with the same "
                                 "classes")  # fmt: skip
    return parts


def _image_files(folder: Path) -> dict[str, list[Path]]:
    classes = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            files = sorted(f for f in entry.iterdir() if f.suffix.lower() in _IMAGE_SUFFIXES)
            if files:
                classes[entry.name] = files
    return classes


def _read_images(files: Sequence[Path], size: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    _check_size(len(files), 3, size, size)
    images = np.empty((len(files), size, size, 3), np.uint8)
    for index, file in enumerate(files):
        try:
            with Image.open(file) as image:
                images[index] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        except OSError as error:
            raise ConfigurationError(f"cannot read the image {file}: {error}") from error
    return images


def _load_torchvision(name: str, image_size: int | None, normalize: str) -> ImageData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigurationError(f"{name!r} is neither digits, an .npz file, nor a folder; a data set of torchvision "
                                 f"needs torchvision ({error})") from error  # fmt: skip
    kind = getattr(datasets, name, None)
    if kind is None:
        raise ConfigurationError(f"torchvision has no data set called {name!r}")
    parts = [kind("data", train=train, download=True) for train in (True, False)]
    images = _images([np.asarray(part.data) for part in parts], image_size, normalize)
    labels = [torch.as_tensor(part.targets).long() for part in parts]
    return ImageData(images[0], labels[0], images[1], labels[1], count_classes(labels), name)


def training_loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int) -> DataLoader[Any]:
    """Batches in random order, newly shuffled every epoch; the same seed gives the same batches.

    A last, smaller batch is dropped, so that every step does the same amount of work and step times compare.

    Parameters
    ----------
    images : torch.Tensor
        (images, channels, height, width).
    labels : torch.Tensor
        (images,).
    batch_size : int
        Images in a batch; at most as many as there are.
    seed : int
        Seed of the order, independent of torch's default generator.

    Returns
    -------
    DataLoader
        Yields ``(images, labels)``; it loads in the calling process, because the whole set is in memory.

    Raises
    ------
    ValueError
        If `batch_size` is larger than the set: there would be no batch at all.
    """
    if batch_size > len(images):
        raise ValueError(f"batch size {batch_size} is larger than the {len(images)} training images")
    dataset = TensorDataset(images, labels)
    order = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
    # A sampler of whole index lists makes one gather a batch instead of one a sample and a stack.
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=True), batch_size=None)


def evaluation_loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> DataLoader[Any]:
    """Batches in the order of the data, the last one smaller if need be.

    Parameters
    ----------
    images : torch.Tensor
        (images, channels, height, width).
    labels : torch.Tensor
        (images,).
    batch_size : int
        Images in a batch.

    Returns
    -------
    DataLoader
        Yields ``(images, labels)``.
    """
    dataset = TensorDataset(images, labels)
    order = SequentialSampler(dataset)
    return DataLoader(dataset, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
