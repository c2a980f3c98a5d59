"""Images in memory and in files, and the batches that are made of them."""

import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from qsparseprop.cli import main
from qsparseprop.training.data import (
    Augmentation,
    ImageData,
    ImageFiles,
    StoredImages,
    image_loader,
    load_data,
    training_loader,
)
from qsparseprop.training.data.loaders import Share
from qsparseprop.utils.errors import ConfigurationError

# torch warns of more processes than the machine has processors
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

RANDOM = np.random.default_rng(0)


def npz(path, count=40, size=(10, 12), channels=3):
    arrays = {}
    for part, images in (("train", count), ("test", count // 2)):
        arrays[f"x_{part}"] = RANDOM.integers(0, 256, (images, *size, channels)).astype(np.uint8)
        arrays[f"y_{part}"] = np.arange(images) % 5
    np.savez(path, **arrays)
    return str(path), arrays


def folder(path, classes=3, images=10, size=16):
    image = pytest.importorskip("PIL.Image")
    for kind in range(classes):
        (path / f"class{kind}").mkdir(parents=True)
        for index in range(images):
            pixels = RANDOM.integers(0, 256, (size, size, 3)).astype(np.uint8)
            image.fromarray(pixels).save(path / f"class{kind}" / f"{index:03}.png")
    return str(path)


def batches(loader):
    return [(images.clone(), labels.clone()) for images, labels in loader]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(x, y) and torch.equal(a, b) for (x, a), (y, b) in zip(ours, theirs, strict=True)
    )


def test_bytes_stay_bytes_in_memory(tmp_path):
    path, arrays = npz(tmp_path / "data.npz")
    data = load_data(path)
    assert data.train.pixels.dtype is torch.uint8
    x = torch.from_numpy(arrays["x_train"]).double().permute(0, 3, 1, 2) / 255
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    ours = torch.cat([images for images, _ in image_loader(data, "train", 40, seed=0)])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, ((x - mean) / std)[order].float())


def test_images_that_grow_do_so_in_the_batch_and_those_that_shrink_at_once(tmp_path):
    path, _ = npz(tmp_path / "data.npz")
    large, small = load_data(path, image_size=64), load_data(path, image_size=8)
    assert large.train.pixels.shape == (40, 3, 10, 12)
    assert large.kind.height == 64
    assert next(iter(image_loader(large, "test", 5)))[0].shape == (5, 3, 64, 64)
    assert small.train.pixels.shape == (40, 3, 8, 8)
    assert small.train.pixels.dtype is torch.uint8


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_read_what_one_process_reads(tmp_path, workers):
    data = load_data(folder(tmp_path), image_size=16)
    augment = Augmentation(["flip", "crop", "resized-crop"])
    expected, ours = (image_loader(data, "train", 8, seed=3, augment=augment, workers=n) for n in (0, workers))
    for _ in range(2):
        assert same(batches(ours), batches(expected))
    expected, ours = (image_loader(data, "test", 4, workers=n) for n in (0, workers))
    assert same(batches(ours), batches(expected))


@pytest.mark.skipif(multiprocessing.get_all_start_methods()[0] != "fork", reason="needs processes that inherit it")
def test_shared_memory_may_run_out(tmp_path, monkeypatch):
    """Batches come another way: lost by the queue, they would be waited for for ever."""
    data = load_data(folder(tmp_path), image_size=16)
    expected = batches(image_loader(data, "train", 8, seed=3, augment=Augmentation(["crop"]), workers=0))

    def no_space(*arguments):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", no_space)
    monkeypatch.setattr(torch.Tensor, "share_memory_", no_space)
    loader = image_loader(data, "train", 8, seed=3, augment=Augmentation(["crop"]), workers=2)
    loader.timeout = 60
    assert same(batches(loader), expected)


