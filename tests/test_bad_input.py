"""What makes no sense is refused with what was expected and what was given, and changes nothing."""

import copy

import pytest
import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop.quantization import QuantConfig

from ._helpers import KINDS, dense_example, example

LINEAR = [kind for kind in KINDS if "Linear" in kind]
CONV = [kind for kind in KINDS if "Conv" in kind]
QUANTIZED = [kind for kind in KINDS if kind.startswith("Quantized")]


def refused(call, *errors, mentions=()):
    """The message of the error that a call must raise."""
    with pytest.raises(errors) as caught:
        call()
    assert type(caught.value) in errors, "a subclass would not be what the documentation promises"
    for words in mentions:
        assert str(words) in str(caught.value)
    return str(caught.value)


def state_of(layer):
    return {k: v.clone() for k, v in layer.state_dict().items()}


def assert_unchanged(layer, state, x, wanted):
    now = layer.state_dict()
    assert now.keys() == state.keys()
    for key, value in state.items():
        assert now[key].dtype == value.dtype
        assert torch.equal(now[key], value), key
    assert torch.equal(layer(x), wanted)


@pytest.fixture
def untouched(kind):
    """A layer and its input; afterwards the layer is what it was."""
    layer, _, x = example(kind)
    state, wanted = state_of(layer), layer(x).detach()
    yield layer, x
    assert_unchanged(layer, state, x, wanted)


# ---- inputs ----


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("shape", [(9, 19), (9, 21), (20, 9), (20, 1), (19,), (), (9, 0), (0,)])
def test_wrong_last_dimension(untouched, kind, shape):
    layer, _ = untouched
    refused(lambda: layer(torch.zeros(shape)), ValueError, mentions=(kind, "in_features=20", tuple(shape)))


@pytest.mark.parametrize("kind", CONV)
@pytest.mark.parametrize(
    "shape", [(5, 5, 9, 7), (5, 7, 9, 7), (9, 7), (7,), (), (1, 5, 6, 9, 7), (5, 9, 7), (5, 0, 9, 7)]
)
def test_wrong_channels_or_dimensions(untouched, kind, shape):
    layer, _ = untouched
    refused(lambda: layer(torch.zeros(shape)), ValueError, mentions=(kind, "6", tuple(shape)))


@pytest.mark.parametrize("kind", CONV)
def test_images_without_pixels(untouched, kind):
    layer, _ = untouched
    refused(lambda: layer(torch.zeros(2, 6, 0, 7)), ValueError, mentions=("2 x 11", "3 x 2"))
    y = layer(torch.zeros(2, 6, 9, 0))  # nothing but padding
    assert y.shape == (2, 8, 5, 3)
    assert torch.equal(y, layer.bias[:, None, None].expand_as(y))


