"""A layer to replace, and what was decided of it."""

import torch
from torch import nn

from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._helpers import set_weight


def sparse_linear(inputs=64, outputs=64, seed=0):
    return set_weight(nn.Linear(inputs, outputs), 0.1, seed)


def swap(model, example, **options):
    return swap_modules_with_sparse(model, example, **{"verbose": False, "quantize": False, **options})


def decisions(model):
    return {d.name: d for d in model.swap_report}


class Two(nn.Module):
    """Two tensors, one of them optional by name, and a flag."""

    def __init__(self):
        super().__init__()
        self.a = sparse_linear()

    def forward(self, x, y, scale=None):
        assert scale is None or isinstance(scale, float)
        return self.a(x + y)


X = torch.ones(4, 64)
