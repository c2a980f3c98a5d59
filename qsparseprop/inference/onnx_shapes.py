"""Operators of torch that move, cut, join and reduce as nodes of ONNX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qsparseprop.inference.calls import Name
from qsparseprop.inference.onnx_arguments import Arguments, onnx_dtype

__all__ = ["NUMBERS", "SEVERAL", "SHAPES"]

Translation = Callable[[Arguments], str]
#: Ends of slices that go backwards.
_BEFORE_THE_FIRST = -(1 << 63)


def _view(call: Arguments) -> str:
    """The same elements in the same order, in other sizes."""
    call.ignore(*call.names[1:])
    sizes = call.result
    if call.step.operator.startswith("aten.squeeze.") and any(call.shape(0)[axis] is None for axis in _axes(call)):
        raise call.refused("of sizes of one, as which the batch may be, is not translated to ONNX")
    if sizes.count(None) <= 1 and 0 not in sizes:
        return call.reshaped(call.tensor(0), sizes)
    asked = call.get(1) if len(call.names) > 1 else None
    if not isinstance(asked, list | tuple) or call.names[1] not in ("size", "shape") or 0 in sizes:
        return call.reshaped(call.tensor(0), sizes)  # which refuses it
    return call.add("Reshape", [call.tensor(0), call.size_vector(asked)])


def _permute(call: Arguments) -> str:
    rank = call.rank(0)
    return call.add("Transpose", [call.tensor(0)], perm=[d % rank for d in call.get(1)])


def _transpose(call: Arguments) -> str:
    rank = call.rank(0)
    one, other = (0, 1) if len(call.names) == 1 else (call.get(1) % max(1, rank), call.get(2) % max(1, rank))
    order = list(range(rank))
    if rank > 1:
        order[one], order[other] = order[other], order[one]
    return call.add("Transpose", [call.tensor(0)], perm=order)


def _movedim(call: Arguments) -> str:
    rank = call.rank(0)
    pair = [[d] if isinstance(d, int) else list(d) for d in (call.get(1), call.get(2))]
    source, target = ([d % rank for d in dims] for dims in pair)
    rest = iter(d for d in range(rank) if d not in source)
    order = [source[target.index(d)] if d in target else next(rest) for d in range(rank)]
    return call.add("Transpose", [call.tensor(0)], perm=order)


def _cut(call: Arguments, x: str, dim: int, start: Any, end: Any, step: int = 1) -> str:
    bounds = [call.size_vector([bound]) for bound in (start, end)]
    return call.add("Slice", [x, *bounds, call.ints([dim]), call.ints([step])])


def _slice(call: Arguments) -> str:
    start, end = call.get("start"), call.get("end")
    start, end = 0 if start is None else start, (1 << 63) - 1 if end is None else end
    return _cut(call, call.tensor(0), call.dim("dim"), start, end, call.get("step"))


def _narrow(call: Arguments) -> str:
    dim, start, length = call.dim("dim"), call.get("start"), call.get("length")
    if type(start) is not int or type(length) is not int:
        raise call.refused("at a place that is computed is not translated to ONNX")
    start = start + call.fixed(0, dim) if start < 0 else start
    return _cut(call, call.tensor(0), dim, start, start + length)


def _flip(call: Arguments) -> str:
    x, rank = call.tensor(0), call.rank(0)
    for dim in call.get(1):
        x = _cut(call, x, dim % rank, -1, _BEFORE_THE_FIRST, -1)
    return x


def _roll(call: Arguments) -> str:
    x, rank = call.tensor(0), call.rank(0)
    shifts, dims = ([n] if isinstance(n, int) else list(n) for n in (call.get("shifts"), call.get("dims")))
    if not dims:
        raise call.refused("of all dimensions as one is not translated to ONNX")
    for shift, dim in zip(shifts, dims, strict=True):
        size = call.fixed(0, dim % rank)
        at = (size - shift) % max(1, size)
        parts = [_cut(call, x, dim % rank, at, size), _cut(call, x, dim % rank, 0, at)]
        x = call.add("Concat", parts, axis=dim % rank)
    return x


def _select(call: Arguments) -> str:
    return call.add("Gather", [call.tensor(0), call.given(call.get("index"), torch.int64)], axis=call.dim("dim"))


def _index_select(call: Arguments) -> str:
    return call.add("Gather", [call.tensor(0), call.tensor("index", torch.int64)], axis=call.dim("dim"))


def _index(call: Arguments) -> str:
    found = [(axis, each) for axis, each in enumerate(call.get("indices")) if each is not None]
    if len(found) != 1 or not isinstance(found[0][1], Name) or call.sizes.meta(found[0][1].name).dtype is torch.bool:
        raise call.refused("by a mask or several indices is not translated to ONNX")
    axis, index = found[0]
    return call.add("Gather", [call.tensor(0), call.given(index, torch.int64)], axis=axis)


def _embedding(call: Arguments) -> str:
    call.ignore("padding_idx", "scale_grad_by_freq", "sparse")
    return call.add("Gather", [call.tensor(0), call.tensor(1, torch.int64)], axis=0)


def _parts(call: Arguments) -> list[str]:
    """What is cut along a dimension, all of it."""
    call.ignore(*call.names[1:])
    dim = call.dim("dim")
    call.fixed(0, dim)
    count = len(call.sizes.meta(call.step.output))
    lengths = [call.sizes.of(call.step.output, part)[dim] for part in range(count)]
    if call.step.operator.startswith("aten.unbind"):
        return [call.add("Gather", [call.tensor(0), call.constant(np.int64(i))], axis=dim) for i in range(count)]
    if not all(lengths):
        raise call.refused("into parts of which some are empty is not translated to ONNX")
    names = [f"{call.step.output}/part"] * count
    return call.export.graph.add_all("Split", [call.tensor(0), call.ints([n or 0 for n in lengths])], names, axis=dim)


def _extreme(operator: str, index: str) -> Callable[[Arguments], list[str]]:
    """The largest or smallest elements along a dimension, and where they are."""

    def translate(call: Arguments) -> list[str]:
        dim, kept = call.dim("dim"), int(call.get("keepdim"))
        x = call.tensor(0)
        return [call.add(operator, [x, call.ints([dim])], keepdims=kept), call.add(index, [x], axis=dim, keepdims=kept)]

    return translate


def _cat(call: Arguments) -> str:
    held = [(name, call.sizes.of(name.name)) for name in call.get(0)]
    # which torch takes for nothing, as it did before it had dimensions of size 0
    given = [name for name, sizes in held if sizes != [0]]
    rank = len(call.result)
    return call.add("Concat", [call.given(name, call.dtype) for name in given], axis=call.get("dim") % rank)


def _stack(call: Arguments) -> str:
    dim = call.get("dim") % len(call.result)
    parts = [call.add("Unsqueeze", [call.given(name, call.dtype), call.ints([dim])]) for name in call.get(0)]
    return call.add("Concat", parts, axis=dim)


def _expand(call: Arguments) -> str:
    call.ignore("implicit")
    sizes = call.get(1)
    if isinstance(sizes, Name):  # those of another value
        return call.add("Expand", [call.tensor(0), call.add("Shape", [call.tensor(1)])])
    return call.add("Expand", [call.tensor(0), call.size_vector([1 if type(n) is int and n == -1 else n
                                                                 for n in sizes])])  # fmt: skip


def _repeat(call: Arguments) -> str:
    x, times, rank = call.tensor(0), list(call.get(1)), call.rank(0)
    if len(times) > rank:
        x = call.add("Unsqueeze", [x, call.ints(range(len(times) - rank))])
    times = [1] * (rank - len(times)) + times
    return call.add("Tile", [x, call.size_vector(times)])


def _axes(call: Arguments) -> list[int]:
    """The dimensions that are reduced, all where none are named."""
    dims = call.get("dim") if call.has("dim") else None
    rank = call.rank(0)
    given = list(range(rank)) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    return [dim % max(1, rank) for dim in given]


def _kept(call: Arguments) -> int:
    return int(call.get("keepdim")) if call.has("keepdim") else 0


def _reduced(operator: str) -> Translation:
    def translate(call: Arguments) -> str:
        x = call.tensor(0, call.dtype)
        return call.add(operator, [x, call.ints(_axes(call))], keepdims=_kept(call))

    return translate


def _where_extreme(operator: str) -> Translation:
    def translate(call: Arguments) -> str:
        if call.get("dim") is None:
            if call.get("keepdim"):
                raise call.refused("of all elements with their dimensions is not translated to ONNX")
            return call.add(operator, [call.reshaped(call.tensor(0), [None])], axis=0, keepdims=0)
        return call.add(operator, [call.tensor(0)], axis=call.dim("dim"), keepdims=_kept(call))

    return translate


def _norm(call: Arguments) -> str:
    kinds = {1: "ReduceL1", 2: "ReduceL2", math.inf: "ReduceMax"}
    name = "ord" if call.has("ord") else "p"
    power = 2 if call.get(name) is None else call.get(name)
    if power not in kinds:
        raise call.refused(f"of power {power} is not translated to ONNX")
    x = call.tensor(0)
    x = call.add("Abs", [x]) if power == math.inf else x
    return call.add(kinds[power], [x, call.ints(_axes(call))], keepdims=_kept(call))


def _variance(call: Arguments) -> str:
    axes = _axes(call)
    count = math.prod(call.fixed(0, axis) for axis in axes)
    if call.has("correction"):
        correction = 1 if call.get("correction") is None else call.get("correction")
    else:
        correction = int(call.get("unbiased"))
    if count <= correction:
        raise call.refused("of too few elements is not translated to ONNX")
    x, dims = call.tensor(0), call.ints(axes)
    centred = call.op("Sub", x, call.add("ReduceMean", [x, dims], keepdims=1))
    squares = call.add("ReduceSum", [call.op("Mul", centred, centred), dims], keepdims=_kept(call))
    return call.op("Div", squares, count - correction)


def _cumsum(call: Arguments) -> str:
    return call.add("CumSum", [call.tensor(0, call.dtype), call.constant(np.int64(call.dim("dim")))])


def _triangle(upper: int) -> Translation:
    return lambda call: call.add("Trilu", [call.tensor(0), call.constant(np.int64(call.get("diagonal")))], upper=upper)


def _pad(call: Arguments) -> str:
    sides = list(call.get(1))
    mode = call.get("mode") if call.has("mode") else call.step.operator.split(".")[1].split("_")[0]
    modes = {"constant": "constant", "reflect": "reflect", "reflection": "reflect", "replicate": "edge",
             "replication": "edge"}  # fmt: skip
    if mode not in modes or not all(type(n) is int and n >= 0 for n in sides):
        raise call.refused(f"of mode {mode!r} by {sides} is not translated to ONNX")
    pairs = list(zip(sides[::2], sides[1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (call.rank(0) - len(pairs)) + pairs
    given = [call.tensor(0), call.ints([before for before, _ in pairs] + [after for _, after in pairs])]
    value = call.get("value") if call.has("value") else None
    if modes[mode] == "constant":
        given.append(call.given(0.0 if value is None else value, call.dtype))
    return call.add("Pad", given, mode=modes[mode])


def _size(call: Arguments) -> str:
    shape = call.add("Shape", [call.tensor(0)])
    return call.add("Gather", [shape, call.constant(np.int64(call.dim("dim")))], axis=0)


def _filled(value: float | str) -> Translation:
    """A tensor of one number, of sizes that may be computed, or of another tensor."""

    def translate(call: Arguments) -> str:
        like = call.step.operator.split(".")[1].endswith("_like")
        number = call.get("fill_value") if value == "fill_value" else value
        shape = call.add("Shape", [call.tensor(0)]) if like else call.size_vector(call.get("size"))
        call.ignore("self", "dtype")
        return call.add("Expand", [call.given(number, call.dtype), shape])

    return translate


def _integers(operator: str) -> Translation:
    """Arithmetic of sizes."""
    return lambda call: call.add(operator, [call.given(call.get(0), torch.int64), call.given(call.get(1), torch.int64)])


def _pixel_shuffle(call: Arguments) -> str:
    if call.rank(0) != 4:
        raise call.refused("of other images than (batch, channels, height, width) is not translated to ONNX")
    return call.add("DepthToSpace", [call.tensor(0)], blocksize=call.get(1), mode="CRD")


def _cast(call: Arguments, x: str, dtype: torch.dtype) -> str:
    return call.add("Cast", [x], to=onnx_dtype(dtype))


def _any(operator: str) -> Translation:
    def translate(call: Arguments) -> str:
        numbers = _cast(call, call.tensor(0, torch.bool), torch.int32)
        return _cast(call, call.add(operator, [numbers, call.ints(_axes(call))], keepdims=_kept(call)), torch.bool)

    return translate


def _names(names: str, translation: Translation) -> dict[str, Translation]:
    return dict.fromkeys(names.split(), translation)


SHAPES: dict[str, Translation] = {
    **_names("flatten reshape view _unsafe_view unflatten squeeze unsqueeze ravel view_as reshape_as", _view),
    **_names("expand expand_as broadcast_to", _expand),
    **_names("repeat tile", _repeat),
    **_names("pad constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d", _pad),
    **_names("replication_pad1d replication_pad2d replication_pad3d", _pad),
    **_names("transpose swapaxes swapdims t", _transpose),
    **_names("cat concat", _cat),
    **_names("norm linalg_vector_norm", _norm),
    **_names("zeros new_zeros zeros_like", _filled(0)),
    **_names("ones new_ones ones_like", _filled(1)),
    **_names("full new_full full_like", _filled("fill_value")),
    "permute": _permute, "movedim": _movedim, "slice": _slice, "narrow": _narrow, "flip": _flip, "roll": _roll,
    "select": _select, "index_select": _index_select, "index": _index, "embedding": _embedding, "stack": _stack,
    "mean": _reduced("ReduceMean"), "sum": _reduced("ReduceSum"), "amax": _reduced("ReduceMax"),
    "amin": _reduced("ReduceMin"), "max": _reduced("ReduceMax"), "min": _reduced("ReduceMin"),
    "prod": _reduced("ReduceProd"), "argmax": _where_extreme("ArgMax"), "argmin": _where_extreme("ArgMin"),
    "any": _any("ReduceMax"), "all": _any("ReduceMin"), "var": _variance,
    "std": lambda call: call.add("Sqrt", [_variance(call)]), "cumsum": _cumsum, "tril": _triangle(0),
    "triu": _triangle(1), "sym_size": _size, "pixel_shuffle": _pixel_shuffle,
}  # fmt: skip
#: Arithmetic of numbers, under names that tensors' have, too.
NUMBERS = {"aten.mul.int": _integers("Mul"), "aten.add.int": _integers("Add"), "aten.sub.int": _integers("Sub"),
           "aten.floordiv.int": _integers("Div")}  # fmt: skip
#: With several results.
SEVERAL: dict[str, Callable[[Arguments], list[str]]] = {
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind", "unsafe_split", "unsafe_chunk",
                     "unsafe_split_with_sizes", "tensor_split"), _parts),
    "max.dim": _extreme("ReduceMax", "ArgMax"),
    "min.dim": _extreme("ReduceMin", "ArgMin"),
}  # fmt: skip
