"""Which instruction sets this processor is said to have."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from qsparseprop._kernels import _dispatch

#: As Linux calls what each file switches on; AMX is asked for besides, and has a model that needs less.
AVX2 = {"avx2", "fma"}
AVX512VL = {*AVX2, "avx512f", "avx512vl", "avx512_vnni"}
AVX512VNNI = {*AVX512VL, "avx512bw", "avx512dq"}
NEEDED = {
    "scalar": set(),
    "avx2": AVX2,
    "avxvnni": {*AVX2, "avx_vnni"},
    "avx512vl": AVX512VL,
    "avx512vnni": AVX512VNNI,
    "avx512vbmi": {*AVX512VNNI, "avx512vbmi"},
    "amx_model": AVX512VNNI,
}


def test_what_is_supported_is_what_linux_says():
    """Linux leaves out what it does not save for a process, and so does the build."""
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("needs Linux on x86-64")
    (line, *_) = (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split())
    built = set(_dispatch.built_isas()) - {"amx"}
    assert set(_dispatch.supported_isas()) - {"amx"} == {isa for isa in built if NEEDED[isa] <= flags}
    assert {"amx_tile", "amx_int8"} <= flags or "amx" not in _dispatch.supported_isas()
