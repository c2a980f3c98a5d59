"""Loaders of others, whose processes fill the shared memory with batches."""

import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop.training import Finetuner
from qsparseprop.training.data import training_loader
from qsparseprop.training.finetuner import shared_memory

IMAGES = TensorDataset(torch.zeros(32, 3, 8, 8), torch.arange(32) % 2)
#: Of a batch of four.
BYTES = 4 * (3 * 8 * 8 * 4 + 8)


def fit(loader, free, monkeypatch, **options):
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: free)
    monkeypatch.setattr("qsparseprop.training.finetuner.fit.free_shared_memory", lambda: free)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1), **options)
    tuner.fit(loader, epochs=1)
    return tuner


@pytest.mark.parametrize("accumulate", [1, 2])
def test_too_little_is_told_of(accumulate, monkeypatch):
    loader = DataLoader(IMAGES, batch_size=4, num_workers=2, prefetch_factor=3)
    with pytest.warns(UserWarning, match=r"2 processes read 6 batches of 0\.0 MB ahead, .* Give it more \(docker run"):
        fit(loader, 6 * BYTES - 1, monkeypatch, accumulate=accumulate)
    for quiet, free in ((loader, 6 * BYTES), (loader, None), (DataLoader(IMAGES, batch_size=4), 0),
                        ([(torch.zeros(4, 192), torch.zeros(4, dtype=torch.int64))], 0),
                        (training_loader(*IMAGES.tensors, 4, 0), 0)):  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(quiet, free, monkeypatch, accumulate=accumulate)


def test_what_is_free_is_asked_of_the_system(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=len(place)))
    assert shared_memory.free_shared_memory() == len("/dev/shm")

    def missing(place):
        raise FileNotFoundError(place)

    monkeypatch.setattr(shutil, "disk_usage", missing)
    assert shared_memory.free_shared_memory() is None


def test_all_tensors_of_a_batch_count():
    x = torch.zeros(2, 3)
    assert shared_memory._bytes({"x": x, "more": [x, (x.double(), "text", None)], "labels": x.long()}) == 144


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(0.3)
        return torch.zeros(4), index % 2


@pytest.mark.parametrize("method", ["train", "evaluate", "measure"])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_whoever_waits_is_told(method, free, monkeypatch):
    monkeypatch.setattr(shared_memory, "PATIENCE", 0.1)
    monkeypatch.setattr(shared_memory, "free_shared_memory", lambda: free)
    model = nn.Linear(4, 2)
    tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.1))
    run, loader = getattr(tuner, method), DataLoader(Slow(), batch_size=2, num_workers=1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(loader)
    told = [str(one.message) for one in told if "shm" in str(one.message)]
    assert len(told) == (0 if free else 1)
    assert all("no batch has come from the loader's 1 processes" in text for text in told)
    assert not [thread for thread in threading.enumerate() if "shared memory" in thread.name]


SCRIPT = """
import sys, time
import torch
from qsparseprop.training import Finetuner
from qsparseprop.training.finetuner import shared_memory

what, slow = sys.argv[1:]
shared_memory.PATIENCE = 1.0

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info().id == int(slow):
            time.sleep(0.1)  # the other one fills the memory with later batches
        return torch.zeros(3, 64, 64), index % 2

def together(samples):
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2))
loader = torch.utils.data.DataLoader(Images(), batch_size=64, num_workers=2, collate_fn=together)
tuner = Finetuner(model, torch.optim.SGD(model.parameters(), 0.01))
one = [(torch.zeros(2, 3, 64, 64), torch.tensor([0, 1]))]
tuner.fit(loader if what == "training" else one, 1, evaluation_batches=loader if what == "evaluation" else None)
"""


def said_with(megabytes, arguments, sentences, folder: Path):
    """Run the script until its error stream has one of the sentences; which one."""
    if sys.platform != "linux" or not shutil.which("unshare"):
        pytest.skip("needs a /dev/shm of its own")
    small = f"mount -t tmpfs -o size={megabytes}m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], check=False, capture_output=True).returncode:
        pytest.skip("needs a /dev/shm of its own")
    (folder / "script.py").write_text(SCRIPT)
    script = f"{small} && exec {sys.executable} {folder / 'script.py'} {' '.join(arguments)}"
    # a file: the loader's processes would keep a pipe open when theirs is gone
    with (folder / "said").open("w") as said:
        running = subprocess.Popen(["unshare", "-m", "sh", "-c", script], stderr=said, stdout=subprocess.DEVNULL)
        try:
            while running.poll() is None:
                text = (folder / "said").read_text()
                for sentence in sentences:
                    if sentence in text:
                        return sentence
                time.sleep(0.05)
        finally:
            running.kill()
            running.wait()
    raise AssertionError(f"it has ended: {(folder / 'said').read_text()[-2000:]}")


BEFORE, WAITING = "by which they come, had 8.4 MB", "no batch has come from the loader's 2 processes for 1 s"


def test_where_torch_waits_for_ever_it_is_told_before(tmp_path):
    assert said_with(8, ["training", "1"], [BEFORE], tmp_path)


@pytest.mark.parametrize(
    ("megabytes", "arguments"),
    [(8, ["training", "0"]),  # the other process takes the room of the first batch
     pytest.param(2, ["evaluation", "1"], marks=pytest.mark.nightly)],  # which there never was
)  # fmt: skip
def test_and_where_no_batch_comes_at_all(megabytes, arguments, tmp_path):
    assert said_with(megabytes, arguments, [BEFORE, WAITING], tmp_path) == WAITING
