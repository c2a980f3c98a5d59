"""Small trainings, and when two of them are the same."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qsparseprop.training.data import training_loader
from qsparseprop.training.finetuner import Finetuner
from qsparseprop.training.models import resnet20
from qsparseprop.utils.network_utils import swap_modules_with_sparse
from qsparseprop.utils.pruning_utils import layerwise_magnitude_prune, make_pruning_permanent


def problem(count=64):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 3, 8, 8, generator=generator)
    images[:, 0, 0, 0] += labels
    return images, labels


def sparse_finetuner(**kwargs):
    """Quantised sparse layers (stochastic rounding), dropout, momentum and a schedule: all that has a state."""
    torch.manual_seed(0)
    model = nn.Sequential(resnet20(num_classes=16, width=4), nn.Dropout(0.2), nn.Linear(16, 4))
    layerwise_magnitude_prune(model, 0.8)
    make_pruning_permanent(model)
    model = swap_modules_with_sparse(model, (16, 3, 8, 8), verbose=False, include_dense=False, min_sparsity=0.7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=100)
    return Finetuner(model, optimizer, scheduler=scheduler, **kwargs)


def plain_finetuner(**kwargs):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    return Finetuner(model, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def assert_same_training(ours, theirs):
    assert ours.history.losses == theirs.history.losses
    assert [e.top1 for e in ours.history.evaluations] == [e.top1 for e in theirs.history.evaluations]
    for (name, a), (_, b) in zip(ours.model.state_dict().items(), theirs.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(torch.as_tensor(ours.optimizer.param_groups[0]["lr"]),
                       torch.as_tensor(theirs.optimizer.param_groups[0]["lr"]))  # fmt: skip


def _loader(kind):
    images, labels = problem()
    if kind == "own generator":
        return training_loader(images, labels, 16, seed=3)
    dataset = TensorDataset(images, labels)
    return DataLoader(dataset, batch_size=16, shuffle=True, num_workers=1 if kind == "workers" else 0)
