"""Calls of the operators that work, and what can be wrong with each of their arguments."""

from __future__ import annotations

import torch

from qsparseprop import ops
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.layout.modes import Modes
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import Plan, make_plan

from ._helpers import generator
from ._ops import operand, weights_of


def _list(rows, source, target):
    return ops.GatherList(*rows, ops.PlaneLayout(*source), ops.PlaneLayout(*target))


def _call_quantize_pack(x, grid, views, image, scheme, seed):
    ops.quantize_pack(x, ops.PlaneLayout(grid, views, image), ops.Scheme(scheme), seed)


def _call_pack(x, grid, views, image):
    ops.pack(x, ops.PlaneLayout(grid, views, image))


def _call_quantize_weight(values, group_ptr, offset, index, plane, source, target):
    ops.quantize_weight(values, _list((group_ptr, offset, index, plane), source, target))


def _call_spmm(planes, weights, group_ptr, offset, index, plane, scale, total, x_scale, x_zero_point, bias, grid,
               in_views, in_image, out_grid, views, image, images):  # fmt: skip
    rows = _list((group_ptr, offset, index, plane), (grid, in_views, in_image), (out_grid, views, image))
    ops.spmm(ops.Packed(planes, x_scale, x_zero_point), ops.Weights(weights, scale, total), rows, images, bias)


def _call_sddmm(planes, dy, group_ptr, offset, index, plane, x_scale, x_zero_point, dy_scale, grid, in_views, in_image,
                dy_grid, views, image, images, nonzeros):  # fmt: skip
    rows = _list((group_ptr, offset, index, plane), (grid, in_views, in_image), (dy_grid, views, image))
    ops.sddmm(ops.Packed(planes, x_scale, x_zero_point), ops.Packed(dy, dy_scale), rows, images, nonzeros)


