"""Images to train on: where they come from, how they are held, augmented, and brought together in batches."""

from .augmentation import Augmentation
from .images import ImageData, ImageFiles, ImageKind, ImageSet, StoredImages
from .loaders import ImageLoader, evaluation_loader, image_loader, training_loader
from .sources import image_kind, load_data, load_digits_data, load_folder, load_npz

__all__ = [
    "Augmentation",
    "ImageData",
    "ImageFiles",
    "ImageKind",
    "ImageLoader",
    "ImageSet",
    "StoredImages",
    "evaluation_loader",
    "image_kind",
    "image_loader",
    "load_data",
    "load_digits_data",
    "load_folder",
    "load_npz",
    "training_loader",
]
