"""Full disks, folders in use, and files that appear whole or not at all."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from qsparseprop.training import locks
from qsparseprop.training.finetuner import Finetuner, read_checkpoint
from qsparseprop.training.finetuner.session import JsonLines
from qsparseprop.training.locks import LOCK, locked
from qsparseprop.utils import files
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.files import replacing, save_tensors

from ._helpers import run_python

CONTENT = {"weight": torch.arange(300_000), "numbers": [1, 2.0, "x"]}


def tuner():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 400), nn.ReLU(), nn.Linear(400, 4))
    return Finetuner(model, torch.optim.AdamW(model.parameters()))


BATCH = (torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4)


# ---- a disk that is full ----


def fail_after(monkeypatch, count):
    """Every file takes so many bytes, and then no more."""
    real = os.write
    room = {}

    def write(descriptor, data):
        left = room.setdefault(descriptor, count)
        if left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(descriptor, memoryview(data)[:left])
        room[descriptor] = left - written
        return written

    monkeypatch.setattr(files.os, "write", write)


def test_tensors_are_written_as_torch_writes_them(tmp_path):
    save_tensors(CONTENT, tmp_path / "file.pt")
    content = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)
    assert torch.equal(content["weight"], CONTENT["weight"])
    assert content["numbers"] == CONTENT["numbers"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_named():
    for write in (lambda: save_tensors(CONTENT, "/dev/full"), lambda: JsonLines("/dev/full").write("step")):
        with pytest.raises(OSError, match="/dev/full") as error:
            write()
        assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("room", [0, 1, 100, 5_000, 100_000, 900_000])
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(room, tmp_path, monkeypatch):
    first = tuner()
    first.fit([BATCH], 1, folder=tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        fail_after(patch, room)
        with pytest.raises(OSError, match=r"last\.pt") as error:
            tuner().fit([BATCH], 2, folder=tmp_path, resume=True)
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log.jsonl"]
    again = tuner()
    again.fit([BATCH], 2, folder=tmp_path, resume=True)
    whole = tuner()
    whole.fit([BATCH], 2)
    assert again.history.losses == whole.history.losses


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"not a regular file.*pipe"), replacing(pipe):
        raise AssertionError("nothing is written")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize("path", ["", ".", "..", "/", "folder", "folder/"])
def test_a_folder_is_not_replaced(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError), replacing(path):
        raise AssertionError("nothing is computed that cannot be written")
    assert os.listdir(tmp_path) == ["folder"]


def test_other_errors_while_saving_stay_what_they_are(tmp_path):
    with pytest.raises((TypeError, AttributeError)), replacing(tmp_path / "file.pt") as temporary:
        save_tensors({"x": threading.Lock()}, temporary)
    assert list(tmp_path.iterdir()) == []


def test_a_log_line_is_written_whole_or_not_at_all(tmp_path):
    resource = pytest.importorskip("resource")
    assert resource is not None
    code = """
import resource, signal, sys
from qsparseprop.training.finetuner.session import JsonLines
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = JsonLines(sys.argv[1])
log.write("step", number=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (60, 60))
try:
    log.write("step", text="x" * 200)
except OSError as error:
    print(error.filename == sys.argv[1])
log.close()
"""
    process = run_python(code, str(tmp_path / "log.jsonl"))
    assert (process.returncode, process.stdout.strip()) == (0, "True"), process.stderr
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {"event": "step", "number": 1}


# ---- folders in use ----

HOLD = """
import sys
from qsparseprop.training.locks import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that has locked the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_is_used_by_one_process_at_a_time(other, tmp_path):
    with pytest.raises(ConfigurationError, match=rf"another training \(process {other.pid}\)"), locked(tmp_path):
        pass
    for resume in (False, True):
        with pytest.raises(ConfigurationError, match="in use"):
            tuner().fit([BATCH], 1, folder=tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    other.communicate()
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(locks.fcntl is None, reason="needs locks of the system")
def test_a_lock_ends_with_its_process(other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / LOCK).exists()
    tuner().fit([BATCH], 1, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "log.jsonl"]


def test_threads_keep_each_other_out_and_a_thread_not_itself(tmp_path):
    refused = []

    def other_thread():
        try:
            with locked(tmp_path):
                pass
        except ConfigurationError as error:
            refused.append(error)

    with locked(tmp_path), locked(tmp_path / "."):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert len(refused) == 1
    other_thread()
    assert len(refused) == 1


def test_without_locks_of_the_system_the_file_is_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / LOCK).write_text("123")
    with pytest.raises(ConfigurationError, match=r"process 123; .*\.lock is its lock"), locked(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_workers_of_a_data_loader_do_not_hold_what_their_parent_had(tmp_path):
    read, write = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has tried
            os._exit(0)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.close(write)
        os.close(read)
        assert os.waitpid(child, 0)[1] == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        tuner().fit([BATCH], 1, folder=tmp_path / "file" / "run")
    with pytest.raises(OSError, match="file"):
        tuner().fit([BATCH], 1, folder=tmp_path / "file")
    (tmp_path / "run" / "last.pt").mkdir(parents=True)
    with pytest.raises(OSError, match=r"last\.pt"):
        tuner().fit([BATCH], 1, folder=tmp_path / "run", resume=True)
    assert (tmp_path / "file").read_text() == "mine"
    tuner().fit([BATCH], 1, folder=tmp_path / "new")
    assert len(read_checkpoint(tmp_path / "new" / "last.pt")["history"]["losses"]) == 1