def _plan(geometry, rows, columns, grid, views, dy_grid, dy_views):
    x, y = (grid, views, geometry.input_image), (dy_grid, dy_views, geometry.output_image)
    pattern = ValuePattern(torch.zeros(6, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 27)
    plan = Plan(pattern, geometry, 1, Modes())
    vars(plan).update(forward=_list(rows, x, y), backward=_list(columns, y, x))  # in place of those of the pattern
    return plan


def _call_layer_forward(x, values, bias, geometry, rows, columns, grid, views, out_grid, out_views, scheme, seed,
                        dtype):  # fmt: skip
    plan = _plan(geometry, rows, columns, grid, views, out_grid, out_views)
    given = ops.Quantisation(None if scheme is None else ops.Scheme(scheme), None, seed)
    ops.layer_forward(x, values, bias, plan, given, dtype)


def _call_layer_backward(dy, values, planes, x_scale, x_zero_point, geometry, rows, columns, grid, views, dy_grid,
                         dy_views, scheme, seed, grads, dtype):  # fmt: skip
    plan = _plan(geometry, rows, columns, grid, views, dy_grid, dy_views)
    given = ops.Quantisation(None if scheme is None else ops.Scheme(scheme), None, seed)
    packed = None if planes is None else ops.Packed(planes, x_scale, x_zero_point)
    ops.layer_backward(dy, values, packed, plan, given, grads, dtype)


CALLS = {name.removeprefix("_call_"): call for name, call in list(globals().items()) if name.startswith("_call_")}


def _parts(rows):
    return {"group_ptr": rows.group_ptr, "offset": rows.offset, "index": rows.index, "plane": rows.plane}


def valid(op, codes=True):
    """Arguments by name of a small call that works: what plans are made of, and tensors."""
    g = conv_geometry(3, 5, (6, 5), (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 4, False)
    plan = make_plan(*dense_pattern(torch.rand(5, 27, generator=generator(1)) < 0.5)[:2], g)
    rows = plan.forward
    nonzeros = int((rows.index >= 0).sum())
    values = torch.randn(nonzeros)
    x, dy = torch.randn(4, 3, 6, 5), torch.randn(4, 5, *g.output_size)
    source = {"grid": list(g.input_grid.numbers), "in_views": list(g.input_views), "in_image": list(g.input_image)}
    target = (list(g.output_grid.numbers), list(g.output_views), list(g.output_image))
    packing = {"x": x, "grid": source["grid"], "views": source["in_views"], "image": source["in_image"]}
    scheme = "absmax" if codes else None
    planes, x_scale, zero = operand(x, g.input_layout, scheme)
    weights, scale, total = weights_of(values, rows, codes)
    grad, dy_scale, _ = operand(dy, g.output_layout, "stochastic" if codes else None)
    bias = torch.randn(5)
    lists = {"geometry": g, "rows": list(_parts(rows).values()), "columns": list(_parts(plan.backward).values()),
             "grid": source["grid"], "views": source["in_views"]}  # fmt: skip
    return {
        "quantize_pack": {**packing, "scheme": "absmax", "seed": None},
        "pack": packing,
        "quantize_weight": {"values": values, **_parts(rows), "source": list(source.values()), "target": target},
        "spmm": {"planes": planes, "weights": weights, **_parts(rows), "scale": scale, "total": total,
                 "x_scale": x_scale, "x_zero_point": zero, "bias": bias, **source,
                 **dict(zip(("out_grid", "views", "image"), target, strict=True)), "images": 4},
        "sddmm": {"planes": planes, "dy": grad, **_parts(rows), "x_scale": x_scale, "x_zero_point": zero,
                  "dy_scale": dy_scale, **source, **dict(zip(("dy_grid", "views", "image"), target, strict=True)),
                  "images": 4, "nonzeros": nonzeros},
        "layer_forward": {"x": x, "values": values, "bias": bias, **lists, "out_grid": target[0],
                          "out_views": target[1], "scheme": scheme, "seed": None, "dtype": torch.float32},
        "layer_backward": {"dy": dy, "values": values, "planes": planes, "x_scale": x_scale, "x_zero_point": zero,
                           **lists, "dy_grid": target[0], "dy_views": target[1], "scheme": scheme, "seed": None,
                           "grads": [True, True, True], "dtype": torch.float32},
    }[op]  # fmt: skip


def _set(place, value):
    def change(old):
        new = old.clone() if isinstance(old, torch.Tensor) else list(old)
        new[place] = value
        return new

    return change


def _within(place, change):
    """A change of one tensor of a list."""
    return lambda old: [*old[:place], change(old[place]), *old[place + 1 :]]


def _gapped(t):
    return torch.stack([t, t], -1)[..., 0]


def _short(t):
    return t[:-1]


def _grid(**numbers):
    names = ("images", "lane_b", "lane_y", "lane_x", "planes", "pitch", "front", "block")

    def change(old):
        return [numbers.get(name, value) for name, value in zip(names, old, strict=True)]

    return change


GRIDS = {
    "7 numbers": _short,
    "no numbers": lambda g: [],
    "no images": _grid(images=0),
    "negative images": _grid(images=-4),
    "no lanes": _grid(lane_b=0),
    "negative row": _grid(lane_y=-6),
    "lanes of pixels overlap": _grid(lane_x=2),
    "lanes of rows overlap": _grid(lane_y=1),
    "lanes of images overlap": _grid(lane_b=7),
    "no planes": _grid(planes=0),
    "pitch not of whole units": _grid(pitch=130),
    "pitch smaller than front": _grid(front=2**20),
    "planes larger than their block": _grid(planes=1000),
    "blocks overlap": _grid(block=64),
    "beyond 64 bits as a product": _grid(planes=2**34, pitch=2**30, block=0),
    "beyond 64 bits as a product, again": _grid(planes=2**30, pitch=2**34, block=64),
    "enormous": _grid(pitch=2**62),
}  # fmt: skip
VIEWS = {
    "none": lambda v: [],
    "8 numbers": lambda v: v[:8],
    "other channels": _set(1, 2),
    "negative plane": _set(0, -1),
    "plane too large": _set(0, 1000),
    "negative origin": _set(2, -1),
    "origin outside of the plane": _set(2, 2**20),
    "negative rows": _set(3, -1),
    "more rows than the tensor has": _set(3, 40),
    "more columns than the tensor has": _set(4, 40),
    "first row outside": _set(5, 30),
    "negative first row": _set(5, -1),
    "negative first column": _set(6, -1),
    "no row step": _set(7, 0),
    "negative column step": _set(8, -1),
    "enormous row step": _set(7, 2**62),
    "enormous plane": _set(0, 2**62),
    "enormous origin": _set(2, 2**62),
    "enormous first row": _set(5, 2**63 - 1),
}  # fmt: skip
GROUP_PTRS = {
    "int64": lambda t: t.long(),
    "float": lambda t: t.float(),
    "empty": lambda t: t[:0],
    "not from 0": _set(0, 1),
    "negative": _set(0, -1),
    "descending": _set(2, 1000),
    "past the slots": lambda t: t * 2,
    "largest": _set(-1, 2**31 - 1),
    "not contiguous": lambda t: torch.stack([t, t], 1)[:, 0],
}  # fmt: skip
IMAGES = {
    "1 number": _short,
    "3 numbers": lambda s: [*s, 1],
    "fewer rows": _set(0, 1),
    "negative": _set(1, -1),
    "enormous": _set(0, 2**62),
}  # fmt: skip
COUNTS = {"more": lambda n: 4000, "negative": lambda n: -4, "enormous": lambda n: 2**62}
OFFSETS = {"int64": lambda t: t.long(), "short": _short, "not contiguous": _gapped, "-1": _set(0, -1),
           "smallest": _set(2, -(2**31)), "past the end": _set(2, 10**6), "largest": _set(-1, 2**31 - 1)}  # fmt: skip
INDICES = {"int64": lambda t: t.long(), "short": _short, "empty": lambda t: t[:0], "not contiguous": _gapped,
           "too large": _set(0, 10**6), "-2": _set(1, -2), "smallest": _set(3, -(2**31)),
           "largest": _set(3, 2**31 - 1)}  # fmt: skip
PLANES = {"int64": lambda t: t.long(), "short": _short, "-1": _set(0, -1), "too large": _set(0, 10**6)}
CORRUPTIONS = {
    "quantize_pack": {
        "x": {"int": lambda t: t.int(), "double": lambda t: t.double(), "half": lambda t: t.half(),
              "complex": lambda t: t.to(torch.complex64), "3-D": lambda t: t[0], "5-D": lambda t: t[None],
              "fewer channels": lambda t: t[:, :2], "fewer rows": lambda t: t[:, :, :1]},
        "grid": GRIDS, "views": VIEWS, "image": IMAGES,
        "scheme": {"unknown": lambda s: "int4", "without its seed": lambda s: "stochastic"},
    },
    "quantize_weight": {
        "values": {"double": lambda t: t.double(), "bfloat16": lambda t: t.bfloat16(), "short": lambda t: t[:-1],
                   "empty": lambda t: t[:0], "not contiguous": _gapped},
        "index": INDICES, "group_ptr": GROUP_PTRS,
    },
    "spmm": {
        "planes": {"signed": lambda t: t.to(torch.int8), "double": lambda t: t.double(), "short": lambda t: t[:-300],
                   "empty": lambda t: t[:0], "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "weights": {"unsigned": lambda t: t.to(torch.uint8), "int32": lambda t: t.int(), "short": _short,
                    "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "group_ptr": {**GROUP_PTRS, "fewer rows": _short},
        # which value a slot holds does not matter here
        "index": {k: v for k, v in INDICES.items() if k not in ("too large", "largest")},
        "offset": OFFSETS, "plane": PLANES,
        "scale": {"missing": lambda t: None, "short": _short, "double": lambda t: t.double()},
        "total": {"missing": lambda t: None, "short": _short, "int32": lambda t: t.int()},
        "x_scale": {"empty": lambda t: t[:0], "double": lambda t: t.double()},
        "x_zero_point": {"empty": lambda t: t[:0], "int64": lambda t: t.long()},
        "bias": {"short": _short, "double": lambda t: t.double(), "not contiguous": _gapped},
        "grid": GRIDS, "in_views": VIEWS, "in_image": IMAGES, "out_grid": GRIDS, "views": VIEWS, "image": IMAGES,
        "images": COUNTS,
    },
    "sddmm": {
        "planes": {"signed": lambda t: t.to(torch.int8), "short": lambda t: t[:-300], "empty": lambda t: t[:0],
                   "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "dy": {"signed": lambda t: t.to(torch.int8), "short": lambda t: t[:-300], "empty": lambda t: t[:0],
               "not contiguous": _gapped, "float among codes": lambda t: t.float()},
        "group_ptr": {**GROUP_PTRS, "fewer rows": _short},
        "offset": OFFSETS, "index": INDICES, "plane": PLANES,
        "x_scale": {"missing": lambda t: None, "empty": lambda t: t[:0], "two": lambda t: t.repeat(2)},
        "x_zero_point": {"missing": lambda t: None, "empty": lambda t: t[:0], "float": lambda t: t.float()},
        "dy_scale": {"missing": lambda t: None, "empty": lambda t: t[:0], "two": lambda t: t.repeat(2)},
        "grid": GRIDS | {"other lanes": _grid(lane_b=128)}, "in_views": VIEWS, "in_image": IMAGES, "dy_grid": GRIDS,
        "views": {**VIEWS, "two": lambda v: v * 2}, "image": IMAGES,
        "images": COUNTS,
        "nonzeros": {"fewer": lambda n: n - 1, "none": lambda n: 0},
    },
}  # fmt: skip
CORRUPTIONS["pack"] = {k: v for k, v in CORRUPTIONS["quantize_pack"].items() if k != "scheme"}
_LISTS = {f"{name}: {k}": _within(place, v) for place, (name, changes) in enumerate(
    {"group_ptr": CORRUPTIONS["spmm"]["group_ptr"], "offset": OFFSETS, "index": INDICES, "plane": PLANES}.items())
    for k, v in changes.items()}  # fmt: skip
CORRUPTIONS["layer_forward"] = {
    "x": CORRUPTIONS["quantize_pack"]["x"],
    "values": {"short": _short, "empty": lambda t: t[:0], "not contiguous": _gapped},
    "bias": {"short": _short, "empty": lambda t: t[:0]},
    "rows": _LISTS, "grid": GRIDS, "views": VIEWS, "out_grid": GRIDS, "out_views": VIEWS,
    "scheme": {"unknown": lambda s: "int4", "without its seed": lambda s: "stochastic"},
    "dtype": {"double": lambda d: torch.float64, "int8": lambda d: torch.int8},
}  # fmt: skip
CORRUPTIONS["layer_backward"] = {
    "dy": CORRUPTIONS["quantize_pack"]["x"],
    "values": CORRUPTIONS["layer_forward"]["values"],
    # floats ask for the weight gradient in float32
    "planes": {**{k: v for k, v in CORRUPTIONS["spmm"]["planes"].items() if k not in ("short", "float among codes")},
               "short": lambda t: t[:-1000], "missing": lambda t: None},
    "x_scale": CORRUPTIONS["sddmm"]["x_scale"],
    "x_zero_point": CORRUPTIONS["sddmm"]["x_zero_point"],
    "rows": _LISTS, "columns": _LISTS, "grid": GRIDS, "dy_grid": GRIDS, "views": VIEWS, "dy_views": VIEWS,
    "scheme": CORRUPTIONS["layer_forward"]["scheme"],
    "dtype": CORRUPTIONS["layer_forward"]["dtype"],
}  # fmt: skip


def _is_harmful(change):
    """Whether products of the numbers leave 64 bits: where such a call is not refused, it ends the process."""
    return "enormous" in change or "beyond" in change


def corruptions(harmful):
    return [(op, argument, change) for op, arguments in CORRUPTIONS.items() for argument, changes in arguments.items()
            for change in changes if _is_harmful(change) == harmful]  # fmt: skip


def corrupted_call(op, argument, change):
    arguments = valid(op)
    arguments[argument] = CORRUPTIONS[op][argument][change](arguments[argument])
    CALLS[op](**arguments)
