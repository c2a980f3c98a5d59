"""What a model is run on when it is swapped: forms of input, and runs that leave no trace."""

import functools
import random
import threading
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from qsparseprop.nn import SparseConv1d, SparseLinear

from ._helpers import set_weight
from ._swap_examples import Two, X, decisions, sparse_linear, swap

pytestmark = pytest.mark.usefixtures("sparse_is_faster")


# ---- forms of input ----


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


def test_compiled_models():
    compiled = torch.compile(nn.Sequential(sparse_linear(), nn.Sequential(sparse_linear(seed=1))), backend="eager")
    x = torch.randn(4, 64)
    wanted = compiled(x)
    swap(compiled, x)
    assert [d.swapped for d in compiled.swap_report] == [True, True]
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)


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
