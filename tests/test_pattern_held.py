"""A module holds its pattern once, in the memory that the kernels read, and shows it as CSR to whoever asks."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.pattern import check_pattern, checked_pattern, compact_pattern, dense_pattern, row_indices
from qsparseprop.layout.plan import shared_plan_cache
from qsparseprop.nn._traced import config_text, sparse_layer

from ._helpers import KINDS, example, examples, random_mask, set_weight

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(density, inputs=24, outputs=18, cls=qnn.QuantizedSparseLinear):
    dense = set_weight(nn.Linear(inputs, outputs), min(density, 1), 0)
    if density == 1:
        nn.init.ones_(dense.weight)
    return cls.from_dense(dense)


def unsigned(columns):
    return columns.view(torch.uint16).to(torch.int32)


def entries(words, rows, columns):
    """A bitmap as a mask, and what is set behind the columns."""
    each = (words.view(rows, -1, 1) >> torch.arange(64) & 1).flatten(1).bool()
    return each[:, :columns], each[:, columns:]


# ---- what is held ----


@given(shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 7, 40, 63, 64, 65, 32_769, 65_536, 65_537])),
       density=st.sampled_from([0, 0.01, 0.3, 0.5, 0.99, 1]), seed=st.integers(0, 99))  # fmt: skip
@examples(60)
def test_patterns_of_what_patterns_hold(shape, density, seed):
    """Columns of 15, 16 and more bits, none and all of them, and bitmaps, of which the bytes are as said."""
    mask = random_mask(shape, density, seed)
    crow, col, _ = dense_pattern(mask)
    pattern = compact_pattern(crow, col, shape)
    for made in (pattern, checked_pattern(*pattern.held, shape, compact=True), copy.deepcopy(pattern)):
        assert (made.rows, made.columns, made.count) == (*shape, col.numel())
        assert torch.equal(made.crow_indices, crow)
        assert torch.equal(made.col_indices, col)
        assert made.crow_indices.dtype == made.col_indices.dtype == torch.int32
        assert torch.equal(made.held[0], crow)
        held = made.held[1]
        size, words = 2 * col.numel(), shape[0] * -(-shape[1] // 64)
        if shape[1] > 65_536:
            assert torch.equal(held, col)
            size *= 2
        elif col.numel() == shape[0] * shape[1]:
            size = 0
        elif 3 * col.numel() >= shape[0] * shape[1] and 8 * words < size:
            assert held.dtype == torch.int64
            there, behind = entries(held, *shape)
            assert torch.equal(there, mask)
            assert not behind.any()
            size = 8 * words
        else:
            assert held.dtype == torch.int16
            assert torch.equal(unsigned(held), col)
        assert held.nbytes == size
        assert made.nbytes == 4 * (shape[0] + 1) + size
        assert not {t.data_ptr() for t in made.held if t.numel()} & {crow.data_ptr(), col.data_ptr()}


def _int16(*values):
    return torch.tensor(values, dtype=torch.int16)


@pytest.mark.parametrize(("crow", "columns", "error", "message"), [
    ([0, 2, 2, 3], _int16(0, 4, 1), ValueError, r"lie in \[0, 4\), got 4 at 1"),
    ([0, 2, 2, 3], _int16(0, -1, 1), ValueError, "got 65535 at 1"),
    ([0, 2, 2, 3], _int16(3, 3, 1), ValueError, "must ascend in each row"),
    ([0, 2, 2, 3], _int16(0, 3), ValueError, "from 0 to 2"),
    ([0, 2, 2, 3], _int16(), ValueError, "from 0 to 0"),  # there are none where there are all
    ([0, 4, 8, 11], _int16(), ValueError, "from 0 to 0"),
    ([0, 5, 8, 12], _int16(), ValueError, "must ascend, by at most 4"),
    ([0, 2, 2, 3], _int16(*range(13)), ValueError, r"at most 3 \* 4 elements"),
    ([0, 2, 2, 3], _int16(0, 3, 1)[:, None], TypeError, "1-D"),
    ([0, 2, 2, 3], _int16(0).expand(3), ValueError, "share 2 bytes"),
    ([0, 2, 2, 3], torch.tensor([0, 3, 1], dtype=torch.uint8), TypeError, "torch.int32"),
    ([0, 2, 2, 3], _int16(0, 3, 1).to_sparse(), ValueError, "dense"),
    ([0, 2, 2, 3], _int16(0, 3, 1).to("meta"), ValueError, "no contents"),
    ([0, 2, 2, 3], torch.tensor([9, 0, 2]), TypeError, "torch.int32"),  # of so few no bits are held
    ([0, 0, 0, 0], torch.tensor([9, 0, 2]), TypeError, "torch.int32"),
])  # fmt: skip
def test_held_columns_that_are_wrong(crow, columns, error, message):
    """Graphs are given them by whoever likes to."""
    crow = torch.tensor(crow, dtype=torch.int32)
    with pytest.raises(error, match=message):
        checked_pattern(crow, columns, (3, 4), compact=True)
    if columns.layout != torch.strided or columns.is_meta:
        return  # which torch keeps from the operator
    count = 12 if columns.numel() == 0 else columns.numel()
    with pytest.raises((TypeError, ValueError)):
        sparse_layer(torch.randn(2, 4, 1, 1), torch.ones(count), None, crow, columns, layer_numbers(4, 3), 1,
                     config_text(None), torch.float32)  # fmt: skip


def _bits(change=lambda words: words):
    """Row pointers and the words of two rows of 70 columns, 40 of them there in the second row."""
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, 3:], mask[1, 30:] = True, True
    crow, col, _ = dense_pattern(mask)
    words = compact_pattern(crow, col, (2, 70)).held[1]
    assert words.dtype == torch.int64
    return crow, change(words.clone())


def _with(place, word):
    def change(words):
        words[place] = word
        return words

    return _bits(change)


@pytest.mark.parametrize(("given", "error", "message"), [
    (_with(0, -1), ValueError, "must have 67 bits below 70 in row 0"),
    (_with(2, 0), ValueError, "must have 40 bits below 70 in row 1"),
    (_with(3, 1 << 6 | 0b11111), ValueError, "must have 40 bits below 70 in row 1"),  # as many, but one behind the end
    (_bits(lambda words: words[:3]), ValueError, "must be 4 words of bits, got 3"),
    (_bits(lambda words: words[:0]), ValueError, "must be 4 words of bits, got 0"),
    (_bits(lambda words: words.repeat(2)), ValueError, "must be 4 words of bits, got 8"),
    (_bits(lambda words: words.to(torch.int32)), ValueError, "from 0 to the number of nonzeros, 4"),
    (_bits(lambda words: words.to(torch.int16)), ValueError, "from 0 to 4"),
    ((torch.tensor([0, 71, 107], dtype=torch.int32), _bits()[1]), ValueError, "must ascend, by at most 70"),
])  # fmt: skip
def test_held_bits_that_are_wrong(given, error, message):
    with pytest.raises(error, match=message):
        checked_pattern(*given, (2, 70), compact=True)


@pytest.mark.parametrize("density", [0, 0.2, 0.5, 0.99, 1])
@pytest.mark.parametrize("inputs", [24, 64, 130])
def test_every_form_has_columns_in_graphs(density, inputs):
    layer = linear(density, inputs)
    for traced, indices in zip(layer._traced_indices(), layer._indices(), strict=True):
        assert torch.equal(traced, indices)
        assert traced.dtype == indices.dtype


def layer_numbers(inputs, outputs):
    return [inputs, outputs, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]


def test_where_patterns_come_from_they_have_32_bits():
    """As before: 16 bits are for those who read what is held."""
    pattern = linear(0.5)._pattern
    with pytest.raises(TypeError, match="col_indices must be"):
        check_pattern(*pattern.held, (18, 24))
    layer = linear(0.5)
    layer.col_indices = layer.col_indices.to(torch.int16)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"col_indices must be.*torch\.int32, got torch\.int16"):
            layer(torch.randn(2, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plans_read_what_the_module_holds(kind):
    """For every size of input the same memory."""
    layer, _, x = example(kind)
    for images in (x, torch.cat([x, x], -1) if "Conv" in kind else x):
        layer(images.requires_grad_()).sum().backward()
        plan = layer.last_plan()
        assert plan.forward.pattern is plan.backward.pattern is layer._pattern
    layer.apply_further_mask(random_mask(layer.weight_shape, 0.5, 2))
    layer(x)
    assert layer.last_plan().forward.pattern is layer._pattern
    assert layer._pattern.count == layer.nonzeros


#: A bitmap of 60 rows of four words where that is less.
WORDS = 8 * 60 * 4


@pytest.mark.parametrize(("density", "size"), [(0, lambda n: 0), (0.2, lambda n: 2 * n), (0.5, lambda n: WORDS),
                                               (0.9, lambda n: WORDS), (1, lambda n: 0)])  # fmt: skip
def test_bytes_of_a_module(density, size):
    layer = linear(density, 240, 60)
    layer(torch.randn(3, 240, requires_grad=True)).sum().backward()
    layer.state_dict()
    layer.mask()
    gc.collect()
    held = [t for t in vars(layer).values() if isinstance(t, torch.Tensor)]
    assert sum(t.nbytes for t in held) == size(layer.nonzeros) + 4 * 61 == layer._pattern.nbytes


def test_what_nobody_should_write_to():
    """Who finds the private tensors all the same, as among the constants of a graph, leads no kernel astray."""
    layer, x = linear(0.5), torch.randn(2, 24)
    layer(x)
    layer._columns[0] = 99
    for _ in range(2):
        with pytest.raises(TypeError, match="col_indices must be"):
            layer(x)


# ---- what is shown ----


@pytest.mark.parametrize("kind", KINDS)
def test_the_pattern_is_shown_as_csr_and_not_kept(kind):
    layer, dense, _ = example(kind)
    wanted = dense_pattern(dense.weight.flatten(1) != 0)
    for name, indices in zip(("crow_indices", "col_indices"), wanted, strict=False):
        shown = getattr(layer, name)
        assert torch.equal(shown, indices)
        assert shown.dtype == torch.int32
        assert shown.is_contiguous()
        assert type(shown) is torch.Tensor
        ref = weakref.ref(shown)
        del shown
        assert ref() is None
    for _ in range(20):
        assert layer.crow_indices.numel()
    assert len(layer._shown) <= 1
    with torch.inference_mode():
        assert not layer.col_indices.is_inference()


def test_copies_may_be_read_and_computed_with():
    layer, x = linear(0.5), torch.randn(3, 24)
    wanted, col = layer(x), layer.col_indices
    values = layer.dense_weight()[row_indices(layer.crow_indices), col]
    assert torch.equal(values, layer.weight.detach())
    values.sum().backward()  # through what has saved the copy
    col.clone().zero_()
    (col + 1).sub_(3)
    assert torch.equal(layer(x), wanted)


def test_a_copy_that_is_written_to_late():
    """After the module has been used again, and after the pattern has become another one."""
    layer, x = linear(0.5), torch.randn(3, 24)
    col = layer.col_indices
    wanted = layer(x)
    col[0] = 23
    with pytest.raises(ValueError, match="are copies"):
        layer(x)
    layer.load_state_dict(linear(0.5).state_dict())
    assert torch.equal(layer(x), wanted)
    col = layer.col_indices
    layer.apply_further_mask(random_mask((18, 24), 0.5, 3))
    wanted = layer(x)
    col.zero_()
    assert torch.equal(layer(x), wanted)


def test_an_edited_copy_that_is_assigned_is_the_pattern():
    layer, x = linear(0.5), torch.randn(3, 24)
    layer(x)
    row = int((layer.crow_indices.diff() > 0).nonzero()[0])
    last = int(layer.crow_indices[row + 1]) - 1
    col = layer.col_indices
    col[last] = 23  # of a row that ascends
    layer.col_indices = col
    assert layer.col_indices is col
    for column in (23, int(col[last - 1]) + 1 if last > int(layer.crow_indices[row]) else 0):
        col[last] = column  # in place, later: it is held as it is
        assert layer.mask()[row, column]
        dense = layer.dense_weight().detach()
        torch.testing.assert_close(qnn.SparseLinear.from_dense(layer.to_dense())(x), x @ dense.T + layer.bias)
        assert torch.equal(layer(x), type(layer).from_dense(layer.to_dense())(x))
    assert torch.equal(layer.state_dict()["col_indices"], col)
    assert layer.state_dict()["col_indices"] is not col
    with pytest.raises(TypeError, match="col_indices must be a tensor, got list"):
        layer.col_indices = [0]
    layer.to("cpu")  # moves what it has been given into memory of its own
    layer.apply_further_mask(torch.ones(18, 24))
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))


def test_states_that_are_assigned_are_copied():
    layer, x = linear(0.5), torch.randn(3, 24)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    wanted = layer(x)
    layer.load_state_dict(state, assign=True)
    state["col_indices"].zero_()
    state["crow_indices"].zero_()
    assert torch.equal(layer(x), wanted)


def test_pickles_have_csr():
    layer = linear(0.5)
    state = layer.__getstate__()
    assert torch.equal(state["col_indices"], layer.col_indices)
    assert torch.equal(state["crow_indices"], layer.crow_indices)
    assert not {"_pattern", "_crow", "_columns"} & state.keys()
    again = pickle.loads(pickle.dumps(layer))
    assert again._pattern is not None
    assert again._stamp == layer._stamp
    assert not {"col_indices", "crow_indices"} & vars(again).keys()


def test_a_bad_pattern_of_a_pickle_is_refused_when_it_is_used():
    layer = linear(0.5)
    state = layer.__getstate__()
    state["col_indices"] = state["col_indices"].fill_(24)
    other = type(layer).__new__(type(layer))
    other.__setstate__(state)
    with pytest.raises(ValueError, match=r"col_indices must lie in \[0, 24\)"):
        other(torch.randn(2, 24))


# ---- graphs ----


@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_graphs_are_given_what_is_held(density):
    layer = linear(density, cls=qnn.SparseLinear)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 24, requires_grad=True)
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, layer(x))
    plan = shared_plan_cache(*layer._pattern.held).last()
    assert torch.equal(plan.forward.pattern.col_indices, layer.col_indices)
    (grad,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(x.grad, grad)
    if density == 1:  # from a pattern that is held nowhere to another one
        layer.apply_further_mask(random_mask((18, 24), 0.5, 3))
        assert torch.equal(compiled(x), layer(x))
        layer.regrow(torch.ones(18, 24))
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("density", [0, 0.5, 1])
def test_exported_programs_in_files(density):
    """Also those whose constants have no elements."""
    layer, x, file = linear(density), torch.randn(5, 24), io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


def test_graphs_of_wide_layers():
    layer = linear(0.01, 65_600, 3, qnn.SparseLinear)
    assert layer._pattern.held[1].dtype == torch.int32
    x = torch.randn(2, 65_600)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert isinstance(layer._pattern, ValuePattern)


class Reader(nn.Module):
    """Reads the pattern of a layer in its forward."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + self.layer.col_indices.sum() + self.layer.crow_indices.sum()


@pytest.mark.parametrize(("density", "inputs"), [(0, 24), (0.5, 24), (1, 24), (0.01, 65_600)])
def test_graphs_that_read_the_pattern(density, inputs):
    model, x = Reader(linear(density, inputs, 3)), torch.randn(5, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), model(x))
    assert torch.equal(torch.export.export(model, (x,), strict=True).module()(x), model(x))


@pytest.mark.parametrize("move", [lambda layer: layer.float(), lambda layer: layer.to("cpu"), lambda layer: layer])
def test_what_is_assigned_stays_the_callers_own(move):
    """Also a Parameter, and also where a model is moved to where it is."""
    layer, x = linear(0.5), torch.randn(5, 24)
    mine = nn.Parameter(layer.col_indices, requires_grad=False)
    layer.col_indices = mine
    assert move(layer).col_indices.data_ptr() == mine.data_ptr()
    before = layer(x)
    row = (layer.mask().sum(1) - 8).abs().argmin()  # has room for other columns
    first, last = layer.crow_indices[row : row + 2].tolist()
    taken = set(mine[first:last].tolist())
    mine[first:last] = torch.tensor([c for c in range(24) if c not in taken][: last - first], dtype=torch.int32)
    assert not torch.equal(layer(x), before)
