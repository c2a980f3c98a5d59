"""What batch normalisation multiplies and adds, forward and backward, against torch and float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.ops import reference

SHAPES = st.tuples(st.integers(2, 80), st.one_of(st.integers(1, 70), st.just(128)))
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PARAMETERS = st.tuples(st.booleans(), st.booleans(), st.booleans()).map(lambda there: (*there, there[2]))


def vectors(channels, given):
    """weight, bias, running_mean and running_var, those that are there."""
    made = torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.1
    return [vector if there else None for vector, there in zip(made, given, strict=True)]


def close(mine, wanted, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(mine, wanted, rtol=rtol, atol=atol, equal_nan=True)


@given(shape=SHAPES, dtype=DTYPES, there=PARAMETERS, training=st.booleans(), save=st.booleans(),
       offset=st.sampled_from([0.0, 30.0, -1000.0]), momentum=st.sampled_from([0.1, 0.0, 1.0]))  # fmt: skip
def test_statistics_are_those_of_the_reference(isa, shape, dtype, there, training, save, offset, momentum):
    there = there if training else (*there[:2], True, True)
    x, parameters = (torch.randn(shape) * 2 + offset).to(dtype), vectors(shape[1], there)
    others = copy.deepcopy(parameters)
    singles, ends, doubles = ops.norm_statistics(x, *parameters, momentum, 1e-5, training, save)
    wanted, _, wanted_doubles = reference.norm_statistics(x, *others, momentum, 1e-5, training, save)
    close(doubles, wanted_doubles, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(parameters, others, strict=True):
        if mine is not None:
            close(mine, theirs)
    # what follows from the statistics, in full precision
    _, variance, rstd, _, _, step, least = doubles
    close(rstd, 1 / (variance + 1e-5).sqrt(), rtol=1e-14, atol=0)
    if training or save:
        low, high = x.float().amin(0), x.float().amax(0)
        assert torch.equal(least, low.double())
        assert torch.equal(singles[2], (1 / step).float())
        assert torch.equal(singles[3], (-least / step - 128).float())
        assert torch.equal(ends, (torch.stack([low, high]) * singles[0] + singles[1]).sort(0)[0].t())
        close(singles[4:], wanted[4:], rtol=1e-4, atol=1e-3)
    else:
        assert torch.cat([singles[2:].flatten(), ends.flatten(), doubles[3:].float().flatten()]).isnan().all()
    close(singles[:2], wanted[:2], rtol=1e-4, atol=1e-3)


@given(shape=SHAPES, there=PARAMETERS, training=st.booleans())
def test_statistics_are_those_of_torch(shape, there, training):
    there = there if training else (*there[:2], True, True)
    x = torch.randn(shape) * 2 + 1
    weight, bias, mean, var = vectors(shape[1], there)
    running = [None if t is None else t.clone() for t in (mean, var)]
    singles, _, _ = ops.norm_statistics(x, weight, bias, *running, 0.3, 1e-4, training, False)
    exact = [None if t is None else t.double() for t in (mean, var, weight, bias)]
    y = functional.batch_norm(x.double(), *exact, training, 0.3, 1e-4)
    close(x * singles[0] + singles[1], y.float(), rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(running, exact[:2], strict=True):
        if mine is not None:
            close(mine, theirs.float())


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 4097])
def test_equal_elements_have_no_variance(isa, rows):
    values = torch.tensor([0.1, -1.7, 1e-30, 1e30, 3.0, 0.0])
    _, _, doubles = ops.norm_statistics(values.repeat(rows, 1), None, None, None, None, 0.1, 1e-5, True, True)
    assert torch.equal(doubles[0], values.double())
    assert torch.equal(doubles[1], torch.zeros(6).double())


@pytest.mark.parametrize("outlier", [0.0, 30.0, -1e4])
@pytest.mark.parametrize("places", [slice(0, 20), slice(0, None, 64), slice(-1, None)])
def test_statistics_do_not_lean_on_a_few_rows(isa, outlier, places):
    x = torch.randn(9000, 20) * 3 + 5
    x[places] = outlier
    _, _, doubles = ops.norm_statistics(x, None, None, None, None, 0.1, 1e-5, True, True)
    exact = x.double()
    close(doubles[0], exact.mean(0), rtol=1e-5, atol=1e-5)
    close(doubles[1], exact.var(0, correction=0), rtol=1e-5, atol=0)


def test_statistics_of_many_rows_lose_no_digits():
    x, running = torch.randn(100_000, 3) + 1e4, [torch.zeros(3), torch.zeros(3)]
    _, _, doubles = ops.norm_statistics(x, None, None, *running, 1.0, 1e-30, True, False)
    close(doubles[0], x.double().mean(0), rtol=1e-7, atol=0)
    close(doubles[1], x.double().var(0, correction=0), rtol=1e-5, atol=0)
    close(running[1].double(), x.double().var(0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_finite_has_no_range(bad, training):
    x, one = torch.randn(300, 3), torch.ones(3)
    x[7, 1] = bad
    _, ends, _ = ops.norm_statistics(x, None, None, one, one.clone(), 0.1, 1e-5, training, True)
    assert ends[1].isnan().all()
    assert ends[::2].isfinite().all()


def test_a_constant_channel():
    x = torch.full((9, 2), 3.0)
    singles, _, doubles = ops.norm_statistics(x, None, None, None, None, 0.1, 1e-5, True, True)
    assert torch.equal(doubles[5], torch.ones(2).double())
    assert torch.equal(singles[2:4], torch.tensor([[1.0, 1.0], [-131.0, -131.0]]))


@pytest.mark.parametrize("training", [True, False])
def test_no_rows_change_nothing(training):
    mean, var = torch.randn(3), torch.rand(3)
    before = mean.clone(), var.clone()
    singles, _, doubles = ops.norm_statistics(torch.empty(0, 3), None, None, mean, var, 0.1, 1e-5, training, True)
    assert singles.isfinite().all()
    assert doubles.isfinite().all()
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])
    factors, _, gradients = ops.norm_factors(torch.zeros(3, 3).double(), doubles, None, 0, training)
    assert factors.isfinite().all()
    assert torch.equal(gradients, torch.zeros(3, 3))


def test_bad_statistics_are_refused_before_anything_changes():
    x, one = torch.randn(6, 5), torch.ones(5)
    mean, var = torch.zeros(5), torch.ones(5)
    good = [x, one, one, mean, var, 0.1, 1e-5, True, True]
    wrong = [
        (0, x[0], ValueError, "2 dimensions"), (0, x.t(), ValueError, "contiguous"),
        (0, x.double(), TypeError, "x must be of dtype"),
        (0, x[:1].clone(), ValueError, "more than 1 value per channel"),
        *((place, one[:4].clone(), ValueError, "at least 5") for place in (1, 2, 3, 4)),
        *((place, torch.ones(6), ValueError, "must have 5 elements, got 6") for place in (1, 2, 3, 4)),
        *((place, one.double(), TypeError, "torch.float32") for place in (1, 2, 3, 4)),
        *((place, torch.ones(10)[::2], ValueError, "contiguous") for place in (1, 2, 3, 4)),
    ]  # fmt: skip
    for place, bad, kind, message in wrong:
        arguments = [bad if i == place else a for i, a in enumerate(good)]
        with pytest.raises(kind, match=message):
            ops.norm_statistics(*arguments)
    for place in (3, 4):
        arguments = [None if i == place else a for i, a in enumerate(good)]
        with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
            ops.norm_statistics(*arguments)
    with pytest.raises(ValueError, match="without batch statistics running_mean and running_var must be given"):
        ops.norm_statistics(x, one, one, None, None, 0.1, 1e-5, False, True)
    for eps, training in ((0.0, True), (-1e-9, True), (-1e-9, False), (math.nan, False)):
        with pytest.raises(ValueError, match="eps must be positive"):
            ops.norm_statistics(*good[:6], eps, training, True)
    assert torch.equal(mean, torch.zeros(5))
    assert torch.equal(var, torch.ones(5))


# ---- backward ----


@given(channels=st.integers(1, 70), count=st.integers(1, 500), weighted=st.booleans(), batch=st.booleans(),
       bad=st.sampled_from([None, None, 0, 1, 2]))  # fmt: skip
def test_factors_are_those_of_the_reference(channels, count, weighted, batch, bad):
    sums, statistics = torch.randn(channels, 3).double(), torch.randn(7, channels).double()
    sums[:, 2].abs_()
    if bad is not None:
        sums[-1, bad] = (math.nan, math.inf, math.nan)[bad]
    weight = torch.randn(channels) if weighted else None
    mine = ops.norm_factors(sums, statistics, weight, count, batch)
    wanted = reference.norm_factors(sums, statistics, weight, count, batch)
    for found, expected in zip(mine, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    if bad in (0, 2):
        assert mine[1][-1].isnan().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_together_are_the_gradient_of_torch(training, dtype):
    """With the codes' numbers in place of x, which the 8 bits stand for, the gradient is that of dense torch."""
    rows, channels = 400, 6
    first = torch.randn(rows, channels)
    first[0], first[1] = -4, 4  # so that the range of x is that of its codes
    weight, bias, mean, var = vectors(channels, [True] * 4)
    _, _, doubles = ops.norm_statistics(first, weight, bias, mean, var, 0.0, 1e-5, training, True)
    step, least = doubles[5], doubles[6]
    codes = ((first.double() - least) / step).round()
    x = (codes * step + least).float()
    singles, _, doubles = ops.norm_statistics(x, weight, bias, mean, var, 0.0, 1e-5, training, True)
    assert torch.equal(codes, (x * singles[2] + singles[3]).round().double() + 128)
    g = torch.randn(rows, channels).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    functional.batch_norm(leaves[0], mean.double(), var.double(), *leaves[1:], training, 0.0, 1e-5).backward(g.double())
    exact = g.double()
    sums = torch.stack([exact.sum(0), (exact * codes).sum(0), exact.abs().amax(0)], 1)
    f, ranges, gradients = ops.norm_factors(sums, doubles, weight, rows, training)
    dx = g.float() * f[0] + (codes.float() * f[1] + f[2])
    close(dx, leaves[0].grad.float(), rtol=1e-4, atol=1e-5)
    close(gradients[0], leaves[1].grad.float(), rtol=1e-4, atol=1e-3)
    close(gradients[1], leaves[2].grad.float(), rtol=1e-6, atol=1e-6)
    close(gradients[2], leaves[0].grad.sum(0).float(), rtol=1e-6, atol=1e-5)
    if training:
        assert torch.equal(gradients[2], torch.zeros(channels))
    assert (dx.abs() <= ranges[:, 1]).all()


