"""States that are refused when they are loaded: what is said, and that nothing has changed."""

from __future__ import annotations

import pytest
import torch

from qsparseprop.nn._state import FORMAT

from ._states import assert_same, layer_and_input, snapshot, swapped


def _bad(key: str, change) -> tuple[str, object]:
    return pytest.param(key, change, id=f"{key}-{change.__name__}")


def too_short(t):
    return t[:-1]


def unsorted(t):
    return t.flip(0)


def duplicates(t):
    return torch.cat([t[:1], t[:-1]])


def out_of_range(t):
    return t + 10_000


def negative(t):
    return t - 10_000


def int64(t):
    return t.to(torch.int64)


def float32(t):
    return t.to(torch.float32)


def two_dimensional(t):
    return t[None]


def newer(t):
    return t + torch.eye(len(t), dtype=t.dtype)[0]


def other_shape(t):
    return t + torch.eye(len(t), dtype=t.dtype)[-1]


def not_a_tensor(t):
    return t.tolist()


def wrapping(t):
    """Row pointers whose differences are all positive in 32 bits."""
    bad = t.clone()
    bad[1:4] = torch.tensor([2**31 - 1, -(2**31), -1], dtype=torch.int32)
    return bad


BAD = [
    _bad("weight", too_short), _bad("weight", int64), _bad("weight", not_a_tensor),
    _bad("crow_indices", too_short), _bad("crow_indices", int64), _bad("crow_indices", unsorted),
    _bad("crow_indices", out_of_range), _bad("crow_indices", float32), _bad("crow_indices", wrapping),
    _bad("crow_indices", not_a_tensor), _bad("crow_indices", two_dimensional),
    _bad("col_indices", too_short), _bad("col_indices", int64), _bad("col_indices", unsorted),
    _bad("col_indices", duplicates), _bad("col_indices", out_of_range), _bad("col_indices", negative),
    _bad("bias", too_short), _bad("bias", int64),
    _bad("_extra_state", newer), _bad("_extra_state", other_shape), _bad("_extra_state", float32),
    _bad("_extra_state", not_a_tensor),
]  # fmt: skip


@pytest.mark.parametrize("kind", ["QuantizedSparseLinear", "SparseConv1d"])
@pytest.mark.parametrize(("key", "change"), BAD)
def test_bad_states_of_a_layer(kind, key, change):
    layer, _, x = layer_and_input(kind)
    state = snapshot(layer)
    state["weight"] *= 2
    state[key] = change(state[key])
    before, wanted = snapshot(layer), layer(x)
    with pytest.raises(RuntimeError, match=f"{key}|crow_indices" if key == "col_indices" else key):
        layer.load_state_dict(state)
    assert_same(before, layer.state_dict())
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize(("key", "change"), BAD)
def test_bad_states_of_a_model_change_no_layer(key, change):
    """The bad layer is the last one, after dense and sparse layers that would be loaded."""
    model = swapped(0)
    state = snapshot(swapped(1))
    name = f"6.{key}"
    state[name] = change(state[name])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"6\." + (key if key != "col_indices" else "c")):
        model.load_state_dict(state)
    assert_same(before, model.state_dict())


@pytest.mark.parametrize("missing", ["weight", "crow_indices", "col_indices", "bias", "_extra_state"])
@pytest.mark.parametrize("strict", [True, False])
def test_missing_keys(missing, strict):
    layer, _, _ = layer_and_input("QuantizedSparseLinear")
    other, _, _ = layer_and_input("QuantizedSparseLinear", 0.6, seed=5)
    before = snapshot(layer)
    state = {k: v for k, v in other.state_dict().items() if k != missing}
    if strict or missing in ("weight", "crow_indices", "col_indices"):
        with pytest.raises(RuntimeError, match=missing):
            layer.load_state_dict(state, strict=strict)
    else:
        assert layer.load_state_dict(state, strict=strict).missing_keys == [missing]
    assert_same(before, layer.state_dict())


def test_unexpected_keys():
    layer, _, _ = layer_and_input("SparseLinear")
    state = {**snapshot(layer), "scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).unexpected_keys == ["scale"]
    without = type(layer)(20, 12, bias=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        without.load_state_dict(layer.state_dict())


def test_a_newer_format_names_both_numbers():
    layer, _, _ = layer_and_input("SparseLinear")
    state = snapshot(layer)
    assert state["_extra_state"].tolist() == [FORMAT, 12, 20]
    state["_extra_state"][0] = FORMAT + 6
    with pytest.raises(RuntimeError, match=f"in format {FORMAT + 6} of .* this version .* format {FORMAT}"):
        layer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=f"in format {FORMAT + 6}"):
        layer.set_extra_state(state["_extra_state"])
    layer.set_extra_state(layer.get_extra_state())
