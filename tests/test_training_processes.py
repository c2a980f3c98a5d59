"""Trainings by several processes: torchrun -m qsparseprop finetune, and the Finetuner beneath it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

import qsparseprop
from qsparseprop import Finetuner
from qsparseprop.training.finetuner.fit import FitLoop
from qsparseprop.training.processes import Processes

from .test_distributed import torchrun

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

SETTINGS = ("--no-compare", "--quiet", "--epochs", "3", "--batch-size", "16", "--prune", "uniform", "--sparsity", "0.8",
            "--threads", "1", "--model", "mlp")  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Squares of four brightnesses and places."""
    generator = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 130), ("test", 37)):
        labels = np.arange(count) % 4
        x = generator.integers(0, 60, (count, 8, 8, 1))
        for image, label in zip(x, labels, strict=True):
            image[4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 120
        parts |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": labels}
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, **parts)
    return str(path)


def environment():
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}


def command(processes, *arguments):
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    settings = ("--no-compare", "--quiet") if "--resume" in arguments else SETTINGS
    return [*launcher, "qsparseprop", "finetune", *settings, *arguments]


def finetune(processes, *arguments):
    return subprocess.run(command(processes, *arguments), env=environment(), capture_output=True, text=True,
                          timeout=300, check=False)  # fmt: skip


def log(folder, event):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def test_two_processes_do_what_one_does_with_the_joint_batch(images, tmp_path):
    """In float32 and without batch normalisation: but for rounding there is no difference."""
    folders = {}
    for processes in (1, 2):
        folders[processes] = tmp_path / str(processes)
        done = finetune(processes, "--data", images, "--out", str(folders[processes]), "--scheme", "float32",
                        "--precision", "fp32", "--augment", "crop")  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1") == 1  # one of them speaks
    one, two = (folders[n] for n in (1, 2))
    steps = [(log(folder, "step"), log(folder, "evaluation")) for folder in (one, two)]
    for ours, theirs in zip(*(both[0] for both in steps), strict=True):
        assert ours["samples"] == theirs["samples"] == 16
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    for ours, theirs in zip(*(both[1] for both in steps), strict=True):
        assert abs(ours["top1"] - theirs["top1"]) < 3  # one of 37 images
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, two)]
    assert [result["processes"] for result in results] == [1, 2]
    state = torch.load(two / "last.pt", weights_only=True)["model"]
    weights = sum(value.numel() for value in state.values() if value.is_floating_point())
    assert results[1]["sent_mb"] == pytest.approx(4 * weights / 1e6, rel=0.01)  # gradients of nonzeros


