"""Codes of weights that are kept: never those of another weight, and only where a weight comes again."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from qsparseprop._kernels import _kept
from qsparseprop._kernels._plan import ProductRows
from qsparseprop.layout.modes import DENSE, LIST, Modes
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear
from qsparseprop.quantization import QuantConfig

from ._helpers import examples, generator, set_weight

pytestmark = pytest.mark.usefixtures("one_thread")

TENSOR = QuantConfig(granularity="tensor", grad="absmax")
CHANNEL = QuantConfig(grad="absmax")
SAWB = QuantConfig(weight="sawb", granularity="tensor", grad="absmax")


def linear(qconfig=TENSOR, mode=LIST):
    layer = QuantizedSparseLinear.from_dense(set_weight(nn.Linear(40, 24), 0.4, 0), qconfig=qconfig)
    layer.product_modes = Modes(mode, mode, mode)
    return layer


def inputs(seed=0):
    return torch.randn(9, 40, generator=generator(seed))


def passes(layer, x):
    """The result and all gradients."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=generator(5)))
    return y.detach(), x.grad, layer.weight.grad.detach().clone(), layer.bias.grad.clone()


def kept(layer):
    """Bytes of the codes that a layer keeps."""
    return sum(_kept.kept_bytes(rows) for rows in vars(layer.last_plan()).values() if isinstance(rows, ProductRows))


def used_codes(layer, x):
    """Have a layer keep the codes of both directions, and use them."""
    for _ in range(3):
        passes(layer, x)
    assert kept(layer) > 0


def assert_as_fresh(layer, x):
    """What a layer computes, twice, is what a copy computes that has kept nothing."""
    expected = passes(copy.deepcopy(layer), x)
    for _ in range(3):
        for ours, theirs in zip(passes(layer, x), expected, strict=True):
            assert torch.equal(ours, theirs)


def _sgd_step(layer):
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _adam_step(layer):
    torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True).step()


def _in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def _one_element(layer):
    layer.weight.detach()[7] += 1.0


def _data_copy(layer):
    layer.weight.data.copy_(layer.weight.detach().flip(0))


def _data_one_element(layer):
    layer.weight.data[3] = -layer.weight.data[3]


def _data_swap(layer):
    values = layer.weight.data
    values[[2, 18]] = values[[18, 2]]


def _data_signs(layer):
    layer.weight.data[[2, 18, 34]] *= -1


def _new_data(layer):
    layer.weight.data = layer.weight.data * 0.5


def _numpy(layer):
    layer.weight.detach().numpy()[5] *= 3


def _numpy_of_old_data(layer):
    view = layer.weight.data.numpy()
    view[:] = view[::-1].copy()


def _inference(layer):
    with torch.inference_mode():
        layer.weight.data.mul_(0.3)


def _load(layer):
    other = linear(layer.qconfig)
    with torch.no_grad():
        other.weight.mul_(2)
    layer.load_state_dict(other.state_dict())


def _assign(layer):
    other = linear(layer.qconfig)
    with torch.no_grad():
        other.weight.mul_(2)
    layer.load_state_dict(other.state_dict(), assign=True)


def _new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 3)


def _mask(layer):
    layer.apply_further_mask(torch.rand(24, 40, generator=generator(3)) < 0.5)


def _regrow(layer):
    layer.regrow(torch.rand(24, 40, generator=generator(3)) < 0.5, torch.ones(24, 40))


def _double_and_back(layer):
    layer.double().float()
    layer.weight.data.mul_(0.9)


CHANGES = [_sgd_step, _adam_step, _in_place, _one_element, _data_copy, _data_one_element, _data_swap, _data_signs,
           _new_data, _numpy, _numpy_of_old_data, _inference, _load, _assign, _new_parameter, _mask, _regrow,
           _double_and_back]  # fmt: skip


