"""What the error of a frozen model is to be expected from its scales alone, and models that are frozen."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree

from qsparseprop.inference.calls import call_operator
from qsparseprop.inference.reference import run_reference
from qsparseprop.inference.steps import Add, Call, Concat, Dequantize, Flatten, Pool, Product, Quantize, Table

#: Errors of 8 bits are taken for independent, which those of two ways to one sum are not.
MARGIN = 2.0
#: Operators that map errors as they map values.
LINEAR = {"aten.reshape.default", "aten.transpose.int", "aten.mean.dim", "aten.flatten.using_ints", "aten.add.Tensor",
          "aten.squeeze.default", "aten.permute.default", "aten.pad.default", "aten.cat.default"}  # fmt: skip
#: Functions by their steepest slope.
SLOPES = {"aten.hardsigmoid.default": 1 / 6, "aten.sigmoid.default": 1 / 4, "aten.clamp.default": 1.0}
#: The steepest slope of any function that tests make tables of: that of Hardswish.
STEEPEST = 1.5


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model in evaluation mode whose normalisations do something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            module.running_mean.copy_(torch.randn(size, generator=generator) / 2)
            module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(size, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(size, generator=generator) / 2)
    return model.eval()


def data(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _scale(codes, like):
    return codes.scale.double().view(1, -1, *[1] * (like.ndim - 2))


def _real(codes, values):
    return (values.double() - codes.zero_point) * _scale(codes, values)


def _rounding(program, name, variance):
    """With the error of rounding to codes, which is evenly spread over one step of the scale."""
    codes = program.values[name].codes
    return variance if codes is None else variance + _scale(codes, variance).square() / 12


def _product(program, step, known, variances):
    source, window = program.values[step.inputs[0]], step.window
    top, bottom, left, right = window.padding
    x = known[step.inputs[0]]
    image = (x.shape[0], source.shape[0], *source.image)
    spread = variances[step.inputs[0]] / _scale(source.codes, x).square()  # in steps of the input's scale
    steps = x.double() - source.codes.zero_point
    weight = step.weight.dense().double().view(step.weight.rows, -1, *window.kernel)

    def sums(values, filters):
        padded = F.pad(values.reshape(image), (left, right, top, bottom))
        return F.conv2d(padded, filters, None, window.stride, 0, window.dilation, step.groups)

    # a weight is rounded as values are, zeros are exact
    found = sums(spread, weight.square()) + sums(steps.square(), (weight != 0).double()) / 12
    found = found * step.weight.scale.double().square().view(1, -1, 1, 1)
    found = found.view(x.shape[0], *program.values[step.output].shape)
    return found if len(step.inputs) == 1 else found + variances[step.inputs[1]]


def _pooled(step, variance):
    window = step.window
    top, bottom, left, right = window.padding
    padded = F.pad(variance, (left, right, top, bottom))
    if step.kind == "max":
        return F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)
    mean = F.avg_pool2d(padded, window.kernel, window.stride) / math.prod(window.kernel)
    return mean if step.count_padding else mean * 4  # in a corner


def _called(step, known, variances):
    """Of operators: those that are linear map variances, as products and functions do with their slopes."""
    if step.operator == "aten.mul.Tensor" and len(step.inputs) == 2:
        first, second = step.inputs
        return (known[first].double().square() * variances[second] + known[second].double().square() * variances[first])
    if step.operator == "aten.mul.Tensor":
        return variances[step.inputs[0]] * step.arguments[1] ** 2
    if step.operator in SLOPES:
        return variances[step.inputs[0]] * SLOPES[step.operator] ** 2
    exact = all(not torch.is_tensor(variances.get(name)) or not variances[name].any() for name in step.inputs)
    result = known[step.output]
    if exact:
        return torch.zeros_like(result, dtype=torch.float64) if torch.is_tensor(result) else None
    assert step.operator in LINEAR, step.operator
    return call_operator(step, {**known, **variances})


def expected_errors(program, inputs):
    """Root mean square of the error of each output, from the scales of codes and weights in float64."""
    known = {}
    outputs = run_reference(program, *inputs, watched=known)
    variances = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in known.items()
                 if name in (*program.inputs, *program.constants)}  # fmt: skip
    for step in program.steps:
        given = variances.get(step.inputs[0]) if step.inputs else None
        if isinstance(step, Call):
            found = _called(step, known, variances)
        elif isinstance(step, Product):
            found = _rounding(program, step.output, _product(program, step, known, variances))
        elif isinstance(step, Pool):
            found = _pooled(step, given)
            found = found if step.kind == "max" else _rounding(program, step.output, found)
        elif isinstance(step, Table):
            found = _rounding(program, step.output, given * STEEPEST**2)
        elif isinstance(step, Add):
            found = _rounding(program, step.output, given + variances[step.inputs[1]])
        elif isinstance(step, Concat):
            found = torch.cat([variances[name] for name in step.inputs], 1)
        elif isinstance(step, Flatten):
            found = given.flatten(1)
        else:
            assert isinstance(step, Quantize | Dequantize)
            found = given if isinstance(step, Dequantize) else _rounding(program, step.output, given)
        variances[step.output] = found
    return [float(variances[name].mean().sqrt()) for name in program.outputs], outputs


def assert_as_good_as_8_bits(model, frozen, *inputs):
    """The outputs are those of the model, but for what rounding to 8 bits does to them.

    With the calibration data for inputs, of which "minmax" cuts nothing off.
    """
    with torch.no_grad():
        exact = _pytree.tree_leaves(model(*inputs))
    expected, _ = expected_errors(frozen.program, inputs)
    found = _pytree.tree_leaves(frozen(*inputs))
    assert len(found) == len(exact)
    for mine, theirs, error in zip(found, exact, expected, strict=True):
        assert mine.shape == theirs.shape
        measured = float((mine.double() - theirs.double()).square().mean().sqrt())
        size = float(theirs.double().square().mean().sqrt())
        assert measured <= MARGIN * error + 1e-6 * size, (measured, error, size)
        assert error < 0.2 * size, "the model is too deep for this to say anything"


def kinds(frozen):
    """What a frozen model computes, by the names of its steps; of calls the operators."""
    return [step.operator.split(".")[1] if isinstance(step, Call) and "." in step.operator else type(step).__name__
            for step in frozen.program.steps]  # fmt: skip
