"""Random changes of images, each against its definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop.training.data import Augmentation, ImageData, image_loader, load_data
from qsparseprop.utils.errors import ConfigurationError

from ._helpers import examples

DTYPES = [torch.uint8, torch.float32]


def images(count, height, width, dtype=torch.uint8):
    torch.manual_seed(count * height * width)
    x = torch.randint(0, 256, (count, 3, height, width))
    return x.to(dtype)


def double(image):
    return image.flip(1)


def smaller(image):
    return image[:, 1:]


def noisy(image):
    return image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_flip(dtype):
    x = images(4, 5, 7, dtype)
    ours = Augmentation(["flip"])(x, torch.tensor([[0.0], [0.49], [0.5], [0.99]], dtype=torch.float64))
    assert torch.equal(ours[:2], x[:2].flip(-1))
    assert torch.equal(ours[2:], x[2:])


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4),
       st.sampled_from(DTYPES))  # fmt: skip
@examples(60)
def test_crop(height, width, draws, dtype):
    x = images(2, height, width, dtype)
    before = x.clone()
    ours = Augmentation(["crop"])(x, torch.tensor(draws, dtype=torch.float64).view(2, 2))
    assert torch.equal(x, before)
    assert ours.dtype == dtype
    top, left = height // 8, width // 8
    for image, result, (y, shift) in zip(x, ours, (draws[:2], draws[2:]), strict=True):
        padded = F.pad(image, (left, left, top, top))
        down, right = int((2 * top + 1) * y), int((2 * left + 1) * shift)
        assert torch.equal(result, padded[:, down : down + height, right : right + width])


@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.floats(0, 1, exclude_max=True), min_size=4, max_size=4))
@examples(60)
def test_resized_crop(height, width, draws):
    x = images(1, height, width, torch.float32)
    ours = Augmentation(["resized-crop"])(x, torch.tensor([draws], dtype=torch.float64))
    area, ratio, y, left = draws
    share, aspect = 0.25 + 0.75 * area, (3 / 4) * (16 / 9) ** ratio
    rows = min(height, max(1, round(height * math.sqrt(share / aspect))))
    columns = min(width, max(1, round(width * math.sqrt(share * aspect))))
    top, first = int((height - rows + 1) * y), int((width - columns + 1) * left)
    part = x[:, :, top : top + rows, first : first + columns]
    expected = F.interpolate(part, size=(height, width), mode="bilinear", antialias=True)
    torch.testing.assert_close(ours, expected)
    assert rows * columns >= 1


def test_draws_go_to_each_in_its_turn():
    augmentation = Augmentation(["flip", "crop", "resized-crop"])
    assert augmentation.draws == 7
    x, draws = images(3, 16, 16), torch.rand(3, 7, dtype=torch.float64)
    expected = x
    for name, columns in (("flip", draws[:, :1]), ("crop", draws[:, 1:3]), ("resized-crop", draws[:, 3:])):
        expected = Augmentation([name])(expected, columns)
    assert torch.equal(augmentation(x, draws), expected)
    assert Augmentation([]).draws == 0


def test_a_function_of_the_user():
    x = images(2, 4, 6)
    draws = torch.rand(2, 1, dtype=torch.float64)
    assert torch.equal(Augmentation([f"{__name__}:double"])(x, draws), x.flip(2))
    state = torch.get_rng_state()
    once, again = (Augmentation([f"{__name__}:noisy"])(x, draws) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, x)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigurationError, match=r"must give an image as it gets it, \(3, 4, 6\) of "):
        Augmentation([f"{__name__}:smaller"])(x, draws)


@pytest.mark.parametrize(("name", "complaint"), [
    ("no.such:thing", "cannot import the augmentation no.such:thing: No module named 'no'"),
    ("math:nothing", "cannot import the augmentation math:nothing"),
    ("math:pi", "math:pi is not a function"),
    ("Flip", "'Flip' is none of flip, crop, resized-crop and package.module:function"),
])  # fmt: skip
def test_what_is_no_augmentation_is_refused(name, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        Augmentation([name])


def test_transforms_of_torchvision():
    v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    x = images(3, 16, 16)
    draws = torch.rand(3, 1, dtype=torch.float64)
    ours = Augmentation(["TrivialAugmentWide"])(x, draws)
    for image, result, draw in zip(x, ours, draws[:, 0].tolist(), strict=True):
        torch.manual_seed(int(draw * 2**53))
        assert torch.equal(result, v2.TrivialAugmentWide()(image))
    with pytest.raises(ConfigurationError, match="RandomCrop needs arguments"):
        Augmentation(["RandomCrop"])
    with pytest.raises(ConfigurationError, match=r"'functional' is none of .* nor has torchvision a transform"):
        Augmentation(["functional"])


# ---- what is black ----


def stored(kind, tmp_path):
    """Images whose first pixel is black: as digits, normalised by somebody, or from 0 to 1."""
    if kind == "digits":
        pytest.importorskip("sklearn")
        return load_data("digits", image_size=16)
    pixels = np.random.default_rng(0).random((16, 16, 16, 3), dtype=np.float32)
    pixels[0, 0, 0] = 0
    if kind == "normalised":
        pixels = (pixels - np.float32([0.5, 0.4, 0.3])) / np.float32([0.2, 0.3, 0.4])
    np.savez(tmp_path / "x.npz", x_train=pixels, x_test=pixels, y_train=np.arange(16) % 2, y_test=np.arange(16) % 2)
    return load_data(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("kind", ["digits", "normalised", "from 0 to 1"])
def test_what_is_left_empty_is_black_in_images_of_floats(kind, tmp_path):
    data = stored(kind, tmp_path)
    black = data.train_images.amin((0, 2, 3))
    for some in (data, data.first(12), ImageData.from_state(data.state())):
        plain, moved = (next(iter(image_loader(some, "train", 8, seed=0, augment=augment)))[0]
                        for augment in (None, Augmentation(["crop"])))  # fmt: skip
        # of the same images; where a corner differs from what is next to it, it was moved there or is empty
        assert not torch.equal(plain, moved)
        values = {float(v) for v in plain[:, 0].unique()}
        new = [float(v) for v in moved[:, 0].unique() if float(v) not in values]
        assert new in ([], pytest.approx([float(black[0])], abs=1e-6))
        edges = torch.cat([moved[:, 0, 0], moved[:, 0, -1], moved[:, 0, :, 0], moved[:, 0, :, -1]])
        assert float((edges - black[0]).abs().min()) < 1e-6


def test_transforms_of_torchvision_fill_with_black(tmp_path):
    pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    black = torch.tensor([-2.0, -1.0, 3.0])
    x = black.view(-1, 1, 1).expand(8, 3, 16, 16)
    draws = torch.rand(8, 1, dtype=torch.float64)
    torch.testing.assert_close(Augmentation(["RandomPerspective"])(x, draws, black), x, rtol=0, atol=1e-6)
    assert not torch.allclose(Augmentation(["RandomPerspective"])(x, draws), x)
