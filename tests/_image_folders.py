"""Small folders of images, and the settings of short trainings with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsparseprop.training.run import RunConfig


def folder(path: Path, classes: Sequence[str] = ("cat", "dog"), images: int = 10) -> Path:
    """Write a folder of images for each class, of its own brightness; skips the test without Pillow."""
    image = pytest.importorskip("PIL.Image")
    for index, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for number in range(images):
            pixels = np.full((12, 12, 3), 40 + 100 * index, np.uint8)
            pixels[number % 12] = number
            image.fromarray(pixels).save(path / name / f"{number}.png")
    return path


def config(data: str | Path, **settings: Any) -> RunConfig:
    """A tiny network on images of 8 pixels."""
    return RunConfig(**{"data": str(data), "model": "mlp", "width": 16, "image_size": 8, "batch_size": 8,
                        "threads": 1, **settings})  # fmt: skip
