"""Training from a folder of JPEG images: how fast they come, how flat memory stays, and how long a training waits.

Images of 224 x 224 pixels, coarse random patterns with grain, ten classes; they are generated where the folder does not
have them yet (100,000: 1.6 GB, some minutes). Then, for each number of threads and workers,

  pass    all training images once through the loader, flipped at random and normalised, without any training
  train   ResNet-18 (7x7 stem, batch 32) in blocks of 8 bits, bfloat16 autocast, trained for --steps steps

with images a second, the share of time that the training waited for data, and memory in MB: of this process and of all
its workers together (each counts what it shares with the others), at every tenth of the way. Linux tells memory;
elsewhere there are dashes.

  python benchmarks/streaming.py --folder stream              100,000 images; allow half an hour
  python benchmarks/streaming.py --folder stream --only train --steps 100 --workers 2
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import _common as common
import numpy as np
import torch
from network import KEPT_DENSE, NETWORKS, QUICK_NETWORKS, sparse_network

from qsparseprop import Finetuner, swap_modules_with_sparse
from qsparseprop.training.data import Augmentation, ImageData, ImageLoader, image_loader, load_data
from qsparseprop.utils.measurement_utils import current_rss_mb

CLASSES = 10

#: One test image for so many training images; at least one a class.
TEST = 50

#: Places at which memory is looked at.
TENTHS = 10


def generate(folder: Path, images: int, size: int) -> None:
    """Write what is missing of `images` training images, and of their test images.

    Parameters
    ----------
    folder : path
        Gets ``train/class/number.jpg`` and ``test/class/number.jpg``.
    images, size : int
        Number, and height and width.
    """
    from PIL import Image

    random = np.random.default_rng(0)
    grain = random.normal(0, 12, (4 * size, 4 * size, 1)).astype(np.float32)
    patterns = random.integers(64, 192, (CLASSES, 8, 8, 3))
    begun = time.perf_counter()
    for part, count in (("train", images), ("test", max(images // TEST, CLASSES))):
        for index in range(count):
            label = index % CLASSES
            file = folder / part / f"class{label}" / f"{index:06}.jpg"
            if file.exists():
                continue
            file.parent.mkdir(parents=True, exist_ok=True)
            one = np.random.default_rng((index, part == "test"))
            coarse = (patterns[label] + one.integers(-64, 64, (8, 8, 3))).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), np.float32)
            top, left = one.integers(0, 3 * size, 2)
            pixels = smooth + grain[top : top + size, left : left + size]
            whole = file.with_suffix(".part")  # an image that was not finished is none
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(whole, "JPEG", quality=80)
            whole.replace(file)
            if part == "train" and (index + 1) % max(images // TENTHS, 1) == 0:
                common.say(f"{index + 1} images in {time.perf_counter() - begun:.0f} s")


def workers_rss_mb() -> float:
    """Resident memory of all processes that this one has started, in MB; NaN where the system does not tell."""
    total = 0.0
    for process in multiprocessing.active_children():
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
        except OSError:
            return math.nan
        # one that has just ended has no memory
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0) * 1024
    return total / 1e6


class Watched:
    """The first batches of a loader, with a look at memory at every tenth of them.

    Parameters
    ----------
    loader : ImageLoader
    batches : int
        At most.
    """

    def __init__(self, loader: ImageLoader, batches: int) -> None:
        self.loader, self.batches = loader, min(batches, len(loader))
        self.memory: list[dict[str, float | None]] = []

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        places = {max(1, round(self.batches * tenth / TENTHS)) for tenth in range(1, TENTHS + 1)}
        iterator = iter(self.loader)
        for done in range(1, self.batches + 1):
            batch = next(iterator)
            if done in places:  # the workers are there until the iterator is asked for one more
                found = {"mb": current_rss_mb(), "workers_mb": workers_rss_mb()}
                self.memory.append({"batch": done, **{k: v if math.isfinite(v) else None for k, v in found.items()}})
            yield batch


def show_memory(memory: Sequence[dict[str, float | None]]) -> None:
    """A line for each place."""
    table = common.Table(["after batch", "MB", "MB of workers"], 12)
    for row in memory:
        table.row(str(row["batch"]), row["mb"], row["workers_mb"])


def read_all(data: ImageData, batch_size: int, workers: int) -> dict[str, Any]:
    """All training images once through the loader."""
    watched = Watched(image_loader(data, "train", batch_size, seed=0, augment=Augmentation(["flip"]),
                                   workers=workers), 2**62)  # fmt: skip
    begun, images = time.perf_counter(), 0
    for pixels, _ in watched:
        images += len(pixels)
    seconds = time.perf_counter() - begun
    common.say(f"\npass: {images} images in {seconds:.0f} s, {images / seconds:.0f} images/s\n")
    show_memory(watched.memory)
    return {"images": images, "seconds": seconds, "images_per_second": images / seconds, "memory": watched.memory}


def train(data: ImageData, args: argparse.Namespace, workers: int, sparsity: float) -> dict[str, Any]:
    """So many steps of a sparse network, by the Finetuner."""
    network = (QUICK_NETWORKS if args.quick else NETWORKS)[1]
    torch.manual_seed(0)
    model = sparse_network(network, sparsity).train().to(memory_format=torch.channels_last)
    swap_modules_with_sparse(model, (args.batch, *data.train.shape), verbose=False, include_dense=False, fuse=True,
                             skip_modules=KEPT_DENSE, min_sparsity=sparsity - 0.01)  # fmt: skip
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=True),
                      autocast_dtype=torch.bfloat16, memory_format=torch.channels_last)  # fmt: skip
    watched = Watched(image_loader(data, "train", args.batch, seed=0, augment=Augmentation(["flip"]),
                                   workers=workers), args.steps)  # fmt: skip
    tuner.fit(watched, epochs=1, progress=False)
    history = tuner.history
    # workers start before the first step
    waits = history.wait_seconds[1:]
    share = sum(waits) / (sum(waits) + sum(history.step_seconds[1:]))
    ms = 1e3 * history.median_step_seconds()
    common.say(f"\ntrain, {100 * sparsity:g} % zeros: {ms:.0f} ms a step of {args.batch} images, {100 * share:.1f} % "
               f"of the time waiting for data, and {history.wait_seconds[0]:.1f} s for the first batch\n")  # fmt: skip
    show_memory(watched.memory)
    return {"sparsity": sparsity, "steps": len(history.losses), "step_ms": ms, "wait_share": share,
            "first_wait_s": history.wait_seconds[0], "losses": history.losses, "memory": watched.memory}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = common.make_parser(__doc__, repeats=1, sparsity=(0.9,), threads=(2,))
    parser.add_argument("--folder", type=Path, default=Path("stream"), metavar="FOLDER",
                        help="where the images are or come to lie (default: %(default)s)")
    parser.add_argument("--images", type=int, default=100_000, metavar="N", help="for training (default: %(default)s)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N",
                        help="processes that read (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images of a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each training (default: %(default)s)")
    parser.add_argument("--only", choices=("generate", "pass", "train"), help="no more than this")
    args, document = common.start("streaming", parser, argv)
    document["arguments"]["folder"] = str(args.folder)
    size = 224
    if args.quick:
        size, args.images, args.batch, args.steps = 64, 60, 4, 10
    generate(args.folder, args.images, size)
    document["results"] = []
    if args.only != "generate":
        begun = time.perf_counter()
        data = load_data(str(args.folder), size, max_images=args.images)
        common.say(f"\n{len(data.train_labels)} training images listed and measured in "
                   f"{time.perf_counter() - begun:.1f} s")  # fmt: skip
        for threads, workers in itertools.product(args.threads, args.workers):
            torch.set_num_threads(threads)
            common.say(f"\n{threads} thread(s), {workers} worker(s)")
            row: dict[str, Any] = {"threads": threads, "workers": workers}
            if args.only != "train":
                row["pass"] = read_all(data, args.batch, workers)
            if args.only != "pass":
                row["train"] = [train(data, args, workers, sparsity) for sparsity in args.sparsity]
            document["results"].append(row)
    common.write_json(args.json, document)


if __name__ == "__main__":
    main()
