"""Small networks for small images, used by the ``finetune`` job, the tests and the benchmarks.

The residual networks call their sub-modules ``conv1, bn1, layer1 .. layerN, shortcut, linear``, the names that the
widespread CIFAR checkpoints carry, so that those load without renaming anything but a ``module.`` prefix.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.utils.errors import ConfigurationError, refuse_more_than_memory
from qsparseprop.utils.state_files import read_state_dict, strip_prefix

from .library_models import LIBRARIES, find_in_libraries, from_library
from .named_functions import import_function
from .vision_transformer import TransformerBlock, VisionTransformer, vit_tiny
from .weights import load_checkpoint

__all__ = [
    "MODELS",
    "BasicBlock",
    "CifarResNet",
    "SubsampleAndPad",
    "TransformerBlock",
    "VisionTransformer",
    "build_model",
    "cifar_resnet",
    "find_builder",
    "load_checkpoint",
    "mlp",
    "read_state_dict",
    "resnet18",
    "resnet20",
    "resnet56",
    "strip_prefix",
    "vgg11",
    "vit_tiny",
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
        """Map (batch, in_channels, height, width) to (batch, out_channels, ceil(h/stride), ceil(w/stride))."""
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
        """Map (batch, in_channels, h, w) to (batch, out_channels, ceil(h/stride), ceil(w/stride))."""
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
        """Map images (batch, in_channels, height, width) to logits (batch, num_classes)."""
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


def cifar_resnet(depth: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """ResNet of the ResNet paper's CIFAR section: three stages of basic blocks, shortcuts without parameters.

    Parameters
    ----------
    depth : int
        Layers with weights: two more than a multiple of 6, such as 20, 56 or 110.
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

    Raises
    ------
    ValueError
        For another depth.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6 n + 2, such as 20 or 56, got {depth}")
    return CifarResNet((depth // 6,) * 3, (width, 2 * width, 4 * width), num_classes, in_channels, SubsampleAndPad)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet` of 20 layers: 0.27 M weights.

    Parameters
    ----------
    num_classes, in_channels, width : int
        As there.
    """
    return cifar_resnet(20, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> CifarResNet:
    """`cifar_resnet` of 56 layers: 0.85 M weights.

    Parameters
    ----------
    num_classes, in_channels, width : int
        As there.
    """
    return cifar_resnet(56, num_classes, in_channels, width)


def vgg11(num_classes: int = 10, in_channels: int = 3, width: int = 64) -> nn.Sequential:
    """VGG-11 with batch normalisation and one linear layer: 9.2 M weights for the default width.

    Parameters
    ----------
    num_classes, in_channels : int
        Outputs of the classifier, and channels of the images, which have at least 32 x 32 pixels.
    width : int
        Channels of the first convolution; the others have 2, 4 and 8 times as many.
    """
    layers: list[nn.Module] = []
    channels = in_channels
    for factor in (1, None, 2, None, 4, 4, None, 8, 8, None, 8, 8, None):
        if factor is None:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, factor * width, 3, padding=1, bias=False), nn.BatchNorm2d(factor * width),
                   nn.ReLU(inplace=True)]  # fmt: skip
        channels = factor * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def mlp(num_classes: int = 10, in_channels: int = 3, width: int = 1024, image_size: int = 32) -> nn.Sequential:
    """Three hidden linear layers over the pixels.

    Parameters
    ----------
    num_classes, in_channels, image_size : int
        Outputs of the classifier; channels, and height and width of the images.
    width : int
        Units of a hidden layer.
    """
    sizes = [in_channels * image_size**2, width, width, width]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, num_classes))


#: What `build_model` knows by name, besides the networks of `LIBRARIES`.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18, "resnet20": resnet20, "resnet32": functools.partial(cifar_resnet, 32),
    "resnet44": functools.partial(cifar_resnet, 44), "resnet56": resnet56,
    "resnet110": functools.partial(cifar_resnet, 110), "vgg11": vgg11, "mlp": mlp, "vit-tiny": vit_tiny,
}  # fmt: skip


def find_builder(name: str) -> Callable[..., nn.Module]:
    """What builds a network, without building it.

    Parameters
    ----------
    name : str
        As `build_model` takes it.

    Returns
    -------
    callable

    Raises
    ------
    ConfigurationError
        If there is none, with the names that are written alike.
    """
    if name in MODELS:
        return MODELS[name]
    library, colon, rest = name.partition(":")
    if not colon:
        return find_in_libraries(name, list(MODELS))
    return from_library(library, rest) if library in LIBRARIES else import_function(name, "model")


def build_model(name: str, **kwargs: int) -> nn.Module:
    """Build a network by name.

    Parameters
    ----------
    name : str
        One of `MODELS`; a network of torchvision or timm, where they are installed, as ``torchvision:resnet50``,
        ``timm:convnext_tiny``, or by the bare name where `MODELS` has none of that name (torchvision's comes before
        timm's); or ``package.module:function``, where the function returns an ``nn.Module``.
    **kwargs
        ``num_classes``, ``in_channels``, ``width``, ``image_size``: those that the function has as parameters are
        passed on.

    Raises
    ------
    ConfigurationError
        (a ValueError) If the name is unknown, or the function cannot be imported, called, or returns something else.
    """
    builder = find_builder(name)
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name} does not say which parameters it has") from error
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    accepted = {key: value for key, value in kwargs.items() if takes_all or key in parameters}
    if name in MODELS:
        _check_size(name, builder, accepted)
    try:
        model = builder(**accepted)
    except TypeError as error:
        raise ConfigurationError(f"{name} cannot be called with {accepted}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def _check_size(name: str, builder: Callable[..., nn.Module], arguments: Mapping[str, int]) -> None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            weights = sum(parameter.numel() for parameter in builder(**arguments).parameters())
    except (OverflowError, RuntimeError, TypeError) as error:  # more than 2**63 bytes, or units
        raise ConfigurationError(f"{name} cannot be as large as {dict(arguments)}") from error
    refuse_more_than_memory(16 * weights, f"training {name} with {weights:.2g} weights, their gradients and moments,")
