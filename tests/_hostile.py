"""Tensors that are not what they seem to be, and blocks to give them to."""

import copy

import torch
from torch import nn

from qsparseprop import nn as qnn
from qsparseprop import ops
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan
from qsparseprop.utils.fusion import fuse_modules

NO_DERIVATIVES = "operators of qsparseprop have no derivatives: use the modules"
NO_MEMORY = r"has no memory: the storage of a tensor of shape .* bytes; whoever has resized it"


def negative(t):
    """The same values, stored as their negatives."""
    return torch._neg_view(-t.detach())


def freed(t, size=0):
    t = t.detach().clone()
    t.untyped_storage().resize_(size)
    return t


def pruned(dense):
    with torch.no_grad():
        dense.weight.mul_(torch.rand(dense.weight.shape) < 0.4)
    return dense


def blocks():
    """Layers and what they compute together with, and inputs."""
    torch.manual_seed(0)
    conv = qnn.QuantizedSparseConv2d.from_dense(pruned(nn.Conv2d(4, 6, 3, padding=1)))
    reader = qnn.QuantizedSparseConv2d.from_dense(pruned(nn.Conv2d(4, 6, 1)))
    linear = qnn.QuantizedSparseLinear.from_dense(pruned(nn.Linear(12, 9)))
    x, rows = torch.randn(3, 4, 6, 5).to(memory_format=torch.channels_last), torch.randn(7, 12)
    yield "conv, norm, relu", fuse_modules(nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU())), x
    yield "norm, relu, conv", fuse_modules(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), reader)), x
    yield "linear, gelu", fuse_modules(nn.Sequential(linear, nn.GELU())), rows
    yield "linear", fuse_modules(nn.Sequential(copy.deepcopy(linear))), rows


BLOCKS = [name for name, *_ in blocks()]


def block(name):
    return next((module, x) for found, module, x in blocks() if found == name)


def operands():
    """What the functions that take a plan are given, by name."""
    plan = make_plan(*dense_pattern(torch.ones(16, 16) > 0)[:2], linear_geometry(16, 16))
    rows = plan.forward
    x, values = torch.randn(rows.source.shape(70)), torch.randn(256)
    return plan, {"x": x, "values": values, "planes": ops.pack(x, rows.source)[0], "bias": torch.randn(16),
                  "slots": ops.gather_weight(values, rows).slots, "out": torch.empty(rows.target.shape(70)),
                  "plan": plan, "gradient": torch.randn(rows.target.shape(70)),
                  "dy": ops.pack(torch.randn(rows.target.shape(70)), rows.target)[0]}  # fmt: skip


CALLS = {
    "pack": (lambda rows, t: ops.pack(t["x"], rows.source)[0], ["x"]),
    "quantize_pack": (lambda rows, t: ops.quantize_pack(t["x"], rows.source, ops.Scheme("absmax", (), True))[0], ["x"]),
    "gather_weight": (lambda rows, t: ops.gather_weight(t["values"], rows).slots, ["values"]),
    "quantize_weight": (lambda rows, t: ops.quantize_weight(t["values"], rows).slots, ["values"]),
    "spmm": (lambda rows, t: ops.spmm(ops.Packed(t["planes"]), ops.Weights(t["slots"]), rows, 70, t["bias"]),
             ["planes", "slots", "bias"]),
    "multiply": (lambda rows, t: ops.multiply(ops.Packed(t["planes"]), t["values"], rows, t["out"], t["bias"]),
                 ["planes", "values", "bias", "out"]),
    "sddmm": (lambda rows, t: ops.sddmm(ops.Packed(t["planes"]), ops.Packed(t["dy"]), rows, 70, 256), ["planes", "dy"]),
    "layer_forward": (lambda rows, t: ops.layer_forward(
        t["x"], t["values"], t["bias"], t["plan"], ops.Quantisation(), torch.float32)[0], ["x", "values", "bias"]),
    "layer_backward": (lambda rows, t: torch.cat([g.flatten() for g in ops.layer_backward(
        t["gradient"], t["values"], ops.Packed(t["planes"]), t["plan"], ops.Quantisation(), (True, True, False),
        torch.float32)[:2]]), ["gradient", "values", "planes"]),
    "packed_backward": (lambda rows, t: torch.cat([g.flatten() for g in ops.packed_backward(
        ops.Packed(t["dy"]), t["values"], ops.Packed(t["planes"]), t["plan"], 70, None, (True, True), torch.float32,
        False)]), ["dy", "values", "planes"]),
}  # fmt: skip
PLACES = [(name, place) for name, (_, places) in CALLS.items() for place in places]
