"""A release says of itself what is so: one version, and no Python or torch that nobody tries."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qsparseprop

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "CHANGELOG.md").is_file(), reason="needs the sources")


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pairs(settings) -> list[tuple[str, str]]:
    return [tuple(pair.split(":")) for pair in settings["tool"]["qsparseprop"]["pairs"]]


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_version_is_one(settings):
    assert "version" not in settings["project"]
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qsparseprop._version.__version__"}
    assert importlib.metadata.version("qsparseprop") == qsparseprop.__version__
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest[1] == qsparseprop.__version__


def test_every_declared_python_is_tried_and_no_other(settings, pairs):
    tried = sorted({python for python, _ in pairs}, key=number)
    assert settings["project"]["requires-python"] == f">={tried[0]}"
    prefix = "Programming Language :: Python :: "
    classifiers = [line.removeprefix(prefix) for line in settings["project"]["classifiers"] if line.startswith(prefix)]
    assert [version for version in classifiers if re.fullmatch(r"3\.\d+", version)] == tried
    wheels = settings["tool"]["cibuildwheel"]["build"]
    assert wheels == [f"cp{python.replace('.', '')}-*" for python in tried]


def test_the_oldest_torch_that_is_declared_is_tried(settings, pairs):
    (torch,) = (name for name in settings["project"]["dependencies"] if name.startswith("torch"))
    oldest = min((torch for _, torch in pairs), key=number)
    assert oldest == f"{torch.removeprefix('torch>=')}.0"


@pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="not in an sdist")
def test_releases_need_no_token_and_one_job_may_ask_for_one():
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    assert "secrets." not in text
    *_, publish = re.split(r"^  (?=\w+:$)", text, flags=re.MULTILINE)
    assert publish.startswith("publish:")
    assert text.count("id-token: write") == publish.count("id-token: write") == 1


def test_nothing_declares_free_threaded_python(settings):
    """Nobody has tried it: patterns are held by modules that the GIL guards."""
    assert not [line for line in settings["project"]["classifiers"] if "Free Threading" in line]
    built = settings["tool"]["cibuildwheel"]
    assert "enable" not in built
    for identifier in ("cp313t-manylinux_x86_64", "cp314t-manylinux_x86_64", "cp313t-win_amd64"):
        assert not any(fnmatch.fnmatch(identifier, pattern) for pattern in built["build"])
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "qsparseprop").rglob("*.p[yx][xd]")]:
        assert "freethreading_compatible" not in path.read_text(encoding="utf-8"), path


def test_free_threaded_python_would_be_told(tmp_path):
    """Where a module does not say that it goes without the GIL, Python takes it back, with a warning, as it imports."""
    pytest.importorskip("Cython")
    source = ROOT / "qsparseprop" / "_kernels" / "_mask.pyx"
    target = tmp_path / "_mask.c"
    command = [sys.executable, "-m", "cython", "-3", "-o", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    text = target.read_text(encoding="utf-8")
    assert "{Py_mod_gil, __Pyx_FREETHREADING_COMPATIBLE}" in text
    (chosen,) = re.findall(r"^#define CYTHON_FREETHREADING_COMPATIBLE (\d)$", text, re.MULTILINE) or ["0"]
    assert chosen == "0"
