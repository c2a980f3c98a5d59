"""The C sources are C11 without extensions, for Windows too, and nothing in them is there for GNU's compilers alone."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "qsparseprop" / "_kernels"
SOURCES = [*sorted((KERNELS / "isa").glob("*.c")), *sorted((KERNELS / "openmp").glob("*.c"))]
STRICT = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Wvla", "-Werror", "-fsyntax-only"]

pytestmark = pytest.mark.skipif(not SOURCES, reason="needs the sources")

#: Headers that only .pyx files include.
OTHERS = """
#include "isa/cpu.h"
#include "dlpack.h"
#include "pool.h"
int unused(void);
int unused(void)
{
    int64_t size = 0;
    void *taken = qsp_pool_take(1 << 20, 0, &size);
    if (taken)
        qsp_pool_give(taken, size);
    return (int)qsp_pool_release() + QSP_BUILT * qsp_supported(0) + (qsp_table(0) == 0);
}
"""

#: As much of Microsoft's C library as the sources use.
LIBRARY = {
    "string.h": """
void *memcpy(void *, const void *, size_t);
void *memmove(void *, const void *, size_t);
void *memset(void *, int, size_t);
int memcmp(const void *, const void *, size_t);
""",
    "stdlib.h": "void *malloc(size_t);\nvoid *calloc(size_t, size_t);\nvoid free(void *);\n",
    "malloc.h": "",
    "math.h": """
#define INFINITY ((float)(1e300 * 1e300))
#define NAN (INFINITY * 0.0f)
#define isnan(x) ((x) != (x))
#define isfinite(x) ((x) - (x) == 0)
float copysignf(float, float), fabsf(float), floorf(float), fmaf(float, float, float), fmaxf(float, float);
float fminf(float, float), nextafterf(float, float), rintf(float), sqrtf(float), expf(float), tanhf(float);
float ldexpf(float, int);
double fabs(double), floor(double), fma(double, double, double), rint(double), sqrt(double), exp(double);
""",
    "intrin.h": """
unsigned __int64 __popcnt64(unsigned __int64);
unsigned char _BitScanForward64(unsigned long *, unsigned __int64);
void __cpuid(int[4], int);
void __cpuidex(int[4], int, int);
unsigned __int64 _xgetbv(unsigned);
""",
}
#: What only GNU's compilers and clang know: nobody may use it where Microsoft's compiles.
POISON = """
#include <immintrin.h>
#undef __clang__
#undef __GNUC__
#pragma GCC poison __attribute__ __asm__ __extension__ __typeof__ typeof __int128 __builtin_prefetch __builtin_trap
#pragma GCC poison __builtin_popcount __builtin_popcountll __builtin_ctz __builtin_ctzll __builtin_cpu_supports
"""


def compile_strictly(command: list[str], source: Path) -> None:
    process = subprocess.run([*command, f"-I{KERNELS}", str(source)], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def other_headers(tmp_path: Path) -> Path:
    source = tmp_path / "others.c"
    source.write_text(OTHERS)
    return source


def needs(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")


COMPILERS = ("gcc", "clang", "x86_64-w64-mingw32-gcc", "aarch64-linux-gnu-gcc")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_sources_are_c11(compiler, path):
    needs(compiler)
    # the declarations of functions that are Linux's own
    compile_strictly([compiler, *STRICT, "-D_DEFAULT_SOURCE", "-DQSPARSEPROP_OPENMP=1"], path)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_headers_are_c11(compiler, tmp_path):
    needs(compiler)
    compile_strictly([compiler, *STRICT, "-D_DEFAULT_SOURCE"], other_headers(tmp_path))


def target_of(path: Path) -> list[str]:
    """x86's instruction sets that a file switches on by pragma, which Microsoft's compiler is told by a flag."""
    found = re.search(r'#pragma GCC target\("([^"=]*)"\)', path.read_text())
    return [f"-m{name}" for name in found[1].split(",")] if found else []


def as_microsofts(tmp_path: Path) -> list[str]:
    """Clang, which takes itself for Microsoft's compiler with the header above in front."""
    needs("clang")
    for name, text in LIBRARY.items():
        (tmp_path / name).write_text(f"#pragma once\n#include <stddef.h>\n{text}")
    (tmp_path / "poison.h").write_text(POISON)
    flags = ["--target=x86_64-pc-windows-msvc", "-fms-compatibility-version=19.40", "-nostdlibinc"]
    # what Microsoft's knows, and does not complain of
    allowed = ["-Wno-language-extension-token", "-Wno-unused-function", "-Wno-unknown-pragmas"]
    return ["clang", *flags, *STRICT, *allowed, "-isystem", str(tmp_path), "-include", str(tmp_path / "poison.h")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_are_for_microsofts_compiler_too(path, tmp_path):
    compile_strictly([*as_microsofts(tmp_path), *target_of(path)], path)


def test_headers_are_for_microsofts_compiler_too(tmp_path):
    compile_strictly(as_microsofts(tmp_path), other_headers(tmp_path))
