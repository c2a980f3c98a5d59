"""Files of images: in which order their dimensions are, and what is no image."""

import contextlib
import re
import zipfile

import numpy as np
import pytest
import torch

from qsparseprop.training.data import ImageKind, image_kind, load_data
from qsparseprop.utils.errors import ConfigurationError

LABELS = np.arange(12) % 3


def write(path, train, test=None, labels=LABELS, **others):
    test = train[:6] if test is None else test
    arrays = {"x_train": train, "y_train": labels, "x_test": test, "y_test": LABELS[: len(test)], **others}
    np.savez(path, **arrays)
    return str(path)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (12, *shape), dtype=np.uint8)


@pytest.mark.parametrize("shape", [
    (8, 8, 1), (8, 8, 3), (8, 8, 4), (8, 10, 3), (32, 32, 3), (5, 7, 3), (4, 4, 3), (3, 3, 1), (9, 9, 2), (16, 16, 13),
    (16, 24, 6), (1, 1, 3), (32, 30, 3),
], ids=str)  # fmt: skip
def test_images_with_channels_last(shape, tmp_path):
    expected = ImageKind(shape[2], shape[0], shape[1], 3)
    path = write(tmp_path / "data.npz", images(*shape))
    assert image_kind(path) == expected
    data = load_data(path)
    assert data.kind == expected
    pixels = torch.from_numpy(images(*shape)).permute(0, 3, 1, 2).float() / 255
    normalised = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(data.train_images, normalised)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (4, 8, 8), (3, 8, 10), (1, 28, 28), (3, 32, 32), (3, 4, 4),
                                   (1, 5, 7), (3, 7, 5)], ids=str)  # fmt: skip
def test_images_with_channels_first_are_recognised(shape, tmp_path):
    first = write(tmp_path / "first.npz", images(*shape))
    last = write(tmp_path / "last.npz", np.moveaxis(images(*shape), 1, 3))
    assert image_kind(first) == image_kind(last) == ImageKind(*shape, 3)
    ours, theirs = load_data(first, max_images=9), load_data(last, max_images=9)
    for part in ("train_images", "test_images"):
        assert torch.equal(getattr(ours, part), getattr(theirs, part))
        assert getattr(ours, part).is_contiguous()


def test_both_parts_may_differ_in_the_order(tmp_path):
    path = write(tmp_path / "data.npz", images(1, 8, 8), images(8, 8, 1)[:6])
    assert load_data(path).test_images.shape == (6, 1, 8, 8)


@pytest.mark.parametrize(("shape", "complaint"), [
    ((3, 3, 3), "may be either"), ((1, 28, 1), "may be either"), ((3, 8, 3), "may be either"),
    ((13, 32, 32), "is neither"), ((32, 48, 64), "is neither"), ((2, 8, 8), "is neither"), ((4, 4, 16), "is neither"),
], ids=str)  # fmt: skip
def test_what_could_be_anything_is_refused(shape, complaint, tmp_path):
    path = write(tmp_path / "data.npz", images(*shape))
    for read in (image_kind, load_data):
        with pytest.raises(ConfigurationError, match=complaint) as refused:
            read(path)
        assert "[images, height, width, channels]" in str(refused.value)


def _with_nan(value):
    x = images(8, 8).astype(np.float32)
    x[3, 2, 1] = value
    return x


