import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qsparseprop.layout.geometry import GROUP, linear_geometry
from qsparseprop.layout.pattern import check_pattern, dense_pattern, row_indices
from qsparseprop.layout.plan import make_plan

from ._helpers import conv_cases, random_mask


@pytest.fixture(autouse=True)
def _one_thread(_seeded):
    """Small tensors only: on a busy machine a team of threads costs more than the work."""
    torch.set_num_threads(1)


def _int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CROW, COL = _int32(0, 2, 2, 3), _int32(0, 3, 1)


def test_a_correct_pattern_passes():
    check_pattern(CROW, COL, (3, 4))
    check_pattern(_int32(0, 0, 0), torch.zeros(0, dtype=torch.int32), (2, 5))
    check_pattern(_int32(0), torch.zeros(0, dtype=torch.int32), (0, 5))


@pytest.mark.parametrize(
    ("crow", "col", "error", "message"),
    [
        (CROW.long(), COL, TypeError, r"crow_indices must be.*torch\.int32, got torch\.int64"),
        (CROW, COL.float(), TypeError, r"col_indices must be.*torch\.int32, got torch\.float32"),
        (CROW.view(2, 2), COL, TypeError, r"crow_indices must be a 1-D.*\(2, 2\)"),
        (CROW, COL[:, None], TypeError, r"col_indices must be a 1-D.*\(3, 1\)"),
        (CROW[:-1], COL, ValueError, "must have 4 elements, got 3"),
        (_int32(0, 2, 2, 3, 3), COL, ValueError, "must have 4 elements, got 5"),
        (_int32(1, 2, 2, 3), COL, ValueError, "ascend from 0 to the number of nonzeros, 3"),
        (_int32(0, 2, 2, 4), COL, ValueError, "ascend from 0 to the number of nonzeros, 3"),
        (_int32(0, 2, 1, 3), COL, ValueError, "ascend from 0"),
        (_int32(0, 5, 2, 3), COL, ValueError, "ascend from 0"),
        (_int32(0, -1, 2, 3), COL, ValueError, "ascend from 0"),
        (CROW, _int32(0, 4, 1), ValueError, r"\[0, 4\), got 0 to 4"),
        (CROW, _int32(-1, 3, 1), ValueError, r"\[0, 4\), got -1 to 3"),
        (CROW, _int32(0, 2**31 - 1, 1), ValueError, r"\[0, 4\), got 0 to 2147483647"),
        (CROW, _int32(3, 0, 1), ValueError, "ascend within each row"),
        (CROW, _int32(3, 3, 1), ValueError, "without duplicates"),
    ],
)
def test_every_kind_of_wrong_pattern_is_an_error(crow, col, error, message):
    with pytest.raises(error, match=message):
        check_pattern(crow, col, (3, 4))


def test_columns_may_descend_from_row_to_row_only():
    check_pattern(_int32(0, 1, 2), _int32(3, 0), (2, 4))


