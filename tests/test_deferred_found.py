"""What users do with the results of layers that defer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsparseprop.nn.deferred import conditions

from ._blocks import sparse


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