REFUSED = {
    "nan": (lambda: {"train": _with_nan(np.nan)}, "1 of 12 images have NaN or Inf, the first one is number 3"),
    "infinite": (lambda: {"train": _with_nan(-np.inf)}, "NaN or Inf"),
    "beyond float32": (lambda: {"train": images(8, 8).astype(float) * 1e300}, "NaN or Inf"),
    "nan in the test": (lambda: {"train": images(8, 8), "test": _with_nan(np.nan)[:6]}, "1 of 6 images have NaN"),
    "complex": (lambda: {"train": images(8, 8).astype(complex)}, "must be images"),
    "objects": (lambda: {"train": np.array([{}] * 12, dtype=object)}, "must be images"),
    "flat": (lambda: {"train": images(64)}, "must be images"),
    "five dimensions": (lambda: {"train": images(1, 2, 3, 4)}, "must be images"),
    "no pixels": (lambda: {"train": images(0, 8)}, "must be images"),
    "float labels": (lambda: {"train": images(8, 8), "labels": LABELS / 2}, "whole numbers"),
    "column of labels": (lambda: {"train": images(8, 8), "labels": LABELS[:, None]}, "whole numbers"),
    "too few labels": (lambda: {"train": images(8, 8), "labels": LABELS[:3]}, "whole numbers"),
    "negative labels": (lambda: {"train": images(8, 8), "labels": LABELS - 1}, "must not be negative"),
    "huge label": (lambda: {"train": images(8, 8), "labels": LABELS + 10**9}, "the largest is 1000000002"),
    "other channels": (lambda: {"train": images(8, 8, 3), "test": images(8, 8)[:6]}, "channels, those for the test 1"),
    "other sizes": (lambda: {"train": images(8, 8), "test": images(9, 9)[:6]}, "1 x 8 x 8 and 1 x 9 x 9: scale them"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_what_is_no_image_is_refused(case, tmp_path):
    arrays, complaint = REFUSED[case]
    path = write(tmp_path / "data.npz", **arrays())
    with pytest.raises(ConfigurationError, match=complaint) as refused:
        load_data(path)
    assert str(refused.value).count(path) <= 1


def test_sizes_may_differ_where_images_are_scaled(tmp_path):
    path = write(tmp_path / "data.npz", images(8, 8), images(9, 9)[:6])
    assert load_data(path, image_size=6).test_images.shape == (6, 1, 6, 6)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16])
def test_bytes_in_wider_integers_are_bytes(dtype, tmp_path):
    expected = load_data(write(tmp_path / "byte.npz", images(8, 8, 3)), normalize="imagenet")
    ours = load_data(write(tmp_path / "wide.npz", images(8, 8, 3).astype(dtype)), normalize="imagenet")
    assert torch.equal(ours.train_images, expected.train_images)
    path = write(tmp_path / "float.npz", images(8, 8, 3).astype(np.float32))
    with pytest.raises(ConfigurationError, match="pixels go from 0 to 255"):
        load_data(path, normalize="imagenet")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "data.npz"
    write(path, images(8, 8))
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[400:440] = b"x" * 40
    for data in (b"", b"x", content[:1000], content[:-30], bytes(damaged)):
        path.write_bytes(data)
        with pytest.raises(ConfigurationError, match="is not an npz file"):
            load_data(str(path))
    packed = path.with_name("packed.npz")
    np.savez_compressed(packed, x_train=images(64, 64), y_train=LABELS, x_test=images(64, 64)[:6], y_test=LABELS[:6])
    damaged = bytearray(packed.read_bytes())
    damaged[30000] ^= 0xFF  # in the pixels
    packed.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match="is not an npz file") as refused:
        load_data(str(packed))
    assert str(refused.value).count(str(packed)) == 1


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("key", ["x_train", "y_test"])
def test_damage_to_compressed_files_is_of_the_file(key, compression, tmp_path):
    source, path = tmp_path / "plain.npz", tmp_path / "data.npz"
    write(source, images(8, 8))
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(path, "w", compression) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    content, whole = path.read_bytes(), load_data(str(path))
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo(f"{key}.npy")
    begin = record.header_offset + 30 + len(record.filename)
    for place in range(begin, begin + record.compress_size, 3):
        damaged = bytearray(content)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with contextlib.suppress(ConfigurationError):  # it may read no further than to the header
            image_kind(str(path))
        try:
            data = load_data(str(path))
        except ConfigurationError as refused:
            assert re.search(r"is not an npz file with .*: \w", str(refused))  # noqa: PT017  # or nothing was lost:
        else:
            assert torch.equal(data.train.pixels, whole.train.pixels)
            assert torch.equal(data.test.labels, whole.test.labels)


def test_headers_that_are_not_closed_are_refused(tmp_path):
    source, path = tmp_path / "plain.npz", tmp_path / "data.npz"
    write(source, images(8, 8))
    with zipfile.ZipFile(source) as plain, zipfile.ZipFile(path, "w") as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name).replace(b"(12", b"(((", 1))
    with pytest.raises(ConfigurationError, match="is not an npz file"):
        load_data(str(path))


@pytest.mark.parametrize("size", [10**5, 10**9])
def test_images_that_no_memory_holds_are_refused(size, tmp_path):
    pytest.importorskip("sklearn")
    path = write(tmp_path / "data.npz", images(8, 8))
    for source in ("digits", path):
        for read in (image_kind, load_data):
            with pytest.raises(ConfigurationError, match=r"would take .* GB, this machine has"):
                read(source, size)
