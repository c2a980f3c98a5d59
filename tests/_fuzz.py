"""Calls the operators with random nonsense, every tensor ending at the edge of memory that must not be touched.

    python -m tests._fuzz SEED CALLS

So many calls on each instruction set. An access beyond a tensor ends the process.
"""

import faulthandler
import json
import os
import random
import signal
import sys

import torch

from qsparseprop import ops
from qsparseprop._kernels import (
    _dense_rows,
    _dispatch,
    _epilogue,
    _matmul,
    _norm,
    _pack,
    _plan,
    _quantize,
    _statistics,
)
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import conv_geometry, linear_geometry
from qsparseprop.layout.modes import Modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan
from qsparseprop.ops import epilogues, layers, normalisation, products, quantization

from ._guarded import GuardedTorch, guarded_copy, guarded_empty

INTEGERS = [0, 1, -1, 2, 3, 4, 5, 63, 64, 65, 128, 1 << 16, 1 << 20, (1 << 31) - 1, 1 << 31, -(1 << 31), 1 << 34,
            1 << 39, (1 << 40) - 1, 1 << 40, (1 << 62) + 64, (1 << 63) - 1, -(1 << 63)]  # fmt: skip
FLOATS = [0.0, -1.0, 0.5, 3.0, 7.0, 1e-45, 1e-300, 1e300, float("inf"), -float("inf"), float("nan")]
SCHEMES = ["absmax", "symmetric", "standard", "sawb", "stochastic", "dithered", "luq", "int4", ""]
ACTIVATIONS = ["gelu", "gelu_tanh", "selu", "identity", "clamp", "leaky_relu", "silu", "hardswish"]
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.int32, torch.bool]


# ---- the operators, made of numbers and tensors that can be corrupted ----


def gather_list(rows, source, target):
    """Of lists of the arguments of `GatherList` and twice of `PlaneLayout`."""
    return ops.GatherList(*rows, ops.PlaneLayout(*source), ops.PlaneLayout(*target))


def scheme_of(scheme, per_channel):
    return None if scheme is None else ops.Scheme(scheme, [], per_channel)


def pack(x, layout):
    ops.pack(x, ops.PlaneLayout(*layout))


def quantize_pack(x, layout, scheme, per_channel, seed):
    ops.quantize_pack(x, ops.PlaneLayout(*layout), scheme_of(scheme, per_channel), seed)


def quantize_weight(values, rows, source, target, factor, zero_point):
    ops.quantize_weight(values, gather_list(rows, source, target), factor, zero_point)


def gather_weight(values, rows, source, target):
    ops.gather_weight(values, gather_list(rows, source, target))


def spmm(operand, weights, rows, source, target, images, bias, dtype, channels_last):
    ops.spmm(ops.Packed(*operand), ops.Weights(*weights), gather_list(rows, source, target), images, bias, dtype,
             channels_last)  # fmt: skip


def multiply(operand, values, rows, source, target, out, bias):
    ops.multiply(ops.Packed(*operand), values, gather_list(rows, source, target), out, bias)


def sddmm(operand, gradient, rows, source, target, images, nonzeros):
    ops.sddmm(ops.Packed(*operand), ops.Packed(*gradient), gather_list(rows, source, target), images, nonzeros)


def dense_rows(pattern, groups, phase, shift, source, target, swapped):
    return DenseRows(ValuePattern(*pattern), groups, phase, shift, ops.PlaneLayout(*source), ops.PlaneLayout(*target),
                     swapped)  # fmt: skip


def quantize_weight_dense(values, factor, zero_point, *rows):
    ops.quantize_weight(values, dense_rows(*rows), factor, zero_point)


def spmm_dense(operand, weights, images, bias, dtype, channels_last, *rows):
    ops.spmm(ops.Packed(*operand), ops.Weights(*weights), dense_rows(*rows), images, bias, dtype, channels_last)


def multiply_dense(operand, values, out, bias, *rows):
    ops.multiply(ops.Packed(*operand), values, dense_rows(*rows), out, bias)


def sddmm_dense(operand, gradient, images, nonzeros, *rows):
    ops.sddmm(ops.Packed(*operand), ops.Packed(*gradient), dense_rows(*rows), images, nonzeros)


