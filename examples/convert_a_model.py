"""Prune a small network, convert it, and train it on: the shortest complete script."""

import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop.utils.network_utils import sparsity, swap_modules_with_sparse


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(),
        nn.Conv2d(64, 128, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    for module in (model[2], model[4]):
        prune.l1_unstructured(module, "weight", amount=0.9)

    model = model.to(memory_format=torch.channels_last)
    model = swap_modules_with_sparse(model, (64, 3, 32, 32))
    print(f"{100 * sparsity(model):.1f} % zeros")

    # the optimizer comes after the swap: replaced layers have new parameters
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = torch.rand(64, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (64,))
    for step in range(10):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
