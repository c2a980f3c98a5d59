"""A sparse network with Accelerate: python examples/accelerate_sparse.py, or by two processes
torchrun --nproc-per-node 2 examples/accelerate_sparse.py (accelerate launch does the same).

Trains a pruned and swapped network on the digits, saves the state of the training, and loads it again. Needs accelerate
and scikit-learn.
"""

import argparse

import torch
import torch.distributed.nn  # before there is a process group: it keeps the one that it finds
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop import layerwise_magnitude_prune, make_pruning_permanent, swap_modules_with_sparse
from qsparseprop.training.data import load_digits_data


def sparse_network(sparsity: float) -> nn.Module:
    """A network for digits of 16 x 16 pixels."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 64, 10),
    )  # fmt: skip
    layerwise_magnitude_prune(model, sparsity)
    make_pruning_permanent(model)
    # include_dense=False times nothing, so that all processes come to the same network
    return swap_modules_with_sparse(model, (64, 3, 16, 16), include_dense=False, fuse=True, verbose=False)


def evaluate(accelerator: Accelerator, model: nn.Module, batches: DataLoader) -> float:
    """Top-1 of all processes together, in percent."""
    model.eval()
    correct = []
    with torch.no_grad():
        for images, labels in batches:
            correct.append(accelerator.gather_for_metrics(model(images).argmax(1) == labels))
    return 100 * torch.cat(correct).float().mean().item()


def train(accelerator: Accelerator, epochs: int, out: str) -> None:
    """Train, save, and load again; the model ends here, before the process group does."""
    set_seed(0)
    data = load_digits_data(16)
    model = sparse_network(0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batch_size = 64 // accelerator.num_processes
    model, optimizer, batches, tests = accelerator.prepare(
        model, optimizer,
        DataLoader(TensorDataset(data.train_images, data.train_labels), batch_size, shuffle=True, drop_last=True),
        DataLoader(TensorDataset(data.test_images, data.test_labels), batch_size),
    )  # fmt: skip
    for epoch in range(epochs):
        model.train()
        for images, labels in batches:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        accelerator.print(f"epoch {epoch + 1}: top-1 {evaluate(accelerator, model, tests):.2f} %")
    accelerator.save_state(out)
    accelerator.wait_for_everyone()  # the first process writes what all of them read
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(out)
    accelerator.print(f"loaded again: top-1 {evaluate(accelerator, model, tests):.2f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", default="accelerate", help="folder of the state (default: %(default)s)")
    args = parser.parse_args()
    accelerator = Accelerator(cpu=True)
    train(accelerator, args.epochs, args.out)
    accelerator.free_memory()
    accelerator.end_training()


if __name__ == "__main__":
    main()