class Passes:
    """Both passes of a layer; the geometry itself is never corrupted."""

    def __init__(self, geometry):
        self.geometry = geometry

    def plan(self, rows, columns, source, target):
        pattern = ValuePattern(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 1)
        plan = Plan(pattern, self.geometry, 1, Modes())
        lists = {"forward": gather_list(rows, source, target), "backward": gather_list(columns, target, source)}
        vars(plan).update(lists)  # in place of those of the pattern
        return plan

    def forward(self, x, values, bias, rows, columns, source, target, scheme, per_channel, in_floats, dtype, save):
        given = ops.Quantisation(scheme_of(scheme, per_channel), None, None, in_floats)
        return ops.layer_forward(x, values, bias, self.plan(rows, columns, source, target), given, dtype, None, save)

    def backward(self, dy, values, packed, rows, columns, source, target, scheme, per_channel, seed, grads, dtype):
        given = ops.Quantisation(scheme_of(scheme, per_channel), None, seed)
        plan = self.plan(rows, columns, source, target)
        return ops.layer_backward(dy, values, ops.Packed(*packed), plan, given, grads, dtype)


def numbers_of(layout):
    return [list(layout.numbers), list(layout.views), list(layout.image)]


def tensors_of(rows):
    return [rows.group_ptr, rows.offset, rows.index, rows.plane]


def valid_calls():
    for number in range(6):
        if number == 0:
            g, shape, groups = linear_geometry(20, 30), (70, 20, 1, 1), 1
        elif number == 5:
            g, shape, groups = volumes(), (3, 4, 12, 5), 1
        else:
            size, kernel, stride, inner = [((6, 5), (3, 3), (2, 1), False), ((9, 9), (3, 3), (1, 1), True),
                                           ((4, 7), (1, 1), (3, 2), False), ((12, 3), (5, 2), (2, 2), True)][number - 1]
            batch, groups = (5, 37, 3, 18)[number - 1], 1 + (number == 2)
            shape = (batch, 4, *size)
            g = conv_geometry(4, 18, size, kernel, stride, (1, 1, 1, 1), (1, 1), batch, inner)
        outputs, images = g.output_grid.planes, shape[0]
        mask = torch.rand(outputs, shape[1] // groups * len(g.tap_shift)) < 0.3
        plan = make_plan(*dense_pattern(mask)[:2], g, groups)
        values = torch.randn(int(mask.sum()))
        x, dy = torch.randn(shape), torch.randn(images, outputs, *g.output_image)
        seed, bias = torch.tensor(1), torch.randn(outputs)
        source, target = numbers_of(g.input_layout), numbers_of(g.output_layout)
        lists = [tensors_of(plan.forward), tensors_of(plan.backward), source, target]
        for tensor in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16()):
            yield pack, [tensor, source]
            for scheme in ("absmax", "standard", "stochastic"):
                for per_channel in (False, True):
                    yield quantize_pack, [tensor, source, scheme, per_channel, seed]
        for codes in (True, False):
            for rows, tensor in ((plan.forward, x), (plan.backward, dy)):
                where = [tensors_of(rows), numbers_of(rows.source), numbers_of(rows.target)]
                own_bias, out = bias if tensor is x else None, torch.empty(rows.target.shape(images))
                if codes:
                    yield quantize_weight, [values, *where, None, None]
                    folded = ops.quantize_pack(tensor, rows.source, ops.Scheme("standard", [], True))
                    yield quantize_weight, [values, *where, *folded[1:]]
                    yield multiply, [list(folded), values, *where, out, own_bias]
                    packed, weights = ops.quantize_pack(tensor, rows.source, ops.Scheme("absmax")), ops.quantize_weight(
                        values, rows)  # fmt: skip
                else:
                    yield gather_weight, [values, *where]
                    packed, weights = ops.pack(tensor, rows.source), ops.gather_weight(values, rows)
                yield multiply, [list(packed), values, *where, out.bfloat16(), own_bias]
                for channels_last in (False, True):
                    yield spmm, [list(packed), list(weights), *where, images, own_bias, torch.float32, channels_last]
            if codes:
                px = ops.quantize_pack(x, g.input_layout, ops.Scheme("absmax"))
                py = ops.quantize_pack(dy, g.output_layout, ops.Scheme("stochastic"), seed)
            else:
                px, py = ops.pack(x, g.input_layout), ops.pack(dy, g.output_layout)
            scheme = "absmax" if codes else None
            for dtype in (torch.float32, torch.bfloat16):
                yield Passes(g).forward, [x.to(dtype), values, bias, *lists, scheme, dtype == torch.bfloat16, False,
                                          dtype, True]  # fmt: skip
                yield Passes(g).backward, [dy.to(dtype), values, list(px), *lists, scheme and "stochastic",
                                           dtype == torch.bfloat16, seed, [True, True, True], dtype]  # fmt: skip
            yield sddmm, [list(px), list(py), lists[0], source, target, images, values.numel()]


