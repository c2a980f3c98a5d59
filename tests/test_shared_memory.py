"""Loaders of others, whose processes fill the shared memory with batches."""

import shutil
import subprocess
import sys
import warnings
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


SCRIPT = """
import torch
from qsparseprop.training import Finetuner

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        return torch.zeros(3, 64, 64), index % 2

def together(samples):
    return torch.stack([image for image, _ in samples]), torch.tensor([label for _, label in samples])

torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 2))
loader = torch.utils.data.DataLoader(Images(), batch_size=64, num_workers=2, collate_fn=together)
Finetuner(model, torch.optim.SGD(model.parameters(), 0.01)).fit(loader, epochs=1)
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="needs a /dev/shm of its own")
def test_where_torch_waits_for_ever_it_is_told_before(tmp_path):
    small = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", small], check=False, capture_output=True).returncode:
        pytest.skip("needs a /dev/shm of its own")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = ["unshare", "-m", "sh", "-c", f"{small} && exec {sys.executable} {tmp_path / 'script.py'}"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        # it goes on to wait
        assert any("by which they come, had 8.4 MB" in line for line in running.stderr)
    finally:
        running.kill()
        running.communicate()
