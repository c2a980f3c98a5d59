"""A small vision transformer, and the block that it is made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.utils.errors import ConfigurationError

__all__ = ["TransformerBlock", "VisionTransformer", "vit_tiny"]


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer network, each after a layer normalisation and added to its input.

    All weights are in ``nn.Linear`` modules, unlike those of ``nn.MultiheadAttention``.

    Parameters
    ----------
    width, heads : int
        Features of a token, and attention heads; the latter divide the former.
    causal : bool
        No token sees those behind it, as in language models.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (batch, tokens, width) to the same shape."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads).unbind(2)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                                  is_causal=self.causal)  # fmt: skip
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Small vision transformer: patches to tokens, blocks, and a classifier of the mean token.

    Parameters
    ----------
    num_classes, in_channels, image_size : int
        Outputs; channels, and height and width of the images, multiples of `patch`.
    patch : int
        Height and width of a patch.
    width, depth, heads : int
        Features of a token, blocks, and attention heads.
    """

    def __init__(self, num_classes: int, in_channels: int, image_size: int, patch: int, width: int, depth: int,
                 heads: int) -> None:  # fmt: skip
        super().__init__()
        if image_size % patch:
            raise ConfigurationError(f"the image size must be a multiple of {patch} for this model, got {image_size}")
        if width % heads:
            raise ConfigurationError(f"the width must be a multiple of {heads} for this model, got {width}")
        self.patches = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (image_size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are no weights, as timm's networks tell them."""
        return {"position"}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (batch, in_channels, image_size, image_size) to logits (batch, num_classes)."""
        # contiguous: what is added to the tokens, layer by layer, and normalised, lies in memory as they do
        tokens = (self.patches(x).flatten(2).transpose(1, 2) + self.position).contiguous()
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit_tiny(num_classes: int = 10, in_channels: int = 3, width: int = 192, image_size: int = 32) -> VisionTransformer:
    """Vision transformer of 6 blocks on patches of 4 x 4 pixels: 2.7 M weights at the default width.

    Parameters
    ----------
    num_classes, in_channels, image_size : int
        Outputs; channels, and height and width of the images.
    width : int
        Features of a token, a multiple of 4.
    """
    return VisionTransformer(num_classes, in_channels, image_size, patch=4, width=width, depth=6, heads=4)
