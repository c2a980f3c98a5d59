"""What is said where the kernels are not compiled: mostly to those who have just got the sources."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qsparseprop

PACKAGE = Path(qsparseprop.__file__).parent


COMMAND = ["-m", "qsparseprop", "info"]


@pytest.mark.parametrize(("case", "command"), [
    ("sources", ["-c", "import qsparseprop; qsparseprop.quantize"]), ("sources", COMMAND), ("other", COMMAND),
    ("archive", COMMAND),
])  # fmt: skip
def test_kernels_that_are_not_there_are_told_of(case, command, tmp_path):
    copy = tmp_path / "ein Ordner" / "qsparseprop"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    says = f"the kernels of qsparseprop are not built in {copy / '_kernels'}: go to another folder"
    path = copy.parent
    if case == "other":
        (copy / "_kernels" / "_dispatch.cpython-27-other.so").touch()
        says = "not built in .* for this Python, but as _dispatch.cpython-27-other.so: go to"
    elif case == "archive":
        path = Path(shutil.make_archive(str(tmp_path / "all"), "zip", copy.parent))
        says = "lies in an archive, from which compiled modules cannot be imported"
    done = subprocess.run([sys.executable, *command], env={**os.environ, "PYTHONPATH": str(path)}, cwd=tmp_path,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == (2 if command[0] == "-m" else 1)
    assert re.search(says, done.stderr.splitlines()[-1]), done.stderr
    assert "circular" not in done.stderr
