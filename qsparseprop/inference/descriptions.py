"""Programs as descriptions in JSON with tensors by name, and back."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsparseprop.inference.containers import StoredTensors, raw_bytes
from qsparseprop.inference.data import from_json, to_json
from qsparseprop.inference.limits import check_pools
from qsparseprop.inference.packing import WAYS, PackedWeight, pack_weight, part_sizes, unpack_weight
from qsparseprop.inference.program import Program
from qsparseprop.inference.reading import Fields, read_list, read_number, read_text, read_whole, refuse
from qsparseprop.inference.steps import (
    Add,
    Call,
    Codes,
    Concat,
    Dequantize,
    Flatten,
    Pool,
    Product,
    Quantize,
    Step,
    Table,
    Value,
    Weight,
    Window,
)
from qsparseprop.utils.errors import ConfigurationError, refuse_more_than_memory

__all__ = ["DescriptionReader", "DescriptionWriter"]

#: Bytes that a nonzero takes in the lists of the kernels, about.
_LIST_BYTES = 12
#: What images and windows have at most; layouts of the kernels ask for less.
_LARGEST_IMAGE, _LARGEST_WINDOW, _LARGEST_SIZE = (1 << 31) - 1, 1 << 16, (1 << 31) - 1
#: Channels of all values together: a number in the file becomes a scale for each.
_MOST_CHANNELS = 1 << 25


class DescriptionWriter:
    """Collects the tensors of what it describes.

    Attributes
    ----------
    tensors : dict of str to Tensor
        By the names that descriptions have for them. Those with the same content are there once.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._known: dict[tuple[torch.dtype, tuple[int, ...], bytes], str] = {}

    def program(self, program: Program) -> dict[str, Any]:
        """Describe a program.

        Parameters
        ----------
        program : Program

        Returns
        -------
        dict
        """
        return {
            "inputs": list(program.inputs),
            "outputs": list(program.outputs),
            "values": {name: self._value(name, value) for name, value in program.values.items()},
            "steps": [self._step(step) for step in program.steps],
            "constants": {n: self._tensor(tensor, f"constants/{n}") for n, tensor in program.constants.items()},
        }

    def _tensor(self, tensor: Tensor, name: str) -> str:
        key = tensor.dtype, tuple(tensor.shape), hashlib.sha256(raw_bytes(tensor)).digest()
        if key not in self._known:
            self._known[key] = name
            self.tensors[name] = tensor
        return self._known[key]

    def _value(self, name: str, value: Value) -> dict[str, Any]:
        described: dict[str, Any] = {"shape": list(value.shape)}
        if value.rows != 1:
            described["rows"] = value.rows
        if value.codes is not None:
            scale = value.codes.scale
            same = bool((scale == scale[0]).all())
            described["scale"] = float(scale[0]) if same else self._tensor(scale, f"scales/{name}")
            described["zero_point"] = value.codes.zero_point
        return described

    def _step(self, step: Step) -> dict[str, Any]:
        kind = type(step).__name__.lower()
        described = {"step": kind, "inputs": list(step.inputs), "output": step.output}
        fields = {name: field.write(self, getattr(step, name), f"{step.output}/{name}")
                  for name, field in _KINDS[kind].fields.items()}  # fmt: skip
        return described | fields

    def _weight(self, weight: Weight, name: str) -> dict[str, Any]:
        packed = pack_weight(weight)
        return {
            "way": packed.way, "rows": packed.rows, "columns": packed.columns, "nonzeros": packed.nonzeros,
            "parts": {part: self._tensor(tensor, f"{name}/{part}") for part, tensor in packed.parts.items()},
            "scale": self._tensor(weight.scale, f"{name}/scale"),
        }  # fmt: skip


