"""What dense rows are made of is checked when they are made; what multiplies them takes nothing that does not fit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from qsparseprop import ops
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern

from ._helpers import generator
from ._hostile import NO_MEMORY, freed, negative

GEOMETRY = conv_geometry(4, 6, (6, 5), (3, 2), (2, 1), (1, 1, 1, 1), (1, 1), 4, False)
CROW, COL, _ = dense_pattern(torch.rand(6, 24, generator=generator(1)) < 0.5)
COUNT = COL.numel()
LARGEST = 2**31 - 1


def pattern(crow_indices=CROW, col_indices=COL, columns=24):
    return ValuePattern(crow_indices, col_indices, columns)


def dense_rows(swapped=False, **changes):
    g = GEOMETRY
    given = {"pattern": pattern(), "groups": 1, "tap_phase": g.tap_phase, "tap_shift": g.tap_shift,
             "source": g.output_layout if swapped else g.input_layout,
             "target": g.input_layout if swapped else g.output_layout, "swapped": swapped}  # fmt: skip
    return DenseRows(*{**given, **changes}.values())


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


# ---- patterns ----


def test_a_pattern_shows_copies_of_what_it_was_given():
    for mask in (torch.rand(5, 7) < 0.5, torch.ones(5, 7) > 0, torch.zeros(5, 7) > 0, torch.rand(2, 70_000) < 0.1):
        crow, col, _ = dense_pattern(mask)
        given = crow.clone(), col.clone()
        found = ValuePattern(*given, mask.shape[1])
        for tensor in (*given, found.crow_indices, found.col_indices):
            tensor.fill_(LARGEST)
        assert (found.rows, found.columns, found.count) == (*mask.shape, int(mask.sum()))
        assert torch.equal(found.crow_indices, crow)
        assert torch.equal(found.col_indices, col)


def test_patterns_that_are_not_plain():
    strided, parameter = torch.stack([CROW, CROW], 1)[:, 0], torch.nn.Parameter(COL, requires_grad=False)
    for crow, col in ((negative(CROW), negative(COL)), (strided, parameter)):
        found = pattern(crow, col)
        assert torch.equal(found.crow_indices, crow)
        assert torch.equal(found.col_indices, col)


@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"crow_indices": None}, TypeError, "crow_indices must be a tensor, got NoneType"),
    ({"crow_indices": [0, 1]}, TypeError, "crow_indices must be a tensor, got list"),
    ({"crow_indices": CROW.float()}, TypeError, "crow_indices must be of dtype torch.int32"),
    ({"crow_indices": CROW.long()}, TypeError, "crow_indices must be of dtype torch.int32"),
    ({"crow_indices": CROW.to("meta")}, ValueError, "crow_indices must be on the CPU"),
    ({"crow_indices": freed(CROW)}, ValueError, f"crow_indices {NO_MEMORY}"),
    ({"crow_indices": freed(CROW, 4)}, ValueError, f"crow_indices {NO_MEMORY}"),
    ({"crow_indices": CROW[:0]}, ValueError, "must have rows and columns, got -1"),
    ({"crow_indices": CROW[:1]}, ValueError, "must have rows and columns, got 0"),
    ({"crow_indices": CROW.flip(0)}, ValueError, "crow_indices must ascend, by at most 24"),
    ({"crow_indices": -CROW}, ValueError, "crow_indices must ascend"),
    ({"crow_indices": CROW + 1}, ValueError, f"crow_indices must ascend from 0 to {COUNT}"),
    ({"crow_indices": changed(CROW, -1, LARGEST)}, ValueError, "crow_indices must ascend, by at most 24"),
    ({"crow_indices": changed(CROW[:2], 0, -LARGEST - 1)}, ValueError, "crow_indices must ascend"),
    ({"col_indices": None}, TypeError, "col_indices must be a tensor, got NoneType"),
    ({"col_indices": COL.float()}, TypeError, "col_indices must be of dtype torch.int32"),
    ({"col_indices": COL.to("meta")}, ValueError, "col_indices must be on the CPU"),
    ({"col_indices": freed(COL)}, ValueError, f"col_indices {NO_MEMORY}"),
    ({"col_indices": freed(COL, 4)}, ValueError, f"col_indices {NO_MEMORY}"),
    ({"col_indices": COL[:-1]}, ValueError, f"crow_indices must ascend from 0 to {COUNT - 1}"),
    ({"col_indices": COL[:0]}, ValueError, "crow_indices must ascend from 0 to 0"),
    ({"col_indices": torch.stack([COL, COL], 1)[:, 0]}, ValueError, "col_indices must be contiguous"),
    ({"col_indices": changed(COL, 1, int(COL[0]))}, ValueError, r"col_indices must ascend in each row .* at 1"),
    ({"col_indices": COL.flip(0)}, ValueError, "col_indices must ascend in each row"),
    ({"col_indices": changed(COL, -1, 24)}, ValueError, r"lie in \[0, 24\), got 24"),
    ({"col_indices": changed(COL, 0, -1)}, ValueError, r"lie in \[0, 24\), got -1"),
    ({"col_indices": torch.full_like(COL, LARGEST)}, ValueError, f"got {LARGEST} at 0"),
    ({"columns": 0}, ValueError, "must have rows and columns, got 6 and 0"),
    ({"columns": -1}, ValueError, "must have rows and columns"),
    ({"columns": 2**31}, ValueError, "must have rows and columns"),
    ({"columns": 5}, ValueError, "crow_indices must ascend, by at most 5"),
    ({"columns": None}, TypeError, "an integer is required"),
])  # fmt: skip
def test_patterns_that_are_refused(changes, error, match):
    assert pattern().count == COUNT
    with pytest.raises(error, match=match):
        pattern(**changes)


# ---- dense rows ----

TAPS = len(GEOMETRY.tap_shift)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("changes", "error", "match"), [
    ({"pattern": None}, TypeError, "'pattern' has incorrect type"),
    ({"pattern": CROW}, TypeError, "'pattern' has incorrect type"),
    ({"pattern": ValuePattern(CROW[:2], COL[: CROW[1]], 24)}, ValueError, "of 1 rows in 1 groups does not go"),
    ({"pattern": pattern(columns=30)}, ValueError, "do not make 30 columns"),
    ({"groups": 0}, ValueError, "in 0 groups does not go"),
    ({"groups": -1}, ValueError, "in -1 groups does not go"),
    ({"groups": 2}, ValueError, "2 channels of a group do not make 24 columns"),
    ({"groups": 3}, ValueError, "in 3 groups does not go"),
    ({"groups": 2**40}, ValueError, "groups does not go"),
    ({"tap_phase": None}, TypeError, "not iterable"),
    ({"tap_phase": ()}, ValueError, "0 taps"),
    ({"tap_phase": GEOMETRY.tap_phase[1:]}, ValueError, "5 taps, shifts of 6"),
    ({"tap_phase": (-1,) * TAPS}, ValueError, r"tap_phase must lie in \[0, 2\)"),
    ({"tap_phase": (2,) * TAPS}, ValueError, r"tap_phase must lie in \[0, 2\)"),
    ({"tap_phase": (2**70,) * TAPS}, ValueError, r"tap_phase must lie in \[0, 2\)"),
    ({"tap_phase": (0.5,) * TAPS}, TypeError, "integer"),
    ({"tap_phase": (None,) * TAPS}, TypeError, "integer"),
    ({"tap_shift": None}, TypeError, "not iterable"),
    ({"tap_shift": ()}, ValueError, "shifts of 0"),
    ({"tap_shift": (2**70,) * TAPS}, ValueError, "tap_shift must lie within"),
    ({"tap_shift": (-(2**62),) * TAPS}, ValueError, "tap_shift must lie within"),
    ({"tap_shift": (GEOMETRY.input_grid.pitch,) * TAPS}, ValueError, "offsets must lie in"),
    ({"tap_shift": (-GEOMETRY.input_grid.pitch,) * TAPS}, ValueError, "offsets must lie in"),
    ({"tap_shift": (0.5,) * TAPS}, TypeError, "integer"),
    ({"source": None}, TypeError, "'source' has incorrect type"),
    ({"target": None}, TypeError, "'target' has incorrect type"),
    ({"source": linear_geometry(4, 6).input_layout}, ValueError, "must have the same lanes"),
])  # fmt: skip
def test_tables_that_are_refused(swapped, changes, error, match):
    with pytest.raises(error, match=match):
        dense_rows(swapped, **changes)


def test_layouts_the_wrong_way_round():
    g = GEOMETRY
    for swapped in (False, True):
        with pytest.raises(ValueError, match="does not go with 8 planes of the output and 6 channels of the input"):
            dense_rows(swapped, source=dense_rows(swapped).target, target=dense_rows(swapped).source)
    none = ops.PlaneLayout(g.output_layout.numbers, (0, 6, 0, 0, 0, 0, 0, 1, 1), (0, 0))
    rows = dense_rows(target=none)
    dy = ops.Packed(torch.zeros(none.lanes(4), dtype=torch.uint8), torch.ones(1))
    assert not ops.sddmm(operand(rows), dy, rows, 4, COUNT).any()


def test_rows_that_are_too_long():
    zeros = torch.zeros(70_001, dtype=torch.int32)
    g = linear_geometry(70_000, 1)
    with pytest.raises(ValueError, match="a row has 70000 weights"):
        DenseRows(ValuePattern(zeros[:2], COL[:0], 70_000), 1, (0,), (0,), g.input_layout, g.output_layout, False)
    g = linear_geometry(1, 70_000)
    with pytest.raises(ValueError, match="a row has 70000 weights"):
        DenseRows(ValuePattern(zeros, COL[:0], 1), 1, (0,), (0,), g.output_layout, g.input_layout, True)


# ---- nobody changes them ----


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
@pytest.mark.parametrize("swapped", [False, True])
def test_copies(copied, swapped):
    rows = dense_rows(swapped)
    again = copied(rows)
    assert (again.rows, again.slots, again.swapped) == (rows.rows, rows.slots, swapped)
    assert (again.source, again.target) == (rows.source, rows.target)
    for name in ("offset", "index", "plane"):
        assert torch.equal(getattr(again, name), getattr(rows, name))
    found = copied(rows.pattern)
    assert torch.equal(found.crow_indices, CROW)
    assert torch.equal(found.col_indices, COL)


def test_they_cannot_be_changed():
    rows = dense_rows()
    before = product(rows)
    for name in ("offset", "index", "plane"):
        getattr(rows, name).fill_(LARGEST)
    for name in ("offset", "index", "plane", "rows", "slots", "source", "target", "pattern", "swapped", "anything"):
        with pytest.raises(AttributeError):
            setattr(rows, name, None)
    for name in ("rows", "columns", "count", "crow_indices", "col_indices", "anything"):
        with pytest.raises(AttributeError):
            setattr(rows.pattern, name, None)
    for call in (lambda: rows.__init__(1, 2, 3, 4, 5, 6, 7), lambda: rows.pattern.__init__(COL, CROW, 1)):
        try:
            call()
        except TypeError:
            continue
    assert torch.equal(product(rows), before)


# ---- operands ----


def operand(rows):
    return ops.quantize_pack(torch.randn(rows.source.shape(4), generator=generator(2)), rows.source,
                             ops.Scheme("symmetric"))  # fmt: skip


def product(rows):
    values = torch.randn(COUNT, generator=generator(3))
    return ops.multiply(operand(rows), values, rows, ops.empty_result(rows, 4, torch.float32))


def test_floats_are_refused():
    rows, values = dense_rows(), torch.randn(COUNT)
    floats = ops.pack(torch.randn(rows.source.shape(4)), rows.source)
    gradient = ops.pack(torch.randn(rows.target.shape(4)), rows.target)
    out = ops.empty_result(rows, 4, torch.float32)
    for call in (lambda: ops.gather_weight(values, rows), lambda: ops.multiply(floats, values, rows, out),
                 lambda: ops.spmm(floats, ops.Weights(torch.randn(rows.slots)), rows, 4),
                 lambda: ops.sddmm(floats, gradient, rows, 4, COUNT)):  # fmt: skip
        with pytest.raises(TypeError, match="dense rows multiply codes"):
            call()
    with pytest.raises(TypeError, match=r"weights must be of dtype torch\.int8"):
        ops.spmm(operand(rows), ops.Weights(torch.randn(rows.slots)), rows, 4)
    with pytest.raises(TypeError, match=r"dy must be of dtype torch\.uint8"):
        ops.sddmm(operand(rows), gradient, rows, 4, COUNT)


@pytest.mark.parametrize(("values", "error", "match"), [
    (torch.randn(COUNT - 1), ValueError, f"values must have {COUNT} elements, got {COUNT - 1}"),
    (torch.randn(COUNT + 1), ValueError, f"values must have {COUNT} elements, got {COUNT + 1}"),
    (torch.randn(0), ValueError, f"values must have {COUNT} elements, got 0"),
    (torch.randn(COUNT).double(), TypeError, "values must be of dtype torch.float32"),
    (torch.randn(COUNT, 2)[:, 0], ValueError, "values must be contiguous"),
    (freed(torch.randn(COUNT)), ValueError, f"values {NO_MEMORY}"),
    (torch.randn(COUNT, device="meta"), ValueError, "values must be on the CPU"),
])  # fmt: skip
def test_values_that_are_refused(values, error, match):
    for swapped in (False, True):
        with pytest.raises(error, match=match):
            ops.quantize_weight(values, dense_rows(swapped))


def test_weights_that_are_refused():
    rows = dense_rows()
    good = ops.quantize_weight(torch.randn(COUNT), rows)
    for part, name in enumerate(("weights", "scale", "correction")):
        for bad, error, match in ((good[part][:-1], ValueError, "must have at least"),
                                  (None, TypeError, "must be a tensor, got NoneType"),
                                  (good[part].double(), TypeError, "must be of dtype")):  # fmt: skip
            with pytest.raises(error, match=f"{name} {match}"):
                ops.spmm(operand(rows), good._replace(**{good._fields[part]: bad}), rows, 4)
    planes = rows.source.planes
    for wrong in (torch.ones(planes - 1), torch.ones(0)):
        with pytest.raises(ValueError, match="factor must have"):
            ops.quantize_weight(torch.randn(COUNT), rows, wrong)
        with pytest.raises(ValueError, match="zero_point must have"):
            ops.quantize_weight(torch.randn(COUNT), rows, None, wrong.int())


def test_gradients_that_are_refused():
    rows, back = dense_rows(), dense_rows(True)
    x, dy = operand(rows), operand(back)
    with pytest.raises(ValueError, match="got those of the input gradient"):
        ops.sddmm(dy, x, back, 4, COUNT)
    for wrong in (COUNT - 1, COUNT + 1, 0, -1, 2**40):
        with pytest.raises(ValueError, match=f"values must be {COUNT}, those of the pattern, got {wrong}"):
            ops.sddmm(x, dy, rows, 4, wrong)
    for images in (-1, 2**40):
        with pytest.raises(ValueError, match="the number of images must lie in"):
            ops.sddmm(x, dy, rows, images, COUNT)
    with pytest.raises(ValueError, match="dy must have at least"):
        ops.sddmm(x, dy, rows, 40, COUNT)
    with pytest.raises(ValueError, match="planes must have at least"):
        ops.sddmm(x._replace(planes=x.planes[:-1]), dy, rows, 4, COUNT)
    with pytest.raises(ValueError, match=NO_MEMORY):
        ops.sddmm(x, dy._replace(planes=freed(dy.planes)), rows, 4, COUNT)
    for name, size in (("scale", 3), ("zero_point", 3)):
        with pytest.raises(ValueError, match=f"x_{name} must have 1 or 8 elements, got {size}"):
            ops.sddmm(x._replace(**{name: getattr(x, name).repeat(size)}), dy, rows, 4, COUNT)
    for none in ((x._replace(scale=None), dy), (x, dy._replace(scale=None)), (x, dy._replace(planes=None))):
        with pytest.raises(TypeError, match="must be a tensor, got NoneType"):
            ops.sddmm(*none, rows, 4, COUNT)


def test_results_that_are_refused():
    rows = dense_rows()
    for shape in ((4, 6, 1, 1), (4, 5, 3, 6), (4, 6), (5, 6, 3, 6)):
        with pytest.raises(ValueError, match=r"out must be of shape|planes must have at least|must have 4 dimensions"):
            ops.multiply(operand(rows), torch.randn(COUNT), rows, torch.empty(shape))
    with pytest.raises(ValueError, match=NO_MEMORY):
        ops.multiply(operand(rows), torch.randn(COUNT), rows, freed(ops.empty_result(rows, 4, torch.float32)))
