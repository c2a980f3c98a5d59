"""What is in the compiled modules: a wheel is to be small, and to name no folder of the machine that built it."""

from __future__ import annotations

import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from qsparseprop import _kernels
from qsparseprop._kernels import _dispatch

MODULES = sorted(Path(_kernels.__path__[0]).glob("*" + EXTENSION_SUFFIXES[0]))

#: Two tags of the dynamic section, and that section's type, as in the ELF specification.
RPATH, RUNPATH, SHT_DYNAMIC = 15, 29, 6


def sections(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Type and content of the sections of a 64-bit little-endian ELF file, by name."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    start = headers[names][4]
    found = {}
    for name, kind, _, _, offset, length in headers:
        text = data[start + name : data.index(b"\0", start + name)].decode()
        found[text] = (kind, data[offset : offset + length])
    return found


def elf_sections(path: Path) -> dict[str, tuple[int, bytes]]:
    """The same of a file; skips the test where it is of another kind."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        pytest.skip("no 64-bit little-endian ELF files here")
    return sections(data)


def test_the_modules_are_found():
    names = {path.name.split(".")[0] for path in MODULES}
    assert {"_dispatch", "_matmul", "_pack"} <= names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_have_no_debug_data(path):
    assert not [name for name in elf_sections(path) if name.startswith((".debug", ".zdebug"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_name_no_folder_of_the_build_machine(path):
    if not _dispatch.compiler.startswith("GCC"):
        pytest.skip("clang adds the folder of its own OpenMP runtime")
    dynamic = [content for kind, content in elf_sections(path).values() if kind == SHT_DYNAMIC]
    tags = {tag for content in dynamic for tag, _ in struct.iter_unpack("<QQ", content)}
    assert tags, "not a dynamic library"
    assert not tags & {RPATH, RUNPATH}


def test_modules_are_small():
    assert sum(path.stat().st_size for path in MODULES) <= 5e6
