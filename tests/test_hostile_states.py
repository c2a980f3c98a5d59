"""States that promise more than they hold are refused before their contents are read, and leave a model as it was."""

import io
import sys

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import prune

from qsparseprop import nn as qnn
from qsparseprop.contents import unreadable
from qsparseprop.nn import accept_dense_state
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_sparse
from qsparseprop.utils.state_report import format_weights, weight_infos

from ._helpers import run_fuzzer, run_python, set_weight


def model_of(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 3))
    for index in (0, 3, 4):
        set_weight(model[index], 0.3, seed + index)
    return model


def swapped(seed):
    return swap_modules_with_sparse(model_of(seed), (2, 3, 4, 4), include_dense=False, verbose=False,
                                    min_sparsity=0)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[k], v) for k, v in before.items())


def huge(t):
    return t.reshape(-1)[:1].expand(10**6, 10**6)


def large(t):
    return t.reshape(-1)[:1].expand(10**9)


def shared(t):
    return t.reshape(-1)[:1].clone().expand(t.shape)


def meta(t):
    return t.to("meta")


def fake(t):
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def sparse(t):
    return t.to_sparse()


def nested(t):
    return torch.nested.nested_tensor([t, t])


def quantized(t):
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def complex_numbers(t):
    return t.to(torch.complex64)


def half_bytes(t):
    return torch.empty(t.shape, dtype=torch.float4_e2m1fn_x2)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


CHANGES = [huge, large, shared, meta, fake, sparse, nested, quantized, complex_numbers, freed]
SPARSE_KEYS = ["weight", "crow_indices", "col_indices", "bias", "_extra_state"]
quiet = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor",
                                   "ignore::DeprecationWarning")  # fmt: skip


@quiet
@pytest.mark.parametrize("key", SPARSE_KEYS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("assign", [False, True])
def test_entries_of_sparse_layers(key, change, assign):
    """Of the last layer, so that a model would be half-loaded."""
    model, state = swapped(0), snapshot(swapped(1))
    state[f"4.{key}"] = change(state[f"4.{key}"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"nothing was loaded:\s+4\."):
        model.load_state_dict(state, assign=assign)
    assert_unchanged(model, before)


@quiet
@pytest.mark.parametrize("key", ["weight", "weight_orig", "weight_mask", "bias"])
@pytest.mark.parametrize("change", [*CHANGES[:-2], freed])
@pytest.mark.parametrize("choice", ["keep_pattern", "take_zeros"])
def test_entries_of_dense_layers(key, change, choice):
    model, dense = swapped(0), model_of(1)
    if key.startswith("weight_"):
        prune.l1_unstructured(dense[4], "weight", 0.5)
    state = {k: v.detach() for k, v in dense.state_dict().items()}
    state[f"4.{key}"] = change(state[f"4.{key}"])
    before = snapshot(model)
    with accept_dense_state(choice), pytest.raises(RuntimeError, match=r"nothing was loaded:\s+4\."):
        model.load_state_dict(state)
    assert_unchanged(model, before)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="a dtype of torch 2.8")
def test_numbers_of_half_a_byte_which_torch_cannot_convert():
    model, state = swapped(0), snapshot(swapped(1))
    state["4.weight"] = half_bytes(state["4.weight"])
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"4\.weight: expected a floating-point tensor, got dtype torch\.float4"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


def test_an_extra_state_of_another_number_of_dimensions():
    layer = qnn.SparseLinear(4, 3)
    for state, message in (
        (torch.ones(10**6, dtype=torch.int64), "of a weight of 999999 dimensions, this module's has 2"),
        (torch.ones(1, dtype=torch.int64).expand(10**9), "the 1000000000 elements of .* share 8 bytes of memory"),
        (torch.tensor([1, 3, 5]), r"of a weight of shape \(3, 5\), this module's is \(3, 4\)"),
        (torch._neg_view(torch.tensor([-1, -3, -4])), None),
    ):
        if message is None:
            layer.set_extra_state(state)
            continue
        with pytest.raises(RuntimeError, match=message):
            layer.set_extra_state(state)


def test_entries_that_are_no_tensors_and_keys_that_are_no_strings():
    model, state = swapped(0), snapshot(swapped(1))
    before = snapshot(model)
    for key in SPARSE_KEYS:
        for value in (None, 7, [1, 2], "x", {"a": 1}):
            with pytest.raises(RuntimeError, match="nothing was loaded"):
                model.load_state_dict({**state, f"4.{key}": value})
    with pytest.raises(RuntimeError, match="keys of a state must be strings, got 3"):
        model.load_state_dict({**state, 3: torch.zeros(1)})
    assert_unchanged(model, before)


def test_negative_and_strided_views_are_loaded_as_what_they_say():
    state = snapshot(swapped(1))
    for key in ("4.weight", "4.bias", "0.weight", "0.bias"):
        state[key] = torch._neg_view(-torch.stack([state[key], state[key] + 1], -1))[..., 0]
    state["4.col_indices"] = torch.stack([state["4.col_indices"]] * 2, -1)[..., 0]
    x = torch.randn(2, 3, 4, 4)
    for assign in (False, True):
        model = swapped(0)
        model.load_state_dict(state, assign=assign)
        assert_unchanged(model, snapshot(swapped(1)))
        assert torch.equal(model.eval()(x), swapped(1).eval()(x))
        assert all(t.is_contiguous() and not t.is_neg() for t in model[4].state_dict().values())


# ---- modules and states on the meta device ----


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("keys", [SPARSE_KEYS, ["weight"], ["crow_indices", "col_indices"], ["_extra_state"], ["bias"]])
@pytest.mark.parametrize("assign", [False, True])
def test_states_on_the_meta_device_are_refused(device, keys, assign):
    """Also those of which only a part is there: values without their pattern make no layer."""
    state = snapshot(swapped(1))
    with torch.device(device):
        model = swap_modules_for_state(model_of_empty(), state)
    for key in keys:
        state[f"4.{key}"] = state[f"4.{key}"].to("meta")
    before = model.state_dict()
    with pytest.raises(RuntimeError, match=r"nothing was loaded:(.|\n)*4\.(.|\n)* meta device"):
        model.load_state_dict(state, assign=assign)
    for key, value in model.state_dict().items():
        if key.endswith("_extra_state"):
            continue
        assert value.device.type == device
        assert value.is_meta or torch.equal(value, before[key])


def model_of_empty():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 10), nn.Linear(10, 3))


