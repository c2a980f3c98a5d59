"""Schemes: their formulas in float64 NumPy, and what they guarantee."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.ops import reference
from qsparseprop.quantization import SAWB_CONSTANTS, QuantConfig, dequantize, quantize

from ._helpers import DTYPES, LAYOUTS, VALUES, examples, generator, laid_out, random_values

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEMES = ("absmax", "standard", "sawb", "stochastic", "dithered", "luq")
RANDOM = ("stochastic", "dithered", "luq")

DEGENERATE = {
    "empty": torch.empty(0),
    "one": torch.tensor([-2.5]),
    "zero": torch.zeros(70),
    "constant": torch.full((70,), 3.7),
    "negative constant": torch.full((70,), -3.7),
    "one-hot": torch.eye(70)[3],
    "denormal": torch.linspace(-1, 1, 63) * 1e-40,
    "huge": torch.linspace(-1, 1, 63) * torch.finfo(torch.float32).max,
    "outlier": torch.cat([torch.linspace(-1e-3, 1e-3, 1000), torch.tensor([1e9])]),
}  # fmt: skip


def options_of(scheme):
    return {"sawb": (12.1, 12.2, 1.0), "dithered": (0.5,), "luq": (5.0,)}.get(scheme, ())


@given(shape=st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple), scheme=st.sampled_from(SCHEMES),
       kind=st.sampled_from(VALUES), layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES),
       bits=st.integers(2, 8), mode=st.sampled_from(["tensor", "dim", "group"]), unsigned=st.booleans(),
       given_options=st.booleans(), number=st.integers(0, 2**63 - 1))  # fmt: skip
@examples(200)
def test_quantize_is_the_reference(
    isa, shape, scheme, kind, layout, dtype, bits, mode, unsigned, given_options, number
):
    x = laid_out(random_values(shape, kind, number % 1000).to(dtype), layout)
    around_zero = scheme in RANDOM or (scheme != "standard" and not unsigned)
    if scheme == "sawb":
        given_options = True
    arguments = (x, scheme, 8 if scheme == "luq" else bits, number % len(shape) if mode == "dim" else None,
                 1 + number % 40 if mode == "group" else None, around_zero, torch.tensor(number),
                 options_of(scheme) if given_options else ())  # fmt: skip
    actual, expected = ops.quantize(*arguments), reference.quantize(*arguments)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert torch.equal(a, e)
    back = (*actual, arguments[3], arguments[4], dtype)
    assert torch.equal(ops.dequantize(*back), reference.dequantize(*back))


def test_large_tensors_on_threads_are_the_reference(isa):
    x = torch.randn(70_001, generator=generator(1)) * torch.logspace(-20, 20, 70_001)
    x = x.view(1, -1)[:, :70_000].view(7, 100, 100)
    for scheme in SCHEMES:
        for dim, group in ((None, None), (0, None), (2, None), (None, 2048)):
            arguments = (x, scheme, 8, dim, group, scheme != "standard", torch.tensor(5), ())
            expected = reference.quantize(*arguments)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                for a, e in zip(ops.quantize(*arguments), expected, strict=True):
                    assert torch.equal(a, e), (scheme, dim, group, threads)


def formula(x, scheme, bits=8):
    """Scale and zero point in float64."""
    x = x.double().numpy()
    levels = 2 ** (bits - 1) - 1
    absmax = np.abs(x).max()
    if scheme == "standard":
        low, high = min(x.min(), 0.0), max(x.max(), 0.0)
        scale = (high - low) / (2**bits - 1)
        return scale, np.rint(-low / scale)
    if scheme == "sawb":
        c1, c2 = SAWB_CONSTANTS[bits]
        clip = c1 * np.sqrt((x**2).mean()) - c2 * np.abs(x).mean()
        return (clip if 0 < clip < absmax else absmax) / levels, 0
    if scheme == "dithered":
        return max(x.std(), absmax / levels), 0
    return absmax / (64 if scheme == "luq" else levels), 0


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_scales_are_the_formulas(isa, scheme, size):
    for bits in (8,) if scheme == "luq" else (3, 4, 8):
        x = torch.randn(5000, generator=generator(3)) * size
        q = quantize(x, scheme, bits=bits)
        scale, zero = formula(x, scheme, bits)
        assert q.scale.item() == pytest.approx(scale, rel=1e-6)
        assert q.zero_point.item() == zero
        if scheme in ("absmax", "sawb", "standard"):
            codes = np.rint(x.double().numpy() / scale) + zero
            levels = 2 ** (bits - 1) - 1
            codes = codes.clip(0, 2**bits - 1) if scheme == "standard" else codes.clip(-levels, levels)
            # the kernel multiplies by a rounded reciprocal: ties may fall to the other side
            assert (np.abs(q.codes.double().numpy() - codes) <= (np.abs(codes) > 0)).all()
            assert (q.codes.double().numpy() != codes).mean() < 1e-3


def draw(seed, number):
    """The u of elements `number` in a call with `seed`, as docs/numerics.md describes it."""
    with np.errstate(over="ignore"):
        low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
        mixed = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        x = np.uint64(0x9E3779B97F4A7C15) * (number.astype(np.uint64) // np.uint64(4)) + mixed
        for factor in (0xD2511F52, 0xCD9E8D56, 0x846CA68A):
            x = (x >> half) | (x << half) if factor != 0xD2511F52 else x
            x ^= (x & low) * np.uint64(factor)
    return ((x >> (np.uint64(16) * (number % 4).astype(np.uint64))) % np.uint64(65536)).astype(np.float64) / 65536


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharing", [{}, {"dim": 1}, {"dim": -1}, {"group_size": 41}], ids=str)
def test_codes_are_the_formulas(isa, scheme, layout, dtype, sharing):
    """In float64, element by element, random numbers included; 41 does not divide the size."""
    x = torch.randn(5, 37, 12, generator=generator(3)) * torch.logspace(-3, 3, 37)[:, None]
    x = laid_out(x.to(dtype), layout)
    q = quantize(x, scheme, **sharing, generator=generator(4))
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator(4)))
    number = np.arange(x.numel()).reshape(x.shape)
    if "dim" in sharing:
        parts = list(np.moveaxis(number, sharing["dim"], 0).reshape(x.shape[sharing["dim"]], -1))
    else:
        flat = number.reshape(-1)
        parts = [flat] if not sharing else [flat[i : i + 41] for i in range(0, flat.size, 41)]
    assert q.scale.numel() == q.zero_point.numel() == len(parts)
    for i, part in enumerate(parts):
        values = x.float().flatten()[torch.from_numpy(part)]
        scale, zero = formula(values, scheme)
        assert q.scale[i].item() == pytest.approx(scale, rel=1e-6)
        assert q.zero_point[i].item() == zero
        t, u = values.double().numpy() / scale, draw(seed, part)
        codes = q.codes.flatten()[torch.from_numpy(part)].double().numpy() - zero
        power = np.exp2(np.floor(np.log2(np.maximum(np.abs(t), 1)))) if scheme == "luq" else 1.0
        # where an ulp of the kernel's product decides, either neighbour may come out
        exact = np.abs(t) / power + u if scheme == "luq" else t + (u if scheme in RANDOM else 0.5)
        near = np.abs(exact - np.rint(exact)) < 2e-5
        expected = np.floor(exact) * power * (np.sign(t) if scheme == "luq" else 1)
        top = {"standard": (-zero, 255 - zero), "luq": (-64, 64)}.get(scheme, (-127, 127))
        assert (near | (codes == expected.clip(*top))).all()
        assert near.mean() < 0.02 or part.size < 500


def test_random_numbers_look_random():
    """Histograms of numbers, of neighbours on several strides, and of their differences: within five deviations."""
    n, scores = 1 << 18, {}

    def score(name, values):
        counts = np.bincount(values.astype(np.int64), minlength=256)
        expected = values.size / 256
        scores[name] = (((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255)

    for stride in (1, 2, 3, 4, 7, 16, 64, 256, 1000, 1024, 4096, 50176):
        r = reference.random_bits(0x0123456789ABCDEF, torch.arange(n) * stride).numpy()
        score((stride, "high"), r >> 8)
        score((stride, "low"), r & 255)
        for lag in (1, 2, 3, 4, 5, 8, 16, 17, 64, 1000, 1024):
            a, b = r[:-lag], r[lag:]
            score((stride, lag, "pairs"), (a >> 12) * 16 + (b >> 12))
            score((stride, lag, "differences"), ((a - b) & 0xFFFF) >> 8)
            score((stride, lag, "xor"), (a ^ b) >> 8)
    assert {k: v for k, v in scores.items() if abs(v) > 5} == {}
    far = reference.random_bits(5, torch.arange(1000) + (1 << 40))
    assert (far == reference.random_bits(5, torch.arange(1000))).double().mean() < 0.01, "all of the index counts"


def test_one_seed_gives_the_same_bits_everywhere():
    """On every instruction set and number of threads, whatever the order of the dimensions; another seed others."""
    x = torch.randn(41, 23, 47, generator=generator(1))
    images = torch.randn(9, 20, 15, 15, generator=generator(2))
    odd = torch.randn(9, 21, 15, 15, generator=generator(2))
    features = torch.randn(700, 60, 1, 1, generator=generator(2))
    assert min(t.numel() for t in (x, images, odd, features)) > 1 << 15, "more than one thread takes"

    def packed(t, seed, scheme, per_channel):
        size = tuple(t.shape[2:])
        g = (conv_geometry(t.shape[1], 8, size, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), t.shape[0], False)
             if size != (1, 1) else linear_geometry(t.shape[1], 8))  # fmt: skip
        return ops.quantize_pack(t, g.input_layout, ops.Scheme(scheme, (), per_channel), seed)

    def results(scheme, number):
        seed = torch.tensor(number)
        for dim, group in ((None, None), (0, None), (2, None), (None, 1000)):
            yield ops.quantize(x, scheme, 8, dim, group, True, seed, ())
        for t in (images, odd, features):
            for per_channel in (False, True):
                first = packed(t, seed, scheme, per_channel)
                yield first
                for layout in ("channels_last", "reversed", "sliced"):
                    other = packed(laid_out(t, layout), seed, scheme, per_channel)
                    assert torch.equal(other[0], first[0]), (scheme, layout)

    active = _dispatch.active_isa()
    try:
        for scheme in RANDOM:
            expected = None
            for isa in _dispatch.supported_isas():
                _dispatch.set_isa(isa)
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found = list(results(scheme, 11))
                    expected = expected or found
                    for f, e in zip(found, expected, strict=True):
                        assert all(map(torch.equal, f, e)), (scheme, isa, threads)
            for f, e in zip(results(scheme, 12), expected, strict=True):
                assert not torch.equal(f[0], e[0])
                assert torch.equal(f[1], e[1])
    finally:
        _dispatch.set_isa(active)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("sharing", [{}, {"dim": 0}, {"dim": 1}, {"group_size": 150}], ids=str)
def test_errors_are_within_their_guarantee(isa, scheme, size, sharing):
    x = torch.randn(40, 101, generator=generator(1)) * torch.logspace(-4, 0, 101) * size
    q = quantize(x, scheme, **sharing)

    def spread(values):  # to the elements that share them
        if "dim" in sharing:
            return values.view((40, 1) if sharing["dim"] == 0 else (1, 101)).double().expand(x.shape)
        return values.double().repeat_interleave(sharing.get("group_size", x.numel()))[: x.numel()].view(x.shape)

    scale, zero = spread(q.scale), spread(q.zero_point)
    back = (q.codes.double() - zero) * scale
    assert torch.allclose(back, q.dequantize().double(), rtol=1e-6, atol=0)
    error, wide = (back - x.double()).abs(), x.double().abs()
    rounding = 2e-5 * scale  # of x / scale, and of the dither
    if scheme in ("stochastic", "dithered"):
        assert (error < scale + rounding).all()
    elif scheme == "luq":
        assert (error < torch.maximum(scale, wide) + rounding).all()
    elif scheme == "sawb":  # beyond the clip: the last code
        clip = 127 * scale
        assert (error <= torch.where(wide <= clip, scale / 2, wide - clip) + rounding).all()
    else:
        ends = 1.0 if scheme == "standard" else 0.5  # the rounding of the zero point adds to that of the ends
        inside = (q.codes > q.codes.min()) & (q.codes < q.codes.max())
        assert (error <= ends * scale + rounding).all()
        assert (error <= scale / 2 + rounding)[inside].all()


def allowed(x, scheme, scale):
    """The two values that a random scheme may give."""
    t = x.abs() / scale
    if scheme == "luq":
        below = torch.where(t < 1, 0.0, torch.exp2(torch.floor(torch.log2(t.clamp(min=1)))))
        above = torch.where(t < 1, 1.0, 2 * below)
        return torch.sign(x) * below * scale, torch.sign(x) * above * scale
    return torch.floor(x / scale) * scale, (torch.floor(x / scale) + 1) * scale


@pytest.mark.parametrize("scheme", RANDOM)
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-3, 1.0, 1e10, 1e30])
def test_random_schemes_are_unbiased(scheme, size):
    x = torch.cat([torch.randn(60, generator=generator(1)), torch.tensor([0.0, 3.5, -3.5]),
                   torch.logspace(-4, 0, 17)]) * size  # fmt: skip
    draws = quantize(x.repeat(4096, 1).view(-1), scheme)
    assert draws.codes.min() >= -127
    values = draws.dequantize().view(4096, -1).double()
    scale = draws.scale.double().item()
    low, high = allowed(x.double(), scheme, scale)
    tolerance = 1e-4 * scale
    nearest = torch.minimum((values - low).abs(), (values - high).abs())
    assert (nearest <= tolerance + 1e-4 * values.abs()).all()
    variance = (x.double() - low).abs() * (high - x.double()).abs()
    # sixteen random bits: a probability is off by 2^-17 of the distance
    bound = 5 * (variance / 4096).sqrt() + 2**-16 * (high - low).abs() + 1e-6 * x.double().abs()
    assert ((values.mean(0) - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_tensors(isa, scheme, kind):
    x = DEGENERATE[kind]
    for bits in (8,) if scheme == "luq" else (3, 8):
        q = quantize(x, scheme, bits=bits)
        assert q.codes.shape == x.shape
        assert torch.isfinite(q.scale).all()
        assert (q.scale > 0).all()
        levels = 2 ** (bits - 1) - 1
        if scheme != "standard" and x.numel():
            assert q.codes.min() >= -levels
            assert q.codes.max() <= levels
        # in float64: the last code of the largest float32 may stand for a little more than that
        back = (q.codes.double() - q.zero_point) * q.scale.double()
        assert (q.dequantize()[x == 0] == 0).all(), "zero stays zero"
        if scheme in ("absmax", "standard") and x.numel():
            # half a step, and the rounding of 1 / scale
            assert (back - x.double()).abs().max() <= 0.50002 * q.scale.double().item()
        if scheme in ("stochastic", "dithered") and x.numel():
            assert (back - x.double()).abs().max() <= 1.0001 * q.scale.double().item()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(isa, scheme, bad, dtype):
    x = torch.randn(6, 40).to(dtype)
    x[2, 3] = bad
    assert not quantize(x, scheme).dequantize().isfinite().any()
    for arguments in ({"dim": 0}, {"group_size": 40}):
        finite = quantize(x, scheme, **arguments).dequantize().isfinite().all(1)
        assert finite.tolist() == [True, True, False, True, True, True]
    finite = quantize(x, scheme, dim=1).dequantize().isfinite().all(0)
    assert finite.nonzero().numel() == 39
    assert not finite[3]


@pytest.mark.parametrize("sharing", [{}, {"dim": 0}, {"dim": 1}, {"group_size": 3000}], ids=str)
def test_error_of_the_defaults(isa, sharing):
    """On a Gaussian of which the 95 % smallest magnitudes are zeros, and for gradients on a dense one as well."""
    x = torch.randn(400, 1000, generator=generator(1))
    pruned = torch.where(x.abs() > x.abs().flatten().kthvalue(int(0.95 * x.numel())).values, x, 0.0)
    assert pruned.count_nonzero() == 0.05 * x.numel()

    def nmse(x, scheme):
        error = quantize(x, scheme, **sharing).dequantize().double() - x.double()
        return (error.square().sum() / x.double().square().sum()).item()

    assert nmse(pruned, QuantConfig().weight) <= 2.5e-5
    assert nmse(pruned, QuantConfig().grad) <= 1e-3
    assert nmse(x, QuantConfig().grad) <= 1e-3


def test_the_seed_decides(isa):
    x = torch.randn(50_000)
    for scheme in RANDOM:
        torch.manual_seed(7)
        first = quantize(x, scheme).codes
        other = quantize(x, scheme).codes
        torch.manual_seed(7)
        torch.set_num_threads(3)
        assert torch.equal(quantize(x, scheme).codes, first)
        assert not torch.equal(first, other)
        a = quantize(x, scheme, generator=generator(3)).codes
        assert torch.equal(a, quantize(x, scheme, generator=generator(3)).codes)


def test_a_dither_of_a_whole_deviation_is_mostly_zeros():
    q = quantize(torch.randn(100_000, generator=generator(1)), "dithered", step=2.0)
    assert q.zero_fraction() == pytest.approx(0.6, abs=0.15)
    assert quantize(torch.zeros(0), "dithered").zero_fraction() == 0.0
    assert torch.equal(dequantize(q), q.dequantize())
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scheme": "int4"}, ["int4"]), ({"bits": 1}, ["bits", "1"]), ({"bits": 9}, ["bits", "9"]),
        ({"dim": 2}, ["dim", "2"]), ({"group_size": 0}, ["group_size", "0"]), ({"dim": 0, "group_size": 4}, ["both"]),
        ({"scheme": "luq", "bits": 4}, ["luq", "levels"]), ({"scheme": "luq", "levels": 8}, ["luq", "8"]),
        ({"scheme": "dithered", "step": -1.0}, ["step", "dither"]), ({"step": 1.0}, ["absmax", "step"]),
        ({"scheme": "sawb", "bits": 7}, ["sawb", "7"]), ({"scheme": "sawb", "constants": 3}, ["constants"]),
        ({"scheme": "standard", "unsigned": False}, ["standard"]), ({"scheme": "luq", "unsigned": True}, ["luq"]),
        ({"x": torch.zeros(3).double()}, ["float64"]), ({"x": [1.0]}, ["tensor"]),
        ({"x": torch.zeros(3, device="meta")}, []),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(arguments, words):
    given = {"x": torch.randn(3, 4), **arguments}
    if words:
        with pytest.raises((TypeError, ValueError)) as error:
            quantize(given.pop("x"), **given)
        assert all(word in str(error.value) for word in words)
    else:
        assert quantize(given.pop("x")).codes.is_meta


def test_codes_without_scales_are_refused():
    q = quantize(torch.randn(3, 4), dim=0)
    for scale, zero in ((q.scale[:0], q.zero_point), (q.scale[:2], q.zero_point), (q.scale, q.zero_point[:0])):
        with pytest.raises(ValueError, match="elements"):
            ops.dequantize(q.codes, scale, zero, 0, None)


def test_a_group_may_be_larger_than_the_tensor():
    x = torch.randn(3, 4)
    q = quantize(x, group_size=2**63 - 1)
    assert q.scale.shape == (1,)
    assert torch.equal(q.codes, quantize(x).codes)
    assert torch.equal(q.dequantize(), quantize(x).dequantize())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"weight": "sawb", "granularity": "channel"}, "granularity"), ({"weight": "stochastic"}, "weight"),
        ({"input": "luq"}, "input"), ({"grad": "standard"}, "grad"), ({"grad_weight": "int4"}, "grad_weight"),
        ({"dither_step": 2.0}, "dithered"), ({"luq_levels": 3}, "luq"), ({"sawb_nonzeros": True}, "sawb"),
        ({"grad": "luq", "luq_levels": 8}, "luq_levels"), ({"grad": "dithered", "dither_step": 0}, "dither_step"),
        ({"input": "sawb", "sawb": (1.0,)}, "sawb"),
    ],
)  # fmt: skip
def test_configs_that_make_no_sense_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        QuantConfig(**arguments)
