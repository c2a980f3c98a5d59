"""What frozen models do with inputs that are not as the usual ones: negated views, NaN in tokens, no samples at all."""

import pytest
import torch
from torch import nn

from qsparseprop.inference import FrozenModule, freeze

from ._frozen import data


class TokensFirst(nn.Module):
    """Layers on tokens in another order than that of the samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x.transpose(0, 1)).relu()).transpose(0, 1)


class Several(nn.Module):
    """Gives what it took, a constant, and rows of pixels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("anchors", torch.zeros(5, 4))

    def forward(self, x):
        return x, self.anchors, self.conv(x).permute(0, 2, 3, 1).reshape(-1, 4)


def test_views_that_are_negated():
    frozen = freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), [data(8, 3, 6, 6)])
    x = data(4, 3, 6, 6, seed=2)
    assert torch.equal(frozen(torch._neg_view(-x)), frozen(x))
    assert torch.equal(frozen(torch.complex(x, -x).conj().imag), frozen(x))


@pytest.mark.parametrize("token_scales", [True, False])
def test_nan_stays_in_its_sample_where_tokens_come_first(token_scales):
    frozen = freeze(TokensFirst(), [data(16, 5, 8)], token_scales=token_scales)
    assert isinstance(frozen, FrozenModule)
    x = data(6, 5, 8, seed=2)
    before = frozen(x)
    x[2, 3, 1] = torch.nan
    found = frozen(x)
    assert found.isnan().flatten(1).any(1).tolist() == [False, False, True, False, False, False]
    assert found[2, 3].isnan().all()
    assert torch.equal(found[2, :3], before[2, :3])


def test_nan_reaches_rows_of_pixels_and_neither_inputs_nor_constants():
    frozen = freeze(Several(), [data(8, 3, 5, 5)])
    assert isinstance(frozen, FrozenModule)
    x = data(5, 3, 5, 5, seed=2)
    x[2, 1, 1, 1] = torch.nan
    same, anchors, rows = frozen(x)
    assert int(same.isnan().sum()) == int(x.isnan().sum()) == 1
    assert not anchors.any()
    assert rows.isnan().view(5, -1).all(1).tolist() == [False, False, True, False, False]
    assert not rows.view(5, -1)[[0, 1, 3, 4]].isnan().any()


def test_no_samples_have_the_dtype_of_others():
    frozen = freeze(nn.Linear(4, 3), [data(8, 4)])
    torch.set_default_dtype(torch.float64)
    try:
        assert frozen(torch.zeros(0, 4)).dtype is torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, *args):
        return self.inner(args[0] + args[1])


def test_arguments_of_any_number_are_traced():
    model, batch = Wrapped(), (data(8, 4), data(8, 4, seed=2))
    frozen = freeze(model, [batch])
    assert isinstance(frozen, FrozenModule)
    given = model(*batch).detach()
    torch.testing.assert_close(frozen(*batch), given, rtol=0, atol=0.05 * float(given.abs().max()))
