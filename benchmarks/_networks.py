"""Networks of `results.py` that the package does not have; `qsparseprop.training.models.build_model` finds them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsparseprop.training.models import VisionTransformer

#: Where `pose` finds the file of weights, and beside it the module that rebuilds the network.
POSE_FILE = "QSPARSEPROP_POSE_FILE"


def vit(num_classes: int = 10, in_channels: int = 3, width: int = 384, image_size: int = 32) -> VisionTransformer:
    """ViT-S's width and heads (Touvron et al., arXiv 2012.12877) on patches of 4 x 4 pixels, four blocks of it."""
    return VisionTransformer(num_classes, in_channels, image_size, patch=4, width=width, depth=4, heads=6)


class PoseBackbone(nn.Module):
    """The backbone of MediaPipe's pose detector, with a classifier of its mean feature in place of the detector's head.

    Parameters
    ----------
    path : path-like
        ``mediapipe_pose_detection_sparse75.npz``, with ``mediapipe_sparse.py`` beside it.
    num_classes : int
    """

    LAST = 303  # number of the last tensor before the decoder
    FEATURES = 1152

    def __init__(self, path: str | os.PathLike[str], num_classes: int) -> None:
        super().__init__()
        path = Path(path)
        self.backbone = _module(path.with_name("mediapipe_sparse.py")).MPNet(path, stop_at=self.LAST)
        used = [str(i) for i, op in enumerate(self.backbone.g["ops"]) if op["outputs"][0] <= self.LAST]
        for name in set(self.backbone.convs) - set(used):
            del self.backbone.convs[name]
        self.head = nn.Linear(self.FEATURES, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[batch, 3, 224, 224]`` to logits."""
        return self.head(self.backbone(x).mean((2, 3)))


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pose(num_classes: int = 10) -> PoseBackbone:
    """`PoseBackbone` of the file that an environment variable names."""
    return PoseBackbone(os.environ[POSE_FILE], num_classes)
