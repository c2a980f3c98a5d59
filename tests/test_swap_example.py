"""What a model is run on when it is swapped, and what that shows: inputs, weights that are read, layers not called."""

import copy
import functools
import random
import threading
import types
import weakref
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from qsparseprop.nn import QuantizedSparseLinear, SparseConv1d, SparseLinear
from qsparseprop.utils import _layer_timing
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_sparse, unfold_attention

from ._helpers import set_weight


@pytest.fixture(autouse=True)
def _sparse_is_faster(_seeded, monkeypatch):
    """Decisions must not depend on the machine."""
    torch.set_num_threads(1)

    def pays(dense, sparse, seen, decision, fuse):
        decision.dense_ms, decision.sparse_ms = 2.0, 1.0
        return True

    monkeypatch.setattr(_layer_timing, "_pays", pays)


def sparse_linear(inputs=64, outputs=64, seed=0):
    return set_weight(nn.Linear(inputs, outputs), 0.1, seed)


def swap(model, example, **options):
    return swap_modules_with_sparse(model, example, **{"verbose": False, "quantize": False, **options})


def decisions(model):
    return {d.name: d for d in model.swap_report}


# ---- forms of input ----


class Two(nn.Module):
    """Two tensors, one of them optional by name, and a flag."""

    def __init__(self):
        super().__init__()
        self.a = sparse_linear()

    def forward(self, x, y, scale=None):
        assert scale is None or isinstance(scale, float)
        return self.a(x + y)


X = torch.ones(4, 64)


@pytest.mark.parametrize(
    "example",
    [
        (X, X), [X, X], {"x": X, "y": X}, ((4, 64), (4, 64)), [(4, 64), X], {"x": (4, 64), "y": X, "scale": 2.0},
        (X, X, None), lambda model: model(X, X), lambda model, extra=X: model(X, extra),
    ],
)  # fmt: skip
def test_forms_of_input(example):
    model = swap(Two(), example)
    assert type(model.a) is SparseLinear
    assert decisions(model)["a"].input_shape == (4, 64)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda model: lambda: model(X, X), lambda model: functools.partial(lambda m: m(X, X), model),
        lambda model: lambda other: model(X, X), lambda model: lambda n=3: model(X, X),
    ],
)  # fmt: skip
def test_a_function_may_know_the_model(make, inplace):
    model = Two()
    swapped = swap(model, make(model), inplace=inplace)
    assert decisions(swapped)["a"].input_shape == (4, 64)
    assert type(swapped.a) is SparseLinear
    assert (type(model.a) is SparseLinear) == inplace


def test_sizes_may_be_numpys():
    assert type(swap(nn.Sequential(sparse_linear()), tuple(np.array([4, 64])))[0]) is SparseLinear
    assert type(swap(Two(), ((np.int64(4), 64), (4, np.int32(64)))).a) is SparseLinear


def test_layers_are_called_by_the_names_of_their_arguments():
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = sparse_linear(), set_weight(nn.Conv1d(4, 4, 3, padding=1), 0.1, 0)

        def forward(self, x):
            return self.b(input=self.a(input=x))

    model = ByName()
    x = torch.randn(2, 4, 64)
    wanted = model(x)
    swap(model, x)
    assert type(model.a) is SparseLinear
    assert type(model.b) is SparseConv1d
    torch.testing.assert_close(model(x), wanted)


def test_layers_to_skip_may_be_given_by_any_of_their_names():
    def shared():
        model = nn.Sequential(sparse_linear())
        model.alias = model[0]
        return model

    assert type(swap(shared(), (4, 64), skip_modules=["alias"])[0]) is nn.Linear
    with pytest.raises(ValueError, match="does not have"):
        swap(shared(), (4, 64), skip_modules=[nn.Linear(64, 64)])


@pytest.mark.parametrize(
    ("example", "error", "words"),
    [
        (None, ValueError, "include_dense=False"), ("64", TypeError, "str"), (64, TypeError, "int"),
        (nn.Linear(2, 2), TypeError, "module"), ((), ValueError, "positive integers"), ((4, -1), ValueError, "-1"),
        ((4, 64), TypeError, "'y'"), ({"x": X}, TypeError, "'y'"), (((4, 0), X), ValueError, "(4, 0)"),
    ],
)  # fmt: skip
def test_no_input(example, error, words):
    model = Two()
    with pytest.raises(error) as caught:
        swap(model, () if example == () else example)
    assert words in str(caught.value)
    assert type(model.a) is nn.Linear
    assert not hasattr(model, "swap_report")


