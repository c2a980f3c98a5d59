"""What follows a product, and its gradient: the operators against plain torch and float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.ops import reference

from ._helpers import examples

ACTIVATIONS = [
    ("identity", []), ("clamp", [0.0, math.inf]), ("clamp", [0.0, 6.0]), ("clamp", [-0.5, 0.25]),
    ("clamp", [1.0, 1.0]),
    ("leaky_relu", [0.01]), ("leaky_relu", [0.0]), ("leaky_relu", [2.5]), ("leaky_relu", [-0.5]),
    ("silu", []), ("hardswish", []), ("gelu", []), ("gelu_tanh", []),
]  # fmt: skip
FUNCTIONS = {
    "identity": lambda x: x,
    "clamp": lambda x, low, high: functional.hardtanh(x, low, high),
    "leaky_relu": functional.leaky_relu,
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
STEPS = {"silu": 1 / 200, "hardswish": 1 / 120, "gelu": 1 / 200, "gelu_tanh": 1 / 200}
ACTIVATION = st.sampled_from(ACTIVATIONS)
CHANNELS = st.one_of(st.integers(1, 70), st.sampled_from([128, 130, 256, 320, 600]))
SHAPES = st.tuples(st.integers(1, 70), CHANNELS)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
PARTS = st.fixed_dictionaries({"affine": st.booleans(), "residual": st.booleans(), "codes": st.booleans()})
SPREADS = st.sampled_from([1.0, 1.0, 4.0, 1e-3, 1e4, 1e30])


def inputs(shape, dtype, parts, spread=1.0):
    """x, residual, scale, shift; code_scale and code_shift: those that there are."""
    channels = shape[1]
    x = (torch.randn(shape) * spread).to(dtype)
    residual = torch.randn(shape).to(dtype) if parts["residual"] else None
    scale, shift = (torch.randn(channels), torch.randn(channels)) if parts["affine"] else (None, None)
    codes = (torch.full((channels,), 40 / spread), torch.randn(channels)) if parts["codes"] else (None, None)
    return [x, residual, scale, shift], list(codes)


def buffers(x, activation, code_scale, save):
    """What `epilogue` fills: codes and what is saved, those that there are."""
    return (None if code_scale is None else ops.codes_like(x),
            ops.saved_like(x, activation) if save else None)  # fmt: skip


def evaluate(arguments, name, options, code_scale=None, code_shift=None, save=False, module=ops):
    """The result, and what was filled."""
    codes, saved = buffers(arguments[0], name, code_scale, save)
    return module.epilogue(*arguments, name, options, code_scale, code_shift, codes, saved), codes, saved


def same(mine, wanted):
    assert len(mine) == len(wanted)
    for a, b in zip(mine, wanted, strict=True):
        if b is None:
            assert a is None
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


@examples(60)
@given(shape=SHAPES, dtype=DTYPES, activation=ACTIVATION, parts=PARTS, save=st.booleans(), spread=SPREADS)
def test_forward_is_the_reference(isa, shape, dtype, activation, parts, save, spread):
    arguments, codes = inputs(shape, dtype, parts, spread)
    mine = evaluate(arguments, *activation, *codes, save)
    same(mine, evaluate(arguments, *activation, *codes, save, reference))


@examples(60)
@given(shape=SHAPES, dtype=DTYPES, activation=ACTIVATION, parts=PARTS, factors=st.booleans(), want_g=st.booleans(),
       spread=SPREADS)  # fmt: skip
def test_gradient_is_the_reference(isa, shape, dtype, activation, parts, factors, want_g, spread):
    arguments, code_parameters = inputs(shape, dtype, parts)
    _, *kept = evaluate(arguments, *activation, *code_parameters, True)
    dy = (torch.randn(shape) * spread).to(dtype)
    factor = torch.randn(3, shape[1]) if factors else None
    same(ops.epilogue_grad(dy, *kept, *activation, factor, want_g),
         reference.epilogue_grad(dy, *kept, *activation, factor, want_g))  # fmt: skip
    sums, wanted = ops.epilogue_sums(dy, *kept, *activation), reference.epilogue_sums(dy, *kept, *activation)
    torch.testing.assert_close(sums[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-4 * spread)
    torch.testing.assert_close(sums[:, 1], wanted[:, 1], rtol=1e-5, atol=3e-2 * spread)
    assert torch.equal(sums[:, 2], wanted[:, 2])


@examples(60)
@given(shape=SHAPES, dtype=DTYPES, activation=ACTIVATION, parts=PARTS, spread=SPREADS)
def test_range_is_the_reference_and_holds_the_result(isa, shape, dtype, activation, parts, spread):
    arguments, _ = inputs(shape, dtype, parts, spread)
    ranges = ops.epilogue_range(*arguments, *activation)
    assert torch.equal(ranges, reference.epilogue_range(*arguments, *activation))
    exact = [None if t is None else t.float() for t in arguments]
    y, _, _ = evaluate(exact, *activation)
    rounding = 1e-6 * arguments[0].float().abs().amax(0).clamp(min=1)
    least, most = y.amin(0), y.amax(0)
    assert (least >= ranges[:, 0] - rounding).all()
    assert (most <= ranges[:, 1] + rounding).all()
    if activation[0] in ("identity", "clamp") or (activation[0] == "leaky_relu" and activation[1][0] >= 0):
        assert torch.equal(ranges, torch.stack([least, most], 1))


@given(ends=st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32)), min_size=1, max_size=40),
       activation=ACTIVATION)  # fmt: skip
def test_ranges_of_activations(isa, ends, activation):
    ranges = torch.tensor(ends).sort(1)[0]
    found = ops.activation_range(ranges, *activation)
    assert torch.equal(found, reference.activation_range(ranges, *activation))
    between = ranges[:, :1] + torch.linspace(0, 1, 101) * (ranges[:, 1:] - ranges[:, :1])
    y = FUNCTIONS[activation[0]](between.double(), *activation[1])
    assert (y.amin(1) >= found[:, 0] - 1e-5).all()
    assert (y.amax(1) <= found[:, 1] + 1e-5).all()
    assert (y.amax(1) >= found[:, 1] - 1e-5).all()


def test_ranges_that_are_not_numbers():
    ranges = torch.tensor([[math.nan, math.nan], [0.0, 1.0], [-1.0, math.inf]])
    for activation in ACTIVATIONS:
        found = ops.activation_range(ranges, *activation)
        assert found[0].isnan().all()
        assert found[1].isfinite().all()
        assert found[2].isfinite().all() == (activation[0] == "clamp" and activation[1][1] < math.inf)
    one = ops.activation_range(torch.tensor([[-2.0, 3.0]]), "leaky_relu", [-2.0])
    assert torch.equal(one, torch.tensor([[0.0, 4.0]]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_slopes_are_those_of_torch(isa, activation):
    name, options = activation
    x = torch.cat([torch.linspace(-20, 20, 40_001), torch.logspace(-30, 37, 100), -torch.logspace(-30, 37, 100),
                   torch.tensor([-3.0, 3.0, 0.0, -0.0, *options])])  # fmt: skip
    x = x[x.isfinite()]
    y, _, saved = evaluate([x[None], None, None, None], name, options, save=True)
    exact = x.double().requires_grad_()
    wanted = FUNCTIONS[name](exact, *options)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    assert ((y[0] - wanted).abs() <= 5e-7 * wanted.abs().maximum(x.abs()).clamp(min=1)).all()
    mine = ops.epilogue_grad(torch.ones_like(x)[None], None, saved, name, options, None, False)[0][0]
    # half a step, and the rounding of float32
    assert (mine - slope).abs().max() <= (STEPS[name] / 2 + 1e-6 if name in STEPS else 1e-7)
    if name in STEPS:  # what is cut off or passes has no error
        far = 12 if name == "silu" else 6
        assert (mine[x < -far] == 0).all()
        assert ((mine[x > far] - 1).abs() < 1e-7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_is_as_in_torch(isa, activation):
    name, options = activation
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0, -1.0]]).repeat(1, 4)
    y, _, _ = evaluate([x, None, None, None], name, options, save=True)
    torch.testing.assert_close(y, FUNCTIONS[name](x.double(), *options).float(), equal_nan=True)
    ranges = ops.epilogue_range(torch.cat([x.abs(), x]), None, None, None, name, options)
    assert ranges[0].isnan().all()
    assert ranges[3:5].isfinite().all()
    limited = name == "clamp" and options[1] < math.inf
    assert ranges[1].isfinite().all() == limited
    assert ranges[2].isfinite().all() == limited
    dy = torch.randn(300, 20)
    dy[3, 1], dy[200, 18], dy[5, 7] = math.nan, math.inf, -math.inf
    before = dy.nan_to_num().clamp(0.1, 0.9)
    _, _, saved = evaluate([before, None, None, None], name, options, save=True)
    sums = ops.epilogue_sums(dy, None, saved, name, options)
    bad = [1, 7, 18] if (name, options) not in (("clamp", [1.0, 1.0]), ("clamp", [-0.5, 0.25])) else []
    assert sums[bad, 2].isnan().all()
    assert sums[[c for c in range(20) if c not in (1, 7, 18)]].isfinite().all()


IMAGES = st.tuples(st.integers(1, 20), st.sampled_from([2, 3, 15, 16, 17, 33, 64, 70, 130, 520]), st.integers(1, 6),
                   st.integers(1, 6))  # fmt: skip
KINDS = st.sampled_from(["3x3", "3x3 stride 2", "1x1", "images side by side", "linear"])


def geometry_of(kind, shape):
    if kind == "linear":
        return linear_geometry(shape[1], 4), (shape[0] * shape[2] * shape[3], shape[1], 1, 1)
    kernel, stride, pad = (1, 1, 0) if kind == "1x1" else (3, 2 if kind == "3x3 stride 2" else 1, 1)
    return conv_geometry(shape[1], 4, shape[2:], (kernel, kernel), (stride, stride), (pad,) * 4, (1, 1), shape[0],
                         kind == "images side by side"), shape  # fmt: skip


def as_images(rows, shape):
    return rows.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


@examples(40)
@given(shape=IMAGES, kind=KINDS, dtype=DTYPES, activation=ACTIVATION, parts=PARTS, per_channel=st.booleans(),
       keep=st.booleans(), save=st.booleans(), scheme=st.sampled_from(["absmax", "symmetric", "standard"]))  # fmt: skip
def test_packing_on_the_way_is_packing_afterwards(isa, shape, kind, dtype, activation, parts, per_channel, keep, save,
                                                   scheme):  # fmt: skip
    geometry, shape = geometry_of(kind, shape)
    layout, scheme = geometry.input_layout, ops.Scheme(scheme, (), per_channel)
    arguments, codes = inputs((shape[0] * shape[2] * shape[3], shape[1]), dtype, parts, 2.0)
    # packed is what there is before it is rounded to dtype
    wide = [None if t is None else t.float() for t in arguments]
    exact, _, _ = evaluate(wide, *activation)
    ranges = torch.stack([exact.amin(0), exact.amax(0)], 1)
    if not per_channel:
        ranges = torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
    kept = buffers(arguments[0], activation[0], codes[0], save)
    parts = arguments[:2], ops.Affine(*arguments[2:]), ops.Activation(*activation)
    y, packed = ops.epilogue_pack(*parts[0], *parts[1:], ops.Kept(*codes, *kept), ranges, layout, scheme, keep)
    wanted, *wanted_kept = evaluate(arguments, *activation, *codes, save)
    same([y], [wanted if keep else None])
    same(kept, wanted_kept)
    same(packed, ops.quantize_pack(as_images(exact, shape), layout, scheme))
    same(packed, reference.epilogue_pack(*parts[0], *parts[1:], ops.Kept(), ranges, layout, scheme, keep)[1])


@examples(40)
@given(shape=IMAGES, kind=KINDS, activation=ACTIVATION, affine=st.booleans(), per_channel=st.booleans(),
       scheme=st.sampled_from(["absmax", "standard"]))  # fmt: skip
def test_packing_from_codes_is_packing_from_their_numbers(isa, shape, kind, activation, affine, per_channel, scheme):
    geometry, shape = geometry_of(kind, shape)
    codes = torch.randint(0, 256, (shape[0] * shape[2] * shape[3], shape[1]), dtype=torch.uint8)
    scale, shift = (torch.randn(shape[1]) / 64, torch.randn(shape[1])) if affine else (None, None)
    ranges = ops.epilogue_range(codes.float(), None, scale, shift, *activation)
    if not per_channel:
        ranges = torch.stack([ranges[:, 0].amin(), ranges[:, 1].amax()])[None]
    rest = (None, ops.Affine(scale, shift), ops.Activation(*activation), ops.Kept(), ranges, geometry.input_layout,
            ops.Scheme(scheme, (), per_channel), False)  # fmt: skip
    same(ops.epilogue_pack(codes, *rest)[1], ops.epilogue_pack(codes.float(), *rest)[1])


@examples(40)
@given(shape=IMAGES, kind=KINDS, dtype=DTYPES, activation=ACTIVATION, parts=PARTS, factors=st.booleans(),
       per_channel=st.booleans(), want_g=st.booleans(),
       scheme=st.sampled_from(["stochastic", "symmetric", "luq"]))  # fmt: skip
def test_packing_the_gradient_on_the_way(isa, shape, kind, dtype, activation, parts, factors, per_channel, want_g,
                                         scheme):  # fmt: skip
    geometry, shape = geometry_of(kind, shape)
    layout, scheme = geometry.input_layout, ops.Scheme(scheme, (), per_channel)
    size = (shape[0] * shape[2] * shape[3], shape[1])
    arguments, code_parameters = inputs(size, dtype, parts)
    _, *kept = evaluate(arguments, *activation, *code_parameters, True)
    dy, factor = torch.randn(size).to(dtype), torch.randn(3, shape[1]) if factors else None
    exact, g = ops.epilogue_grad(dy.float(), *kept, *activation, factor, True)
    most = exact.abs().amax(0) if per_channel else exact.abs().amax()[None]
    seed = torch.tensor(5)
    arguments = (dy, *kept, ops.Activation(*activation), factor, torch.stack([-most, most], 1), layout, scheme, seed,
                 want_g)  # fmt: skip
    packed, own_g = ops.epilogue_grad_pack(*arguments)
    same(packed, ops.quantize_pack(as_images(exact, shape), layout, scheme, seed))
    same(packed, reference.epilogue_grad_pack(*arguments)[0])
    if not want_g:
        assert own_g is None
    elif kind not in ("1x1", "3x3 stride 2"):  # which may leave pixels out
        same([own_g], [g.to(dtype)])


def test_all_threads_and_instruction_sets_agree():
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(3000, 70, generator=generator) * 3 for _ in range(3))
    vectors, factor = torch.randn(4, 70, generator=generator), torch.randn(3, 70, generator=generator)
    results = []
    before, threads_before = _dispatch.active_isa(), torch.get_num_threads()
    try:
        for isa in _dispatch.supported_isas():
            _dispatch.set_isa(isa)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                result = []
                for name, options in ACTIVATIONS:
                    arguments = [x, residual, vectors[0], vectors[1]]
                    y, codes, saved = evaluate(arguments, name, options, vectors[2], vectors[3], True)
                    result += [y, codes, saved, ops.epilogue_range(*arguments, name, options),
                               ops.epilogue_sums(dy, codes, saved, name, options),
                               *ops.epilogue_grad(dy, codes, saved, name, options, factor, True)]  # fmt: skip
                results.append(result)
    finally:
        _dispatch.set_isa(before)
        torch.set_num_threads(threads_before)
    for result in results[1:]:
        same(result, results[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_rows(activation):
    x, none = torch.empty(0, 5), (None, None)
    y, codes, saved = evaluate([x, None, *none], *activation, torch.ones(5), torch.ones(5), True)
    assert (y.shape, codes.shape) == ((0, 5), (0, 5))
    assert torch.equal(ops.epilogue_sums(x, codes, saved, *activation), torch.zeros(5, 3).double())
    assert ops.epilogue_grad(x, codes, saved, *activation, None, True)[1].shape == (0, 5)
    with pytest.raises(ValueError, match="the range of no elements"):
        ops.epilogue_range(x, None, *none, *activation)


def test_bad_activations_are_refused():
    x, none = torch.randn(4, 5), [None] * 3
    for name, options, message in (
        ("swish", [], "must be one of identity, clamp, leaky_relu, silu, hardswish, gelu, gelu_tanh, got 'swish'"),
        ("clamp", [0.0], "the activation 'clamp' has 2 options"), ("silu", [1.0], "'silu' has 0 options, got"),
        ("leaky_relu", [], "the activation 'leaky_relu' has 1 options"),
        ("clamp", [1.0, 0.0], "two numbers in order"), ("clamp", [math.nan, 0.0], "two numbers in order"),
        ("leaky_relu", [math.inf], "must be finite"), ("leaky_relu", [math.nan], "must be finite"),
        ("leaky_relu", [1e39], "must be finite"),
    ):  # fmt: skip
        for call in (
            lambda a: ops.epilogue(x, *none, *a, None, None, None, None),
            lambda a: ops.epilogue_range(x, *none, *a),
            lambda a: ops.epilogue_sums(x, None, None, *a),
            lambda a: ops.epilogue_grad(x, None, None, *a, None, False),
            lambda a: ops.activation_range(torch.zeros(5, 2), *a),
        ):
            with pytest.raises(ValueError, match=message):
                call((name, options))


def test_bad_tensors_are_refused():
    x, one = torch.randn(4, 5), torch.ones(5)
    relu, codes, bits = ("clamp", [0.0, math.inf]), *buffers(x, "clamp", one, True)
    good = [x, x.clone(), one, one, *relu, one, one, codes, bits]
    wrong = [
        (0, x[0], ValueError, "2 dimensions"), (0, torch.randn(5, 4).t(), ValueError, "contiguous"),
        (0, x.double(), TypeError, "x must be of dtype"), (1, x[:3], ValueError, "residual must be"),
        (1, x.bfloat16(), ValueError, "residual must be"), (1, torch.randn(5, 4).t(), ValueError, "contiguous"),
        *((place, one[:4].clone(), ValueError, "at least 5 elements") for place in (2, 3, 6, 7)),
        *((place, torch.ones(6), ValueError, "must have 5 elements, got 6") for place in (2, 3, 6, 7)),
        *((place, one.double(), TypeError, "torch.float32") for place in (2, 3, 6, 7)),
        *((place, torch.ones(10)[::2], ValueError, "contiguous") for place in (2, 3, 6, 7)),
        *((place, None, ValueError, "scale and shift must be given together, or neither") for place in (2, 3)),
        *((place, None, ValueError, "codes must be given together, or none of them") for place in (6, 7, 8)),
        (8, codes[:3].clone(), ValueError, "codes must have at least 20"),
        (8, torch.cat([codes, codes]), ValueError, "codes must have 20 elements, got 40"),
        (8, codes.float(), TypeError, "codes must be"), (8, torch.zeros(5, 4).byte().t(), ValueError, "contiguous"),
        (9, bits[:3].clone(), ValueError, "saved must have at least 4"), (9, codes, TypeError, "saved must be"),
        (9, torch.cat([bits, bits]), ValueError, "saved must have 4 elements, got 8"),
    ]  # fmt: skip
    for place, bad, kind, message in wrong:
        with pytest.raises(kind, match=message):
            ops.epilogue(*[bad if i == place else a for i, a in enumerate(good)])
    with pytest.raises(ValueError, match="the activation 'identity' needs nothing to be saved"):
        ops.epilogue(*good[:4], "identity", [], None, None, None, bits)
    ops.epilogue(*good)
    for arguments, kind, message in (
        ((x, codes[:3].clone(), bits, *relu), ValueError, "codes must have at least 20"),
        ((x, torch.cat([codes, codes]), bits, *relu), ValueError, "codes must have 20 elements, got 40"),
        ((x, codes.float(), bits, *relu), TypeError, "codes must be"),
        ((x, codes, None, *relu), ValueError, "the gradient of the activation 'clamp' needs what was saved"),
        ((x, codes, bits[:3].clone(), *relu), ValueError, "saved must have at least 4"),
        ((x, codes, bits, "gelu", []), TypeError, "saved must be"),
        ((x, codes, codes, *relu), TypeError, "saved must be"),
        ((x, codes, codes[:3].clone(), "silu", []), ValueError, "saved must have at least 20"),
        ((x.double(), codes, bits, *relu), TypeError, "dy must be"),
    ):
        with pytest.raises(kind, match=message):
            ops.epilogue_sums(*arguments)
        with pytest.raises(kind, match=message):
            ops.epilogue_grad(*arguments, None, False)
    for factor in (torch.ones(2, 5), torch.ones(4, 5)):
        with pytest.raises(ValueError, match="factor must have"):
            ops.epilogue_grad(x, codes, bits, *relu, factor, False)
    for bad in (torch.zeros(5), torch.zeros(5, 3), torch.zeros(5, 2).double(), torch.zeros(2, 5).t()):
        with pytest.raises((TypeError, ValueError), match="ranges must be"):
            ops.activation_range(bad, *relu)


def test_bad_packing_is_refused():
    x, one, codes = torch.randn(8, 5), torch.ones(5), torch.zeros(8, 5, dtype=torch.uint8)
    geometry, _ = geometry_of("1x1", (2, 5, 2, 2))
    layout = geometry.input_layout
    relu, ranges = ("clamp", [0.0, math.inf]), torch.zeros(5, 2)

    def pack(x, residual, code_scale, save, keep, scheme="absmax", ranges=ranges, activation=relu):
        kept = ops.Kept(code_scale, code_scale, *buffers(x, activation[0], code_scale, save))
        return ops.epilogue_pack(x, residual, ops.Affine(one, one), ops.Activation(*activation), kept, ranges, layout,
                                 ops.Scheme(scheme, (), True), keep)  # fmt: skip

    for activation in (relu, ("silu", [])):
        for residual, code_scale, save in ((codes, None, False), (None, one, False), (None, None, True)):
            with pytest.raises(TypeError, match="neither with a residual nor with codes"):
                pack(codes, residual, code_scale, save, False, activation=activation)
        with pytest.raises(TypeError, match="x must be of dtype"):
            pack(codes, None, None, False, True, activation=activation)
    for call in (lambda: ops.epilogue(codes, None, one, one, *relu, None, None, None, None),
                 lambda: ops.epilogue_range(codes, None, one, one, *relu)):  # fmt: skip
        with pytest.raises(TypeError, match="x must be of dtype"):
            call()
    for scheme in ("sawb", "stochastic", "luq", "dithered"):
        with pytest.raises(ValueError, match=f"the scheme '{scheme}' cannot be combined"):
            pack(x, None, None, False, False, scheme=scheme)
    with pytest.raises(ValueError, match="rows must be those of whole images"):
        pack(x[:7], None, None, False, False)
    with pytest.raises(ValueError, match="ranges must have at least 10"):
        pack(x, None, None, False, False, ranges=ranges[:4].clone())
    arguments = (x, None, None, ops.Activation("identity"), None, ranges, layout)
    with pytest.raises(ValueError, match="the scheme 'standard' cannot be combined"):
        ops.epilogue_grad_pack(*arguments, ops.Scheme("standard", (), True), None, False)
    with pytest.raises(ValueError, match="needs a seed"):
        ops.epilogue_grad_pack(*arguments, ops.Scheme("stochastic", (), True), None, False)
