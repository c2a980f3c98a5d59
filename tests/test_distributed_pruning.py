"""Changes of the pattern where others hold the weight: they work, or every process refuses and none waits."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from .test_distributed import torchrun

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = '''
import inspect
import os
import warnings
import torch
import torch.distributed as dist
import torch.distributed.nn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from qsparseprop.nn import QuantizedSparseLinear, SparseLinear
from qsparseprop.utils.pruning_utils import GradualPruner

torch.set_num_threads(1)
dist.init_process_group("gloo")
keep = torch.ones(16, 16, dtype=torch.bool)
keep[::2] = False
# newer versions of torch have another name for the argument, and warn of the old one
arguments = inspect.signature(DistributedDataParallel).parameters
quiet = {next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in arguments): False}


def make(kind=SparseLinear):
    torch.manual_seed(0)
    dense = nn.Linear(16, 16)
    with torch.no_grad():
        dense.weight.mul_(torch.rand(16, 16) > 0.7)
    return nn.Sequential(kind.from_dense(dense), nn.ReLU(), nn.Linear(16, 2))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()


def refused(attempt, sentence):
    try:
        attempt()
    except NotImplementedError as error:
        assert sentence in str(error), error
    else:
        raise AssertionError(f"not refused: {sentence}")


def refuses_all(model, layer, optimizer, sentence, pruner=None):
    step(model, optimizer)
    flat = layer._parameters.get("weight") is None
    before = {} if flat else {k: v.clone() for k, v in layer.state_dict().items()}
    for given in (None, optimizer):
        if given is None and "ZeroRedundancy" in sentence:
            continue
        refused(lambda: layer.apply_further_mask(keep, given), sentence)
        refused(lambda: layer.regrow(~keep, optimizer=given), sentence)
    refused(lambda: layer.check_optimizer(optimizer), sentence)
    refused(pruner.step if pruner else lambda: GradualPruner(model, optimizer, 0.95, end_step=10), sentence)
    assert not pruner or pruner.steps == 0
    for key, value in before.items():
        now = layer.state_dict()[key]
        assert type(now) is type(value) and torch.equal(*(t.to_local() if hasattr(t, "to_local") else t
                                                          for t in (now, value))), key
    step(model, optimizer)


for kind in (SparseLinear, QuantizedSparseLinear):
    model = make(kind)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    refuses_all(model, model[0], torch.optim.AdamW(model.parameters()), "is a DTensor")

    for original in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = FullyShardedDataParallel(make(kind), use_orig_params=original, device_id=torch.device("cpu"))
        layer = model.module[0]
        refuses_all(model, layer, torch.optim.AdamW(model.parameters()), "flat parameter")

    model = make(kind)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    refuses_all(model, model[0], optimizer, "ZeroRedundancyOptimizer keeps the state")
    model[0].apply_further_mask(keep)  # and what the sentence says
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    for _ in range(2):
        step(model, optimizer)

    model = make(kind)
    optimizer = torch.optim.AdamW(model.parameters())
    pruner = GradualPruner(model, optimizer, 0.95, end_step=2)
    wrapped = DistributedDataParallel(model, **quiet)
    refuses_all(wrapped, model[0], optimizer, "DistributedDataParallel has made buffers", pruner)
    for _ in range(3):
        del wrapped
        pruner.step()
        wrapped = DistributedDataParallel(model, **quiet)
        for _ in range(2):
            step(wrapped, optimizer)
    assert abs(model[0].sparsity - 0.95) < 0.01
    del wrapped
    model[0].apply_further_mask(torch.zeros(16, 16), optimizer)  # a layer without weights takes part
    wrapped = DistributedDataParallel(model, **quiet)
    for _ in range(3):
        step(wrapped, optimizer)
    both = torch.cat([p.detach().flatten() for p in model.parameters()])
    other = both.clone()
    dist.broadcast(other, 0)
    assert torch.equal(both, other)
    del wrapped

    model = make(kind)  # a frozen weight is exchanged by nobody
    model[0].weight.requires_grad_(False)
    wrapped = DistributedDataParallel(model, **quiet)
    model[0].apply_further_mask(keep)
    step(wrapped, torch.optim.SGD(model[2].parameters(), 0.1))
    del wrapped

    masked, split = (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2)) for _ in range(2))  # dense, with masks
    for model in (masked, split):
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.5)
    wrapped = DistributedDataParallel(masked)
    optimizer = torch.optim.SGD(masked.parameters(), 0.01)
    GradualPruner(masked, optimizer, 0.9, end_step=1, initial_sparsity=0.8).step()
    step(wrapped, optimizer)
    assert abs(masked[0].weight_mask.mean().item() - 0.2) < 0.01
    del wrapped
    fully_shard(split, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(split.parameters(), 0.01)
    refused(lambda: GradualPruner(split, optimizer, 0.9, end_step=1), "is a DTensor")
    dist.barrier()
dist.barrier()
print("all refused", flush=True)
os._exit(0)  # FSDP and ZeRO hold the group, see the documentation of several processes
'''


def test_changes_of_the_pattern_in_several_processes(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = torchrun(tmp_path, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all refused") == 2