@pytest.mark.parametrize("example", [(4, 64), (X, X), {"x": X}, None, lambda model: 1 / 0])
def test_without_timing_nothing_runs(example):
    class Untouchable(Two):
        def forward(self, *args):
            raise AssertionError("the model was run")

    model = swap(Untouchable(), example, include_dense=False)
    assert type(model.a) is SparseLinear
    assert decisions(model)["a"].input_shape is None


def test_the_example_is_not_changed():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sparse_linear()

        def forward(self, x, others):
            x.add_(1)
            others[0].add_(1)
            return self.a(x)

    x, other = torch.zeros(4, 64), torch.zeros(3)
    swap(InPlace(), (x, [other]))
    assert not x.any()
    assert not other.any()


def test_a_model_in_training_that_needs_targets():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sparse_linear()

        def forward(self, images, targets=None):
            if self.training:
                wanted = torch.stack([t["boxes"] for t in targets])
                return {"loss": (self.a(torch.stack(images)) - wanted).square().mean()}
            return self.a(torch.stack(images))

    images, targets = [torch.ones(64)] * 2, [{"boxes": torch.ones(64)}] * 2
    for example in ((images, targets), lambda model: model(images, targets), {"images": images, "targets": targets}):
        assert type(swap(Detector(), example).a) is SparseLinear
    assert type(swap(Detector().eval(), (images,)).a) is SparseLinear


def test_the_largest_of_several_inputs_counts():
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sparse_linear()

        def forward(self, x):
            return self.a(x).sum() + self.a(x[:2]).sum()

    assert decisions(swap(Pyramid(), (6, 64)))["a"].input_shape == (6, 64)


# ---- layers that the model does not call at their place ----


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


def test_compiled_models():
    compiled = torch.compile(nn.Sequential(sparse_linear(), nn.Sequential(sparse_linear(seed=1))), backend="eager")
    x = torch.randn(4, 64)
    wanted = compiled(x)
    swap(compiled, x)
    assert [d.swapped for d in compiled.swap_report] == [True, True]
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_stays_dense():  # what was compiled is the layer as it was
    model = nn.Sequential(torch.compile(sparse_linear(), backend="eager"), sparse_linear(seed=1))
    swap(model, None, include_dense=False)
    assert [d.swapped for d in model.swap_report] == [False, True]


def test_inference_mode_ends_where_layers_are_made():
    with torch.inference_mode():
        model = swap(nn.Sequential(sparse_linear()), (4, 64))
    assert not model[0].weight.is_inference()
    model[0].weight.requires_grad_().sum().backward()


def test_models_may_keep_outputs():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.features, self.last = sparse_linear(), [], {}

        def forward(self, x):
            self.features.append(self.a(x))
            self.last["output"] = self.features[-1]
            return self.features[-1]

    model = Keeps()
    output = model(torch.randn(4, 64))
    copied = swap(model, (4, 64), inplace=False)
    swap(model, (4, 64))
    assert type(model.a) is type(copied.a) is SparseLinear
    assert model.last["output"] is model.features[0] is output
    assert copied.last["output"] is copied.features[0]
    assert torch.equal(copied.features[0], output.detach())


def test_a_model_that_cannot_be_copied():
    model = nn.Sequential(sparse_linear())
    model.lock = threading.Lock()
    with pytest.raises(TypeError, match="include_dense=False"):
        swap(model, (4, 64))
    assert type(swap(model, None, include_dense=False)[0]) is SparseLinear


def test_a_module_list_is_no_such_list():
    model = InAList()
    model.stages = nn.ModuleList(model.stages)
    swap(model, (4, 64))
    assert type(model.a) is type(model.b) is SparseLinear
    assert model.stages[1] is model.a


def test_the_second_run_leaves_no_trace():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = sparse_linear(), nn.BatchNorm1d(64)
            self.drop, self.calls, self.log = nn.Dropout(0.5), 0, []
            self.last = None
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            self.log.append(x.shape)
            self.seen = self.seen + 1
            np.random.rand()  # noqa: NPY002
            random.random()
            self.last = self.drop(self.norm(self.a(x)))
            return self.last

    model = Stateful()
    random_states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    swap(model, (8, 64))
    assert type(model.a) is SparseLinear
    assert (model.calls, model.log, model.last) == (0, [], None)
    assert not model.seen.any()
    assert not model.norm.running_mean.any()
    assert not model.norm.num_batches_tracked
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (np.random.get_state()[1] == random_states[1]).all()  # noqa: NPY002
    assert random.getstate() == random_states[2]
    assert "forward" not in vars(model.a)


