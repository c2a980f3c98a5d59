"""Frozen models against the best that serves dense ones: ONNX Runtime int8, OpenVINO int8, torch.compile, PyTorch.

Each comparison runs in turn in this process; medians. ResNet-18 at 224 and 32 pixels, Linear 1024 -> 4096 at several
batches, a transformer's encoder layer (768, 3072) of 128 tokens, and the backbone of a pose detector with its weights,
75 % zeros (--shared names the folder with it). Weights of the others are random, with zeros at random
places; the engines get the same weights, whose zeros they do not use. Needs onnx, onnxruntime and openvino for these,
and for torch.compile a C++ compiler.

  python benchmarks/inference.py --threads 1 --sparsity 0.9 0.95        some twenty minutes, ten with --no-compile
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import Table, make_parser, put_zeros, say, start, write_json
from _networks import PoseBackbone
from torch import Tensor, nn

from qsparseprop.benchmarking.serving import OURS, ServingConfig, serving_times
from qsparseprop.inference import freeze
from qsparseprop.training.models import build_model
from qsparseprop.utils.pruning_utils import prunable_modules


class EncoderLayer(nn.Module):
    """A layer of BERT's size: four projections and two of the feed-forward part, all of them sparse."""

    def __init__(self, width: int = 768, heads: int = 12, inner: int = 3072) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        batch, tokens, width = x.shape

        def split(t: Tensor) -> Tensor:
            return t.view(batch, tokens, self.heads, width // self.heads).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        heads = nn.functional.scaled_dot_product_attention(query, key, value)
        x = self.norm(x + self.out(heads.transpose(1, 2).reshape(batch, tokens, width)))
        return self.last_norm(x + self.down(nn.functional.gelu(self.up(x))))


def _resnet18(size: int) -> nn.Module:
    """For small images the first convolution has 3 x 3 pixels; for large ones 7 x 7, stride 2, and a pool behind it."""
    model = build_model("resnet18", in_channels=3, image_size=size, num_classes=1000)
    if size > 64:
        stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        model.conv1 = stem
        model.bn1 = nn.Sequential(model.bn1, nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return model


#: Of the folder of shared files, with the weights of the pose detector.
POSE = "weights/mediapipe_pose_detection_sparse75.npz"
#: Name, model, shape of a sample, batches.
CASES = (
    ("ResNet-18 224 px", lambda: _resnet18(224), (3, 224, 224), (16, 1)),
    ("ResNet-18 32 px", lambda: _resnet18(32), (3, 32, 32), (64, 1)),
    ("Linear 1024 -> 4096", lambda: nn.Linear(1024, 4096), (1024,), (1, 16, 256)),
    ("encoder layer, 128 tokens", EncoderLayer, (128, 768), (1,)),
    ("pose backbone 224 px", None, (3, 224, 224), (1, 8)),
)


def measure(case: int, sparsity: float, batch: int, config: ServingConfig, shared: Path) -> dict[str, Any]:
    """Milliseconds of a request by competitor: medians."""
    name, build, shape, _ = CASES[case]
    torch.manual_seed(0)
    if build is None:
        model: nn.Module = PoseBackbone(shared / POSE, 10).eval()
        pruned = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        sparsity = 1 - sum(int((w != 0).sum()) for w in pruned) / sum(w.numel() for w in pruned)
    else:
        model = build().eval()
        # of a network all but the first and the last layer, of a layer everything
        whole = [module for module in model.modules() if isinstance(module, nn.Linear)]
        for module in prunable_modules(model).values() if shape[0] == 3 else whole:
            put_zeros(module.weight, sparsity)
    x = torch.randn(batch, *shape)
    frozen = freeze(model, [x if batch > 1 else torch.randn(4, *shape)])
    times, missing = serving_times(model, frozen, x, config)
    ms = {way: 1e3 * statistics.median(taken) for way, taken in times.items()}
    best = min((way for way in ms if way != OURS), key=ms.__getitem__)
    return {"case": name, "sparsity": sparsity, "batch": batch, "ms": ms, "best": best, "ratio": ms[best] / ms[OURS],
            "missing": missing}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = make_parser(__doc__, repeats=5, sparsity=(0.9, 0.95), threads=(1,))
    parser.add_argument("--cases", type=int, nargs="+", default=list(range(len(CASES))), metavar="N",
                        help="which of the five above, from 0 (default: all)")
    parser.add_argument("--shared", default=str(Path(__file__).resolve().parents[2] / "shared"), metavar="FOLDER",
                        help="folder with weights/ (default: the one beside the project)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    args, document = start("inference", parser, argv)
    document["results"] = []
    config = ServingConfig(seconds=args.seconds, compiled=not (args.no_compile or args.quick))
    for threads in args.threads:
        torch.set_num_threads(threads)
        say(f"\n{threads} thread(s): milliseconds of a request, and the best of the others over ours\n")
        table = Table(["case", "batch", "zeros", "frozen", "best", "ratio", "which"], first=28)
        for case in args.cases[:1] if args.quick else args.cases:
            pose = CASES[case][1] is None
            if pose and not (Path(args.shared) / POSE).is_file():
                say(f"{CASES[case][0]}: left out, {args.shared} has no {POSE}")
                continue
            for sparsity in args.sparsity[:1] if pose else args.sparsity:
                for batch in CASES[case][3]:
                    found = measure(case, sparsity, 1 if args.quick else batch, config, Path(args.shared))
                    table.row(found["case"], str(found["batch"]), f"{100 * found['sparsity']:.3g} %", found["ms"][OURS],
                              found["ms"][found["best"]], f"{found['ratio']:.2f}x", found["best"])  # fmt: skip
                    document["results"].append({"threads": threads, **found})
        missing = dict.fromkeys(line for one in document["results"] for line in one["missing"])
        say("\n".join(missing))
    write_json(args.json, document)


if __name__ == "__main__":
    main()
