"""Models of torch's own modules, frozen and written as ONNX: what ONNX Runtime makes of them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsparseprop.inference import FrozenModule, export_onnx, freeze

from ._frozen import data, randomised
from ._helpers import sampled

pytest.importorskip("onnx", reason="ONNX files are written by onnx")
runtime = pytest.importorskip("onnxruntime", reason="ONNX files are read by ONNX Runtime")


def check(model: nn.Module, path: Path, *inputs: Tensor) -> None:
    """Frozen and exported, a model computes the same up to codes that are rounded otherwise."""
    frozen = freeze(randomised(model), [inputs])
    assert isinstance(frozen, FrozenModule)
    assert any(layer.quantised for layer in frozen.freeze_report)
    export_onnx(frozen, path / "model.onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = runtime.InferenceSession(str(path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    for batch in (len(inputs[0]), 1):
        given = [x[:batch] for x in inputs]
        [found] = session.run(None, {name: x.numpy() for name, x in zip(frozen.program.inputs, given, strict=True)})
        wanted = frozen(*given)
        assert found.shape == tuple(wanted.shape)
        assert float((torch.from_numpy(found) - wanted).norm() / wanted.norm()) <= 0.01


class UNet(nn.Module):
    """Two levels, joined across; one way up or another, and a normalisation of any kind."""

    def __init__(self, up: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), norm, nn.LeakyReLU(0.1))
        self.up = up
        self.last = nn.Sequential(nn.Conv2d(24, 8, 3, padding=1), nn.PReLU(8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        return self.last(torch.cat([first, self.up(self.down(first))], 1))


@pytest.mark.parametrize("norm", [lambda: nn.BatchNorm2d(16), lambda: nn.GroupNorm(4, 16)], ids=["batch", "group"])
@pytest.mark.parametrize("up", [
    lambda: nn.ConvTranspose2d(16, 16, 2, 2),
    lambda: nn.ConvTranspose2d(16, 16, 3, 2, padding=1, output_padding=1),
    lambda: nn.Upsample(scale_factor=2),
    lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    lambda: nn.Upsample(size=(12, 12), mode="bilinear", align_corners=True),
    lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    lambda: nn.Sequential(nn.Conv2d(16, 64, 1), nn.PixelShuffle(2)),
], ids=["transposed", "output padding", "nearest", "bilinear", "aligned", "bicubic", "shuffled"])  # fmt: skip
def test_u_nets(up: Any, norm: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(UNet(up(), norm()), tmp_path, data(4, 3, 12, 12))


class Volumes(nn.Module):
    """Layers of one and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU6(), nn.MaxPool1d(2),
                                  nn.ConvTranspose1d(8, 6, 4, 2, 1))  # fmt: skip
        self.volume = nn.Sequential(nn.Conv3d(6, 4, 3, padding=1), nn.InstanceNorm3d(4), nn.ELU(), nn.AvgPool3d(2))
        self.classify = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        line = self.line(x).view(x.shape[0], 6, 4, 2, 2)
        return self.classify(self.volume(line).mean((2, 3, 4)))


def test_lines_and_volumes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Volumes(), tmp_path, data(4, 4, 16))


@pytest.mark.parametrize(("first", "norm_first", "activation"),
                         sampled(product([False, True], [False, True], ["relu", "gelu"])))  # fmt: skip
def test_encoders(first: bool, norm_first: bool, activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation, batch_first=first, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    check(model, tmp_path, data(5, 6, 16))


class Masked(nn.Module):
    """An encoder with tokens that are padding, and its mean over the others."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        tokens = self.encoder(x, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1).to(tokens.dtype)
        return self.classify((tokens * kept).sum(1) / kept.sum(1).clamp(min=1))


def test_masks_are_inputs_that_are_true_or_false(tmp_path: Path) -> None:
    torch.manual_seed(0)
    padding = torch.arange(6)[None] >= torch.tensor([6, 3, 1, 4])[:, None]
    check(Masked(), tmp_path, data(4, 6, 16), padding)


def test_a_decoder_with_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            out: Tensor = self.model(source, target, tgt_mask=self.mask, tgt_is_causal=True)
            return out

    check(Both(), tmp_path, data(5, 6, 16), data(5, 4, 16, seed=2))


class Block(nn.Module):
    """Attention to what was before, as language models write it, and a layer of two."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])
        self.attend, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.inner = nn.Sequential(nn.Linear(16, 64), nn.GELU(approximate="tanh"), nn.Linear(64, 16))
        self.written_out = written_out

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.attend(self.norms[0](x)).split(width, 2)
        query, key, value = (part.view(batch, length, 2, width // 2).transpose(1, 2) for part in parts)
        if self.written_out:
            scores = query @ key.transpose(-2, -1) * (width // 2) ** -0.5
            before = torch.tril(torch.ones(length, length)).view(1, 1, length, length)
            seen = scores.masked_fill(before == 0, float("-inf")).softmax(-1) @ value
        else:
            seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(seen.transpose(1, 2).contiguous().view(batch, length, width))
        return x + self.inner(self.norms[1](x))


class Decoder(nn.Module):
    """A small GPT."""

    def __init__(self, written_out: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(19, 16), nn.Embedding(8, 16)
        self.blocks = nn.Sequential(Block(written_out), Block(written_out), nn.LayerNorm(16))
        self.head = nn.Linear(16, 19, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1]))
        out: Tensor = self.head(self.blocks(self.tokens(tokens) + places))
        return out


@pytest.mark.parametrize("written_out", [False, True])
def test_decoders_with_a_causal_mask(written_out: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    check(Decoder(written_out), tmp_path, torch.randint(0, 19, (5, 8)))
