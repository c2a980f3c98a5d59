"""Image data for the ``finetune`` job: scikit-learn's handwritten digits, which its package ships (no download)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

__all__ = ["ImageData", "evaluation_loader", "load_digits_data", "training_loader"]


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images, split in two and normalised.

    Attributes
    ----------
    train_images, test_images : torch.Tensor
        float32 ``[images, channels, height, width]``; mean 0 and standard deviation 1 over the training images.
    train_labels, test_labels : torch.Tensor
        int64 ``[images]``.
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


def training_loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int, seed: int) -> DataLoader:
    """Batches in random order, newly shuffled every epoch; the same seed gives the same batches.

    A last, smaller batch is dropped, so that every step does the same amount of work and step times compare.

    Parameters
    ----------
    images : torch.Tensor
        ``[images, channels, height, width]``.
    labels : torch.Tensor
        ``[images]``.
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


def evaluation_loader(images: torch.Tensor, labels: torch.Tensor, batch_size: int) -> DataLoader:
    """Batches in the order of the data, the last one smaller if need be.

    Parameters
    ----------
    images : torch.Tensor
        ``[images, channels, height, width]``.
    labels : torch.Tensor
        ``[images]``.
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
