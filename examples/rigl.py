"""Dynamic sparse training on top of the sparse modules: RigL (Evci et al. 2020, arXiv 1911.11134) on the digits.

A network starts with 90 % random zeros. Every few steps a part of the smallest weights is removed, and as many are
grown where the gradient of the dense weight is largest. Needs scikit-learn.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from qsparseprop.nn._base import SparseModule
from qsparseprop.training.data import evaluation_loader, load_digits_data, training_loader
from qsparseprop.utils.network_utils import sparsity, swap_modules_with_dense, swap_modules_with_sparse

STEPS, INTERVAL, FRACTION = 440, 20, 0.3


def sparse_modules(model: nn.Module) -> dict[str, SparseModule]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseModule)}


def update_pattern(model: nn.Module, optimizer: torch.optim.Optimizer, fraction: float, images, labels) -> None:
    """Move a fraction of the weights of each layer; momentum moves along."""
    dense = swap_modules_with_dense(model, inplace=False)  # its weights have gradients where there are no nonzeros
    F.cross_entropy(dense(images), labels).backward()
    for name, module in sparse_modules(model).items():
        count = int(fraction * module.nonzeros)
        weight, existing = module.dense_weight().detach().flatten(), module.mask().flatten()
        smallest = weight.abs().masked_fill(~existing, torch.inf).topk(count, largest=False).indices
        growth = dense.get_submodule(name).weight.grad.abs().flatten().masked_fill(existing, -1)
        largest = growth.topk(count).indices
        keep, grow = torch.ones_like(existing), torch.zeros_like(existing)
        keep[smallest], grow[largest] = False, True
        module.apply_further_mask(keep.view(module.weight_shape), optimizer)
        module.regrow(grow.view(module.weight_shape), optimizer=optimizer)


def main() -> None:
    torch.manual_seed(0)
    data = load_digits_data(size=16, channels=1)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    for module in (model[3], model[6], model[11]):
        prune.random_unstructured(module, "weight", 0.9)
    swap_modules_with_sparse(model, (64, 1, 16, 16), include_dense=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    step = 0
    while step < STEPS:
        for images, labels in training_loader(data.train_images, data.train_labels, 64, seed=step):
            if step % INTERVAL == INTERVAL - 1 and step < 0.75 * STEPS:
                fraction = FRACTION / 2 * (1 + math.cos(math.pi * step / (0.75 * STEPS)))
                update_pattern(model, optimizer, fraction, images, labels)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        right = sum((model(x).argmax(1) == y).sum().item()
                    for x, y in evaluation_loader(data.test_images, data.test_labels, 120))  # fmt: skip
    print(f"{step} steps, {100 * sparsity(model):.1f} % zeros, top-1 {100 * right / len(data.test_labels):.1f} %")


if __name__ == "__main__":
    main()