def test_a_model_on_the_meta_device_is_not_half_loaded():
    """Without assign=True torch loads nothing into such parameters, and says so in a warning only."""
    state = snapshot(swapped(1))
    model = swap_modules_for_state(model_of_empty(), state)
    model[4].to("meta")
    before = snapshot(model[0])
    with pytest.raises(RuntimeError, match=r"nothing was loaded:\s+4.weight: the module is on the meta device; load"):
        model.load_state_dict(state)
    assert_unchanged(model[0], before)
    model.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(model.eval()(x), swapped(1).eval()(x))


# ---- memory ----


def test_what_can_be_read():
    x = torch.randn(4, 3)
    assert unreadable(x) is None
    assert unreadable(x.t()) is None
    assert unreadable(nn.Parameter(x)[1:, ::2]) is None
    assert unreadable(torch.empty(0, 10**12)) is None
    assert unreadable(torch._neg_view(x)) is None
    for change in (huge, large, shared, meta, fake, sparse, freed):
        assert isinstance(unreadable(change(x)), str)
    assert unreadable(torch._efficientzerotensor(3)) is not None  # whose tolist() reads at address 0
    assert unreadable([1]) == "expected a tensor, got list"


def test_a_report_of_weights_reads_nothing_that_cannot_be_read():
    state = snapshot(swapped(1))
    for key in ("4.weight", "4.col_indices", "4._extra_state", "1.running_mean"):
        infos = {info.name: info for info in weight_infos({**state, key: huge(state[key])})}
        if key.startswith("4."):
            assert infos["4.weight"].note
    del state["4.col_indices"]
    assert {info.name: info for info in weight_infos(state)}["4.weight"].note


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
def test_a_report_of_nested_tensors():
    state = snapshot(swapped(1))
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    for key in ("4.weight", "4.col_indices", "4._extra_state", "1.running_mean", "0.weight"):
        infos = weight_infos({**state, key: nested})
        assert format_weights(infos)
    assert {i.name: i for i in weight_infos({"a.weight": nested})}["a.weight"].note == "nested, not counted"


_PEAK = """
import resource, sys, torch
from qsparseprop import nn as qnn
from qsparseprop.nn import accept_dense_state
rows, columns = 2000, 4000
layer = qnn.SparseLinear(columns, rows, bias=False)
if sys.argv[1] == "dense":
    state = {"weight": torch.randn(rows, columns // 2).repeat(1, 2)}
else:
    each = columns // 2
    state = {"weight": torch.randn(rows * each), "_extra_state": layer.get_extra_state(),
             "crow_indices": torch.arange(0, rows * each + 1, each, dtype=torch.int32),
             "col_indices": torch.arange(0, columns, 2, dtype=torch.int32).repeat(rows)}
size = sum(t.nbytes for t in state.values())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with accept_dense_state("take_zeros"):
    layer.load_state_dict(state)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes")
@pytest.mark.parametrize(("kind", "multiple"), [("sparse", 3), ("dense", 10)])
def test_loading_takes_a_small_multiple_of_the_state(kind, multiple):
    process = run_python(_PEAK, kind)
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < multiple


def test_expanded_tensors_survive_a_file():
    """torch.save keeps strides, so that a file of 2 kB may say that it has 10^12 elements."""
    state = snapshot(swapped(1))
    state["4.weight"], state["4.col_indices"] = huge(state["4.weight"]).view(-1), huge(state["4.col_indices"]).view(-1)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["4.weight"].numel() == 10**12
    model = swapped(0)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=r"4\.col_indices: the 1000000000000 elements .* share .* bytes"):
        model.load_state_dict(state)
    assert_unchanged(model, before)


# ---- at random ----


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by calls of Linux")
def test_random_corrupted_checkpoints(kind, tmp_path):
    pytest.importorskip("safetensors")
    assert sum(run_fuzzer("_fuzz_states", 0, 200, tmp_path, kind).values()) == 200