def valid_dense():
    """Arguments of the products by dense rows."""
    scheme = ops.Scheme("standard", [], True)
    for g, images, groups, density in (
        (linear_geometry(20, 30), 70, 1, 0.5), (linear_geometry(1030, 19), 3, 1, 1.0), (volumes(), 3, 1, 1.0),
        (conv_geometry(4, 18, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 5, False), 5, 2, 0.5),
        (conv_geometry(6, 6, (4, 7), (3, 2), (3, 2), (1, 1, 1, 1), (1, 1), 18, True), 18, 6, 1.0),
    ):  # fmt: skip
        outputs, columns = g.output_grid.planes, g.in_channels // groups * len(g.tap_shift)
        pattern = [*dense_pattern(torch.rand(outputs, columns) < density)[:2], columns]
        values, bias = torch.randn(pattern[1].numel()), torch.randn(outputs)
        layouts, packed = (g.input_layout, g.output_layout), []
        for swapped in (False, True):
            source, target = layouts[:: -1 if swapped else 1]
            rows = [pattern, groups, list(g.tap_phase), list(g.tap_shift), *map(numbers_of, (source, target)), swapped]
            made, own_bias, out = dense_rows(*rows), None if swapped else bias, torch.empty(target.shape(images))
            operand = ops.quantize_pack(torch.randn(source.shape(images)), source, ops.Scheme("symmetric"))
            folded = ops.quantize_pack(torch.randn(source.shape(images)), source, scheme)
            packed.append(operand)
            yield quantize_weight_dense, [values, None, None, *rows]
            yield quantize_weight_dense, [values, *folded[1:], *rows]
            yield multiply_dense, [list(folded), values, out, own_bias, *rows]
            yield multiply_dense, [list(operand), values, out.bfloat16(), own_bias, *rows]
            for channels_last in (False, True):
                weights = list(ops.quantize_weight(values, made))
                yield spmm_dense, [list(operand), weights, images, own_bias, torch.float32, channels_last, *rows]
            if swapped:
                rows = [*rows[:4], rows[5], rows[4], False]
                yield sddmm_dense, [*map(list, packed), images, values.numel(), *rows]


def volumes(transposed=False):
    return conv_geometry(4, 18, (3, 4, 5), (2, 3, 2), (2, 1, 2), (1, 1, 1, 1, 0, 1), (1, 1, 1), 3, False, transposed)


def valid_transposed():
    for g, batch in ((linear_geometry(20, 30, True), 70), (volumes(True), 3),
                     (conv_geometry(4, 18, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 37, True, True), 37)):
        rows, columns = g.output_grid.planes, g.in_channels
        plan = make_plan(*dense_pattern(torch.rand(rows, columns * len(g.tap_shift)) < 0.3)[:2], g, 1)
        values, bias = torch.randn(plan.forward.index.amax() + 1), torch.randn(columns)
        x, dy = torch.randn(batch, rows, *g.output_image), torch.randn(batch, columns, *g.input_image)
        lists = [tensors_of(plan.forward), tensors_of(plan.backward), numbers_of(g.input_layout),
                 numbers_of(g.output_layout)]  # fmt: skip
        passes = Passes(g)
        for scheme in (None, "absmax", "standard"):
            for dtype in (torch.float32, torch.bfloat16):
                forward = [x.to(dtype), values, bias, *lists, scheme, dtype == torch.bfloat16, scheme == "standard",
                           dtype, True]  # fmt: skip
                _, packed = passes.forward(*forward)
                yield passes.forward, forward
                yield passes.backward, [dy.to(dtype), values, list(packed), *lists, scheme and "stochastic",
                                        dtype == torch.bfloat16, torch.tensor(1), [True] * 3, dtype]  # fmt: skip


def valid_quantizations():
    """Arguments of `quantize` and `dequantize`: every scheme, dtype and way to share a scale."""
    options = {"sawb": [12.1, 12.2, 1.0], "dithered": [0.5], "luq": [5.0]}
    for shape in ((7, 20, 9), (129,), (3, 64), (2, 1, 5, 4), (0, 4), (1,)):
        x = torch.randn(shape)
        sharings = [(None, None), (0, None), (-1, None), (None, 32), (None, 1)]
        for scheme in SCHEMES[:-2]:
            for dim, group in sharings:
                tensor = x.bfloat16() if (len(scheme) + (group or 0)) % 2 else x
                bits = 8 if scheme == "luq" else random.choice([2, 5, 8])
                q = [tensor, scheme, bits, dim, group, scheme != "standard", torch.tensor(5), options.get(scheme, [])]
                yield ops.quantize, q
                codes, scale, zero = ops.quantize(*q)
                for dtype in (torch.float32, torch.bfloat16):
                    yield ops.dequantize, [codes, scale, zero, dim, group, dtype]


