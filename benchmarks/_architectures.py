"""Architectures in real use, small: what `architectures.py` and the tests run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

#: Images, channels, height and width.
IMAGES = (4, 3, 64, 64)
_TEXT = (2, 16)
_SIZES = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 256}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A network and what it is run on.

    Attributes
    ----------
    name, package : str
        What the package, without which it cannot be made, calls it.
    make : callable
        Gives the network, with random weights.
    inputs : callable
        Gives its arguments, positional ones or a mapping.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...] | Mapping[str, Any]]

    @property
    def available(self) -> bool:
        """Whether the package is there."""
        return importlib.util.find_spec(self.package) is not None


def _images(*shape: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(shape or IMAGES),)


def _tokens() -> torch.Tensor:
    return torch.randint(_SIZES["vocab_size"], _TEXT)


def _text() -> dict[str, Any]:
    return {"input_ids": _tokens()}


def _both_texts() -> dict[str, Any]:
    return {"input_ids": _tokens(), "decoder_input_ids": _tokens()}


def torchvision() -> Any:
    """The package, also where its compiled half does not fit torch: the networks are made of torch's operators."""
    try:
        import torchvision
    except RuntimeError:  # it describes operators that its library would have defined
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            _stand_in.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


_stand_in = torch.library.Library("torchvision", "FRAGMENT")


def _vision(name: str, *shape: int, **options: Any) -> Architecture:
    # ten classes: on small images, a thousand would be a quarter of the work
    return Architecture(name, "torchvision", lambda: getattr(torchvision().models, name)(weights=None, num_classes=10,
                                                                                         **options), _images(*shape))


def _alexnet() -> nn.Module:
    model = torchvision().models.alexnet(weights=None)
    model.avgpool = nn.AdaptiveAvgPool2d(1)  # its classifier would be nine tenths of the weights
    model.classifier = nn.Sequential(nn.Dropout(), nn.Linear(256, 256), nn.ReLU(True), nn.Linear(256, 10))
    return model


def _wide_resnet() -> nn.Module:
    resnet = torchvision().models.resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=128)


def _vgg(name: str) -> Architecture:
    def make() -> nn.Module:
        model = getattr(torchvision().models, name)(weights=None)
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # as for AlexNet
        model.classifier = nn.Sequential(nn.Linear(512, 256), nn.ReLU(True), nn.Dropout(), nn.Linear(256, 10))
        return model

    return Architecture(name, "torchvision", make, _images())


def _segmentation(name: str, *shape: int) -> Architecture:
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    return Architecture(name, "torchvision", lambda: getattr(torchvision().models.segmentation, name)(**options),
                        _images(*shape))  # fmt: skip


def _pyramid() -> nn.Module:
    models = torchvision().models
    return models.detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet18", weights=None,
                                                               trainable_layers=5)  # fmt: skip


def _timm(name: str, *shape: int, **options: Any) -> Architecture:
    def make() -> nn.Module:
        torchvision()
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options)

    return Architecture(name, "timm", make, _images(*shape))


def _transformers(kind: str, config: str, inputs: Callable[[], Any] = _text, **options: Any) -> Architecture:
    def make() -> nn.Module:
        if importlib.util.find_spec("torchvision") is not None:
            torchvision()  # transformers imports it
        import transformers

        return getattr(transformers, kind)(getattr(transformers, config)(**options))

    return Architecture(kind, "transformers", make, inputs)


def _own(name: str, *shape: int, **options: int) -> Architecture:
    def make() -> nn.Module:
        from qsparseprop.training.models import build_model

        return build_model(name, **options)

    return Architecture(name, "qsparseprop", make, _images(*shape))