def test_epochs_differ_and_seeds_differ(tmp_path):
    data = load_data(npz(tmp_path / "data.npz")[0])
    loader = image_loader(data, "train", 8, seed=1, augment=Augmentation(["crop"]))
    first, second = batches(loader), batches(loader)
    again = batches(image_loader(data, "train", 8, seed=1, augment=Augmentation(["crop"])))
    other = batches(image_loader(data, "train", 8, seed=2, augment=Augmentation(["crop"])))
    assert same(first, again)
    assert not same(first, second)
    assert not same(first, other)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(tmp_path, processes):
    data = load_data(npz(tmp_path / "data.npz", count=42)[0])
    augment = Augmentation(["flip", "crop"])
    whole = batches(image_loader(data, "train", 8, seed=1, augment=augment))
    parts = [batches(image_loader(data, "train", 8, seed=1, augment=augment, share=Share(rank, processes)))
             for rank in range(processes)]  # fmt: skip
    assert len(whole) == 5
    for batch, (images, labels) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert torch.equal(part[batch][0], images[rank::processes])
            assert torch.equal(part[batch][1], labels[rank::processes])
    tested = [labels for rank in range(processes)
              for _, labels in image_loader(data, "test", 8, share=Share(rank, processes))]  # fmt: skip
    assert torch.equal(torch.cat(tested).sort().values, data.test_labels.sort().values)
    with pytest.raises(ConfigurationError, match="cannot be shared out evenly to 3 processes"):
        image_loader(data, "train", 8, seed=1, share=Share(0, 3))


def test_data_goes_to_another_process_as_plain_containers(tmp_path):
    for data in (load_data(npz(tmp_path / "data.npz")[0]), load_data(folder(tmp_path / "images"), image_size=16)):
        torch.save(data.state(), tmp_path / "state.pt")
        again = ImageData.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert again.fingerprint() == data.fingerprint()
        assert same(batches(image_loader(again, "train", 8, seed=0)), batches(image_loader(data, "train", 8, seed=0)))


def test_a_few_images_are_of_all_classes(tmp_path):
    data = load_data(folder(tmp_path, classes=4), image_size=16, max_images=8)
    assert isinstance(data.train, ImageFiles)
    assert torch.bincount(data.train_labels).tolist() == [2, 2, 2, 2]
    assert torch.bincount(data.test_labels).tolist() == [2, 2, 2, 2]


def test_other_images_have_another_fingerprint(tmp_path):
    one = load_data(folder(tmp_path / "one"), image_size=16)
    assert load_data(str(tmp_path / "one"), image_size=16).fingerprint() == one.fingerprint()
    assert load_data(str(tmp_path / "one"), image_size=8).fingerprint() != one.fingerprint()
    (tmp_path / "one" / "class1" / "005.png").rename(tmp_path / "one" / "class1" / "105.png")
    assert load_data(str(tmp_path / "one"), image_size=16).fingerprint() != one.fingerprint()
    # the folder may be moved
    (tmp_path / "one" / "class1" / "105.png").rename(tmp_path / "one" / "class1" / "005.png")
    (tmp_path / "one").rename(tmp_path / "two")
    assert load_data(str(tmp_path / "two"), image_size=16).fingerprint() == one.fingerprint()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(tmp_path, workers):
    data = load_data(folder(tmp_path), image_size=16)
    broken = data.train.files[7]
    with open(broken, "wb") as file:
        file.write(b"no image")
    with pytest.raises(ConfigurationError) as refused:
        batches(image_loader(data, "train", 8, seed=0, workers=workers))
    assert str(refused.value).startswith(f"cannot read the image {broken}")
    assert "Traceback" not in str(refused.value)


def test_a_tiff_with_offsets_that_are_no_integers_is_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    data = load_data(folder(tmp_path), image_size=16)
    pixels = io.BytesIO()
    image.new("RGB", (16, 16)).save(pixels, "TIFF")
    content = pixels.getvalue()
    offsets = content.index(struct.pack("<HHI", 0x111, 4, 1))  # the tag, its type, which is long, and its count
    with open(data.train.files[7], "wb") as file:
        file.write(content[: offsets + 2] + struct.pack("<H", 11) + content[offsets + 4 :])
    with pytest.raises(ConfigurationError, match=r"cannot read the image .*integer"):
        data.train.read(torch.tensor([7]))


