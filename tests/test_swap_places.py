"""Layers that the model calls elsewhere than at their place, or reads the weights of there."""

import weakref

import pytest
import torch
from torch import nn

from qsparseprop.nn import SparseLinear
from qsparseprop.utils.network_utils import swap_modules_for_state, unfold_attention

from ._swap_examples import decisions, sparse_linear, swap

pytestmark = pytest.mark.usefixtures("sparse_is_faster")


class InAList(nn.Module):
    """As in feature pyramids: registered by name, used from a list."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (sparse_linear(seed=seed) for seed in range(3))
        self.stages = [self.b, self.a]

    def forward(self, x):
        for stage in self.stages:
            x = torch.relu(stage(x))
        return self.c(x)


class InADict(InAList):
    def __init__(self):
        super().__init__()
        self.stages = {"b": self.b, "a": self.a}

    def forward(self, x):
        return self.c(self.stages["a"](self.stages["b"](x)))


class InATupleOfTuples(InAList):
    def __init__(self):
        super().__init__()
        self.stages = ((self.b, torch.relu), (self.a, torch.relu))

    def forward(self, x):
        for layer, act in self.stages:
            x = act(layer(x))
        return self.c(x)


class KeptMethod(InAList):
    def __init__(self):
        super().__init__()
        self.stages = [self.b.forward, self.a.__call__]


class KeptFunction(InAList):
    def __init__(self):
        super().__init__()
        b, a = self.b, self.a
        self.stages = [lambda x: b(x), lambda x: a(x)]


@pytest.mark.parametrize("kind", [InAList, InADict, InATupleOfTuples, KeptMethod, KeptFunction])
@pytest.mark.parametrize("inplace", [True, False])
def test_layers_called_from_elsewhere_stay_dense(kind, inplace):
    model = kind()
    before = model.a, model.b
    x = torch.randn(8, 64)
    wanted = model(x)
    swapped = swap(model, x, inplace=inplace)
    assert type(swapped.a) is type(swapped.b) is nn.Linear
    assert not inplace or (swapped.a is before[0] and swapped.b is before[1])
    assert type(swapped.c) is SparseLinear
    for name in "ab":
        d = decisions(swapped)[name]
        assert not d.swapped
        assert "list" in d.reason or "not reached" in d.reason or "outside" in d.reason, d.reason
    torch.testing.assert_close(swapped(x), wanted)
    if kind is not KeptFunction or inplace:  # a function of the original knows the original's layers only
        swapped(x).sum().backward()
        assert all(p.grad is not None for p in swapped.parameters())


class AtItsPlaceToo(InAList):
    def forward(self, x):
        return self.c(self.a(self.b(super().forward(x))))


class AtItsPlaceInEvaluation(InAList):
    def forward(self, x):
        return super().forward(x) if self.training else self.c(self.a(self.b(x)))


class WeightsInAList(InAList):
    def __init__(self):
        super().__init__()
        self.weights = [self.b.weight, self.a.weight]

    def forward(self, x):
        for weight in self.weights:
            x = nn.functional.linear(x, weight)
        return self.c(self.b(self.a(x)))


class WeightsInAFunction(InAList):
    def __init__(self):
        super().__init__()
        b, a = self.b.weight, self.a.weight
        self.stages = lambda x: x @ b @ a

    def forward(self, x):
        return self.c(self.b(self.a(self.stages(x))))


class WeakReferences(InAList):
    def __init__(self):
        super().__init__()
        self.stages = [weakref.ref(self.b), weakref.ref(self.a)]

    def forward(self, x):
        return self.c(self.stages[0]()(self.a(self.b(x))))


class ViewsOfWeights(InAList):
    """Kept from the beginning, as some layers keep a transposed weight."""

    def __init__(self):
        super().__init__()
        self.transposed = [self.b.weight.t(), self.a.weight.detach().t()]

    def forward(self, x):
        return self.c(self.b(x @ self.transposed[1]) + self.a(x @ self.transposed[0]))


class PartsOfOneTensor(InAList):
    def __init__(self):
        super().__init__()
        both = nn.Parameter(torch.stack([self.b.weight, self.a.weight]).detach())
        self.b.weight.data, self.a.weight.data = both.data[0], both.data[1]
        self.both = both

    def forward(self, x):
        return self.c(self.a(self.b(x)) + x @ self.both[0])


@pytest.mark.parametrize(
    "kind",
    [AtItsPlaceToo, AtItsPlaceInEvaluation, WeightsInAList, WeightsInAFunction, WeakReferences, ViewsOfWeights,
     PartsOfOneTensor],
)  # fmt: skip
@pytest.mark.parametrize("example", [torch.ones(4, 64), None])
def test_layers_that_are_called_at_their_place_and_elsewhere_stay_dense(kind, example):
    model = kind().eval()
    x = torch.randn(4, 64)
    wanted = model(x)
    before = model.a, model.b
    swap(model, example, include_dense=example is not None)
    assert (model.a, model.b) == before
    assert type(model.c) is SparseLinear
    assert all(decisions(model)[name].reason for name in "ab")
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
    if kind is not ViewsOfWeights:  # whose graph ends where it was made
        model.train()(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(type(p) is nn.Parameter and not vars(p) for layer in before for p in layer.parameters())


def test_other_replacements_mind_them_as_well():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2)
            self.kept = [self.a]

        def forward(self, x):
            return self.kept[0](x, x, x)[0] + self.b(x, x, x)[0]

    model = Attends()
    a, x = model.a, torch.randn(3, 2, 16)
    wanted = model(x)
    unfold_attention(model)
    assert model.a is a
    assert type(model.b) is not nn.MultiheadAttention
    torch.testing.assert_close(model(x), wanted)

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (sparse_linear(seed=seed) for seed in range(3))

    state = swap(Plain(), None, include_dense=False).state_dict()
    model = InAList()
    before = model.a, model.b, model.c
    with pytest.raises(ValueError, match="also holds a, b in a list"):
        swap_modules_for_state(model, state)
    assert (model.a, model.b, model.c) == before


def test_weights_that_were_read_from_one_file_are_no_parts_of_one_tensor():
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    memory = torch.cat([p.detach().reshape(-1) for p in model.parameters()])  # as safetensors reads files
    for p, part in zip(model.parameters(), memory.split([p.numel() for p in model.parameters()]), strict=True):
        p.data = part.view_as(p)
    swap(model, (4, 64))
    assert type(model[0]) is type(model[1]) is SparseLinear


def test_a_compiled_layer_stays_dense():  # what was compiled is the layer as it was
    model = nn.Sequential(torch.compile(sparse_linear(), backend="eager"), sparse_linear(seed=1))
    swap(model, None, include_dense=False)
    assert [d.swapped for d in model.swap_report] == [False, True]


def test_a_module_list_is_no_such_list():
    model = InAList()
    model.stages = nn.ModuleList(model.stages)
    swap(model, (4, 64))
    assert type(model.a) is type(model.b) is SparseLinear
    assert model.stages[1] is model.a