class _CausalBlock(nn.Module):
    """Of a temporal convolutional network: two dilated causal convolutions with ReLU and dropout, and a residual."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv1 = nn.Conv1d(inputs, outputs, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, dilation=dilation)
        self.shortcut = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dropout(torch.relu(self.conv1(self.pad(x))))
        y = self.dropout(torch.relu(self.conv2(self.pad(y))))
        return torch.relu(y + self.shortcut(x))


def _tcn() -> nn.Module:
    return nn.Sequential(_CausalBlock(4, 32, 1), _CausalBlock(32, 32, 2), _CausalBlock(32, 32, 4), nn.Conv1d(32, 5, 1))


def _small_resnet1d() -> nn.Module:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv1d(inputs, outputs, 7, stride, 3, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]

    return nn.Sequential(*block(2, 32, 2), *block(32, 64, 2), *block(64, 64, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
                         nn.Linear(64, 5))  # fmt: skip


class _UNet(nn.Module):
    """Two levels down and up, with BatchNorm and ReLU, upsampling, and concatenation."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._block(3, width), self._block(width, 2 * width)])
        self.middle = self._block(2 * width, 4 * width)
        self.up = nn.ModuleList([self._block(6 * width, 2 * width), self._block(3 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _block(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([nn.functional.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        return self.head(x)


ARCHITECTURES = [
    _own("resnet20"),
    _own("vgg11", 4, 3, 32, 32, width=16),
    _own("mlp", 8, 3, 32, 32, width=128),
    _own("vit-tiny", 4, 3, 32, 32, width=96),
    Architecture("tcn", "qsparseprop", _tcn, _images(4, 4, 40)),
    Architecture("resnet1d", "qsparseprop", _small_resnet1d, _images(4, 2, 128)),
    Architecture("unet", "qsparseprop", _UNet, _images(2, 3, 32, 32)),
    _vision("resnet18"),
    _vision("resnet50"),
    _vision("resnext50_32x4d"),
    Architecture("wide_resnet", "torchvision", _wide_resnet, _images()),
    _vgg("vgg11"),
    _vgg("vgg11_bn"),
    Architecture("alexnet", "torchvision", _alexnet, _images()),
    _vision("squeezenet1_1"),
    _vision("densenet121"),
    _vision("googlenet", aux_logits=False, init_weights=False),
    _vision("inception_v3", 2, 3, 96, 96, aux_logits=False, init_weights=False),
    _vision("mobilenet_v2"),
    _vision("mobilenet_v3_small"),
    _vision("shufflenet_v2_x0_5"),
    _vision("efficientnet_b0"),
    _vision("efficientnet_v2_s", 2, 3, 64, 64),
    _vision("mnasnet0_5"),
    _vision("regnet_y_400mf"),
    _vision("convnext_tiny", 2, 3, 64, 64),
    Architecture("vit", "torchvision", lambda: torchvision().models.VisionTransformer(64, 16, 2, 4, 128, 512),
                 _images()),
    _segmentation("deeplabv3_mobilenet_v3_large"),
    _segmentation("fcn_resnet50", 2, 3, 32, 32),
    _segmentation("lraspp_mobilenet_v3_large"),
    Architecture("resnet18_fpn", "torchvision", _pyramid, _images()),
    _timm("deit_tiny_patch16_224", img_size=64),
    _timm("swin_tiny_patch4_window7_224", 2, 3, 56, 56, img_size=56, depths=(2, 2, 2, 2)),
    _timm("mixer_s16_224", img_size=64),
    _timm("cspdarknet53", 2, 3, 64, 64),
    _timm("resnetv2_50", 2, 3, 64, 64),
    _timm("hrnet_w18_small"),
    _timm("repvgg_a0"),
    _timm("ghostnet_100"),
    _timm("mobilevit_xs"),
    _timm("res2net50_26w_4s", 2, 3, 64, 64),
    _timm("tf_efficientnet_lite0"),
    _timm("levit_128s", 2, 3, 224, 224),
    _transformers("BertModel", "BertConfig", **_SIZES),
    _transformers("GPT2LMHeadModel", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32,
                  use_cache=False),
    _transformers("GPT2Model", "GPT2Config", n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=32,
                  use_cache=False, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0),
    _transformers("T5Model", "T5Config", _both_texts, vocab_size=100, d_model=64, d_kv=16, d_ff=256, num_layers=2,
                  num_heads=4, use_cache=False),
    _transformers("LlamaForCausalLM", "LlamaConfig", **_SIZES, use_cache=False),
    _transformers("OPTForCausalLM", "OPTConfig", vocab_size=100, hidden_size=64, num_hidden_layers=2,
                  num_attention_heads=4, ffn_dim=256, word_embed_proj_dim=64, use_cache=False),
    _transformers("Wav2Vec2Model", "Wav2Vec2Config", lambda: {"input_values": torch.randn(2, 4000)},
                  hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
                  conv_dim=(64,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, mask_time_prob=0.0),
    _transformers("WhisperModel", "WhisperConfig",
                  lambda: {"input_features": torch.randn(2, 20, 40), "decoder_input_ids": _tokens()},
                  vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                  decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=20,
                  max_source_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
                  use_cache=False),
    _transformers("SegformerForSemanticSegmentation", "SegformerConfig",
                  lambda: {"pixel_values": torch.randn(2, 3, 64, 64)}, num_labels=5),
]  # fmt: skip
