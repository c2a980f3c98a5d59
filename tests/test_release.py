"""A release says of itself what is so: one version, and no Python or torch that nobody tries."""

from __future__ import annotations

import importlib.metadata
import re
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
