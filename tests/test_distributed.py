"""DistributedDataParallel over gloo, with two real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import qsparseprop
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune

from ._helpers import relative_error

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
STEPS, BATCH = 6, 16

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

# The group ends where it is destroyed. Something that holds it would let gloo's threads run on while the interpreter
# ends, and one that then releases a tensor aborts the process: rarely, so that it is not for the tests to wait for it.
RUN = '''
import runpy
import sys
import weakref
import torch.distributed as dist

destroy = dist.destroy_process_group

def destroy_and_check():
    group = weakref.ref(dist.group.WORLD)
    destroy()
    assert group() is None, "something holds the process group"

dist.destroy_process_group = destroy_and_check
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
'''

WORKER = '''
import sys
import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which its functions would keep as a default argument
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from qsparseprop.nn.deferred import conditions

conditions.LEAST_ELEMENTS = 0  # blocks form on small tensors, too
folder = sys.argv[1]

def train(kind):
    rank, world = dist.get_rank(), dist.get_world_size()
    start = torch.load(f"{folder}/start_{kind}.pt", weights_only=False)
    if rank:  # what the first process has is what counts
        for tensor in start.parameters():
            tensor.data.zero_()
    model = DistributedDataParallel(start)
    sent = []

    def count(state, bucket):
        sent.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    torch.manual_seed(rank)
    batches = torch.load(f"{folder}/batches.pt")
    for x, y in batches:
        part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.save((model.module.state_dict(), sum(sent) / len(batches)), f"{folder}/end_{kind}_{rank}.pt")

torch.set_num_threads(1)
dist.init_process_group("gloo")
for kind in ("fp32", "int8", "blocks"):
    train(kind)
dist.destroy_process_group()
'''


def torchrun(folder: Path, script: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess:
    run = folder / "run.py"
    run.write_text(RUN)
    package = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(run), str(script), *arguments]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, cwd=script.parent, capture_output=True, text=True, timeout=300,
                          check=False)  # fmt: skip


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
                          nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 4))  # fmt: skip
    layerwise_magnitude_prune(model, 0.8)
    return swap_modules_with_sparse(model, (2, 3, 8, 8), quantize=kind != "fp32", include_dense=False,
                                    min_sparsity=0.5, verbose=False, fuse=kind == "blocks")  # fmt: skip


def train(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def test_two_processes_train_like_one_with_the_joint_batch(tmp_path):
    batches = [(torch.randn(BATCH, 3, 8, 8), torch.randint(4, (BATCH,))) for _ in range(STEPS)]
    torch.save(batches, tmp_path / "batches.pt")
    for kind in ("fp32", "int8", "blocks"):
        torch.save(network(kind), tmp_path / f"start_{kind}.pt")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(tmp_path, script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    exact = train(network("fp32"), batches).state_dict()
    for kind in ("fp32", "int8", "blocks"):
        alone = train(network(kind), batches).state_dict()
        (first, sent), (second, _) = (torch.load(tmp_path / f"end_{kind}_{rank}.pt") for rank in (0, 1))
        assert sent == 4 * sum(p.numel() for p in network(kind).parameters())  # of nonzeros, and nothing else
        for key, wanted in alone.items():
            assert torch.equal(first[key], second[key]), key
            if not wanted.is_floating_point():
                assert torch.equal(first[key], wanted)
            elif kind == "fp32":
                assert relative_error(first[key], wanted) < 1e-5, key
        if kind != "fp32":  # as far from float32 as one process gets by its rounding
            assert 0 < distance(first, exact) < 2 * distance(alone, exact)
            assert distance(alone, exact) < 0.3 * distance(network("fp32").state_dict(), exact)


PATTERNS = '''
import sys
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from qsparseprop.nn import SparseLinear

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
dense = nn.Linear(40, 30)
with torch.no_grad():  # as many weights everywhere, in other places
    dense.weight.view(-1)[torch.randperm(1200)[:1000]] = 0
model = DistributedDataParallel(nn.Sequential(SparseLinear.from_dense(dense)))
try:
    model(torch.randn(3, 40))
    answer = "ran"
except ValueError as error:
    answer = f"refused: {error}"
with open(f"{sys.argv[1]}/answer_{rank}", "w") as file:
    file.write(answer)
del model
dist.barrier()
dist.destroy_process_group()
'''


def test_processes_with_other_patterns_are_refused(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(PATTERNS)
    done = torchrun(tmp_path, script, str(tmp_path))
    assert done.returncode == 0, done.stderr
    # in files: torchrun runs Python unbuffered, and lines that two processes print to one pipe run into each other
    first, second = ((tmp_path / f"answer_{rank}").read_text() for rank in (0, 1))
    assert first == "ran"
    assert second.startswith("refused: the values of this SparseLinear")
    assert "by loading one state" in second


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return torch.cat([(a[k] - b[k]).flatten() for k in b if b[k].is_floating_point()]).norm().item()


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests")
def test_the_example(tmp_path):
    done = torchrun(tmp_path, EXAMPLES / "ddp.py", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "int8:"
    assert int(last[3]) == 4 * int(last[1])