def test_neither_run_changes_what_a_model_holds():
    class Momentum(nn.Module):
        """As contrastive learning has it: parameters that a forward pass writes to, and more that is no buffer."""

        def __init__(self):
            super().__init__()
            self.a, self.key = sparse_linear(), nn.Parameter(torch.ones(3))
            self.seen, self.nested, self.queue = torch.zeros(2), {"calls": {"n": 0}, "log": [[]]}, deque([1])
            self.norms = [nn.BatchNorm1d(64)]
            norm = nn.BatchNorm1d(64)
            self.kept = lambda x: norm(x)
            self.norm_of_kept, self.generator = [norm], torch.Generator().manual_seed(1)

        def forward(self, x):
            with torch.no_grad():
                self.key.data.mul_(0.5)
                self.seen.add_(1)
            self.nested["calls"]["n"] += 1
            self.nested["log"][0].append(x.shape)
            self.queue.append(torch.rand(1, generator=self.generator))
            return self.kept(self.norms[0](self.a(x)))

    model = Momentum()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    grad = model.key.grad
    swap(model, lambda m: (m(torch.randn(4, 64)).sum() + m.key.sum()).backward())
    assert type(model.a) is SparseLinear
    assert torch.equal(model.key.detach(), torch.ones(3))
    assert model.key.grad is grad
    assert torch.equal(grad, torch.ones(3))
    assert not model.seen.any()
    assert model.nested == {"calls": {"n": 0}, "log": [[]]}
    assert model.queue == deque([1])
    assert torch.equal(model.generator.get_state(), torch.Generator().manual_seed(1).get_state())
    assert not model.norms[0].running_mean.any()
    assert not model.norm_of_kept[0].num_batches_tracked


@pytest.mark.parametrize("training", [True, False])
def test_the_second_run_is_in_the_recorded_mode(training):
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = sparse_linear(), sparse_linear()

        def forward(self, x):
            return self.a(x) if self.training else self.b(x)

    model = Picky().train(training)
    swap(model, (4, 64))
    assert [type(model.a), type(model.b)] == ([SparseLinear, nn.Linear] if training else [nn.Linear, SparseLinear])
    assert model.training == training


# ---- weights that the model computes with ----