def test_bad_factors_are_refused():
    sums, statistics, one = torch.zeros(5, 3).double(), torch.ones(7, 5).double(), torch.ones(5)
    for arguments, kind, message in (
        ((sums[:4].clone(), statistics, one, 3, True), ValueError, "sums must have at least 15"),
        ((torch.zeros(6, 3).double(), statistics, one, 3, True), ValueError, "sums must have 15 elements, got 18"),
        ((sums.float(), statistics, one, 3, True), TypeError, "sums must be"),
        ((sums, statistics[:6], one, 3, True), ValueError, "statistics must be of shape"),
        ((sums, statistics[0], one, 3, True), ValueError, "statistics must be of shape"),
        ((sums, torch.ones(5, 7).double().t(), one, 3, True), ValueError, "statistics must be contiguous"),
        ((sums, statistics, one.double(), 3, True), TypeError, "weight must be"),
        ((sums, statistics, torch.ones(6), 3, True), ValueError, "weight must have 5 elements"),
        ((sums, statistics, one, -1, True), ValueError, "must not be negative"),
    ):
        with pytest.raises(kind, match=message):
            ops.norm_factors(*arguments)


def test_all_threads_and_instruction_sets_agree():
    x, results = torch.randn(5000, 70), []
    before = _dispatch.active_isa()
    try:
        for isa in _dispatch.supported_isas():
            _dispatch.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                running = [torch.zeros(70), torch.ones(70)]
                results.append([*ops.norm_statistics(x, None, None, *running, 0.1, 1e-5, True, True), *running])
    finally:
        _dispatch.set_isa(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
