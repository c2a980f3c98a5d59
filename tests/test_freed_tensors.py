"""Tensors whose memory is gone are refused by a sentence, wherever they are met."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.quantization import QuantConfig

from ._helpers import KINDS, example
from ._hostile import BLOCKS, CALLS, NO_MEMORY, PLACES, block, freed, operands, pruned

# ---- tensors whose memory is gone ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["x", "weight", "bias", "crow_indices", "col_indices", "dy"])
@pytest.mark.parametrize("size", [0, 4])
def test_storages_that_were_resized(kind, place, size):
    layer, _, x = example(kind)
    y = layer(x)
    if place == "x":
        with pytest.raises(ValueError, match=f"the input {NO_MEMORY}"):
            layer(freed(x, size))
    elif place == "dy":
        with pytest.raises(ValueError, match=NO_MEMORY):
            y.backward(freed(torch.randn_like(y), size))
    else:
        tensor = freed(getattr(layer, place), size)
        setattr(layer, place, nn.Parameter(tensor) if place in ("weight", "bias") else tensor)
        with pytest.raises(ValueError, match=NO_MEMORY):
            layer(x)


@pytest.mark.parametrize("config", [QuantConfig(check_finite=True), QuantConfig(weight="sawb", granularity="tensor")])
def test_resized_weights_that_are_read_before_they_are_quantised(config):
    layer = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(8, 5)), qconfig=config)
    layer.weight = nn.Parameter(freed(layer.weight))
    with pytest.raises(ValueError, match=f"the weight {NO_MEMORY}"):
        layer(torch.randn(3, 8))


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, torch.Tensor.t])
def test_resized_inputs_that_are_converted_first(convert):
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 8)))
    x = convert(torch.randn(8, 8))
    inputs = x, x[None]
    x.untyped_storage().resize_(0)
    for given in inputs:
        with pytest.raises(ValueError, match=f"the input {NO_MEMORY}"):
            layer(given)


def _freeing_what_is_saved(module, x, which):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = module(x.requires_grad_())
    tensors = [t for t in saved if t.numel()]
    for tensor in tensors if which == "all" else [tensors[which]]:
        tensor.untyped_storage().resize_(0)
    return y


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["all", 0, 1, -1])
def test_saved_tensors_that_were_freed_before_the_backward_pass(kind, which):
    layer, _, x = example(kind)
    y = _freeing_what_is_saved(layer, x, which)
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.sum().backward()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("which", ["all", 0, 1, -1])
def test_tensors_that_blocks_saved_and_somebody_freed(name, which):
    module, x = block(name)
    y = _freeing_what_is_saved(module, x, which)
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.sum().backward()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_refuse_inputs_and_gradients_without_memory(name):
    module, x = block(name)
    with pytest.raises((ValueError, RuntimeError), match=f"{NO_MEMORY}|not allocated"):  # the latter by torch
        module(freed(x))
    y = module(x.requires_grad_())
    with pytest.raises(ValueError, match=NO_MEMORY):
        y.backward(freed(torch.ones_like(y)))


@pytest.mark.parametrize("place", ["weight", "crow_indices", "col_indices", "bias"])
def test_modules_whose_own_memory_is_gone(place):
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    setattr(layer, place, getattr(layer, place))  # of the pattern a copy, which is held as it is then
    tensor = getattr(layer, place)
    size = tensor.untyped_storage().nbytes()
    tensor.untyped_storage().resize_(0)
    if place != "bias":
        with pytest.raises(ValueError, match=f"{place} {NO_MEMORY}"):
            layer.dense_weight()
        with pytest.raises(ValueError, match=f"{place} {NO_MEMORY}"):
            layer.apply_further_mask(torch.zeros(5, 8))
    with pytest.raises(RuntimeError, match=f"{place} of the module {NO_MEMORY}"):
        layer.load_state_dict(state)
    tensor.untyped_storage().resize_(size)
    with torch.no_grad():
        tensor.zero_()
    layer.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("place", ["weight_orig", "weight_mask", "bias"])
def test_dense_layers_whose_memory_is_gone(place):
    """As of a model whose parameters FSDP has spread over processes."""
    dense = prune.l1_unstructured(nn.Linear(8, 5), "weight", 0.5)
    getattr(dense, place).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{place} of the dense layer {NO_MEMORY}"):
        qnn.SparseLinear.from_dense(dense)


def test_masks_without_memory():
    layer = qnn.SparseLinear.from_dense(pruned(nn.Linear(8, 5)))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(ValueError, match=f"mask {NO_MEMORY}"):
        layer.apply_further_mask(freed(torch.ones(5, 8)))
    with pytest.raises(ValueError, match=f"values {NO_MEMORY}"):
        layer.regrow(torch.ones(5, 8), freed(torch.ones(5, 8)))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("place", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_normalisations_of_blocks_whose_memory_is_gone(place, training):
    if training and place.startswith("running"):
        pytest.skip("not read in training")
    module, x = block("conv, norm, relu")
    norm = module[1].train(training)
    getattr(norm, place).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=NO_MEMORY):
        module(x)


def operator_calls():
    x, matrix = torch.randn(2, 3, 4, 5), torch.randn(6, 20)
    one = torch.ones(20)
    _, bits = ops.relu_mask(x)
    codes, scale, zero = ops.quantize(x, "absmax", 8, None, None, True, None, [])
    kept, slopes = ops.codes_like(matrix), ops.saved_like(matrix, "silu")
    epilogue = [matrix, matrix, one, one, "silu", [], one, one, kept, slopes]
    ranges, factor = torch.ones(20, 2), torch.ones(3, 20)
    return {
        "relu_mask": [x], "relu_mask_": [x], "keep_masked": [x, bits],
        "quantize": [x, "absmax", 8, None, None, True, None, []], "dequantize": [codes, scale, zero, None, None],
        "norm_statistics": [matrix, one, one.clone(), one.clone(), one + 1, 0.1, 1e-5, True, True],
        "norm_factors": [torch.ones(20, 3).double(), torch.ones(7, 20).double(), one, 6, True],
        "epilogue": epilogue, "epilogue_pack": [*epilogue, ranges],
        "epilogue_range": [matrix, matrix, one, one, "silu", []], "activation_range": [torch.ones(20, 2), "silu", []],
        "epilogue_sums": [matrix, kept, slopes, "silu", []],
        "epilogue_grad": [matrix, kept, slopes, "silu", [], torch.ones(3, 20), True],
        "epilogue_grad_pack": [matrix, kept, slopes, factor, ranges, torch.tensor(1)],
        "quantize_weight": [one, one.clone(), one.int(), one[:1].clone()],
    }  # fmt: skip


def _epilogue_pack(x, residual, scale, shift, activation, options, code_scale, code_shift, codes, saved, ranges):
    ops.epilogue_pack(x, residual, ops.Affine(scale, shift), ops.Activation(activation, options),
                      ops.Kept(code_scale, code_shift, codes, saved), ranges, linear_geometry(20, 20).input_layout,
                      ops.Scheme("absmax", (), True), True)  # fmt: skip


def _epilogue_grad_pack(dy, codes, saved, factor, ranges, seed):
    layout, scheme = linear_geometry(20, 20).input_layout, ops.Scheme("stochastic", (), True)
    ops.epilogue_grad_pack(dy, codes, saved, ops.Activation("silu"), factor, ranges, layout, scheme, seed, True)


def _quantize_weight(values, factor, zero_point, clip):
    rows = make_plan(*dense_pattern(torch.eye(20) > 0)[:2], linear_geometry(20, 20)).forward
    ops.quantize_weight(values, rows, factor, zero_point, clip)


#: Those that take plans, and parts of them.
FUNCTIONS = {"epilogue_pack": _epilogue_pack, "epilogue_grad_pack": _epilogue_grad_pack,
             "quantize_weight": _quantize_weight}  # fmt: skip


@pytest.mark.parametrize("name", operator_calls())
def test_operators_refuse_every_tensor_without_memory(name):
    arguments = operator_calls()[name]
    op = FUNCTIONS.get(name) or getattr(torch.ops.qsparseprop, name)
    op(*arguments)
    parameters = [*inspect.signature(op).parameters] if name in FUNCTIONS else [
        a.name for a in op.default._schema.arguments]  # fmt: skip
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            for size in (0, 1):
                given = [freed(argument, size) if i == place else a for i, a in enumerate(arguments)]
                with pytest.raises(ValueError, match=f"^{parameters[place]} {NO_MEMORY}"):
                    op(*given)


# ---- at random ----


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_functions_of_plans_refuse_tensors_without_memory(name, place):
    plan, tensors = operands()
    tensors[place].untyped_storage().resize_(8)
    with pytest.raises(ValueError, match=NO_MEMORY):
        CALLS[name][0](plan.forward, tensors)


def test_lists_of_freed_tensors_are_refused():
    rows = operands()[0].forward
    parts = [rows.group_ptr, rows.offset, rows.index, rows.plane]
    for i in range(4):
        given = [t.clone() for t in parts]
        given[i].untyped_storage().resize_(4)
        with pytest.raises(ValueError, match=NO_MEMORY):
            ops.GatherList(*given, rows.source, rows.target)