@given(shape=st.tuples(st.integers(0, 12), st.integers(0, 12)), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_dense_pattern_round_trip(shape, density, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    crow, col, flat = dense_pattern(mask)
    assert crow.dtype == col.dtype == torch.int32
    assert flat.dtype == torch.int64
    check_pattern(crow, col, shape)
    again = torch.zeros(shape, dtype=torch.bool)
    again[row_indices(crow), col.long()] = True
    assert torch.equal(again, mask)
    assert torch.equal(mask.reshape(-1).nonzero().squeeze(1), flat)
    assert torch.equal(row_indices(crow) * shape[1] + col, flat)


def test_indices_above_float32_precision_stay_exact():
    """2**24 + 1 is where indices kept as floats go wrong."""
    columns = 2**24 + 9
    mask = torch.zeros(1, columns, dtype=torch.bool)
    wanted = [1, 2**24 - 1, 2**24 + 1, 2**24 + 3, columns - 1]
    mask[0, wanted] = True
    crow, col, flat = dense_pattern(mask)
    assert col.tolist() == flat.tolist() == wanted
    plan = make_plan(crow, col, linear_geometry(columns, 1))
    assert plan.forward.plane.tolist()[:5] == wanted
    assert plan.forward.offset.tolist()[:5] == [64 * c for c in wanted]


def _check_list(rows, count, nonzeros, rows_of, offset_of):
    """A list holds each nonzero once, in the right row, with its own offset; the rest is marked as padding."""
    assert {t.dtype for t in (rows.group_ptr, rows.offset, rows.index, rows.plane)} == {torch.int32}
    assert rows.group_ptr.shape == (count + 1,)
    slots = GROUP * int(rows.group_ptr[-1])
    assert rows.offset.shape == rows.index.shape == rows.plane.shape == (slots,)
    assert rows.group_ptr[0] == 0
    assert (rows.group_ptr.diff() >= 0).all()
    slot_row = torch.repeat_interleave(torch.arange(count), GROUP * rows.group_ptr.diff().long())
    real = rows.index >= 0
    assert torch.equal(rows.index[real].sort().values, torch.arange(nonzeros, dtype=torch.int32))
    assert (rows.index[~real] == -1).all()
    index = rows.index[real].long()
    assert torch.equal(slot_row[real], rows_of[index])
    assert torch.equal(rows.offset[real].long(), offset_of[index])
    # four at a time, and never a group of padding alone
    wanted = torch.bincount(rows_of, minlength=count)
    assert torch.equal(rows.group_ptr.diff().long(), (wanted + GROUP - 1) // GROUP)
    if slots:
        assert rows.offset.min() >= 0


@given(case=conv_cases(most_channels=4))
@settings(max_examples=150)
def test_lists_hold_every_nonzero_once(case):
    g = case.geometry()
    x, y = g.input_grid, g.output_grid
    per_group, taps = case.in_channels // case.groups, len(g.tap_shift)
    mask = random_mask((case.out_channels, per_group * taps), case.density, case.seed)
    crow, col, _ = dense_pattern(mask)
    plan = make_plan(crow, col, g, case.groups)
    assert plan.geometry is g
    row, column = mask.nonzero().unbind(1)
    tap = column % taps
    channel = column // taps + row // (case.out_channels // case.groups) * per_group
    plane = torch.tensor(g.tap_phase)[tap] * case.in_channels + channel
    shift = torch.tensor(g.tap_shift)[tap]
    nonzeros = int(mask.sum())
    _check_list(plan.forward, case.out_channels, nonzeros, row, plane * x.pitch + x.front + shift)
    _check_list(plan.backward, x.planes, nonzeros, plane, row * y.pitch + y.front - shift)
    real = plan.forward.index >= 0
    assert torch.equal(plan.forward.plane[real].long(), plane[plan.forward.index[real].long()])


def test_rows_are_padded_to_four():
    mask = torch.zeros(5, 9, dtype=torch.bool)
    for r, n in enumerate([0, 1, 4, 5, 9]):
        mask[r, :n] = True
    plan = make_plan(*dense_pattern(mask)[:2], linear_geometry(9, 5))
    assert plan.forward.group_ptr.tolist() == [0, 0, 1, 2, 4, 7]
    assert plan.forward.index.tolist()[:4] == [0, -1, -1, -1]
    assert (plan.forward.index < 0).sum() == 3 + 0 + 3 + 3


def test_a_weight_of_zeros_has_empty_lists():
    plan = make_plan(*dense_pattern(torch.zeros(3, 6, dtype=torch.bool))[:2], linear_geometry(6, 3))
    for rows, count in ((plan.forward, 3), (plan.backward, 6)):
        assert rows.group_ptr.tolist() == [0] * (count + 1)
        assert rows.offset.numel() == rows.index.numel() == rows.plane.numel() == 0
