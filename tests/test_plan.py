"""What the kernels walk is checked when it is made, and nobody can change it afterwards."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch

from qsparseprop import ops
from qsparseprop.layout import plan as plans
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, PlanCache, make_plan

from ._helpers import generator


def some_plan():
    g = conv_geometry(3, 5, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 4, False)
    return make_plan(*dense_pattern(torch.rand(5, 27, generator=generator(1)) < 0.5)[:2], g)


def product(rows):
    """Of the same numbers for lists that are alike."""
    operand = ops.pack(torch.randn(rows.source.shape(4), generator=generator(2)), rows.source)
    return ops.spmm(operand, ops.Weights(torch.linspace(-1, 1, rows.slots)), rows, 4)


def test_what_a_list_was_made_of_may_change_afterwards():
    rows = some_plan().forward
    given = [rows.group_ptr, rows.offset, rows.index, rows.plane]
    again = ops.GatherList(*given, rows.source, rows.target)
    for tensor in given:
        tensor.fill_(2**31 - 1)
    assert torch.equal(product(again), product(rows))


def test_what_a_list_shows_of_itself_are_copies():
    rows = some_plan().backward
    before = product(rows)
    for name in ("group_ptr", "offset", "index", "plane"):
        getattr(rows, name).fill_(2**31 - 1)
    assert torch.equal(product(rows), before)
    for name in ("group_ptr", "offset", "index", "plane", "rows", "slots", "source", "target", "anything"):
        with pytest.raises(AttributeError):
            setattr(rows, name, None)


def test_layouts_cannot_be_changed():
    layout = some_plan().geometry.input_layout
    for name in ("numbers", "views", "image", "channels", "planes", "complete", "anything"):
        with pytest.raises(AttributeError):
            setattr(layout, name, None)
    numbers = list(layout.numbers)
    other = ops.PlaneLayout(numbers, list(layout.views), list(layout.image))
    numbers[5] = 1 << 29
    assert other == layout
    assert hash(other) == hash(layout)
    assert other != ops.PlaneLayout(layout.numbers, layout.views, (40, 40))
    assert other != 3


def test_making_one_again_changes_nothing():
    rows, layout = some_plan().forward, some_plan().geometry.output_layout
    before = product(rows)
    for call in (lambda: rows.__init__(1, 2, 3, 4, 5, 6), lambda: layout.__init__([0] * 8, [], ())):
        try:
            call()
        except TypeError:
            continue
    assert torch.equal(product(rows), before)
    assert layout == some_plan().geometry.output_layout


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies(copied):
    plan = some_plan()
    assert torch.equal(product(copied(plan.forward)), product(plan.forward))
    assert copied(plan.geometry.input_layout) == plan.geometry.input_layout
    scheme = ops.Scheme("sawb", (12.1, 12.2, 1.0), True)
    assert copied(scheme) == scheme != ops.Scheme("sawb", (), True)


def test_layouts_that_do_not_go_together():
    rows, g = some_plan().forward, linear_geometry(3, 5)
    parts = rows.group_ptr, rows.offset, rows.index, rows.plane
    with pytest.raises(ValueError, match="must have the same lanes"):
        ops.GatherList(*parts, g.input_layout, rows.target)
    with pytest.raises(ValueError, match="an element for each of the 6 planes"):
        ops.GatherList(*parts, rows.target, rows.source)
    with pytest.raises(TypeError):
        ops.GatherList(*parts, None, rows.target)


def test_tensors_of_another_layout_are_refused():
    plan = some_plan()
    x = torch.randn(4, 3, 6, 5)
    for given in (x[:, :2], x[:, :, :5], x[..., :4], x[0], x.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"must be of shape|must have 4 dimensions"):
            ops.pack(given, plan.forward.source)
    packed = ops.pack(x[:2], plan.forward.source)
    with pytest.raises(ValueError, match="planes must have at least"):
        ops.spmm(packed, ops.gather_weight(torch.randn(200), plan.forward), plan.forward, 200)


def test_images_of_one_pixel_may_have_two_dimensions():
    g = linear_geometry(20, 30)
    plan = make_plan(*dense_pattern(torch.rand(30, 20, generator=generator(1)) < 0.5)[:2], g)
    values, x = torch.randn(int((plan.forward.index >= 0).sum())), torch.randn(70, 20)
    quantisation = ops.Quantisation(ops.Scheme("absmax", (), True))
    flat, _ = ops.layer_forward(x, values, None, plan, quantisation, torch.float32)
    images, _ = ops.layer_forward(x[..., None, None], values, None, plan, quantisation, torch.float32)
    assert flat.shape == (70, 30)
    assert torch.equal(images[:, :, 0, 0], flat)


def test_a_pattern_that_is_refused_is_refused_again():
    """And the plans of the one before are gone."""
    crow, col, _ = dense_pattern(torch.eye(4) > 0)
    cache, g = PlanCache(), linear_geometry(4, 4)
    plan = cache.get(crow, col, (4, 4), g, 1)
    assert cache.find(crow, col, g, 1) is plan
    bad = col.clone().fill_(9)
    for _ in range(2):
        with pytest.raises(ValueError, match="col_indices must lie in"):
            cache.get(crow, bad, (4, 4), g, 1)
    assert cache.find(crow, col, g, 1) is None
    assert cache.get(crow, col, (4, 4), g, 1) is not plan


@pytest.mark.parametrize("grid", [(4, 1073741823, 11, 1, 8, 576, 64, 4672), (4, 121, 536870912, 1, 8, 576, 64, 4672),
                                  (4, 121, 11, 1, 8, 576, 64, 4672)])  # fmt: skip
@pytest.mark.parametrize("place", [3, 4])
def test_views_of_fewer_rows_and_columns_than_none_are_refused(grid, place):
    view = [0, 8, 12, 10, 10, 0, 0, 1, 1]
    view[place] = -1
    with pytest.raises(ValueError, match="does not fit images"):
        ops.PlaneLayout(grid, tuple(view), (10, 10))


def test_a_plan_that_is_late_does_not_stand_for_a_new_pattern(monkeypatch):
    """As where a pattern changes while another thread makes the plan of the one before."""
    old, new = (dense_pattern(torch.rand(6, 8, generator=generator(seed)) < 0.5)[:2] for seed in (1, 2))
    cache, geometry = PlanCache(), linear_geometry(8, 6)
    made, go_on = threading.Event(), threading.Event()

    def slow(pattern, *rest):
        plan = Plan(pattern, *rest)
        if torch.equal(pattern.col_indices, old[1]):
            made.set()
            assert go_on.wait(30)
        return plan

    monkeypatch.setattr(plans, "Plan", slow)
    thread = threading.Thread(target=cache.get, args=(*old, (6, 8), geometry, 1))
    thread.start()
    assert made.wait(30)
    wanted = cache.get(*new, (6, 8), geometry, 1)
    go_on.set()
    thread.join()
    found = cache.get(*new, (6, 8), geometry, 1)
    assert found is wanted
    assert torch.equal(found.forward.offset, make_plan(*new, geometry).forward.offset)


def test_the_last_plan_is_not_looked_for_while_plans_come_and_go():
    """As where a thread asks for the modes of a layer that others give inputs of new sizes."""
    crow, col, _ = dense_pattern(torch.eye(4) > 0)
    cache, found = PlanCache(), []
    plan = cache.get(crow, col, (4, 4), linear_geometry(4, 4), 1)
    thread = threading.Thread(target=lambda: found.append(cache.last()))
    with cache._lock:
        thread.start()
        thread.join(0.2)
        assert not found
    thread.join(30)
    assert found == [plan]