def test_photos_are_decoded_at_about_their_size(tmp_path):
    image = pytest.importorskip("PIL.Image")
    gradient = np.linspace(0, 255, 800)[None, :, None].repeat(800, 0).repeat(3, 2).astype(np.uint8)
    for kind in ("a", "b"):
        (tmp_path / kind).mkdir()
        for index in range(3):
            image.fromarray(gradient).save(tmp_path / kind / f"{index}.jpg", quality=95)
    data = load_data(str(tmp_path), image_size=32)
    ours = data.train.read(torch.tensor([0]))[0, 0].double()
    expected = torch.nn.functional.interpolate(torch.from_numpy(gradient[None, :, :, 0]).double()[None], size=(32, 32),
                                               mode="bilinear", antialias=True)[0, 0]  # fmt: skip
    assert (ours - expected).abs().max() < 3  # of 255


_MEMORY = """
import sys, torch
import numpy as np
from qsparseprop.training.data import image_loader, load_data
from qsparseprop.utils.measurement_utils import peak_rss_mb, reset_peak_rss

data = load_data(sys.argv[1])
loader = image_loader(data, "train", 64, seed=0)
next(iter(loader))
if not reset_peak_rss():
    sys.exit(5)
before = peak_rss_mb()
for images, labels in loader:
    pass
print(peak_rss_mb() - before)
"""


def test_memory_stays_flat_over_an_epoch(tmp_path):
    x = np.zeros((20_000, 32, 32, 3), np.uint8)  # 61 MB; 246 MB as float32
    y = np.arange(20_000) % 10
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    done = subprocess.run([sys.executable, "-c", _MEMORY, str(tmp_path / "data.npz")], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode == 5:
        pytest.skip("the system does not tell the peak of a part of a process")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


def test_the_loader_of_tensors_takes_them_as_they_are():
    images, labels = torch.randn(12, 2, 3, 3), torch.arange(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(5))
    ours = batches(training_loader(images, labels, 4, seed=5))
    for batch, (x, y) in enumerate(ours):
        assert torch.equal(x, images[order[4 * batch : 4 * batch + 4]])
        assert torch.equal(y, order[4 * batch : 4 * batch + 4])
    part = StoredImages(images, labels)
    assert part.shape == (2, 3, 3)


@pytest.mark.nightly
def test_a_comparison_reads_files_in_further_processes(tmp_path):
    pytest.importorskip("matplotlib")
    source = folder(tmp_path / "images", images=12)
    out = tmp_path / "out"
    assert main(["finetune", "--data", source, "--image-size", "16", "--model", "resnet20", "--width", "4", "--threads",
                 "1", "--batch-size", "8", "--workers", "1", "--augment", "flip", "--quiet", "--out", str(out)]) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["data"] == {"name": "images", "train": 27, "test": 9}
    assert all(len(run["losses"]) == 3 for run in result["runs"].values())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_memory_of_workers_stays_flat():
    """Freed batches go back to the system: holes of the heap would grow by one batch after the other."""
    pixels, labels = torch.zeros(3840, 3, 4, 4, dtype=torch.uint8), torch.zeros(3840, dtype=torch.long)
    images = StoredImages(pixels, labels, (224, 224))
    data = ImageData(images, images, 1, "", torch.ones(3), torch.zeros(3))
    loader = image_loader(data, "train", 32, seed=0, augment=Augmentation(["flip"]), workers=1)
    megabytes = []
    for batch, _ in enumerate(loader):
        if batch in (20, 110):
            (worker,) = multiprocessing.active_children()
            with open(f"/proc/{worker.pid}/status") as status:
                megabytes += [int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon")]
    assert megabytes[1] - megabytes[0] < 40  # a batch has 4.6, and four are on the way
