"""Trainings in processes of their own: two in one folder, on a disk that is full, and killed at any moment."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import qsparseprop
from qsparseprop.training.finetuner import read_checkpoint

from .test_finetuner_ends_early import SCRIPT, assert_same_content

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals, limits and file systems of POSIX")


@pytest.fixture
def npz(tmp_path):
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 64), ("test", 16)):
        arrays |= {f"x_{part}": generator.integers(0, 255, (count, 8, 8), dtype=np.uint8),
                   f"y_{part}": np.arange(count) % 4}  # fmt: skip
    np.savez(tmp_path / "data.npz", **arrays)
    return tmp_path / "data.npz"


def environment():
    package = str(Path(qsparseprop.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])}


def started(*command, before=()):
    return subprocess.Popen([*before, sys.executable, *map(str, command)], env=environment(), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def finetune(npz, out, *more):
    return ["-m", "qsparseprop", "finetune", "--data", npz, "--model", "mlp", "--batch-size", "32", "--threads", "1",
            "--quiet", "--no-compare", "--out", out, *more]  # fmt: skip


# ---- two jobs, one folder ----


def test_of_two_jobs_that_start_together_one_is_refused(npz, tmp_path):
    out = tmp_path / "run"
    both = [started(*finetune(npz, out, "--epochs", "100000")) for _ in range(2)]
    try:
        deadline = time.monotonic() + 120
        while all(process.poll() is None for process in both) and time.monotonic() < deadline:
            time.sleep(0.02)
        loser = next(process for process in both if process.poll() is not None)
        winner = next(process for process in both if process is not loser)
        message = loser.communicate(timeout=60)[1]
        assert loser.returncode == 2
        assert message.count("\n") == 1, message
        assert f"{out} is in use by another training (process {winner.pid}): wait until it has ended" in message
        while not (out / "last.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        winner.send_signal(signal.SIGTERM)
        assert winner.wait(timeout=60) == 128 + signal.SIGTERM, winner.stderr.read()
        read_checkpoint(out / "last.pt")
    finally:
        for process in both:
            process.kill()
            process.communicate()


# ---- a disk that is full ----

#: A training whose checkpoints need more room than there is from some step on: the optimizer's momentum comes later.
FULL = """
import os, resource, signal, sys, torch
from torch import nn
from qsparseprop.training.finetuner import Finetuner

folder, room = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4))
tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
batch = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
tuner.fit([batch], 2, folder=folder)
print(os.path.getsize(folder + "/last.pt"), flush=True)
if room:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    tuner.fit([batch], 4, folder=folder, resume=True)
except OSError as error:
    print(error, flush=True)
    sys.exit(3)
"""


def assert_kept(folder, message, reason):
    assert message.endswith(f"{reason}: '{folder}/last.pt'"), message
    assert sorted(path.name for path in folder.iterdir()) == ["last.pt", "log.jsonl"]
    assert len(read_checkpoint(folder / "last.pt")["history"]["losses"]) == 2


@pytest.mark.parametrize("room", [5_000, 300_000])
def test_a_checkpoint_that_may_not_be_so_large(room, tmp_path):
    pytest.importorskip("resource")
    folder = tmp_path / "run"
    out, errors = started("-c", FULL, folder, room).communicate(timeout=120)
    assert out.count("\n") == 2, errors
    assert_kept(folder, out.splitlines()[1], "[Errno 27] File too large")


def test_a_file_system_without_room(tmp_path):
    """One of a megabyte, which holds one checkpoint of 630 kB, and not two at a time."""
    mount = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
    if shutil.which("unshare") is None or subprocess.run(
        ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path, "true"], capture_output=True, check=False
    ).returncode:  # fmt: skip
        pytest.skip("no file system can be mounted here")
    saved = tmp_path.parent / f"{tmp_path.name}-kept"
    folder = tmp_path / "run"
    # in a namespace of its own, where nobody else sees it; what is left there is copied before it vanishes with it
    script = 'rc=0; "$@" || rc=$?; cp -r "$FOLDER" "$SAVED"; exit $rc'
    inside = ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path, "sh", "-c", script, "sh"]
    process = subprocess.run([*inside, sys.executable, "-c", FULL, folder, "0"], capture_output=True, text=True,
                             env={**environment(), "FOLDER": str(folder), "SAVED": str(saved)}, timeout=120,
                             check=False)  # fmt: skip
    assert process.returncode in (1, 3), process.stderr
    if process.returncode == 1:  # the second checkpoint of the first call has already found no room
        message = process.stderr.strip().splitlines()[-1].removeprefix("OSError: ")
    else:
        message = process.stdout.splitlines()[-1]
    assert message == f"[Errno 28] No space left on device: '{folder}/last.pt'"
    assert sorted(path.name for path in saved.iterdir()) == ["last.pt", "log.jsonl"]
    assert len(read_checkpoint(saved / "last.pt")["history"]["losses"]) >= 1
    shutil.rmtree(saved)


# ---- killed at any moment ----


@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.nightly)])
def test_kills_at_random(kills, tmp_path):
    """Whatever the moment, a whole checkpoint is there, and the training goes on from it to the same bits."""
    rng, folder = random.Random(kills), tmp_path / "killed"
    seeds = "import numpy, random\nrandom.seed(0)\nnumpy.random.seed(0)\n"
    (tmp_path / "train.py").write_text(seeds + SCRIPT)
    epochs, done, killed = max(2, kills // 4), 0, 0
    whole = started(tmp_path / "train.py", tmp_path / "whole", epochs)
    out, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    for _ in range(kills):
        process = started(tmp_path / "train.py", folder, epochs)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(rng.random() ** 2 * 0.5)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (folder / "last.pt").exists():
            steps = len(read_checkpoint(folder / "last.pt")["history"]["losses"])
            assert steps >= done
            done = steps
        else:
            assert done == 0
    assert killed
    process = started(tmp_path / "train.py", folder, epochs)
    again, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert again == out
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    ours, theirs = (read_checkpoint(path / "last.pt") for path in (folder, tmp_path / "whole"))
    assert_same_content(ours, theirs)
    ours, theirs = (torch.load(f"{path}.result") for path in (folder, tmp_path / "whole"))
    assert_same_content(ours, theirs)
