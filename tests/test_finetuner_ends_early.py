"""Trainings whose process ends early: killed at any point, or asked to stop."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import qsparseprop
from qsparseprop.training.finetuner import read_checkpoint

SCRIPT = """
import sys, torch
from torch import nn
from qsparseprop.training.data import training_loader
from qsparseprop.training.finetuner import Finetuner

torch.set_num_threads(1)
torch.manual_seed(0)
# large enough that writing takes a while
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3000, 4))
tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
images = torch.randn(48, 3, 8, 8)
loader = training_loader(images, torch.arange(48) % 4, 8, seed=1)
print("ready", flush=True)
result = tuner.fit(loader, int(sys.argv[2]), folder=sys.argv[1], resume=True, checkpoint_every=1)
print(result.stopped_by and result.stopped_by.name, len(tuner.history.losses), flush=True)
torch.save(tuner.model.state_dict(), sys.argv[1] + ".result")
"""


#: Sparse layers in 8 bits with stochastic rounding, batch normalisation, dropout, AdamW and a schedule; the process
#: kills itself at a point inside the writing of its n-th checkpoint.
SPARSE_SCRIPT = """
import io, os, random, signal, sys
import numpy, torch
from torch import nn
from qsparseprop.training.data import evaluation_loader, training_loader
from qsparseprop.training.finetuner import Finetuner, checkpoint
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent

folder, epochs, point, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
save, replace, writes = checkpoint.save_tensors, os.replace, 0

def die():
    print(len(tuner.history.losses), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

def saving(content, target):
    global writes
    if ".last.pt." in target.name:
        writes += 1
        if writes == wanted and point == "half":
            buffer = io.BytesIO()
            torch.save(content, buffer)
            target.write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            die()
    return save(content, target)

def replacing(source, target):
    ours = str(target).endswith("last.pt") and writes == wanted
    if ours and point == "before":
        die()
    replace(source, target)
    if ours and point == "after":
        die()

checkpoint.save_tensors, os.replace = saving, replacing
torch.set_num_threads(1)
random.seed(0)
numpy.random.seed(0)
torch.manual_seed(0)
model = nn.Sequential(resnet20(num_classes=16, width=4), nn.Dropout(0.2), nn.Linear(16, 4))
layerwise_magnitude_prune(model, 0.8)
make_pruning_permanent(model)
model = swap_modules_with_sparse(model, (16, 3, 8, 8), verbose=False, include_dense=False, min_sparsity=0.7)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
tuner = Finetuner(model, optimizer, scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100))
images, labels = torch.randn(64, 3, 8, 8), torch.arange(64) % 4
tuner.fit(training_loader(images, labels, 16, seed=3), epochs, folder=folder, resume=True, checkpoint_every=2,
          evaluation_batches=evaluation_loader(images, labels, 32))
