"""Networks of the benchmarks that the package does not have.

`qsparseprop.training.models.build_model` finds those of `results.py`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsparseprop.training.models import TransformerBlock, VisionTransformer

#: Where `pose` finds the file of weights, and beside it the module that rebuilds the network.
POSE_FILE = "QSPARSEPROP_POSE_FILE"


def vit(num_classes: int = 10, in_channels: int = 3, width: int = 384, image_size: int = 32) -> VisionTransformer:
    """ViT-S's width and heads (Touvron et al., arXiv 2012.12877) on patches of 4 x 4 pixels, four blocks of it."""
    return VisionTransformer(num_classes, in_channels, image_size, patch=4, width=width, depth=4, heads=6)


class LanguageModel(nn.Module):
    """Decoder: tokens to blocks with causal attention, and logits of the token that follows each of them.

    Parameters
    ----------
    vocabulary, context : int
        Different tokens, and tokens of a sequence at most.
    width, depth, heads : int
        Features of a token, blocks, and attention heads.
    """

    def __init__(self, vocabulary: int, context: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for module in self.modules():  # GPT-2's
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map tokens ``[batch, length]`` to logits ``[batch, length, vocabulary]``."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


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
    sys.modules[path.stem] = module  # where torch.compile looks for it
    spec.loader.exec_module(module)
    return module


def pose(num_classes: int = 10) -> PoseBackbone:
    """`PoseBackbone` of the file that an environment variable names."""
    return PoseBackbone(os.environ[POSE_FILE], num_classes)
