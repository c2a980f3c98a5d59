"""The Parameter of a sparse weight: ordinary where elements are alike, refused where it is meant to be dense."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear, SparseConv2d, SparseLinear
from qsparseprop.nn._values import SparseValues
from qsparseprop.utils.optimizer_utils import decays, parameter_groups

from ._helpers import set_weight


@pytest.fixture
def layer():
    return SparseLinear.from_dense(set_weight(nn.Linear(20, 30), 0.2, 0))


MISUSES = {
    "orthogonality": lambda w: (w @ w.t()).norm(),
    "product": lambda w: torch.randn(4, 20) @ w,
    "product with itself": lambda w: w @ w,
    "linear": lambda w: F.linear(torch.randn(4, 20), w),
    "linear of as many features": lambda w: F.linear(torch.randn(4, w.numel()), w),
    "convolution": lambda w: F.conv2d(torch.randn(1, 2, 5, 5), w),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transposed": lambda w: w.transpose(0, -1),
    "normalised rows": lambda w: F.normalize(w, dim=-1),
    "norms of rows": lambda w: w.norm(dim=0),
    "norms of rows by place": lambda w: torch.norm(w, 2, 0),
    "vector norm": lambda w: torch.linalg.vector_norm(w, dim=0),
    "spectral norm": lambda w: torch.linalg.norm(w, 2),
    "matrix norm": lambda w: torch.linalg.matrix_norm(w),
    "sums of columns": lambda w: w.sum(0),
    "means by name": lambda w: torch.mean(w, dim=0),
    "amax": lambda w: w.amax(0),
    "softmax": lambda w: torch.softmax(w, 0),
    "a row": lambda w: w[0],
    "rows": lambda w: list(w),
    "unbind": lambda w: w.unbind(),
    "another dimension": lambda w: w[None],
    "as a matrix": lambda w: w.view(w.size(0), -1),
    "reshaped": lambda w: torch.reshape(w, (-1, 1)),
    "flattened from 1": lambda w: w.flatten(1),
    "einsum": lambda w: torch.einsum("i,i->", w, w),
    "singular values": lambda w: torch.linalg.svdvals(w),
    "outer": lambda w: torch.outer(w, w),
    "broadcast": lambda w: w + torch.randn(30, 20),
    # of shapes that fit by chance, or always
    "beside as many columns": lambda w: w - torch.randn(30, w.numel()),
    "scaled rows": lambda w: w * torch.ones(30, 1),
    "scaled rows from the left": lambda w: torch.ones(30, 1) / w,
    "copied into a matrix": lambda w: torch.zeros(30, w.numel()).copy_(w),
    "interpolated": lambda w: torch.lerp(torch.zeros(30, w.numel()), w, 0.5),
    "compared": lambda w: w > torch.ones(30, 1),
    "distance": lambda w: F.mse_loss(w, torch.zeros(1, w.numel())),
    "repeated": lambda w: w.repeat(2, 1),
    "strided": lambda w: w.as_strided((2, 2), (2, 1)),
    "quantile": lambda w: w.quantile(0.5, 0),
    "covariance": lambda w: torch.cov(w),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_what_is_meant_for_the_dense_weight_is_refused(layer, misuse):
    with pytest.raises((RuntimeError, IndexError), match=r"dense_weight\(\)"):
        misuse(layer.weight)


def test_refused_in_a_compiled_function_as_well(layer):
    with pytest.raises(NotImplementedError, match=r"dense_weight\(\)"):
        torch.compile(lambda w: w @ w.t(), backend="eager")(layer.weight)
    # as one graph: torch 2.8 cannot trace the refusal, which refuses as well
    with pytest.raises(Exception, match=r"dense_weight\(\)|__contains__` of class `set`"):
        torch.compile(lambda w: w @ w.t(), backend="eager", fullgraph=True)(layer.weight)


USES = {
    "norm": lambda w: w.norm(), "order": lambda w: w.norm(1), "penalty": lambda w: w.pow(2).sum(),
    "magnitude": lambda w: w.abs().max(), "flat": lambda w: w.view(-1), "flatten": lambda w: w.flatten(),
    "reshape": lambda w: w.reshape(-1), "slice": lambda w: w[2:5], "choice": lambda w: w[w > 0],
    "vector norm": lambda w: torch.linalg.vector_norm(w), "elementwise": lambda w: w * w + 1,
    "one vector of all": lambda w: nn.utils.parameters_to_vector([w]), "detached": lambda w: w.detach(),
    "stacked": lambda w: torch.stack([w, w]), "largest": lambda w: w.topk(2).values, "dtype": lambda w: w.double(),
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_treats_elements_alike_is_as_with_any_parameter(layer, use):
    plain = nn.Parameter(layer.weight.data)
    result = use(layer.weight)
    assert type(result) is (type(layer.weight) if result is layer.weight else torch.Tensor)
    assert torch.equal(result, use(plain))


def test_the_dense_weight_has_the_gradient_that_torch_gives(layer):
    """An orthogonality penalty, of the sparse layer and of a dense one with the same zeros."""
    dense, mask = layer.to_dense(), layer.mask()

    def penalty(w):
        return (w @ w.t() - torch.eye(30)).square().sum()

    penalty(layer.dense_weight()).backward()
    penalty(dense.weight).backward()
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad[mask])


@pytest.mark.parametrize("kind", [SparseLinear, QuantizedSparseLinear, SparseConv2d, QuantizedSparseConv2d])
def test_every_way_to_a_layer_leads_to_such_values(kind):
    dense = set_weight(nn.Linear(8, 9) if "Linear" in kind.__name__ else nn.Conv2d(8, 9, 3), 0.3, 0)
    layer = kind.from_dense(dense)
    other = kind.like(dense)
    other.load_state_dict(layer.state_dict(), assign=True)
    empty = kind.like(dense)
    empty.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other, empty, layer.double()]
    layer.regrow(torch.ones(layer.weight_shape))
    for one in (*copies, layer):
        assert type(one.weight) is SparseValues
        assert isinstance(one.weight, nn.Parameter)
        assert one.weight.requires_grad
        assert one.weight.shape == (one.nonzeros,)


def test_states_hold_plain_tensors(layer):
    assert all(type(value) is torch.Tensor for value in layer.state_dict().values())


def test_an_optimizer_that_was_pickled_with_its_layer_still_trains_it(layer):
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    layer, optimizer = pickle.loads(pickle.dumps((layer, optimizer)))
    assert optimizer.param_groups[0]["params"][0] is layer.weight


def test_it_prints_like_a_parameter(layer):
    assert repr(layer.weight).startswith("Parameter containing:\ntensor([")


def test_a_parameter_may_be_made_of_it(layer):
    copy_of = nn.Parameter(layer.weight)
    assert isinstance(copy_of, nn.Parameter)
    assert copy_of.requires_grad
    assert copy_of.is_leaf
    assert torch.equal(copy_of, layer.weight)
    assert type(layer.weight.detach()) is torch.Tensor


# ---- weight decay ----


def model_of(sparse):
    model = nn.Sequential(set_weight(nn.Linear(20, 30), 0.2, 0), nn.LayerNorm(30), nn.Linear(30, 4))
    if sparse:
        model[0] = SparseLinear.from_dense(model[0])
    return model


@pytest.mark.parametrize("sparse", [False, True])
def test_weights_decay_in_their_group(sparse):
    model = model_of(sparse)
    model[2].weight.requires_grad_(False)
    names = {id(p): n for n, p in model.named_parameters()}
    decay, rest = parameter_groups(model, 0.05)
    assert [names[id(p)] for p in decay["params"]] == ["0.weight"]
    assert {names[id(p)] for p in rest["params"]} == {"0.bias", "1.weight", "1.bias", "2.bias"}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.05, 0.0)
    assert [decays(p) for p in model.parameters()] == [True, False, False, False, True, False]


def test_a_step_decays_sparse_weights_like_dense_ones():
    steps = []
    for sparse in (False, True):
        model = model_of(sparse)
        optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        steps.append(model[0].dense_weight() if sparse else model[0].weight)
    torch.testing.assert_close(*steps)


def test_names_may_be_spared():
    model = model_of(True)
    for names, wanted in ((["0"], {"2.weight"}), (["2.weight"], {"0.weight"})):
        decay, _ = parameter_groups(model, 0.1, names)
        assert {n for n, p in model.named_parameters() if any(p is q for q in decay["params"])} == wanted
    with pytest.raises(ValueError, match="'3'"):
        parameter_groups(model, 0.1, ["3"])
    with pytest.raises(ValueError, match="-1"):
        parameter_groups(model, -1)


def test_files_of_parameters_are_read_with_weights_only(layer, tmp_path):
    torch.save(layer.state_dict(keep_vars=True), tmp_path / "parameters.pt")
    weight = torch.load(tmp_path / "parameters.pt", weights_only=True)["weight"]
    assert type(weight) is SparseValues
    assert torch.equal(weight.detach(), layer.weight.detach())


def converted(layer, function):
    """By each of the ways that torch has to convert parameters."""
    function(torch.__future__, True)
    try:
        return layer.double()
    finally:
        function(torch.__future__, False)


BECOMES = {
    "set": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(m.nonzeros))),
    "registered": lambda m: m.register_parameter("weight", nn.Parameter(torch.ones(m.nonzeros))),
    "meta": lambda m: m.to("meta"),
    "to_empty": lambda m: m.to("meta").to_empty(device="cpu"),
    "overwritten": lambda m: converted(m, lambda f, on: f.set_overwrite_module_params_on_conversion(on)),
    "swapped": lambda m: converted(m, lambda f, on: f.set_swap_module_params_on_conversion(on)),
}


@pytest.mark.parametrize("become", BECOMES.values(), ids=BECOMES)
def test_whatever_becomes_the_weight_is_such_values(layer, become):
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        become(layer)
    assert type(layer.weight) is SparseValues
    with pytest.raises(NotImplementedError, match=r"dense_weight\(\)"):
        layer.weight.t()


def test_weights_of_whole_modules_of_earlier_versions(layer):
    layer.weight.__class__ = nn.Parameter  # as they were pickled then
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    file = pickle.dumps((layer, optimizer))
    assert b"SparseValues" not in file
    loaded, optimizer = pickle.loads(file)
    assert type(loaded.weight) is SparseValues
    assert [len(group["params"]) for group in parameter_groups(loaded, 0.1)] == [1, 1]
    assert optimizer.param_groups[0]["params"][0] is loaded.weight
