"""The primitives and products in C under AddressSanitizer and UndefinedBehaviorSanitizer: what every push has of them.

Operators, layers and frozen programs, races, and valgrind are for ``tests/sanitize.sh``, at night.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from qsparseprop._kernels import _dispatch

from .test_kernel_sources import KERNELS
from .test_primitives import build, compared

#: Checks are calls, and there are none of a pointer's null and object, which takes a third of the compiler's time.
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=undefined", "-g1",
         "--param", "asan-instrumentation-with-call-threshold=0"]  # fmt: skip
FAULTS = {"read": "heap-buffer-overflow", "write": "heap-buffer-overflow", "freed": "heap-use-after-free",
          "overflow": "signed integer overflow", "shift": "shift exponent 32"}  # fmt: skip


def sanitizing(folder: Path) -> list[str]:
    """A gcc that has the runtimes; skips the test where there is none."""
    command = shlex.split(os.environ.get("CC", "gcc"))
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs a compiler: {command[0]}")
    if b"Free Software" not in subprocess.run([*command, "--version"], capture_output=True, check=False).stdout:
        command = ["gcc"]
    (folder / "nothing.c").write_text("int main(void) { return 0; }\n")
    program = str(folder / "nothing")
    done = subprocess.run([*command, *FLAGS, str(folder / "nothing.c"), "-o", program],
                          capture_output=True, check=False)  # fmt: skip
    if done.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
        pytest.skip("needs gcc's libasan and libubsan")
    return [*command, *FLAGS]


@pytest.mark.skipif(not (KERNELS / "isa").is_dir(), reason="needs the sources")
def test_primitives_and_products_are_clean(tmp_path, monkeypatch):
    """And what is not is reported. One test: it takes one processor half a minute to build the program."""
    command = sanitizing(tmp_path)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    program = str(build(command, tmp_path))
    for fault, report in FAULTS.items():
        done = subprocess.run([program, "1", fault], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode != 0, f"nobody has reported {fault}"
        assert report in done.stderr, done.stderr[-2000:]
    # amx asks the system for its tiles, which it may refuse here and not there
    assert set(compared(program, "40")) | {"amx"} == set(_dispatch.supported_isas()) | {"amx"}