class DescriptionReader:
    """Reads what `DescriptionWriter` writes, and refuses whatever else is there.

    Parameters
    ----------
    stored : StoredTensors
    """

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored
        self._read: set[str] = set()
        self._weights: dict[str, Weight] = {}
        self._needed, self._looked_at = 0, 1 << 26
        self._channels = 0

    def program(self, value: Any, where: str = "the program") -> Program:
        """Read a program.

        Parameters
        ----------
        value : any
            From JSON.
        where : str
            What it is, for messages.

        Returns
        -------
        Program

        Raises
        ------
        ConfigurationError
            If it is none.
        """
        fields = Fields(value, where)
        inputs = fields.take("inputs", read_list(read_text, 1))
        outputs = fields.take("outputs", read_list(read_text, 1))
        values = fields.take("values", self._values)
        steps = fields.take("steps", self._steps)
        constants = fields.take("constants", self._constants)
        fields.close()
        superfluous = self._stored.names - self._read
        if superfluous:
            raise ConfigurationError(f"the tensor {sorted(superfluous)[0]!r:.60} belongs to nothing")
        unknown = [step.output for step in steps if step.output not in values]
        if unknown:
            raise ConfigurationError(f"step {unknown[0]!r:.60} computes a value that is not described")
        try:
            check_pools(steps, values)
            return Program(inputs, outputs, values, steps, constants)
        except ValueError as error:
            raise ConfigurationError(str(error)) from error

    # ---- tensors ----

    def _tensor(self, value: Any, where: str, dtype: torch.dtype | None = None) -> Tensor:
        name = read_text(value, where)
        if name not in self._stored.names:
            refuse(where, "the name of a tensor", value)
        found, shape = self._stored.describe(name)
        if found is None or dtype not in (None, found):
            raise ConfigurationError(f"the tensor {name!r:.60} must be of {dtype or 'a known dtype'}, not of "
                                     f"{found or 'another one'}")  # fmt: skip
        self._read.add(name)
        self._need(math.prod(shape) * found.itemsize)
        return self._stored.get(name)

    def _need(self, size: int) -> None:
        """Count memory, since few bytes of a file can ask for any number of it."""
        self._needed += size
        if self._needed >= self._looked_at:  # asking the system takes longer than reading a small tensor
            refuse_more_than_memory(self._needed, "what it describes")
            self._looked_at = self._needed + (1 << 26)

    def _vector(self, dtype: torch.dtype) -> Callable[[Any, str], Tensor]:
        """A reader of tensors with memory of their own: who writes to the file must not change what was checked."""

        def read(value: Any, where: str) -> Tensor:
            return self._tensor(value, where, dtype).clone()

        return read

    def _constants(self, value: Any, where: str) -> dict[str, Tensor]:
        fields = Fields(value, where)
        return {read_text(name, where): fields.take(name, self._tensor) for name in fields.names}

    # ---- values ----

    def _values(self, value: Any, where: str) -> dict[str, Value]:
        fields = Fields(value, where)
        return {read_text(name, where): fields.take(name, self._value) for name in fields.names}

    def _value(self, value: Any, where: str) -> Value:
        fields = Fields(value, where)
        shape = fields.take("shape", read_list(read_whole(-1, _LARGEST_SIZE), 0, 64))
        rows = fields.take("rows", read_whole(1, _LARGEST_SIZE)) if fields.has("rows") else 1
        codes = None
        if fields.has("zero_point") or fields.has("scale"):
            if len(shape) not in (1, 3) or min(shape) < 1 or math.prod(shape) > _LARGEST_IMAGE:
                refuse(where, "of (channels, height, width) or (features,)", shape)
            self._need(math.prod(shape) * rows)
            self._channels += shape[0]
            if self._channels > _MOST_CHANNELS:
                raise ConfigurationError(f"its values have more than {_MOST_CHANNELS:,} channels")
            zero = fields.take("zero_point", read_whole(0, 255))
            scale = fields.take("scale", lambda scale, where: self._scale(scale, where, shape[0]))
            codes = self._checked(where, lambda: Codes(scale, zero))
        fields.close()
        return self._checked(where, lambda: Value(shape, codes, rows))

    def _scale(self, value: Any, where: str, channels: int) -> Tensor:
        if isinstance(value, str):
            return self._vector(torch.float32)(value, where)
        return torch.full((channels,), read_number(value, where), dtype=torch.float32)

    @staticmethod
    def _checked(where: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except ConfigurationError:
            raise
        except ValueError as error:
            raise ConfigurationError(f"{where}: {error}") from error

    # ---- steps ----

    def _steps(self, value: Any, where: str) -> tuple[Step, ...]:
        return read_list(self._step)(value, "a step")

    def _step(self, value: Any, where: str) -> Step:
        fields = Fields(value, where)
        output = fields.take("output", read_text)
        fields.where = f"step {output!r:.60}"
        kind = fields.take("step", read_text)
        if kind not in _KINDS:
            raise ConfigurationError(f"{fields.where} is of a kind that is not known, {kind!r:.60}")
        inputs = fields.take("inputs", read_list(read_text))
        read = {name: fields.take(name, functools.partial(field.read, self))
                for name, field in _KINDS[kind].fields.items()}  # fmt: skip
        fields.close()
        return _KINDS[kind].step(inputs, output, **read)

    def _weight(self, value: Any, where: str) -> Weight:
        fields = Fields(value, where)
        way = fields.take("way", read_text)
        if way not in WAYS:
            raise ConfigurationError(f"{where} is written in a way that is not known, {way!r:.60}")
        rows, columns = (fields.take(name, read_whole(1, high)) for name, high in
                         (("rows", _LARGEST_SIZE), ("columns", 1 << 16)))  # fmt: skip
        nonzeros = fields.take("nonzeros", read_whole(0, min(rows * columns, _LARGEST_SIZE)))
        self._need(nonzeros * _LIST_BYTES)
        scale = fields.take("scale", self._vector(torch.float32))
        if scale.shape != (rows,):
            raise ConfigurationError(f"{where} has {rows} rows and scales of shape {tuple(scale.shape)}")
        sizes = part_sizes(way, rows, columns, nonzeros)
        given = fields.take("parts", Fields)
        parts = {name: given.take(name, self._part(torch.int8 if name == "codes" else torch.uint8)) for name in sizes}
        given.close()
        fields.close()
        packed = PackedWeight(way, rows, columns, nonzeros, parts)
        # of layers that share a weight it is there once
        key = json.dumps(value, sort_keys=True)
        if key not in self._weights:
            self._weights[key] = self._checked(where, lambda: unpack_weight(packed, scale))
        return self._weights[key]

    def _part(self, dtype: torch.dtype) -> Callable[[Any, str], Tensor]:
        def read(value: Any, where: str) -> Tensor:
            part = self._tensor(value, where, dtype)
            if part.ndim != 1:
                refuse(where, "a tensor of one dimension", tuple(part.shape))
            return part

        return read


# ---- what steps have beside inputs and output ----


class _Field(NamedTuple):
    write: Callable[[DescriptionWriter, Any, str], Any]
    read: Callable[[DescriptionReader, Any, str], Any]


class _Kind(NamedTuple):
    step: type[Step]
    fields: dict[str, _Field]


def _read_window(reader: DescriptionReader, value: Any, where: str) -> Window:
    fields = Fields(value, where)
    sizes = read_list(read_whole(1, _LARGEST_WINDOW), 2, 2)
    padding = fields.take("padding", read_list(read_whole(0, _LARGEST_WINDOW), 4, 4))
    kernel, stride, dilation = (fields.take(name, sizes) for name in ("kernel", "stride", "dilation"))
    fields.close()
    return Window(kernel, stride, padding, dilation)  # type: ignore[arg-type]


def _limit(open_end: float) -> _Field:
    """A limit, null where there is none."""
    return _Field(lambda writer, value, name: None if value == open_end else float(value),
                  lambda reader, value, where: open_end if value is None else read_number(value, where))  # fmt: skip


def _plain(read: Callable[[Any, str], Any]) -> _Field:
    return _Field(lambda writer, value, name: value, lambda reader, value, where: read(value, where))


def _read_bool(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        refuse(where, "true or false", value)
    return value


def _read_data(kind: type) -> Callable[[DescriptionReader, Any, str], Any]:
    def read(reader: DescriptionReader, value: Any, where: str) -> Any:
        found = reader._checked(where, lambda: from_json(value))
        if not isinstance(found, kind):
            refuse(where, f"a {kind.__name__}", found)
        return found

    return read


def _tensor_field(dtype: torch.dtype) -> _Field:
    return _Field(lambda writer, value, name: writer._tensor(value, name),
                  lambda reader, value, where: reader._vector(dtype)(value, where))  # fmt: skip


_WINDOW = _Field(lambda writer, value, name: {key: list(each) for key, each in value._asdict().items()}, _read_window)
_WEIGHT = _Field(DescriptionWriter._weight, DescriptionReader._weight)
_LIMITS = {"low": _limit(-math.inf), "high": _limit(math.inf)}
_KINDS = {
    "quantize": _Kind(Quantize, {"dynamic": _plain(_read_bool)}),
    "dequantize": _Kind(Dequantize, {}),
    "product": _Kind(Product, {"weight": _WEIGHT, "bias": _tensor_field(torch.float32), "window": _WINDOW,
                               "groups": _plain(read_whole(1, _LARGEST_SIZE)), **_LIMITS}),
    "pool": _Kind(Pool, {"kind": _plain(read_text), "window": _WINDOW, "count_padding": _plain(_read_bool)}),
    "table": _Kind(Table, {"table": _tensor_field(torch.uint8)}),
    "add": _Kind(Add, _LIMITS),
    "concat": _Kind(Concat, {}),
    "flatten": _Kind(Flatten, {}),
    "call": _Kind(Call, {"operator": _plain(read_text),
                         "arguments": _Field(lambda writer, value, name: to_json(value), _read_data(tuple)),
                         "keywords": _Field(lambda writer, value, name: to_json(value), _read_data(dict))}),
}  # fmt: skip
