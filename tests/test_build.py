"""What is in the compiled modules: a wheel is to be small, and to name no folder of the machine that built it."""

from __future__ import annotations

import re
import struct
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from qsparseprop import _kernels
from qsparseprop._kernels import _dispatch
from qsparseprop.layout import geometry

MODULES = sorted(Path(_kernels.__path__[0]).glob("*" + EXTENSION_SUFFIXES[0]))

#: Three tags of the dynamic section, that section's type, and two types of symbols, as in the ELF specification.
NEEDED, RPATH, RUNPATH, SHT_DYNAMIC = 1, 15, 29, 6
STT_FUNC, STT_FILE = 2, 4


def sections(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Type and content of the sections of a 64-bit little-endian ELF file, by name."""
    (table,) = struct.unpack_from("<Q", data, 40)
    size, count, names = struct.unpack_from("<HHH", data, 58)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    start = headers[names][4]
    found = {}
    for name, kind, _, _, offset, length in headers:
        found[text_at(data, start + name)] = (kind, data[offset : offset + length])
    return found


def dynamic_tags(found: dict[str, tuple[int, bytes]]) -> set[tuple[int, int]]:
    """Entries of the dynamic section: their tags and values."""
    contents = [content for kind, content in found.values() if kind == SHT_DYNAMIC]
    return {entry for content in contents for entry in struct.iter_unpack("<QQ", content)}


def text_at(strings: bytes, start: int) -> str:
    """A name in a table of strings."""
    return strings[start : strings.index(b"\0", start)].decode()


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
    if _dispatch.openmp_of == "compiler":
        pytest.skip("clang adds the folder of its own OpenMP runtime")
    tags = dynamic_tags(elf_sections(path))
    assert tags, "not a dynamic library"
    assert not {RPATH, RUNPATH} & {tag for tag, _ in tags}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name.split(".")[0])
def test_modules_need_no_openmp_runtime_of_their_own(path):
    """Its functions are torch's, which all runtimes have that torch is built with on Linux."""
    if _dispatch.openmp_of == "compiler":
        pytest.skip("this build was asked to")
    found = elf_sections(path)
    names = found[".dynstr"][1]
    needed = {text_at(names, value) for tag, value in dynamic_tags(found) if tag == NEEDED}
    assert not {name for name in needed if not name.startswith(("libc.", "libm.", "libpthread.", "ld-linux"))}
    symbols = struct.iter_unpack("<IBBHQQ", found[".dynsym"][1])
    undefined = {text_at(names, name) for name, _, _, section, _, _ in symbols if not section}
    assert not {name for name in undefined if name.startswith("__kmpc")}, "openmp/kmpc.c lacks them"
    if path.name.startswith("_dispatch."):  # which is loaded before there is one, to tell whether one is wanted
        assert not {name for name in undefined if name.startswith(("GOMP", "omp_"))}


def test_modules_are_small():
    assert sum(path.stat().st_size for path in MODULES) <= 5e6


def functions(path: Path) -> dict[str, list[str]]:
    """Names of the functions of a module, by the source file that they come from; what a profiler shows."""
    found = elf_sections(path)
    if ".symtab" not in found:
        pytest.skip("the modules are stripped")
    names, by_file, file = found[".strtab"][1], {}, ""
    for start, info, _, section, _, _ in struct.iter_unpack("<IBBHQQ", found[".symtab"][1]):
        name = text_at(names, start)
        if info & 15 == STT_FILE:
            file = Path(name).name
        elif info & 15 == STT_FUNC and section:
            by_file.setdefault(file, []).append(name)
    return by_file


@pytest.fixture
def kernels():
    (path,) = (path for path in MODULES if path.name.startswith("_dispatch."))
    return functions(path)


@pytest.mark.parametrize("isa", _dispatch.built_isas())
def test_functions_name_their_instruction_set(kernels, isa):
    # .part.0, .constprop.1 and the like are the compiler's; qsp_... are helpers that Cython's modules have as well
    own = {name.split(".")[0] for name in kernels[f"{isa}.c"] if not name.startswith("qsp_")}
    named = {name for name in own if name.endswith(f"__{isa}")}
    # of some the rest is the code of avx512vnni
    if isa == "avx512vbmi":
        assert f"tokens_product__{isa}" in named
    else:
        assert {f"{name}__{isa}" for name in ("spmm_dense_u8s8", "sddmm_dense_u8s8")} <= named
    if isa not in ("amx", "amx_model", "avx512vbmi"):
        assert {f"{name}__{isa}" for name in ("spmm_f32_64x2", "sddmm_f32_64x1")} <= named
        for product in ("spmm", "sddmm"):
            assert any(re.fullmatch(rf"{product}_u8s8_\d+x\d+__{isa}", name) for name in named)
    if isa != "scalar":  # which keeps functions that are inline in all others
        assert not own - named, "isa/names.h lacks them"


def test_no_two_functions_have_one_name(kernels):
    names = [name for file in kernels.values() for name in file if not name.startswith("qsp_")]
    assert len(names) > 100
    assert not {name for name in names if names.count(name) > 1}


def test_units_and_groups_are_as_large_as_in_python():
    assert _dispatch.unit == geometry.UNIT
    assert _dispatch.group == geometry.GROUP
