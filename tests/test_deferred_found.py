"""What users do with the results of layers that defer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.nn.deferred import conditions
from qsparseprop.utils.fusion import fuse_modules
from qsparseprop.utils.network_utils import swap_modules_with_sparse

from ._blocks import conv_net, mlp, prune, sparse, swapped


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(conditions, "LEAST_ELEMENTS", 0)
    layer = sparse(nn.Linear(24, 24))
    layer.deferring = True
    with torch.no_grad():
        return layer(torch.randn(32, 24))


def test_parameter_of_a_result(result):
    """As prototypes and embeddings are initialised."""
    assert torch.equal(nn.Parameter(result), result + 0)


def test_subclass_behind_a_result_is_asked(result):
    calls = []

    class Logged(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append(func)
            return super().__torch_function__(func, (), args, kwargs or {})

    assert type(result + torch.ones(32, 24).as_subclass(Logged)) is Logged
    assert calls


@pytest.mark.parametrize("model", [conv_net(), mlp(nn.GELU())], ids=["convolutions", "linear layers"])
def test_gradients_have_memory_of_their_own(model):
    """Of no more than they need: files and other packages take the whole of it."""
    shape = (5, 12, 9, 7) if isinstance(model[0], nn.Conv2d) else (9, 24)
    model = swapped(model, shape)
    gradients = torch.autograd.grad(model(torch.randn(shape)).square().sum(), list(model.parameters()))
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.is_contiguous(), name
        assert gradient.untyped_storage().nbytes() == gradient.nbytes, name


def test_what_a_layer_was_fed_is_of_the_last_call():
    model = swapped(mlp(nn.ReLU()), (9, 24))
    for _ in range(3):  # until it is known that the last result is only read
        model(torch.randn(9, 24)).sum()
    assert model[4].took_packed()
    model[4](torch.randn(9, 40)).sum()
    assert not model[4].took_packed()


def test_the_memory_of_a_result_is_given_to_no_other_tensor(result):
    """Torch would go on with memory that is not there."""
    other = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"nor given to another tensor: take a clone\(\)"):
        other.set_(result)
    assert torch.equal(other, torch.zeros(3))
    other.set_(result.clone())
    assert torch.equal(other, result + 0)


@pytest.mark.usefixtures("sparse_is_faster")
def test_a_swap_that_fails_leaves_no_hooks_behind():
    """Those by which dense layers start chains are taken back, too; what was fused before stays so."""

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = sparse(nn.Linear(64, 64))
            self.stem, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
            self.conv = prune(nn.Conv2d(64, 64, 3, padding=1), 0.05)

        def forward(self, x):
            if type(self.conv) is not nn.Conv2d:
                raise ValueError("only with dense layers")
            return self.conv(self.norm(self.stem(x)))

    def hooks(model):
        return {name: (type(m), dict(m._forward_hooks), dict(m._forward_pre_hooks), vars(m).get("deferring"))
                for name, m in model.named_modules()}  # fmt: skip

    model = Picky()
    for _ in range(2):
        before = hooks(model)
        with pytest.raises(RuntimeError, match="only with dense layers"):
            swap_modules_with_sparse(model, (64, 3, 16, 16), fuse=True, verbose=False, min_sparsity=0.5)
        assert hooks(model) == before
        fuse_modules(model)
    assert hooks(model) == before

