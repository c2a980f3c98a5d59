"""Every primitive and the products of each instruction set against portable C, in a program without Python.

``tests/native`` has the program: ``loops/table.h`` takes the place of the loops' own and puts functions of plain
memory around the primitives, ``primitives.c`` gives them random and extreme operands, at the end of memory. It is built
for this machine, and for 64-bit ARM by a cross compiler, where qemu runs it as processors with the extensions and
without.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qsparseprop._kernels import _dispatch

from .test_kernel_sources import KERNELS, code, functions

NATIVE = Path(__file__).resolve().parent / "native"
FLAGS = ["-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{KERNELS}"]
#: The optimisation that fewest of the compiler's seconds go to, and none of the warnings get lost by.
OPTIMISED = "-O1"
ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")
#: qemu's processors, and the instruction sets that are to be found there: the baseline, sdot, sdot and usdot.
PROCESSORS = {
    "cortex-a72": ["scalar", "neon"],
    "neoverse-n1": ["scalar", "neon", "neon_dotprod"],
    "max": ["scalar", "neon", "neon_dotprod", "neon_i8mm"],
}

pytestmark = pytest.mark.skipif(not (KERNELS / "isa").is_dir(), reason="needs the sources")


def compiler(*names: str) -> list[str]:
    """The first command that there is; skips the test where there is none."""
    for name in names:
        command = shlex.split(name)
        if shutil.which(command[0]):
            return command
    pytest.skip(f"needs a compiler: {' or '.join(names)}")


def build(command: Sequence[str], folder: Path) -> Path:
    """The program, all warnings being errors."""
    sources = [NATIVE / "primitives.c", *sorted((KERNELS / "isa").glob("*.c"))]

    def compiled(source: Path) -> str:
        to = folder / f"{source.stem}.o"
        done = subprocess.run([*command, OPTIMISED, f"-I{NATIVE}", *FLAGS, "-c", str(source), "-o", str(to)],
                              capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        return str(to)

    with ThreadPoolExecutor(2) as jobs:
        objects = list(jobs.map(compiled, sources))
    subprocess.run([*command, *objects, "-lm", "-o", str(folder / "primitives")], check=True, timeout=60)
    return folder / "primitives"


def compared(*command: str) -> list[str]:
    """Names of the instruction sets that the program has found, and found equal to portable C."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return [line.split()[0] for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ARM_LIBRARIES.is_dir():
        pytest.skip(f"needs the C library of 64-bit ARM in {ARM_LIBRARIES} (libc6-dev-arm64-cross)")
    return build(compiler("aarch64-linux-gnu-gcc"), tmp_path_factory.mktemp("arm"))


def test_primitives_of_this_processor(tmp_path):
    program = build(compiler(os.environ.get("CC", "cc"), "gcc", "clang"), tmp_path)
    # amx asks the system for its tiles, which it may refuse here and not there
    assert set(compared(str(program))) | {"amx"} == set(_dispatch.supported_isas()) | {"amx"}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_primitives_of_arm(arm, processor):
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("needs qemu-aarch64 (qemu-user)")
    command = ["qemu-aarch64", "-L", str(ARM_LIBRARIES), "-cpu", processor, str(arm)]
    assert compared(*command) == PROCESSORS[processor]


@pytest.mark.parametrize("name", ["neon", "neon_dotprod", "neon_i8mm"])
@pytest.mark.parametrize("command", ["aarch64-linux-gnu-gcc", "clang --target=aarch64-linux-gnu"])
def test_all_loops_compile_for_arm(command, name):
    """Products alone are in the program; this is everything, without optimisation and what it would find."""
    if not ARM_LIBRARIES.is_dir():
        pytest.skip(f"needs the C library of 64-bit ARM in {ARM_LIBRARIES} (libc6-dev-arm64-cross)")
    source = str(KERNELS / "isa" / f"{name}.c")
    done = subprocess.run([*compiler(command), *FLAGS, "-fsyntax-only", source],
                          capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_primitive_has_a_probe():
    """By its own name, or called by the one of another."""
    probes = (NATIVE / "probes.h").read_text()
    declared = functions(code(KERNELS / "isa" / "primitives.h"), ";")
    called_by_rows = {"spmm_acc_set1", "spmm_acc_dot", "spmm_acc_store", "spmm_acc_lane", "sddmm_grad_load",
                      "sddmm_acc_dot"}  # fmt: skip
    assert declared - set(re.findall(r"\w+", probes)) - called_by_rows == set()
