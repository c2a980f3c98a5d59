"""What users do with the results of layers that defer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.nn.deferred import conditions

from ._blocks import conv_net, mlp, sparse, swapped


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
