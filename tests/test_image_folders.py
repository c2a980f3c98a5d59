"""Folders of images as they are: with files that are none, and images of cameras that were not held upright."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from qsparseprop.training.data import load_data
from qsparseprop.training.data.images import read_image
from qsparseprop.utils.errors import ConfigurationError

from .test_data_found import folder

RANDOM = np.random.default_rng(0)


def test_files_that_are_passed_over_are_told_of(tmp_path):
    data = folder(tmp_path / "photos")
    (data / "cat" / "more").mkdir()
    shutil.copy(data / "cat" / "0.png", data / "cat" / "more" / "10.png")
    for name in ("dog/a.heic", "labels.csv", "dog/Thumbs.db", "cat/.hidden", "dog/.cache.txt"):
        (data / name).write_text("x")
    with pytest.warns(UserWarning, match=r"3 files are passed over, cat/more/10\.png, dog/a\.heic, labels\.csv; an im"):
        found = load_data(str(data), image_size=8)
    assert len(found.train.labels) + len(found.test.labels) == 20
    for name in ("cat", "dog"):
        for number in range(3):
            (data / name / f"{number}.heic").write_text("x")
    with pytest.warns(UserWarning, match=r"9 files are passed over, .* and 6 more; "):
        load_data(str(data), image_size=8)


def test_a_third_part_is_told_of(tmp_path):
    for part in ("train", "test", "val"):
        folder(tmp_path / part, images=2)
    with pytest.warns(UserWarning, match=r"4 files are passed over, val/cat/0\.png, val/cat/1\.png, .* and 1 more"):
        load_data(str(tmp_path), image_size=8)


@pytest.mark.parametrize("place", ["bee/more/0.png", "bee/0.heic"])
def test_a_class_that_has_lost_all_is_refused_with_what_is_there(place, tmp_path):
    data = folder(tmp_path, ("ant", "cat"))
    (data / place).parent.mkdir(parents=True)
    shutil.copy(data / "ant" / "0.png", data / place)
    with pytest.raises(ConfigurationError, match=rf"without images: bee \(there are {place}\); an image is a file"):
        load_data(str(data), image_size=8)
    for name in ("ant", "cat"):
        shutil.rmtree(data / name)
    with pytest.raises(ConfigurationError, match=rf"one folder of images a class.*: 1 file is passed over, {place}; "):
        load_data(str(data), image_size=8)


def test_links_that_lead_back_are_not_followed(tmp_path):
    data = folder(tmp_path)
    try:
        (data / "cat" / "again").symlink_to(data, target_is_directory=True)
    except OSError:
        pytest.skip("needs links")
    with pytest.warns(UserWarning, match=r"1 file is passed over, cat/again;"):
        load_data(str(data), image_size=8)


def test_a_command_tells_of_it_in_a_line(tmp_path):
    data = folder(tmp_path / "photos")
    (data / "cat" / "a.heic").write_text("x")
    command = [sys.executable, "-m", "qsparseprop", "finetune", "--no-compare", "--quiet", "--data", str(data),
               "--model", "mlp", "--width", "8", "--image-size", "8", "--batch-size", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if "passed over" in line or "sources.py" in line] == [
        f"python -m qsparseprop finetune: warning: {data}: 1 file is passed over, cat/a.heic; an image is a file "
        "*.bmp, *.gif, *.jpeg, *.jpg, *.png, *.ppm, *.tif, *.tiff, *.webp right in the folder of its class"]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_the_camera_was(orientation, kind, tmp_path):
    image, ops = pytest.importorskip("PIL.Image"), pytest.importorskip("PIL.ImageOps")
    pixels = np.zeros((48, 32, 3), np.uint8)
    pixels[:24, :16, 0] = pixels[24:, :16, 1] = 255
    exif = image.Exif()
    exif[0x0112] = orientation
    image.fromarray(pixels).save(tmp_path / f"x.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
    with image.open(tmp_path / f"x.{kind}") as stored:
        expected = ops.exif_transpose(stored).convert("RGB").resize((16, 16), image.Resampling.BILINEAR)
    ours = read_image(str(tmp_path / f"x.{kind}"), 16)
    if kind == "jpg":
        # which is decoded at a smaller size
        assert np.abs(ours.astype(int) - np.asarray(expected)).mean() < 4
    else:
        assert np.array_equal(ours, np.asarray(expected))


def test_a_damaged_note_of_a_camera_leaves_the_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for number, note in enumerate((b"Exif\0\0no TIFF", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"")):
        image.fromarray(pixels).save(tmp_path / f"{number}.png", exif=note)
        assert np.array_equal(read_image(str(tmp_path / f"{number}.png"), 8), pixels)


def test_classes_that_no_network_can_learn_are_named(tmp_path):
    data = folder(tmp_path / "inner", ("ant",))
    with pytest.raises(ConfigurationError, match="there is one class only, ant: a network learns to tell"):
        load_data(str(data), image_size=8)
    folder(tmp_path / "few" / "a", ("ant", "bee"), images=1)
    with pytest.raises(ConfigurationError, match=r"at least two images a class.*: there is one of ant, bee$"):
        load_data(str(tmp_path / "few" / "a"), image_size=8)
    folder(tmp_path / "parts" / "train", ("ant", "bee"))
    folder(tmp_path / "parts" / "val", ("ant", "cat"))
    with pytest.raises(ConfigurationError, match=r"same classes; only train/ has bee; only val/ has cat$"):
        load_data(str(tmp_path / "parts"), image_size=8)
    x, y = np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64)
    np.savez(tmp_path / "one.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(ConfigurationError, match="all labels are 0"):
        load_data(str(tmp_path / "one.npz"))
