"""Operators of torch whose kernels trust their arguments: programs may come from anywhere, and are checked before."""

import pytest
import torch
from torch import nn

from qsparseprop.inference import FrozenModule, freeze, load, save
from qsparseprop.inference.calls import Name, call_operator, find_operator
from qsparseprop.inference.steps import Call

from ._frozen import data
from ._helpers import sampled


def call(name, *arguments, **values):
    return call_operator(Call(tuple(values), "y", name, arguments), values)


def recurrent(kind, weights, states=None, layers=1, batch_first=True):
    states = [torch.zeros(1, 2, 8)] * (2 if kind == "lstm" else 1) if states is None else states
    hidden = states if kind == "lstm" else states[0]
    return call(f"aten.{kind}.input", Name("x"), hidden, weights, False, layers, 0.0, False, False, batch_first,
                x=torch.zeros(2, 3, 4))  # fmt: skip


@pytest.mark.parametrize(("kind", "rows"), [("lstm", 32), ("gru", 24), ("rnn_tanh", 8), ("rnn_relu", 8)])
def test_recurrent_weights_have_the_sizes_that_kernels_take_for_granted(kind, rows):
    def weights(rows, inside=4, hidden=8):
        return [torch.zeros(rows, inside), torch.zeros(rows, hidden)]

    assert recurrent(kind, weights(rows))[0].shape == (2, 3, 8)
    other = [weights(rows - 1), weights(0), weights(rows, 5), weights(rows, 4, 7), weights(rows)[:1], [],
             [weight.double() for weight in weights(rows)]]  # fmt: skip
    for wrong in other:
        with pytest.raises(ValueError, match=r"sizes|one dtype"):
            recurrent(kind, wrong)
    for layers in (0, 2, 1 << 40):
        with pytest.raises(ValueError, match="sizes"):
            recurrent(kind, weights(rows), layers=layers)
    with pytest.raises(ValueError, match="sizes"):
        recurrent(kind, weights(rows), states=[torch.zeros(1, 1, 8)] * (2 if kind == "lstm" else 1))
    with pytest.raises(ValueError, match=r"packed|not among"):
        call(f"aten.{kind}.data", Name("x"), torch.ones(3), [], [], False, 1, 0.0, False, False, x=torch.zeros(6, 4))


@pytest.mark.parametrize("settings", sampled([
    {}, {"bidirectional": True}, {"num_layers": 2, "bias": False}, {"proj_size": 3, "num_layers": 2},
]), ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of projections
def test_recurrent_layers_of_torch_pass(settings, tmp_path):
    torch.manual_seed(0)
    kinds = (nn.LSTM,) if "proj_size" in settings else (nn.LSTM, nn.GRU, nn.RNN)
    for kind in kinds:
        model, x = kind(4, 8, **{"batch_first": True, **settings}), data(5, 6, 4)
        frozen = freeze(model, [x])
        assert isinstance(frozen, FrozenModule)
        save(frozen, tmp_path / "m.qsp")
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / "m.qsp")(x)[0], model(x)[0])


def test_keys_and_values_are_as_many():
    query, key, value = torch.zeros(1, 2, 8, 4), torch.zeros(1, 2, 900, 4), torch.zeros(1, 2, 1, 4)
    attention, names = "aten.scaled_dot_product_attention.default", [Name("q"), Name("k"), Name("v")]
    assert call(attention, *names, q=query, k=key, v=key).shape == query.shape
    with pytest.raises(ValueError, match="numbers of keys and values"):
        call(attention, *names, q=query, k=key, v=value)


@pytest.mark.parametrize("name", [
    "aten._native_batch_norm_legit_no_training.default", "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "aten.upsample_nearest2d.default", "aten._upsample_nearest_exact1d.default",
])  # fmt: skip
def test_kernels_that_take_sizes_for_granted_are_refused(name):
    with pytest.raises(ValueError, match="not among the operators that programs may call"):
        find_operator(name)