print(len(tuner.history.losses), flush=True)
"""


#: These tests may run in the background or behind nohup.
NOTHING_IGNORED = """import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
"""


@pytest.fixture
def start(tmp_path):
    package = str(Path(qsparseprop.__file__).parents[1])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])

    def run(folder, *arguments, script=SCRIPT):
        file = tmp_path / f"train{len(script)}.py"
        file.write_text(NOTHING_IGNORED + textwrap.dedent(script))
        return subprocess.Popen([sys.executable, str(file), str(folder), *map(str, arguments)], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})  # fmt: skip

    return run


def assert_same_content(ours, theirs, where=""):
    """Equality of all that a checkpoint holds, except for times."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for key in theirs:
            if "seconds" not in str(key):
                assert_same_content(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same_content(*pair, f"{where}/{i}")
    else:
        assert ours == theirs, where


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_at_any_point_of_writing_a_checkpoint_changes_nothing_but_the_time(start, tmp_path):
    """A resumed training ends with the uninterrupted one's last checkpoint, bit for bit and as a whole."""
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert finish(start(whole, 3, "never", 0, script=SPARSE_SCRIPT)) == ["12"]
    before = 0
    for point, number in (("half", 1), ("half", 2), ("before", 2), ("after", 2), ("half", 2)):
        process = start(folder, 3, point, number, script=SPARSE_SCRIPT)
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (-signal.SIGKILL, "")
        killed_at = int(out)
        assert before <= killed_at <= 12
        assert any(folder.glob(".last.pt.*.tmp")) == (point != "after")
        done = 0
        if (folder / "last.pt").exists():
            done = len(read_checkpoint(folder / "last.pt")["history"]["losses"])
        # at the end of an epoch the same step is written twice, with the evaluation
        assert done == killed_at if point == "after" else killed_at - 2 <= done <= killed_at
        before = done
    assert before > 0
    assert finish(start(folder, 3, "never", 0, script=SPARSE_SCRIPT)) == ["12"]
    assert sorted(path.name for path in folder.iterdir()) == ["best.pt", "last.pt", "log.jsonl"]
    for name in ("last.pt", "best.pt"):
        assert_same_content(read_checkpoint(folder / name), read_checkpoint(whole / name))


def finish(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""
    return out.split()


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_kill_while_a_checkpoint_is_written_loses_nothing_but_the_last_step(start, tmp_path):
    folder = tmp_path / "killed"
    whole = start(tmp_path / "whole", 2)
    assert finish(whole) == ["ready", "None", "12"]
    killed_inside = 0
    for wanted in (3, 7):
        process = start(folder, 2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            log = folder / "log.jsonl"
            written = log.read_text().count('"event": "checkpoint"') if log.exists() else 0
            if written >= wanted and any(folder.glob(".last.pt.*.tmp")):
                process.kill()
                break
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        killed_inside += any(folder.glob(".last.pt.*.tmp"))
        done = len(read_checkpoint(folder / "last.pt")["history"]["losses"])
        logged = [line for line in (folder / "log.jsonl").read_text().splitlines() if '"checkpoint"' in line]
        assert json.loads(logged[-1])["step"] <= done <= 11
    assert killed_inside, "no kill hit the writing of a checkpoint"
    assert finish(start(folder, 2)) == ["ready", "None", "12"]
    assert not any(folder.glob(".*.tmp"))
    ours, theirs = torch.load(f"{folder}.result"), torch.load(tmp_path / "whole.result")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(name, start, tmp_path):
    number = getattr(signal, name, None)
    if number is None:
        pytest.skip(f"no {name} here")
    folder = tmp_path / "stopped"
    process = start(folder, 10_000)
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while not (folder / "last.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    stopped_by, steps = finish(process)
    assert stopped_by == name
    assert len(read_checkpoint(folder / "last.pt")["history"]["losses"]) == int(steps)
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["stopped_by"] == name


#: Two processes read and augment; an epoch has twelve steps. A signal to all of them, as Ctrl-C is in a terminal.
WORKERS_SCRIPT = """
import numpy, os, random, signal, sys, torch
from torch import nn
from qsparseprop import Finetuner
from qsparseprop.training.data import Augmentation, ImageData, StoredImages, image_loader

if __name__ == "__main__":
    folder, stop_at, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    os.setpgrp()
    torch.set_num_threads(1)
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)  # checkpoints hold all of these
    pixels = torch.randint(256, (96, 3, 8, 8), dtype=torch.uint8)
    images = StoredImages(pixels, torch.arange(96) % 4)
    data = ImageData(images, images, 4, "noise", torch.full((3,), 1 / 255), torch.zeros(3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))

    def interrupt():
        if len(tuner.history.losses) + 1 == stop_at:
            os.killpg(0, getattr(signal, name))

    tuner.after_step = interrupt
    loader = image_loader(data, "train", 8, seed=1, augment=Augmentation(["crop", "flip"]), workers=2)
    tests = image_loader(data, "test", 8, workers=2)
    result = tuner.fit(loader, 2, evaluation_batches=tests, folder=folder, resume=True)
    print("stopped" if result.stopped_by else "done", len(tuner.history.losses), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("name", [
    "SIGINT", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("SIGTERM", "SIGHUP")),
])  # fmt: skip
def test_a_signal_to_a_training_and_its_workers(name, start, tmp_path):
    """In the middle of the second epoch: what is resumed is what was never stopped, bit for bit."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish(start(whole, 0, name, script=WORKERS_SCRIPT)) == ["done", "24"]
    assert finish(start(stopped, 17, name, script=WORKERS_SCRIPT)) == ["stopped", "17"]
    assert finish(start(stopped, 0, name, script=WORKERS_SCRIPT)) == ["done", "24"]
    ours, theirs = (read_checkpoint(folder / "last.pt") for folder in (stopped, whole))
    assert_same_content(ours, theirs)