@pytest.mark.parametrize("mode", [LIST, DENSE])
@pytest.mark.parametrize("qconfig", [TENSOR, CHANNEL, SAWB], ids=["tensor", "channel", "sawb"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_quantised_anew(change, qconfig, mode):
    layer, x = linear(qconfig, mode), inputs()
    used_codes(layer, x)
    before = passes(layer, x)[0]
    change(layer)
    assert_as_fresh(layer, x)
    assert not torch.equal(passes(layer, x)[0], before)


@pytest.mark.parametrize("change", [_data_copy, _data_one_element, _numpy])
def test_changes_that_no_version_counts_are_seen_again_and_again(change):
    """Also when codes of the one before have been kept in the meantime."""
    layer, x = linear(), inputs()
    for _ in range(5):
        used_codes(layer, x)
        change(layer)
        assert torch.equal(passes(layer, x)[0], passes(copy.deepcopy(layer), x)[0])


def test_averages_that_are_swapped_in_and_out():
    layer, x = linear(), inputs()
    average = layer.weight.detach() * 0.7
    for _ in range(4):
        used_codes(layer, x)
        own = layer.weight.detach().clone()
        layer.weight.data.copy_(average)
        assert_as_fresh(layer, x)
        layer.weight.data.copy_(own)
        assert_as_fresh(layer, x)


@pytest.mark.parametrize("qconfig", [TENSOR, CHANNEL], ids=["tensor", "channel"])
def test_other_inputs(qconfig):
    """Scales of channels are in the codes, one scale is not."""
    layer = linear(qconfig)
    for seed in (0, 0, 0, 1, 2, 2, 2, 0):
        x = inputs(seed) * torch.logspace(-1, 1, 40) * (seed + 1)
        for ours, theirs in zip(passes(layer, x), passes(copy.deepcopy(layer), x), strict=True):
            assert torch.equal(ours, theirs)


def test_other_settings():
    layer, x = linear(), inputs()
    for qconfig in (CHANNEL, TENSOR, SAWB, QuantConfig(weight="sawb", granularity="tensor", sawb=(12.1, 12.2),
                                                       grad="absmax"), TENSOR):  # fmt: skip
        used_codes(layer, x)
        layer.qconfig = qconfig
        assert_as_fresh(layer, x)


def test_convolutions_of_several_sizes():
    layer = QuantizedSparseConv2d.from_dense(set_weight(nn.Conv2d(6, 8, 3, padding=1), 0.4, 0), qconfig=TENSOR)
    for size in (5, 7, 5, 5, 7, 7, 5):
        x = torch.randn(2, 6, size, size, generator=generator(size))
        assert_as_fresh(layer, x)
        layer.weight.data.mul_(1.1)


def test_threads_share_a_layer_whose_weight_changes():
    """Every result is that of one of the weights there were, computed with it alone afterwards."""
    layer, x = linear(), inputs()
    scales, errors = [1.0, 2.0, 4.0], []  # of which every result tells which one it was
    own = layer.weight.detach().clone()
    with torch.no_grad():
        layer.bias.zero_()
        expected = layer(x)

    def run():
        try:
            for _ in range(150):
                with torch.no_grad():
                    y = layer(x)
                assert any(torch.equal(y, scale * expected) for scale in scales)
        except BaseException as error:
            errors.append(error)

    for scale in scales:
        workers = [threading.Thread(target=run) for _ in range(3)]
        layer.weight.data.copy_(own * scale)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        with torch.no_grad():
            assert torch.equal(layer(x), scale * expected)
    assert not errors


# ---- when codes are kept ----


def test_a_training_step_keeps_nothing():
    for qconfig in (TENSOR, CHANNEL):
        layer, x = linear(qconfig), inputs()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
        for _ in range(4):
            passes(layer, x)
            optimizer.step()
            assert kept(layer) == 0


def test_writers_to_data_are_left_alone():
    """Codes are kept ever more rarely where they turn out to have been kept for nothing."""
    layer, x = linear(), inputs()
    times = 0
    for step in range(200):
        with torch.no_grad():
            layer(x)
        times += kept(layer) > 0
        layer.weight.data.add_(0.01 * (-1) ** step)
    assert times < 10


def test_evaluation_keeps_from_the_second_use_on():
    layer = linear()
    held = []
    with torch.no_grad():
        for seed in range(4):
            layer(inputs(seed))
            held.append(kept(layer))
    rows = layer.last_plan().forward
    assert held == [0] + [rows.slots + 12 * rows.rows] * 3
    layer(inputs(4).requires_grad_()).sum().backward()
    _sgd_step(layer)
    with torch.no_grad():
        layer(inputs(5))  # keeps at once what it guesses will be used
        layer(inputs(6))
    assert kept(layer) == held[-1]


def test_accumulated_gradients_keep_both_directions():
    layer, x = linear(), inputs()
    passes(layer, x)
    assert kept(layer) == 0
    passes(layer, x)
    plan = layer.last_plan()
    assert kept(layer) == sum(rows.slots + 12 * rows.rows for rows in (plan.forward, plan.backward))


@pytest.mark.parametrize(("density", "beside"), [(1, False), (0.9, False), (0.5, True)])
def test_large_codes_lie_beside_gradients_where_dense_weights_take_more(density, beside):
    """Values, gradients and codes of both directions, against values and gradients without zeros."""
    dense = nn.Linear(1480, 1424, bias=False)
    nn.init.ones_(dense.weight)
    layer = QuantizedSparseLinear.from_dense(set_weight(dense, density, 0) if density < 1 else dense, qconfig=TENSOR)
    layer.product_modes = Modes(DENSE, DENSE, DENSE)
    x = torch.randn(3, 1480)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    rows = layer.last_plan().dense_forward
    assert kept(layer) == rows.slots + 12 * rows.rows  # there are no gradients
    for _ in range(3):
        layer(x.requires_grad_()).sum().backward()
    both = rows, layer.last_plan().dense_backward
    assert kept(layer) == (sum(r.slots + 12 * r.rows for r in both) if beside else 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_keeps_for_the_second_run(reentrant):
    """Whose input, and so whose scales, are those of the first."""
    layer = linear(CHANNEL)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    for step in range(3):
        x = inputs(step).requires_grad_()
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        optimizer.step()
    assert kept(layer) > 0
    expected = copy.deepcopy(layer)(inputs(9))
    assert torch.equal(layer(inputs(9)), expected)


def test_long_products_keep_nothing():
    layer = linear()
    x = torch.randn(2000, 40)
    with torch.no_grad():
        for _ in range(4):
            layer(x)
    assert kept(layer) == 0


def test_codes_go_nowhere():
    layer, x = linear(), inputs()
    used_codes(layer, x)
    keys = linear().state_dict().keys()
    assert layer.state_dict().keys() == keys
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.last_plan() is None


def test_results_of_inference_mode():
    layer, x = linear(), inputs()
    with torch.inference_mode():
        for _ in range(3):
            y = layer(x)
    assert torch.equal(layer(x), y)
    assert_as_fresh(layer, x)


# ---- the digest ----


def reference_digest(values):
    """By integers of Python, which do not overflow."""

    def mixed(place):
        n = (place + 1) * 0x9E3779B1 % 2**32
        n = (n ^ n >> 16) * 0x85EBCA6B % 2**32
        n = (n ^ n >> 13) * 0xC2B2AE35 % 2**32
        return n ^ n >> 16

    words = [*map(int, values.numpy().view(np.uint32))]
    words += [0] * (-len(words) % 16)
    sums = [[0] * 8 for _ in range(3)]
    for start in range(0, len(words), 16):
        for lane in range(8):
            low, high = words[start + 2 * lane : start + 2 * lane + 2]
            sums[0][lane] += low + (high << 32)
            for number in range(2):
                keys = []
                for word in (2 * lane, 2 * lane + 1):
                    place = 32 * number + 2 * word
                    keys.append(mixed(place + 1) + start // 16 * (mixed(place) | 1))
                sums[1 + number][lane] += (low + keys[0]) % 2**32 * ((high + keys[1]) % 2**32)
    return b"".join((total % 2**64).to_bytes(8, "little") for lanes in sums for total in lanes)


@given(st.integers(0, 200), st.integers(0, 1000))
@examples(40)
def test_the_digest_is_its_formula(isa, size, seed):
    values = torch.randn(size, generator=generator(seed))
    assert _kept.digest(values, 1) == reference_digest(values)


@pytest.mark.parametrize("size", [131072 * 2, 500_001])
def test_the_digest_is_the_same_by_all_and_for_any_number_of_threads(isa, size):
    values = torch.randn(size, generator=generator(1))
    assert len({_kept.digest(values, threads) for threads in (1, 2, 3, 7)}) == 1
    part = values[:1000]
    assert _kept.digest(part, 1) == reference_digest(part)


@given(st.data())
@examples(200)
def test_the_digest_tells_small_changes(data):
    """A bit, two exchanged, signs."""
    size = data.draw(st.integers(2, 300))
    values = torch.randn(size, generator=generator(size))
    kind = data.draw(st.sampled_from(["bit", "exchange", "signs"]))
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2, unique=True))
    changed = values.clone()
    if kind == "bit":
        changed.numpy().view(np.uint32)[places[0]] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    elif kind == "exchange":
        changed[places] = values[places[::-1]]
    else:
        changed[places] *= -1
    assert _kept.digest(changed, 1) != _kept.digest(values, 1)