@pytest.mark.nightly
@pytest.mark.skipif(os.name == "nt", reason="needs signals")
def test_two_processes_stop_together_and_go_on_where_they_were(images, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--data", images, "--scheme", "int8", "--epochs", "12", "--augment", "crop")
    assert finetune(2, *options, "--out", str(whole)).returncode == 0
    running = subprocess.Popen(command(2, *options, "--out", str(parts)), env=environment(), stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 120
    while not (parts / "log.jsonl").exists() or len(log(parts, "step")) < 5:
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=120)
    stopped = len(log(parts, "step"))
    if (parts / "result.json").exists():
        pytest.skip("the training was over before the signal reached it")
    assert log(parts, "end")[-1]["stopped_by"] == "SIGTERM"
    done = finetune(2, "--resume", "--out", str(parts))
    assert done.returncode == 0, done.stderr
    assert 5 <= stopped < len(log(parts, "step"))
    theirs, ours = (json.loads((folder / "result.json").read_text()) for folder in (whole, parts))
    # which layers are faster dense is measured anew by each training
    if ours["replaced_layers"] == theirs["replaced_layers"]:
        assert ours["losses"] == theirs["losses"]
        assert ours["top1"] == theirs["top1"]
    # and what two have begun, one can end
    again = finetune(1, "--resume", "--out", str(parts))
    assert again.returncode == 0, again.stderr


@pytest.mark.nightly
def test_machines_need_not_share_the_folder(images, tmp_path):
    """Two processes in folders of their own, begun without torchrun: the first one's has everything."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    for options in (("--data", images, "--epochs", "2"), ("--resume",)):
        running = []
        for rank, folder in enumerate(folders):
            whose = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            running.append(subprocess.Popen(command(1, *options, "--out", "run"), env={**environment(), **whose},
                                            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                            text=True))  # fmt: skip
        for process in running:
            errors = process.communicate(timeout=120)[1]
            assert process.returncode == 0, errors
    assert json.loads((folders[0] / "run" / "result.json").read_text())["processes"] == 2
    assert log(folders[0] / "run", "resume")
    assert not any(path.is_file() for path in folders[1].rglob("*"))


def test_what_processes_cannot_do_is_refused_by_all(images, tmp_path):
    for arguments, sentence in (
        (("--batch-size", "15"), "batches of 15 images cannot be shared out evenly to 2 processes"),
        (("--prune", "gradual"), "gradual pruning changes what processes have in common"),
        (("--compare",), "a comparison is for one process"),
    ):
        done = finetune(2, "--data", images, *arguments, "--out", str(tmp_path / "run"))
        assert done.returncode != 0
        assert sentence in done.stderr
        assert "[rank" not in done.stderr  # with which torchrun marks tracebacks
        assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


WORKER = '''
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from qsparseprop.training import Finetuner, NonFiniteLossError

torch.set_num_threads(1)
dist.init_process_group("gloo")

def main():
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    tuner = Finetuner(DistributedDataParallel(model), torch.optim.SGD(model.parameters(), 0.1), accumulate=2)
    assert tuner.model is model
    torch.manual_seed(rank)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    tuner.train([(x, y), (x + 1, y)])
    assert tuner.history.samples == [32]
    # what one process has measured, all have
    figures = [None, None]
    evaluation = tuner.measure([(x[: 3 + rank], y[: 3 + rank])])
    seen = (tuner.history.losses, tuner.history.correct, evaluation.top1, evaluation.loss)
    dist.all_gather_object(figures, seen)
    assert figures[0] == figures[1], figures
    weights = [p.detach().clone() for p in model.parameters()]
    bad = x.clone()
    if rank == 1:
        bad[0, 0] = float("nan")
    try:
        tuner.train_step(bad, y)
    except NonFiniteLossError as error:
        assert ("in another process" in str(error)) == (rank == 0), error
    else:
        raise AssertionError("not refused")
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    tuner.train_step(x, y)
    try:
        tuner.fit([(x, y)] * (3 + rank), epochs=1)
    except ValueError as error:
        assert "the processes have 3, 4 batches an epoch" in str(error), error
    else:
        raise AssertionError("not refused")

main()
dist.destroy_process_group()
'''


def test_a_finetuner_of_a_distributed_model(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr


AGAIN = '''
import copy
import weakref

import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsparseprop import layerwise_magnitude_prune, make_pruning_permanent, swap_modules_with_sparse
from qsparseprop.training import Finetuner

torch.set_num_threads(1)
dist.init_process_group("gloo")


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(self.first(x))


def network(sparsity):
    torch.manual_seed(0)
    model = Branches()
    layerwise_magnitude_prune(model, sparsity)
    make_pruning_permanent(model)
    return swap_modules_with_sparse(model, None, include_dense=False, min_sparsity=0.1, verbose=False, quantize=False)


def tuner(sparsity, **options):
    model = network(sparsity)
    wrapped = DistributedDataParallel(model, **options)
    return Finetuner(wrapped, torch.optim.SGD(model.parameters(), 0.1))


calls = []


def hook(state, bucket):
    calls.append(state)
    work = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return work.then(lambda done: done.value()[0] / dist.get_world_size())


def main():
    x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(dist.get_rank())), torch.arange(8) % 3
    names = ("forward_sync_buffers" if "forward_sync_buffers" in vars(DistributedDataParallel(nn.Linear(2, 2)))
             else "broadcast_buffers")
    options = {"find_unused_parameters": True, "gradient_as_bucket_view": True, "bucket_cap_mb": 3, names: False}
    of_before = tuner(0.7, **options)
    of_before.train_step(x, y)
    state = copy.deepcopy(of_before.state_dict())
    ours = tuner(0.5, **options)
    ours.parallel.register_comm_hook("told", hook)
    former = weakref.ref(ours.parallel)
    ours.load_state_dict(state)
    assert former() is not ours.parallel, "the pattern has changed, and with it what is sent"
    for name, value in options.items():
        if name != "bucket_cap_mb":
            assert getattr(ours.parallel, name) == value, name
    assert ours.parallel.bucket_bytes_cap == 3 * 2**20
    assert ours.parallel.module is ours.model
    # without find_unused_parameters the second step would be refused; and gradients are means, by the hook
    for one in (of_before, ours):
        one.train_step(x, y)
        one.train_step(x, y)
    assert set(calls) == {"told"}, calls
    for a, b in zip(of_before.model.parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    still = tuner(0.5, static_graph=True)
    still.load_state_dict(state)
    assert still.parallel.static_graph
    assert still.parallel.bucket_bytes_cap == DistributedDataParallel(nn.Linear(2, 2)).bucket_bytes_cap
    for _ in range(2):
        still.train_step(x, y)


main()
dist.destroy_process_group()
'''


def test_a_model_that_is_wrapped_again_is_wrapped_as_before(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(AGAIN)
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr


def test_processes_stop_at_the_same_step_whenever_a_signal_comes():
    """One that comes while they ask each other is one that the others do not know of yet."""
    model = torch.nn.Linear(2, 2)
    loop = FitLoop(Finetuner(model, torch.optim.SGD(model.parameters(), 0.1)), [], 1, None, None, None, 0, None, 1)

    class Together(Processes):
        def highest(self, number):
            loop.request.signal = signal.SIGTERM
            return max(number, others)

    others = 0
    with mock.patch.object(Finetuner, "together", Together(0, 2)):
        assert not loop._asked_to_stop()
        assert loop._asked_to_stop()
        loop.request.signal, others = None, int(signal.SIGINT)
        assert loop._asked_to_stop()