class ReadsWeight(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = sparse_linear(), sparse_linear(seed=1), how

    def forward(self, x):
        if self.how == "product":  # Swin, Mamba
            return self.b(nn.functional.linear(x, self.a.weight, self.a.bias))
        if self.how == "cosine":
            return self.b(nn.functional.linear(x, nn.functional.normalize(self.a.weight)))
        if self.how == "penalty":
            return self.b(self.a(x)) + self.a.weight.sum()
        if self.how == "data":
            return self.b(x @ self.a.weight.data)
        return self.b(self.a(x.to(self.a.weight.dtype).to(self.a.weight.device)))  # T5


@pytest.mark.parametrize("pruned", [None, "mask", "removed"])
@pytest.mark.parametrize("how", ["product", "cosine", "penalty", "data"])
def test_layers_whose_weight_is_read_stay_dense(how, pruned):
    model = ReadsWeight(how)
    if pruned:
        prune.l1_unstructured(model.a, "weight", 0.9)
    if pruned == "removed":
        prune.remove(model.a, "weight")
    x = torch.randn(4, 64)
    wanted = model(x)
    swap(model, x)
    assert type(model.a) is nn.Linear
    assert "weight is read" in decisions(model)["a"].reason
    assert type(model.b) is SparseLinear
    torch.testing.assert_close(model(x), wanted)


def test_looking_at_a_weight_is_not_reading_it():
    assert type(swap(ReadsWeight("dtype"), (4, 64)).a) is SparseLinear


def test_a_model_that_runs_with_dense_layers_only_is_left_as_it_was():
    class Checks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = sparse_linear()

        def forward(self, x):
            assert type(self.a) is nn.Linear, "only Linear here"
            return self.a(x)

    model = Checks()
    layer = model.a
    with pytest.raises(RuntimeError, match=r"(?s)only Linear here.*skip_modules"):
        swap(model, (4, 64))
    assert model.a is layer
    assert not hasattr(model, "swap_report")


# ---- layers that start at zero ----


@pytest.mark.parametrize("timed", [True, False])
def test_layers_that_start_at_zero_stay_dense(timed):
    class Branch(nn.Module):
        """A branch that starts at zero, as in LoRA, ControlNet and ReZero."""

        def __init__(self):
            super().__init__()
            self.a, self.zero, self.conv = sparse_linear(), nn.Linear(64, 64, bias=False), nn.Conv1d(1, 1, 3, padding=1)
            nn.init.zeros_(self.zero.weight)
            nn.init.zeros_(self.conv.weight)

        def forward(self, x):
            return x + self.conv(self.zero(self.a(x))[:, None])[:, 0]

    model = swap(Branch(), (4, 64), include_dense=timed)
    assert type(model.a) is SparseLinear
    assert type(model.zero) is nn.Linear
    assert type(model.conv) is nn.Conv1d
    assert "not pruned" in decisions(model)["zero"].reason
    assert "not pruned" in decisions(model)["conv"].reason


@pytest.mark.parametrize("prototype", [True, False])
def test_a_layer_that_was_pruned_empty_is_replaced(prototype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    prune.custom_from_mask(model[0], "weight", torch.zeros(8, 8))
    swap(model, (4, 8), include_dense=False, prototype=prototype, quantize=True)
    assert type(model[0]) is not nn.Linear
    assert prototype or type(model[0]) is QuantizedSparseLinear


def test_a_copy_of_the_model_is_recorded_with_its_masks():
    """Parametrizations and hooks of pruning are made permanent in the copy only."""
    model = nn.Sequential(sparse_linear(), nn.ReLU(), parametrizations.weight_norm(nn.Linear(64, 8)))
    prune.l1_unstructured(model[0], "weight", 0.9)
    before = copy.deepcopy(model.state_dict())
    swap(model, (4, 64), skip_modules=["0"])
    assert prune.is_pruned(model[0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


# ---- what a layer has beside its weight ----


def calls_another(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


BESIDE = {
    "forward": (calls_another, "forward was replaced"),
    "bound forward": (
        lambda m: setattr(m, "forward", types.MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), m)),
        "forward was replaced",
    ),
    "parameter": (lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(64))), "holds scale"),
    "module": (lambda m: m.add_module("adapter", nn.Linear(64, 64)), "holds adapter"),
    "hook of its state": (lambda m: m.register_state_dict_pre_hook(lambda *_: None), "has hooks"),
    "hook of loading": (lambda m: m.register_load_state_dict_post_hook(lambda *_: None), "has hooks"),
}


@pytest.mark.parametrize(("change", "words"), BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("example", [torch.ones(4, 64), None])
def test_layers_that_are_more_than_their_type_stay_dense(change, words, example):
    model = nn.Sequential(sparse_linear(), sparse_linear(seed=1))
    change(model[0])
    x = torch.randn(4, 64)
    wanted = model(x)
    swap(model, example, include_dense=example is not None)
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is SparseLinear
    assert words in decisions(model)["0"].reason
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruned", [False, True])
def test_what_is_noted_at_parameters_is_taken_over(pruned):
    model = nn.Sequential(sparse_linear())
    if pruned:
        prune.l1_unstructured(model[0], "weight", 0.9)
    weight = model[0].weight_orig if pruned else model[0].weight
    weight._no_weight_decay = model[0].bias.lr_scale = 0.5
    swap(model, (4, 64))
    assert model[0].weight._no_weight_decay == model[0].bias.lr_scale == 0.5


def test_weights_of_single_bytes_stay_dense():
    layer = sparse_linear().to(torch.float8_e4m3fn)
    model = swap(nn.Sequential(layer), None, include_dense=False, min_sparsity=0.0)
    assert "float8" in decisions(model)["0"].reason
    with pytest.raises(TypeError, match="float8"):
        SparseLinear.from_dense(layer)


def test_a_layer_of_the_same_name_is_told_apart():
    kind = type("Linear", (nn.Module,), {"__module__": "elsewhere"})
    layer = kind()
    layer.weight = nn.Parameter(torch.zeros(64, 64))
    model = swap(nn.Sequential(layer), None, include_dense=False)
    assert decisions(model)["0"].reason == "nothing sparse replaces elsewhere.Linear"
