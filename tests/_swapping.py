"""A network with layers to replace, and what is compared after a swap."""

import torch
from torch import nn

from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import set_weight

SHAPE = (6, 3, 10, 9)


class Net(nn.Module):
    """A dense stem, two sparse convolutions with batch statistics and dropout between, a sparse classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1, bias=False),
                                   nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(0.1))
        self.last = nn.Conv2d(12, 12, (3, 1), groups=3)
        self.head = nn.Linear(12, 5)
        set_weight(self.stem, 1.0, 0)
        for seed, layer in enumerate((self.block[2], self.last, self.head)):
            set_weight(layer, 0.15, seed + 1)
        for p in self.parameters():
            p.data /= 4

    def forward(self, x):
        return self.head(self.last(self.block(self.stem(x))).mean((2, 3)))


def swap(model, shape=SHAPE, **options):
    """Without timing, so that decisions do not depend on the machine."""
    return swap_modules_with_sparse(model, shape, **{"include_dense": False, "verbose": False, **options})


def snapshot(model):
    """Everything of a model that a conversion might disturb."""
    return {
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone())
                       for n, p in model.named_parameters()},
        "buffers": {n: (id(b), b.clone()) for n, b in model.named_buffers()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "random": torch.get_rng_state(),
    }  # fmt: skip


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key, a in before.items():
        b = after[key]
        if isinstance(a, dict):
            assert_same(a, b)
        elif isinstance(a, tuple):
            for x, y in zip(a, b, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key
        else:
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def decisions(model):
    return {d.name: d for d in model.swap_report}