def epilogue_pack(x, residual, affine, activation, kept, ranges, layout, scheme, per_channel, keep):
    ops.epilogue_pack(x, residual, ops.Affine(*affine), ops.Activation(*activation), ops.Kept(*kept), ranges,
                      ops.PlaneLayout(*layout), scheme_of(scheme, per_channel), keep)  # fmt: skip


def epilogue_grad_pack(dy, codes, saved, activation, factor, ranges, layout, scheme, per_channel, seed, want_g):
    ops.epilogue_grad_pack(dy, codes, saved, ops.Activation(*activation), factor, ranges, ops.PlaneLayout(*layout),
                           scheme_of(scheme, per_channel), seed, want_g)  # fmt: skip


def valid_epilogues(x, activation, one, factor, packing, seed, all_parts):
    """Arguments of what follows a product, with all parts or with few."""
    forward = [x, *([x, one, one] if all_parts else [None] * 3), *activation]
    kept, saved = ops.codes_like(x), ops.saved_like(x, activation[0])
    ops.epilogue(*forward, one, one, kept, saved)
    filled = [one, one, kept, saved] if all_parts else [None, None, None, saved]
    residual, affine = forward[1], forward[2:4]
    yield ops.epilogue, [*forward, *filled]
    yield ops.epilogue_range, forward
    yield epilogue_pack, [x, residual, affine, activation, filled, *packing, "absmax", all_parts, all_parts]
    yield epilogue_pack, [kept, None, affine, activation, [None] * 4, *packing, "standard", all_parts, False]
    yield ops.activation_range, [packing[0], *activation]
    gradient = [x, kept if all_parts else None, saved]
    factor = factor if all_parts else None
    yield ops.epilogue_sums, [*gradient, *activation]
    yield ops.epilogue_grad, [*gradient, *activation, factor, all_parts]
    yield epilogue_grad_pack, [*gradient, activation, factor, *packing, "stochastic", all_parts, seed, all_parts]


def valid_rows():
    """Arguments of the operators of batch normalisation and activations."""
    for channels, geometry, images in (
        (20, linear_geometry(20, 7), (70, 20, 1, 1)), (33, linear_geometry(33, 7), (5, 33, 1, 1)),
        (4, conv_geometry(4, 7, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 5, False), (5, 4, 6, 5)),
        (18, conv_geometry(18, 7, (3, 4), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 37, True), (37, 18, 3, 4)),
    ):  # fmt: skip
        layout, seed = numbers_of(geometry.input_layout), torch.tensor(3)
        rows = images[0] * images[2] * images[3]
        x, one, factor = torch.randn(rows, channels), torch.rand(channels) + 0.5, torch.randn(3, channels)
        ranges = torch.stack([-4 * one, 4 * one], 1)
        for tensor in (x, x.bfloat16()):
            statistics = [tensor, one, one, one.clone(), one.clone(), 0.1, 1e-5]
            for training in (True, False):
                yield ops.norm_statistics, [*statistics, training, True]
                *_, doubles = ops.norm_statistics(*statistics, training, True)
                yield ops.norm_factors, [torch.rand(channels, 3).double(), doubles, one, rows, training]
            for per_channel in (True, False):
                packing = [ranges if per_channel else ranges[:1].clone(), layout]
                for activation in (["identity", []], ["clamp", [0.0, 6.0]], ["leaky_relu", [0.1]], ["silu", []],
                                   ["hardswish", []], ["gelu", []]):  # fmt: skip
                    yield from valid_epilogues(tensor, activation, one, factor, packing, seed, per_channel)


