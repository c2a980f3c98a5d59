"""Small residual networks for 32x32 images, used by the ``finetune`` job, the tests and the benchmarks.

The sub-modules are called ``conv1, bn1, layer1 .. layerN, shortcut, linear``, the names that the widespread CIFAR
checkpoints carry, so that those load without renaming anything but a ``module.`` prefix.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "SubsampleAndPad",
    "build_model",
    "load_checkpoint",
    "resnet18",
    "resnet20",
    "strip_prefix",
]


class SubsampleAndPad(nn.Module):
    """Shortcut without parameters ("option A" of the ResNet paper): every second pixel, new channels filled with zeros.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the input and of the output; the difference is split evenly in front and behind.
    stride : int
        Step between the pixels that are kept, in both directions.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        extra = out_channels - in_channels
        self.stride = stride
        self.padding = (extra // 2, extra - extra // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, in_channels, height, width]`` to ``[batch, out_channels, ceil(h/stride), ceil(w/stride)]``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.padding))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each followed by batch normalisation, added to a shortcut.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the input and of the output.
    stride : int
        Stride of the first convolution.
    make_shortcut : callable
        Called as ``make_shortcut(in_channels, out_channels, stride)`` where the shape changes; otherwise the shortcut
        is the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        make_shortcut: Callable[[int, int, int], nn.Module] = _projection,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        # In place: batch normalisation saves its input, never its output, so nothing that autograd needs is lost.
        self.relu = nn.ReLU(inplace=True)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else make_shortcut(in_channels, out_channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, in_channels, h, w]`` to ``[batch, out_channels, ceil(h/stride), ceil(w/stride)]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class CifarResNet(nn.Module):
    """ResNet of basic blocks with the CIFAR stem: one 3x3 convolution of stride 1 and no pooling.

    Parameters
    ----------
    blocks : sequence of int
        Number of blocks in each stage; every stage but the first starts with stride 2.
    widths : sequence of int
        Channels of each stage, as many as `blocks`.
    num_classes : int
        Outputs of the classifier.
    in_channels : int
        Channels of the images.
    make_shortcut : callable
        Shortcut of blocks that change the shape, see `BasicBlock`.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        widths: Sequence[int],
        num_classes: int = 10,
        in_channels: int = 3,
        make_shortcut: Callable[[int, int, int], nn.Module] = _projection,
    ) -> None:
        super().__init__()
        if len(blocks) != len(widths):
            raise ValueError(f"blocks and widths must have the same length, got {len(blocks)} and {len(widths)}")
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self._stages: list[str] = []
        channels = widths[0]
        for index, (depth, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(BasicBlock(channels, width, stride, make_shortcut))
                channels = width
            name = f"layer{index + 1}"
            self.add_module(name, nn.Sequential(*stage))
            self._stages.append(name)
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images ``[batch, in_channels, height, width]`` to logits ``[batch, num_classes]``."""
        out = self.relu(self.bn1(self.conv1(x)))
        for name in self._stages:
            out = getattr(self, name)(out)
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def resnet18(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> CifarResNet:
    """ResNet-18 with the CIFAR stem: 11.2 M weights and 0.56 GMAC for a 32x32 image at the default width.

    Parameters
    ----------
    num_classes : int
        Outputs of the classifier.
    in_channels : int
        Channels of the images.
    width : int
        Channels of the first stage; the others have 2, 4 and 8 times as many.

    Returns
    -------
    CifarResNet
        Randomly initialised from torch's default generator.
    """
    return CifarResNet((2, 2, 2, 2), (width, 2 * width, 4 * width, 8 * width), num_classes, in_channels)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet-20 of the ResNet paper's CIFAR section: 0.27 M weights, shortcuts without parameters.

    Parameters
    ----------
    num_classes : int
        Outputs of the classifier.
    in_channels : int
        Channels of the images.
    width : int
        Channels of the first stage; the others have 2 and 4 times as many.

    Returns
    -------
    CifarResNet
        Randomly initialised from torch's default generator. Its ``state_dict`` has the keys of the common CIFAR-10
        checkpoints (see `load_checkpoint`).
    """
    return CifarResNet((3, 3, 3), (width, 2 * width, 4 * width), num_classes, in_channels, SubsampleAndPad)


_BUILDERS: dict[str, Callable[..., CifarResNet]] = {"resnet18": resnet18, "resnet20": resnet20}


def build_model(name: str, **kwargs: int) -> CifarResNet:
    """Build one of the networks of this module by name.

    Parameters
    ----------
    name : {"resnet18", "resnet20"}
        Which network.
    **kwargs
        Passed on: ``num_classes``, ``in_channels``, ``width``.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model {name!r}, choose from {', '.join(_BUILDERS)}")
    return _BUILDERS[name](**kwargs)


def strip_prefix(state_dict: Mapping[str, torch.Tensor], prefix: str = "module.") -> dict[str, torch.Tensor]:
    """Return `state_dict` with `prefix` removed from the keys that start with it (``DataParallel`` leaves one)."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items()}


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint file into `model`, in place.

    Parameters
    ----------
    model : nn.Module
        Network of the matching architecture.
    path : path-like
        File written by ``torch.save``: a state dict, or a dict that holds one under ``"state_dict"``; keys may start
        with ``module.``. Only tensors and plain containers are unpickled (``weights_only=True``).

    Returns
    -------
    nn.Module
        The same `model`.

    Raises
    ------
    RuntimeError
        If keys or shapes do not match.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(strip_prefix(content.get("state_dict", content)))
    return model
