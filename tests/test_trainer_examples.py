"""The examples for Lightning and Accelerate, by one process and by two, where the packages are installed."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import qsparseprop

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests"),
    pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn"),
]


def run(folder, *command):
    """What a command prints, with one thread a process and the package that is being tested."""
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def several(processes):
    if processes > 1 and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    return processes


@pytest.mark.parametrize("processes", [1, 2])
def test_lightning(processes, tmp_path):
    """1,437 images in steps of 64, whoever computes them: 23 an epoch."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("needs lightning")
    printed = run(tmp_path, str(EXAMPLES / "lightning_sparse.py"), "--devices", str(several(processes)))
    trained, loaded = (float(value) for value in re.findall(r"^top-1 ([\d.]+) %", printed, re.MULTILINE))
    assert trained > 90
    assert loaded == pytest.approx(trained, abs=0.02)  # the mean of two processes' means
    assert "46 steps" in printed
    assert (tmp_path / "lightning" / "digits.ckpt").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate(processes, tmp_path):
    """What is loaded again predicts what was trained."""
    if importlib.util.find_spec("accelerate") is None:
        pytest.skip("needs accelerate")
    launcher = [] if several(processes) == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                                                   str(processes)]  # fmt: skip
    printed = run(tmp_path, *launcher, str(EXAMPLES / "accelerate_sparse.py"))
    assert printed.count("loaded again") == 1  # one of them speaks
    first, trained, loaded = (float(value) for value in re.findall(r"top-1 ([\d.]+) %", printed))
    assert min(first, trained) > 80
    assert loaded == trained
    assert list((tmp_path / "accelerate").glob("model*"))
