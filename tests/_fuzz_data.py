"""Reads images from files that are not what they seem: .npz of other arrays, headers and bytes, and damaged images.

    python -m tests._fuzz_data SEED FILES FOLDER

A file is refused by a `ConfigurationError`, or gives finite images of the shape that it says.
"""

from __future__ import annotations

import faulthandler
import io
import json
import random
import re
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qsparseprop.training.data import image_kind, load_data
from qsparseprop.training.data._reading import read_image
from qsparseprop.utils.errors import ConfigurationError

from ._fuzz_api import limit_memory

MEMORY = 4 << 30
TYPES = ("u1", "f4", "i8", "f8", "?", "f2", ">i2", ">f4", "u2")
SHAPES = ((8, 8, 3), (3, 8, 8), (8, 8), (9, 7, 1))
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)

#: What an array may be instead.
ODD = (
    lambda a: a.astype(object), lambda a: a[..., ::-1], np.asfortranarray, lambda a: a.astype("c8"),
    lambda a: a.astype("i8").astype("M8[s]"), lambda a: a.astype("U3"), lambda a: np.zeros(3, [("a", "i4")]),
    lambda a: np.zeros(a.shape, np.longdouble), lambda a: np.full(a.shape, np.nan), lambda a: np.full(a.shape, np.inf),
    lambda a: np.full(a.shape, 2**63, "u8"), lambda a: a[:0], lambda a: np.array(5), lambda a: np.full(a.shape, -1),
    lambda a: np.full(a.shape, 1e300), lambda a: np.full(a.shape, 1e-45), lambda a: a[: len(a) // 2],
)  # fmt: skip
SIZES = (b"-1", b"9" * 6, b"9" * 12, b"9" * 19, b"9" * 25, b"0", b"True", b"1.5", b"'a'")
DESCRIPTIONS = (b"'|O", b"'<V", b"'>", b"'(3,)<", b"'<M8[", b"[('a','<")
HEADERS = (
    b"(" * 200 + b")" * 200, b"-" * 3000 + b"1", b"{'descr': '<f4', 'fortran_order': True, 'shape': (20, 8, 8, 3), }",
    b"{'descr': [('f0','<f4',(2,2))], 'fortran_order': False, 'shape': (20,8,8), }",
    b"{'descr': '<f4', 'fortran_order': False, 'shape': (20L, 8, 8, 3), }",
)  # fmt: skip
#: Pillow's format and mode, and the ending.
FORMATS = (("PNG", "RGB", "png"), ("PNG", "P", "png"), ("PNG", "I;16", "png"), ("PNG", "LA", "png"),
           ("JPEG", "RGB", "jpg"), ("JPEG", "CMYK", "jpg"), ("JPEG", "L", "jpeg"), ("GIF", "P", "gif"),
           ("BMP", "RGB", "bmp"), ("TIFF", "RGB", "tif"), ("TIFF", "I;16", "tif"), ("TIFF", "F", "tiff"),
           ("WEBP", "RGBA", "webp"), ("PPM", "RGB", "ppm"), ("PPM", "L", "pgm"), ("TIFF", "1", "tif"))  # fmt: skip


def damage(content: bytes, rng: random.Random, head: int) -> bytes:
    """Some bits or bytes changed, most of them near the beginning, or parts missing, or put in."""
    data = bytearray(content)
    kind = rng.choice(["bits", "bits", "bytes", "numbers", "cut", "missing", "more"])
    place = rng.randrange(len(data) if rng.random() < 0.4 else min(len(data), head))
    if kind in ("bits", "bytes"):
        for _ in range(rng.choice([1, 1, 3, 10])):
            other = rng.choice([0, 255, rng.randrange(256)])
            data[place] = data[place] ^ 1 << rng.randrange(8) if kind == "bits" else other
            place = rng.randrange(min(len(data), head))
    elif kind == "numbers":
        data[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff"])
    elif kind == "cut":
        del data[place:]
    elif kind == "missing":
        del data[place : place + rng.randrange(1, 9)]
    else:
        data[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


def change_header(array: bytes, rng: random.Random) -> bytes:
    """A member of an .npz with another description of its array."""
    length = struct.unpack("<H", array[8:10])[0]
    header, values = array[10 : 10 + length].rstrip(), array[10 + length :]
    kind = rng.choice(["byte", "size", "type", "whole"])
    if kind == "byte":
        place = rng.randrange(len(header))
        header = header[:place] + rng.randbytes(1) + header[place + 1 :]
    elif kind == "size":
        header = re.sub(rb"\(\d+", b"(" + rng.choice(SIZES), header)
    elif kind == "type":
        header = re.sub(rb"'[<|>]", rng.choice(DESCRIPTIONS), header, count=1)
    else:
        header = rng.choice(HEADERS)
    return array[:8] + struct.pack("<H", len(header) + 1) + header + b"\n" + values


def npz(rng: random.Random) -> bytes:
    """One that could be read, with something wrong in it, as a rule."""
    random_numbers = np.random.default_rng(rng.getrandbits(32))
    shape, kind, members = rng.choice(SHAPES), rng.choice(TYPES), {}
    for part, count in (("train", 20), ("test", 10)):
        images = random_numbers.random((count, *shape)) * rng.choice([1, 255])
        for name, array in ((f"x_{part}", images.astype(kind)), (f"y_{part}", random_numbers.integers(0, 3, count))):
            file = io.BytesIO()
            with np.errstate(all="ignore"):
                changed = rng.choice(ODD)(array) if rng.random() < 0.12 else array
            np.lib.format.write_array(file, np.asanyarray(changed), allow_pickle=True)
            members[name] = file.getvalue()
    if rng.random() < 0.4:
        name = rng.choice(list(members))
        members[name] = change_header(members[name], rng)
    if rng.random() < 0.1:
        del members[rng.choice(list(members))]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", rng.choice(COMPRESSIONS)) as archive:
        for name, content in members.items():
            for again in range(1 + (rng.random() < 0.03)):
                archive.writestr(f"{name}.npy", content[: len(content) // 2] if again else content)
    content = file.getvalue()
    return damage(content, rng, len(content)) if rng.random() < 0.5 else content


def read_npz(path: Path, rng: random.Random) -> None:
    """As finetune does."""
    size, normalize = rng.choice([None, 8, 5]), rng.choice(["data", "imagenet"])
    seen = image_kind(str(path), size)
    data = load_data(str(path), size, 0, normalize, rng.choice([None, 7]))
    for images, labels in ((data.train_images, data.train_labels), (data.test_images, data.test_labels)):
        assert torch.isfinite(images).all(), "images with NaN or Inf"
        assert len(images) == len(labels) > 0
        assert seen is None or images.shape[1:] == (seen.channels, seen.height, seen.width), (seen, images.shape)
        assert int(labels.min()) >= 0
        assert int(labels.max()) < data.num_classes


def images(rng: random.Random) -> list[tuple[str, bytes]]:
    """Small ones of many formats, some with notes of a camera."""
    values, found = np.random.default_rng(0).random((24, 20, 3)), []
    for kind, mode, ending in FORMATS:
        for noted in range(3):
            if mode == "I;16":
                image = Image.fromarray((values[..., 0] * 65535).astype(np.uint16))
            elif mode == "F":
                image = Image.fromarray(values[..., 0].astype(np.float32))
            else:
                image = Image.fromarray((values * 255).astype(np.uint8)).convert(mode)
            options: dict[str, object] = {}
            if kind == "TIFF":
                options["compression"] = "group4" if mode == "1" else rng.choice(["raw", "tiff_lzw", "packbits"])
            if noted and kind in ("JPEG", "TIFF", "PNG", "WEBP"):
                notes = Image.Exif()
                notes[0x112] = rng.randrange(1, 9)  # how it is turned
                options["exif"] = notes
            file = io.BytesIO()
            image.save(file, kind, **options)
            found.append((ending, file.getvalue()))
    return found


def main() -> None:
    """Try so many files, and say what became of them."""
    seed, count, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rng, counts = random.Random(seed), Counter[str]()
    whole = images(rng)
    limit_memory(MEMORY)
    for number in range(count):
        kind = "image" if number % 3 else "npz"
        ending, content = ("npz", npz(rng)) if kind == "npz" else rng.choice(whole)
        path = folder / f"last.{ending}"
        path.write_bytes(content if kind == "npz" else damage(content, rng, 160))
        print(number, kind, ending, flush=True)
        faulthandler.dump_traceback_later(60, exit=True)
        began = time.monotonic()
        try:
            if kind == "npz":
                read_npz(path, rng)
            else:
                pixels = read_image(str(path), 8)
                assert pixels.shape == (8, 8, 3)
                assert pixels.dtype == np.uint8
            counts[f"{kind} read"] += 1
        except ConfigurationError as error:
            counts[f"{kind} refused"] += 1
            if str(path) not in str(error):
                raise AssertionError(f"does not name its file: {error}") from error
        assert time.monotonic() - began < 30
        path.unlink()
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(counts))


if __name__ == "__main__":
    main()