def corrupt_integer(value):
    return random.choice([*INTEGERS, value + 1, value - 1, 2 * value, -value, value + 64, value - 64, value // 2])


def corrupt(argument):
    if argument is None:
        return random.choice([None, None, None, random.choice(INTEGERS)])
    if isinstance(argument, bool):
        return not argument
    if isinstance(argument, str):
        return random.choice(ACTIVATIONS if argument in ACTIVATIONS else SCHEMES)
    if isinstance(argument, torch.dtype):
        return random.choice(DTYPES)
    if isinstance(argument, int):
        return corrupt_integer(argument)
    if isinstance(argument, float):
        return random.choice([*FLOATS, argument])
    if isinstance(argument, list) and not argument:
        return [random.choice(FLOATS) for _ in range(random.randrange(4))]
    if isinstance(argument, list) and isinstance(argument[0], float) and random.random() < 0.3:
        return random.choice([argument[:-1], argument + argument])
    if isinstance(argument, list) and not isinstance(argument[0], int):  # of what operators are made of, one part
        place = random.randrange(len(argument))
        return [corrupt(a) if i == place else a for i, a in enumerate(argument)]
    if isinstance(argument, list):
        new = list(argument)
        for _ in range(random.choice([1, 1, 2, 3])):
            place = random.randrange(len(new))
            new[place] = corrupt(new[place])  # None already, perhaps
        return random.choice([new, new, new, new, new[:-1], new + new[:9]])
    if argument.numel() == 0 or argument.ndim == 0:
        return argument
    if argument.dtype == torch.int32 and random.random() < 0.8:
        new = argument.reshape(-1).clone()
        for _ in range(random.choice([1, 1, 2])):
            place = random.randrange(new.numel())
            value = corrupt_integer(int(new[place]))
            new[place] = max(-(2**31), min(2**31 - 1, value))
        return new.view(argument.shape)
    if argument.is_floating_point() and random.random() < 0.2:
        new = argument.reshape(-1).clone()
        new[random.randrange(new.numel())] = torch.tensor(random.choice(FLOATS), dtype=torch.float64)
        return new.view(argument.shape)
    return random.choice([
        lambda t: t[: random.randrange(t.shape[0] + 1)],
        lambda t: t[: max(t.shape[0] - random.choice([1, 2, 4, 16, 64, 100]), 0)],
        lambda t: t.transpose(0, -1),
        lambda t: t[..., None],
        lambda t: t.double(),
        lambda t: t.to(random.choice(DTYPES)),
        lambda t: t[..., ::2],
        lambda t: t.new_empty(0),
        lambda t: t.new_empty(0, 1 << 40),
        lambda t: t.expand(3, *t.shape),
        lambda t: torch.cat([t, t]),
    ])(argument)  # fmt: skip


def guard(argument):
    if isinstance(argument, list):
        return [guard(a) for a in argument]
    return guarded_copy(argument) if isinstance(argument, torch.Tensor) else argument


def describe(argument):
    if isinstance(argument, list):
        return "[" + ", ".join(map(describe, argument)) + "]"
    if not isinstance(argument, torch.Tensor):
        return repr(argument)
    values = f" {argument.tolist()}" if argument.dtype == torch.int32 and argument.numel() < 200 else ""
    return f"<{argument.dtype} {tuple(argument.shape)} {argument.stride()}{values}>"


def end_after(seconds):
    """Say where the process is and end it, once it has computed so long, whatever else the machine does meanwhile."""
    faulthandler.register(signal.SIGPROF, chain=True)
    signal.setitimer(signal.ITIMER_PROF, seconds * (10 if os.environ.get("QSPARSEPROP_SANITIZED") else 1))


def main():
    seed, calls = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()
    end_after(100)
    torch.set_num_threads(1 + seed % 2)  # both with and without a team
    random.seed(seed)
    torch.manual_seed(seed)
    families = products, layers, quantization, normalisation, epilogues
    for module in (*families, _plan, _dense_rows, _matmul, _pack, _quantize, _norm, _epilogue, _statistics):
        module.torch = GuardedTorch()
    for module in (products, layers, quantization, epilogues, _pack):
        module.empty = guarded_empty
    valid, others = [*valid_calls(), *valid_transposed(), *valid_dense()], [*valid_quantizations(), *valid_rows()]
    refused = accepted = 0
    for isa in _dispatch.supported_isas():
        _dispatch.set_isa(isa)
        for op, arguments in valid + others:
            op(*map(guard, arguments))
        for _ in range(calls):
            op, arguments = random.choice(valid if random.random() < 0.5 else others)
            arguments = list(arguments)
            for _ in range(random.choice([1, 1, 1, 2])):
                place = random.randrange(len(arguments))
                arguments[place] = corrupt(arguments[place])
            print(isa, op, *map(describe, arguments), sep="\n  ", flush=True)
            arguments = list(map(guard, arguments))
            try:
                op(*arguments)
            except Exception as error:  # which kind is checked elsewhere; here it matters that there is one
                refused += 1
                print(repr(error))
            else:
                accepted += 1
    print("done:", json.dumps({"refused": refused, "accepted": accepted}))
    assert refused > calls // 4


if __name__ == "__main__":
    main()
