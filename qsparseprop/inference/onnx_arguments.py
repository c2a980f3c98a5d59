"""What calls of torch's operators are given, as tensors of an ONNX graph, and which sizes and dtypes these have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from qsparseprop.inference.calls import Name, call_operator, find_operator
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Call, Step
from qsparseprop.utils.errors import ConfigurationError

if TYPE_CHECKING:
    from qsparseprop.inference.onnx import _Export

__all__ = ["Arguments", "Sizes", "onnx_dtype"]

#: Batches that programs are gone through with: sizes that differ depend on the batch. No model has these by itself.
_BATCHES = 4099, 6007


def onnx_dtype(dtype: torch.dtype) -> int:
    """The dtype that ONNX has for one of torch.

    Parameters
    ----------
    dtype : dtype

    Returns
    -------
    int
        Of onnx.TensorProto.
    """
    return int(helper.np_dtype_to_tensor_dtype(_numpy_dtype(dtype)))


def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return np.dtype(torch.empty(0, dtype=dtype).numpy().dtype)


class Sizes:
    """Sizes and dtypes of the values of a program, found on tensors without memory, with two sizes of the batch.

    Parameters
    ----------
    program : Program
    inputs : dict
        Shapes, with None for the batch, and dtypes of the inputs.
    """

    def __init__(self, program: Program, inputs: dict[str, tuple[Sequence[int | None], torch.dtype]]) -> None:
        self.program = program
        self.worlds: list[dict[str, Any]] = []
        for batch in _BATCHES:
            world: dict[str, Any] = {name: held.to("meta") for name, held in program.constants.items()}
            for name, (shape, dtype) in inputs.items():
                world[name] = torch.empty([batch if n is None or n < 0 else n for n in shape], dtype=dtype,
                                          device="meta")  # fmt: skip
            self.worlds.append(world)

    def add(self, step: Step) -> None:
        """What a step gives.

        Parameters
        ----------
        step : Step

        Raises
        ------
        Exception
            Whatever torch raises where sizes depend on values.
        """
        for batch, world in zip(_BATCHES, self.worlds, strict=True):
            if isinstance(step, Call):
                found = call_operator(step, world)
                many = isinstance(found, list | tuple)
                world[step.output] = [_meta(each) for each in found] if many else _meta(found)
            else:
                value = self.program.values[step.output]
                world[step.output] = torch.empty(batch * value.rows, *value.shape, device="meta")

    def meta(self, name: str) -> Any:
        """A value without memory, or a number."""
        return self.worlds[0][name]

    def of(self, name: str, part: int | None = None) -> list[int | None]:
        """The shape of a value, or of one of several, with None for what depends on the batch."""
        found = [world[name] if part is None else world[name][part] for world in self.worlds]
        return [one if one == other else None for one, other in zip(found[0].shape, found[1].shape, strict=True)]


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


class Arguments:
    """The arguments of a call, by place or by name; those that nobody asks for must have their defaults.

    Parameters
    ----------
    export : _Export
    step : Call
    """

    def __init__(self, export: _Export, step: Call) -> None:
        self.export, self.step, self.sizes = export, step, export.sizes
        schema = find_operator(step.operator)._schema
        self.names = [argument.name for argument in schema.arguments]
        self._given = {**dict(zip(self.names, step.arguments, strict=False)), **step.keywords}
        self._defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        self._asked: set[str] = set()

    def refused(self, reason: str) -> ConfigurationError:
        """The error of what is not translated."""
        return ConfigurationError(f"{self.step.operator}, of step {self.step.output!r}, {reason}")

    # ---- what was given ----

    def get(self, place: int | str) -> Any:
        """An argument as it was given."""
        name = self.names[place] if isinstance(place, int) else place
        self._asked.add(name)
        return self._given.get(name, self._defaults.get(name))

    def has(self, name: str) -> bool:
        """Whether the operator has an argument."""
        return name in self.names

    def ignore(self, *names: str) -> None:
        """Arguments that change nothing."""
        self._asked.update(names)

    def numbers(self, place: int | str, count: int) -> list[int]:
        """Numbers for each of some dimensions, one for all given as one."""
        found = self.get(place)
        values = [found] if isinstance(found, int) else list(found)
        if not all(type(n) is int for n in values):
            raise self.refused("with sizes that are computed is not translated to ONNX")
        return values * count if len(values) == 1 else values

    def close(self) -> None:
        """Refuse arguments that were not looked at and change something."""
        for name, value in self._given.items():
            known = name in self._asked or value == self._defaults.get(name)
            harmless = name in ("device", "layout", "pin_memory", "memory_format", "non_blocking")
            same = name == "dtype" and value is self.dtype and value in (torch.float32, torch.int64, torch.bool)
            if not known and not harmless and not same:
                raise self.refused(f"with {name}={value!r} is not translated to ONNX")

    # ---- what it is ----

    def meta(self, place: int | str) -> Tensor:
        """An argument without memory."""
        found = self.get(place)
        if not isinstance(found, Name) or not isinstance(self.sizes.meta(found.name), Tensor):
            raise self.refused(f"with {found!r} is not translated to ONNX")
        held: Tensor = self.sizes.meta(found.name)
        return held

    def shape(self, place: int | str) -> list[int | None]:
        """Sizes of an argument, None for what depends on the batch."""
        self.meta(place)
        return self.sizes.of(self.get(place).name)

    def rank(self, place: int | str) -> int:
        """Dimensions of an argument, the batch included."""
        return self.meta(place).ndim

    def fixed(self, place: int | str, dim: int) -> int:
        """A size that does not depend on the batch."""
        size = self.shape(place)[dim]
        if size is None:
            raise self.refused("over a size that depends on the batch is not translated to ONNX")
        return size

    def dim(self, name: str, of: int | str = 0) -> int:
        """A dimension, counted from the front."""
        return int(self.get(name)) % max(1, self.rank(of))

    @property
    def result(self) -> list[int | None]:
        """Sizes of what the call gives."""
        return self.sizes.of(self.step.output)

    @property
    def dtype(self) -> torch.dtype:
        """That of what the call gives, or of the first of it."""
        found = self.sizes.meta(self.step.output)
        found = found[0] if isinstance(found, list) else found
        return found.dtype if isinstance(found, Tensor) else torch.int64

    # ---- tensors and nodes ----

    def tensor(self, place: int | str, dtype: torch.dtype | None = None) -> str:
        """An argument as a tensor, numbers included, of a dtype where one is asked for."""
        return self.given(self.get(place), dtype)

    def given(self, found: Any, dtype: torch.dtype | None = None) -> str:
        """Something given as a tensor."""
        if isinstance(found, Name):
            meta, real = self.sizes.meta(found.name), self.export.real(found.name)
            if isinstance(meta, list):
                raise self.refused("of several results is not translated to ONNX")
            has = meta.dtype if isinstance(meta, Tensor) else torch.int64
            return real if dtype in (None, has) else self.add("Cast", [real], to=onnx_dtype(dtype or has))
        if isinstance(found, bool | int | float):
            return self.constant(np.array(found, _numpy_dtype(dtype or torch.float32)))
        raise self.refused(f"with {found!r} is not translated to ONNX")

    def constant(self, value: Any) -> str:
        """A tensor that the graph holds."""
        return self.export.graph.constant(np.asarray(value), f"{self.step.output}/constant")

    def ints(self, values: Sequence[int]) -> str:
        """A vector of int64."""
        return self.constant(np.array(list(values), np.int64))

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        """A node."""
        return self.export.graph.add(operator, inputs, f"{self.step.output}/{operator.lower()}", **attributes)

    def op(self, operator: str, *inputs: str | float, **attributes: Any) -> str:
        """A node on tensors and numbers, these of the dtype of the result."""
        numpy = _numpy_dtype(self.dtype)
        given = [x if isinstance(x, str) else self.constant(np.array(x, numpy)) for x in inputs]
        return self.add(operator, given, **attributes)

    def size_vector(self, sizes: Sequence[Any]) -> str:
        """Sizes as a tensor, those that are values of the program included."""
        if all(type(n) is int for n in sizes):
            return self.ints(sizes)
        axis = self.ints([0])
        parts = [self.ints([n]) if type(n) is int else self.add("Unsqueeze", [self.given(n), axis]) for n in sizes]
        return self.add("Concat", parts, axis=0)

    def reshaped(self, x: str, sizes: Sequence[int | None]) -> str:
        """A tensor in another shape, of whose sizes one may depend on the batch."""
        if list(sizes).count(None) > 1 or 0 in sizes:
            raise self.refused("to sizes of which several depend on the batch, or none is left, is not translated to "
                               "ONNX")  # fmt: skip
        return self.add("Reshape", [x, self.ints([-1 if n is None else n for n in sizes])])
