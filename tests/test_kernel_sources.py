"""What a reader of the C sources may rely on: which folder knows instruction sets, and what a new one has to bring."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "qsparseprop" / "_kernels"

pytestmark = pytest.mark.skipif(not (KERNELS / "isa").is_dir(), reason="needs the sources")


def code(path: Path) -> str:
    """A C file without its comments."""
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def functions(text: str, end: str) -> set[str]:
    """Names of the static functions whose parameters are followed by `end`."""
    return set(re.findall(rf"^(?:QSP_INLINE|QSP_APART|static)(?: inline)? [\w ]+?[ *]+(\w+)\([^)]*\){end}", text, re.M))


def loops():
    return sorted((KERNELS / "loops").glob("*.h"))


def test_the_sources_are_found():
    assert {"spmm.h", "sddmm.h", "pack.h", "table.h"} <= {path.name for path in loops()}


@pytest.mark.parametrize("path", loops(), ids=lambda path: path.name)
def test_loops_have_no_intrinsics(path):
    assert not re.findall(r"\b(?:_mm\w*|__m\d+\w*|__asm__|__AVX\w*|v\w+q_\w+)\b", code(path))


@pytest.mark.parametrize("path", [*loops(), *sorted((KERNELS / "isa").glob("*.h"))], ids=lambda path: path.name)
def test_slots_are_counted_in_groups_by_name(path):
    """4 is QSP_GROUP wherever slots are counted."""
    assert not re.findall(r".*(?:\b4 \* [^;\n]*group|group[^;\n]* \* 4\b|(?:offset|weight) \+ 4\b).*", code(path))


def test_every_primitive_has_a_contract():
    declared = functions(code(KERNELS / "isa" / "primitives.h"), ";")
    defined = functions(code(KERNELS / "isa" / "scalar.h"), r"\s*\{")
    assert len(declared) > 80
    assert defined - declared == {"nearest", "wrapping_add"}  # helpers
    assert declared - defined == set()


def test_every_primitive_is_used():
    """What no loop wants, no new instruction set should have to bring."""
    used = set(re.findall(r"\w+", "".join(code(path) for path in loops())))
    assert functions(code(KERNELS / "isa" / "primitives.h"), ";") - used == set()