@pytest.mark.parametrize("kind", CONV)
def test_images_smaller_than_the_kernel(kind):
    layer = getattr(qnn, kind).from_dense(nn.Conv2d(3, 4, (5, 3), padding=(1, 0), dilation=(1, 2)))
    refused(lambda: layer(torch.zeros(2, 3, 2, 9)), ValueError, mentions=("4 x 9", "5 x 5"))
    refused(lambda: layer(torch.zeros(2, 3, 9, 4)), ValueError, mentions=("11 x 4", "5 x 5"))
    assert layer(torch.zeros(2, 3, 3, 5)).shape == (2, 4, 1, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating_point(untouched, kind, dtype):
    layer, x = untouched
    refused(lambda: layer(x.abs().to(dtype)), TypeError, mentions=(kind, "floating-point", dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_dense_tensor(untouched, kind):
    layer, x = untouched
    refused(lambda: layer(x.tolist()), TypeError, mentions=(kind, "tensor", "list"))
    refused(lambda: layer(x.numpy()), TypeError, mentions=(kind, "tensor", "ndarray"))
    refused(lambda: layer(None), TypeError, mentions=(kind, "tensor", "NoneType"))
    refused(lambda: layer(x.to_sparse()), TypeError, mentions=(kind, "strided", "sparse_coo"))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_tensors(untouched, kind):
    layer, x = untouched
    refused(lambda: layer(x.to("meta")), ValueError, mentions=(kind, "CPU", "meta"))
    elsewhere = copy.deepcopy(layer).to("meta")
    refused(lambda: elsewhere(x), ValueError, mentions=(kind, "CPU", "meta"))


# ---- from_dense ----


@pytest.mark.parametrize("kind", KINDS)
def test_from_dense_of_something_else(kind):
    cls = getattr(qnn, kind)
    wanted = "torch.nn.Linear" if "Linear" in kind else "torch.nn.Conv2d"
    others = [nn.Conv1d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1), nn.ReLU(), nn.Bilinear(2, 2, 2),
              nn.Conv2d(2, 2, 1) if "Linear" in kind else nn.Linear(2, 2)]  # fmt: skip
    for other in others:
        refused(lambda other=other: cls.from_dense(other), TypeError, mentions=(kind, wanted, type(other).__qualname__))
    refused(lambda: cls.from_dense(torch.zeros(3, 3)), TypeError, mentions=(kind, wanted, "Tensor"))
    refused(lambda: cls.from_dense(None), TypeError, mentions=(kind, wanted, "NoneType"))
    layer, _, _ = example(kind)
    refused(lambda: cls.from_dense(layer), TypeError, mentions=(kind, wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(kind, bad):
    dense, _ = dense_example(kind)
    with torch.no_grad():
        dense.weight.view(-1)[[1, 3, 4]] = bad
    refused(lambda: getattr(qnn, kind).from_dense(dense), ValueError, mentions=("NaN or Inf", 3, dense.weight.numel()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_weights_that_are_not_floating_point(kind, dtype):
    dense, _ = dense_example(kind)
    dense.weight = nn.Parameter(dense.weight.detach().to(dtype), requires_grad=False)
    refused(lambda: getattr(qnn, kind).from_dense(dense), TypeError, mentions=("floating point", dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_elsewhere(kind):
    dense, _ = dense_example(kind)
    refused(lambda: getattr(qnn, kind).from_dense(dense.to("meta")), ValueError, mentions=("CPU", "meta"))


@pytest.mark.parametrize("kind", CONV)
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes(kind, mode):
    conv = nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode)
    refused(lambda: getattr(qnn, kind).from_dense(conv), NotImplementedError, mentions=(kind, "zeros", mode))


@pytest.mark.parametrize("kind", KINDS)
def test_qconfig_of_another_type(kind):
    dense, _ = dense_example(kind)
    cls = getattr(qnn, kind)
    if kind in QUANTIZED:
        for given in ("absmax", {"weight": "absmax"}, QuantConfig):
            refused(lambda given=given: cls.from_dense(dense, qconfig=given), TypeError,
                    mentions=("QuantConfig", type(given).__name__))  # fmt: skip
    else:
        refused(lambda: cls.from_dense(dense, qconfig=QuantConfig()), TypeError, mentions=(kind, "float32"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight", "stochastic"), ("weight", "int4"), ("weight", None), ("weight", 8),
        ("input", "stochastic"), ("input", "Absmax"), ("input", ["absmax"]),
        ("grad", "standard"), ("grad", ""), ("grad", True),
        ("granularity", "pixel"), ("granularity", 1),
        ("check_finite", 1), ("check_finite", "yes"), ("check_finite", None),
    ],
)  # fmt: skip
def test_quantconfig_values(name, value):
    message = refused(lambda: QuantConfig(**{name: value}), ValueError, mentions=(name, repr(value)))
    if name != "check_finite":
        assert repr(getattr(QuantConfig(), name)) in message


def test_quantconfig_does_not_change():
    config = QuantConfig()
    with pytest.raises(AttributeError):
        config.input = "standard"
    assert config == QuantConfig()
    assert hash(config) == hash(QuantConfig())


# ---- state ----


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_another_shape(untouched, kind):
    layer, _ = untouched
    right = tuple(layer.weight_shape)
    for shape in [(layer.nonzeros,), right[::-1], (*right, 1), right[1:], ()]:
        refused(lambda shape=shape: layer.apply_further_mask(torch.zeros(shape)), ValueError, mentions=(right, shape))


def _edit(name, place, value):
    def edit(layer):
        getattr(layer, name)[place] = value

    return edit


CORRUPTIONS = {
    "column too large": (_edit("col_indices", 3, 10**6), ("col_indices", "1000000")),
    "column one too large": (lambda layer: layer.col_indices[-1].fill_(layer.mask()[0].numel()), ("col_indices",)),
    "negative column": (_edit("col_indices", 0, -1), ("col_indices", "-1")),
    "column that appears twice": (lambda layer: layer.col_indices[1].copy_(layer.col_indices[0]), ("col_indices",)),
    "first row does not start at 0": (_edit("crow_indices", 0, 1), ("crow_indices", "ascend")),
    "rows that descend": (_edit("crow_indices", 2, 10**6), ("crow_indices", "ascend")),
    "rows past the end": (_edit("crow_indices", -1, 2**31 - 1), ("crow_indices", "ascend")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_corrupted_pattern_is_noticed(kind, corruption):
    """After an edit in place of tensors that were assigned, also where tables of the correct pattern exist."""
    layer, _, x = example(kind, density=0.5)
    state, wanted = state_of(layer), layer(x).detach()
    layer.crow_indices, layer.col_indices = layer.crow_indices, layer.col_indices
    assert torch.equal(layer(x), wanted)
    edit, mentions = CORRUPTIONS[corruption]
    edit(layer)
    refused(lambda: layer(x), ValueError, mentions=mentions)
    refused(lambda: layer(x), ValueError, mentions=mentions)
    layer.load_state_dict(state)
    assert_unchanged(layer, state, x, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_edits_of_copies_of_the_pattern_are_noticed(kind, corruption):
    """They do not reach the pattern, which nobody is to believe; the copy may be gone."""
    layer, _, x = example(kind, density=0.5)
    state, wanted = state_of(layer), layer(x).detach()
    CORRUPTIONS[corruption][0](layer)
    for use in (lambda: layer(x), lambda: layer(x), layer.mask, layer.dense_weight, layer.state_dict,
                lambda: layer.apply_further_mask(torch.zeros(layer.weight_shape))):  # fmt: skip
        refused(use, ValueError, mentions=(kind, "are copies", "layer.col_indices = changed"))
    layer.load_state_dict(state)
    assert_unchanged(layer, state, x, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_patterns_of_another_dtype_or_length(kind):
    layer, _, x = example(kind)
    state, wanted = state_of(layer), layer(x).detach()
    layer.col_indices = layer.col_indices.long()
    refused(lambda: layer(x), TypeError, mentions=("col_indices", "torch.int32", "torch.int64"))
    layer.col_indices = state["col_indices"][:-1].clone()
    refused(lambda: layer(x), ValueError, mentions=(layer.nonzeros, layer.nonzeros - 1))
    layer.col_indices, layer.crow_indices = state["col_indices"].clone(), state["crow_indices"][:-1].clone()
    refused(lambda: layer(x), ValueError, mentions=("crow_indices", state["crow_indices"].numel()))
    layer.crow_indices = state["crow_indices"].clone()
    assert_unchanged(layer, state, x, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_length(kind):
    layer, _, x = example(kind)
    state, wanted = state_of(layer), layer(x).detach()
    for weight in (layer.weight.detach()[:-1], layer.weight.detach()[:, None], layer.weight.detach().repeat(2)):
        layer.weight = nn.Parameter(weight.clone())
        refused(lambda: layer(x), ValueError, mentions=(layer.col_indices.numel(), tuple(weight.shape)))
    layer.weight = nn.Parameter(state["weight"].clone())
    assert_unchanged(layer, state, x, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bias_of_another_length(kind):
    layer, _, x = example(kind)
    state, wanted = state_of(layer), layer(x).detach()
    layer.bias = nn.Parameter(torch.zeros(layer.bias.numel() - 1))
    refused(lambda: layer(x), ValueError, mentions=("bias", layer.weight_shape[0], layer.weight_shape[0] - 1))
    layer.bias = nn.Parameter(state["bias"].clone())
    assert_unchanged(layer, state, x, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_layer(untouched, kind):
    layer, _ = untouched
    other, _, _ = example(kind, density=0.6)
    with pytest.raises(RuntimeError, match="crow_indices: is missing"):
        layer.load_state_dict({k: other.state_dict()[k] for k in ("weight", "col_indices")}, strict=False)
    with pytest.raises(RuntimeError, match="col_indices"):
        layer.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
