"""Where images come from: scikit-learn's digits, which its package ships, files of numpy, folders, or torchvision."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qsparseprop.training._packages import import_optional
from qsparseprop.utils.errors import ConfigurationError, refuse_more_than_memory

from ._folders import ImageFolder, listed
from ._npz import PARTS, NpzFile, count_classes
from ._reading import read_image
from .images import ImageData, ImageFiles, ImageKind, ImageSet, StoredImages, black_of, scaled

__all__ = ["image_kind", "load_data", "load_digits_data", "load_folder", "load_npz"]

#: Mean and standard deviation by channel with which most published colour networks were trained.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: What the classes of scikit-learn's digits are called.
_DIGITS = tuple("0123456789")

#: Interpolation may leave the range of pixels by that much.
_TOLERANCE = 0.01

#: So many training images of a folder decide mean and standard deviation: reading all of them may take hours.
_MEASURED = 2000

#: About so many images of each part of a folder are read before a training begins.
_TRIED = 100

#: Images that are converted to float64 at a time.
_CHUNK = 256


def image_kind(source: str, image_size: int | None = None) -> ImageKind | None:
    """What `load_data` is going to return, found without reading images; None where that cannot be known.

    Parameters
    ----------
    source, image_size
        See `load_data`.

    Returns
    -------
    ImageKind or None

    Raises
    ------
    ConfigurationError
        As from `load_data`.
    """
    if source == "digits":
        _check_size(1797, 3, image_size or 32, image_size or 32)
        return ImageKind(3, image_size or 32, image_size or 32, len(_DIGITS), _DIGITS)
    if source.endswith(".npz"):
        archive = NpzFile(source)
        height, width = archive.sizes if image_size is None else (image_size, image_size)
        _check_size(1, archive.channels, height, width)
        return ImageKind(archive.channels, height, width, count_classes(archive.labels, source))
    if os.path.isdir(source):
        classes = tuple(ImageFolder(Path(source)).parts[0])
        _check_size(1, 3, image_size or 32, image_size or 32)
        return ImageKind(3, image_size or 32, image_size or 32, len(classes), classes)
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

    return ImageData.from_tensors(
        to_images(train_pixels), train_labels.long(), to_images(test_pixels), test_labels.long(),
        len(_DIGITS), "scikit-learn digits", _DIGITS,
    )  # fmt: skip


def load_data(
    source: str, image_size: int | None = None, seed: int = 0, normalize: str = "data", max_images: int | None = None
) -> ImageData:
    """Images from whatever `source` names.

    Files of numpy stay in memory in the type in which they are stored, bytes as a rule; images in folders stay there
    and are read when a batch wants them.

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
        Use only so many training images, taken at equal distances, and as many test images.

    Returns
    -------
    ImageData

    Raises
    ------
    ConfigurationError
        If there is no such thing, or its content does not fit.
    ImportError
        If a package that this source needs is missing.
    """
    if source == "digits":
        if normalize == "imagenet":
            raise ConfigurationError("the digits are grey, and are not normalised as ImageNet is")
        data = load_digits_data(image_size or 32, seed=seed)
    elif source.endswith(".npz"):
        data = load_npz(source, image_size, normalize)
    elif os.path.isdir(source):
        data = load_folder(source, image_size or 32, seed, normalize)
    elif os.sep in source or "." in source:
        raise ConfigurationError(f"there is no folder {source!r}; a file must be *.npz")
    else:
        data = _load_torchvision(source, image_size, normalize)
    return data.first(max_images)


def _check_size(images: int, channels: int, height: int, width: int) -> None:
    # twice: while they are scaled and normalised
    refuse_more_than_memory(2 * 4 * images * channels * height * width,
                            f"{images} images of {height} x {width} pixels")  # fmt: skip


def _stored(arrays: Sequence[np.ndarray], labels: Sequence[Tensor], image_size: int | None) -> list[StoredImages]:
    """Sets of images (images, height, width[, channels]), which stay bytes where they are."""
    sets = []
    for array, part in zip(arrays, labels, strict=True):
        size = array.shape[1:3] if image_size is None else (image_size, image_size)
        _check_size(1, array.shape[3] if array.ndim == 4 else 1, *size)
        pixels = _pixels(array if array.ndim == 4 else array[..., None])
        if size[0] * size[1] < array.shape[1] * array.shape[2]:
            # once and for all; what grows does so in each batch, since it may not fit into memory
            pixels = torch.cat([scaled(some, size) for some in pixels.split(_CHUNK)])
        sets.append(StoredImages(pixels, part, size))
    if any(part.pixels.dtype is torch.float32 for part in sets):
        # one scale for both: bytes are what they are among pixels from 0 to 1
        for one in sets:
            one.pixels = one.pixels / 255 if one.pixels.dtype is torch.uint8 else one.pixels
    if any(part.shape != sets[0].shape for part in sets):
        sizes = " and ".join(" x ".join(map(str, part.shape)) for part in sets)
        raise ConfigurationError(f"images for training and for the test have the sizes {sizes}: scale them to one "
                                 "(--image-size)")  # fmt: skip
    return sets


def _pixels(array: np.ndarray) -> Tensor:
    """Images (images, height, width, channels) as a tensor (images, channels, height, width); bytes where they fit."""
    if array.dtype.kind in "iub" and (array.dtype == np.uint8 or (array.min() >= 0 and array.max() <= 255)):
        return torch.from_numpy(array.astype(np.uint8, copy=False)).permute(0, 3, 1, 2)
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).permute(0, 3, 1, 2)
    if array.dtype.kind != "f":
        return x / 255
    if not (finite := torch.isfinite(x).flatten(1).all(1)).all():
        raise ConfigurationError(f"{int((~finite).sum())} of {len(x)} images have NaN or Inf, the first one is "
                                 f"number {int((~finite).nonzero()[0])}")  # fmt: skip
    return x


def _data(
    train: ImageSet, test: ImageSet, num_classes: int, name: str, normalize: str,
    classes: Sequence[str] | None = None,
) -> ImageData:  # fmt: skip
    """Two sets with the scale that their pixels get."""
    channels = train.shape[0]
    highest = 1.0
    if isinstance(train, StoredImages) and train.pixels.dtype is torch.float32:
        stored = [part for part in (train, test) if isinstance(part, StoredImages)]
        black = black_of(train.pixels)
        for part in stored:
            part.black = black
        low, high = min(float(x.pixels.min()) for x in stored), max(float(x.pixels.max()) for x in stored)
        if normalize == "imagenet" and not -_TOLERANCE <= low <= high <= 1 + _TOLERANCE:
            raise ConfigurationError("ImageNet's normalisation is for pixels from 0 to 1 (or integers to 255); the "
                                     f"pixels go from {low:g} to {high:g}")  # fmt: skip
    else:
        highest = 255.0
    if normalize == "imagenet":
        if channels != 3:
            raise ConfigurationError(f"ImageNet's normalisation is for 3 channels, the images have {channels}")
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (IMAGENET_MEAN, IMAGENET_STD))
    else:
        # only the training images: the test set must stay unseen
        mean, std = _mean_and_std(train)
        mean, std = mean / highest, (std / highest).clamp(min=1e-6)
    return ImageData(train, test, num_classes, name, (1 / (highest * std)).float(), (-mean / std).float(),
                     None if classes is None else tuple(classes))  # fmt: skip


def _mean_and_std(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Of the pixels by channel, in float64; of images in files a share says enough."""
    count = len(images.labels)
    measured = count if isinstance(images, StoredImages) else min(count, _MEASURED)
    total = squares = torch.zeros(images.shape[0], dtype=torch.float64)
    for indices in (torch.arange(measured) * count // measured).split(_CHUNK):
        pixels = images.read(indices).double()
        total = total + pixels.sum((0, 2, 3))
        squares = squares + pixels.square_().sum((0, 2, 3))
    pixels_each = measured * images.shape[1] * images.shape[2]
    mean = total / pixels_each
    return mean, ((squares - total * mean) / max(pixels_each - 1, 1)).clamp(min=0).sqrt()


def load_npz(
    path: str | os.PathLike[str], image_size: int | None = None, normalize: str = "data"
) -> ImageData:
    """Load a file written by ``numpy.savez``.

    Parameters
    ----------
    path : path-like
        With the arrays ``x_train``, ``y_train``, ``x_test``, ``y_test``: images, (images, height, width) or
        (images, height, width, channels), integers from 0 to 255 or floats; labels integers from 0. Images of 1,
        3 or 4 channels may be (images, channels, height, width), too. Nothing is unpickled.
    image_size, normalize
        See `load_data`.

    Returns
    -------
    ImageData

    Raises
    ------
    ConfigurationError
        If it is no such file, or the order of its dimensions cannot be told.
    """
    archive = NpzFile(path)
    classes = count_classes(archive.labels, os.fspath(path))
    images = [archive.images(part) for part in PARTS]
    try:
        train, test = _stored(images, archive.labels, image_size)
        return _data(train, test, classes, Path(path).stem, normalize)
    except ConfigurationError as error:
        raise ConfigurationError(f"{os.fspath(path)}: {error}") from error


def load_folder(
    path: str | os.PathLike[str], image_size: int = 32, seed: int = 0, normalize: str = "data"
) -> ImageData:
    """Images in a folder with one sub-folder a class, which are read when a batch wants them.

    Parameters
    ----------
    path : path-like
        ``path/class/image``, of which every fifth image of a class is for the test; or ``path/train/class/image`` and
        ``path/test/class/image`` (or ``val``). There is a warning of other files, which are passed over.
    image_size, seed, normalize
        See `load_data`; images are scaled to a square.

    Returns
    -------
    ImageData

    Raises
    ------
    ConfigurationError
        If there are no images, or both parts do not have the same classes.
    ImportError
        If Pillow is missing.
    """
    path = Path(path)
    folder = ImageFolder(path)
    if folder.warning is not None:
        warnings.warn(folder.warning, stacklevel=3)
    parts = folder.parts
    split = len(parts) == 2
    if not split:
        order = np.random.default_rng(seed)
        whole = {name: [files[i] for i in order.permutation(len(files))] for name, files in parts[0].items()}
        parts = [{name: [f for i, f in enumerate(files) if (i % 5 == 0) == test_part] for name, files in whole.items()}
                 for test_part in (False, True)]  # fmt: skip
        if few := [name for name, files in parts[0].items() if not files]:
            raise ConfigurationError(f"{path} needs at least two images a class, one of them for the test: there is "
                                     f"one of {listed(few)}")  # fmt: skip
    sets = []
    for part in parts:
        labels = torch.tensor([i for i, files in enumerate(part.values()) for _ in files])
        sets.append(ImageFiles([str(f) for files in part.values() for f in files], labels, image_size))
    for files in sets:
        # what is wrong with all of them, or with one of a few, is told before a training begins
        for index in range(0, len(files.files), max(1, len(files.files) // _TRIED)):
            read_image(str(files.files[index]), image_size)
    return _data(sets[0], sets[1], len(parts[0]), path.name, normalize, tuple(parts[0]))


def _load_torchvision(name: str, image_size: int | None, normalize: str) -> ImageData:
    is_none = f"{name!r} is neither digits, an .npz file, nor a folder"
    datasets = import_optional("torchvision.datasets", f"{is_none}; a data set of torchvision")
    kind = getattr(datasets, name, None)
    if kind is None:
        raise ConfigurationError(f"{is_none}, nor has torchvision a data set of that name")
    try:
        parts = [kind("data", train=train, download=True) for train in (True, False)]
        arrays, targets = [np.asarray(part.data) for part in parts], [part.targets for part in parts]
    except (TypeError, AttributeError) as error:
        raise ConfigurationError(f"torchvision's {name} is not one of those that have their images in memory, such as "
                                 "CIFAR10: write it to a folder of one folder a class") from error  # fmt: skip
    labels = [torch.as_tensor(part).long() for part in targets]
    train, test = _stored(arrays, labels, image_size)
    count, classes = count_classes(labels, name), getattr(parts[0], "classes", None)
    known = isinstance(classes, list | tuple) and len(classes) == count and all(isinstance(c, str) for c in classes)
    return _data(train, test, count, name, normalize, classes if known else None)
