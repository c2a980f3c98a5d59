"""What fuzzers have found (tests/fuzz.py), mended since: crashes, silence, errors without a sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ._helpers import run_fuzzer, run_module

CORPUS = sorted(Path(__file__).with_name("corpus").iterdir())

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by calls of Linux")


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_was_found(path):
    pytest.importorskip("safetensors")
    process = run_module("_corpus", str(path))
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    assert process.stdout.endswith("done\n")


def test_random_calls(tmp_path):
    """A share of what .ci/nightly does."""
    pytest.importorskip("onnx")
    found = run_fuzzer("_fuzz_api", 0, 200, tmp_path)
    assert found["refused"] > 60
    assert found["accepted"] > 30
    assert "found" not in found


def test_random_checkpoints_of_trainings(tmp_path):
    pytest.importorskip("safetensors")
    assert sum(run_fuzzer("_fuzz_trainings", 0, 100, tmp_path).values()) == 100


def test_random_files_of_images(tmp_path):
    assert sum(run_fuzzer("_fuzz_data", 0, 300, tmp_path).values()) == 300


def test_random_commands(tmp_path):
    assert sum(run_fuzzer("_fuzz_commands", 0, 60, tmp_path).values()) == 60
