"""Data-parallel training of a sparse network on the digits: torchrun --nproc-per-node 2 examples/ddp.py

Each process computes on its part of the batch; DistributedDataParallel averages the gradients, which are as small as
the weights: one number a nonzero. Needs scikit-learn.
"""

import argparse

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, see main()
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from qsparseprop.training.data import load_digits_data, training_loader
from qsparseprop.training.models import CifarResNet
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent


def make_model(sparsity: float, kind: str) -> nn.Module:
    """The same network in every process."""
    torch.manual_seed(0)
    model = CifarResNet((1, 1, 1), (16, 32, 64), in_channels=1)
    layerwise_magnitude_prune(model, sparsity)
    make_pruning_permanent(model)
    if kind == "dense":
        return model
    # without timing: every process has to come to the same decisions
    return swap_modules_with_sparse(model, (16, 1, 16, 16), quantize=kind == "int8", include_dense=False,
                                    min_sparsity=0.9 * sparsity, verbose=False)  # fmt: skip


def train(kind: str, sparsity: float, epochs: int, batch_size: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    # The pattern has to be the same everywhere, which the seed sees to: values are sent, patterns are not.
    model = DistributedDataParallel(make_model(sparsity, kind))
    sent = [0, 0]  # bytes, steps

    def count(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent[0] += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    data = load_digits_data(size=16, channels=1)
    share = batch_size // world
    torch.manual_seed(rank)  # the random rounding of gradients need not be the same
    for epoch in range(epochs):
        losses = []
        for images, labels in training_loader(data.train_images, data.train_labels, batch_size, seed=epoch):
            part = slice(rank * share, (rank + 1) * share)
            loss = F.cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sent[1] += 1
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {mean.item() / world:.4f}", flush=True)
    if rank == 0:
        weights = sum(p.numel() for p in model.parameters())
        print(f"{kind}: {weights} parameters, {sent[0] // sent[1]} bytes of gradients a step and process")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["int8", "fp32", "dense"], default="int8")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together (default: %(default)s)")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    train(args.kind, args.sparsity, args.epochs, args.batch_size)
    # This waits for gloo's threads, if nothing else holds the group. Else they outlive the interpreter, and one that
    # still has a tensor to release aborts the process. So the DistributedDataParallel ends with its function; and
    # torch.distributed.nn, which torch would import inside of it, has the group as a default argument of its functions.
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
