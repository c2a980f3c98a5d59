"""From steps of a program to steps of the kernels, on buffers of an arena, for a batch of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qsparseprop._kernels._frozen import CodedBuffer, FrozenStep, Segment
from qsparseprop._kernels._frozen_product import ProductStep
from qsparseprop._kernels._frozen_steps import CodedStep, PackStep
from qsparseprop._kernels._frozen_tokens import (
    TokenBuffer,
    TokenGatherStep,
    TokenProductStep,
    TokenQuantizeStep,
    most_tokens,
)
from qsparseprop._kernels._plan import PlaneLayout
from qsparseprop.inference.lanes import Taps, find_lanes, taps_of
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import factors_of, inverse_scale
from qsparseprop.inference.steps import (
    Add,
    Call,
    Concat,
    Dequantize,
    Flatten,
    Pool,
    Product,
    Quantize,
    Step,
    Table,
    Value,
)
from qsparseprop.inference.weights_in_memory import WeightStore
from qsparseprop.layout.geometry import UNIT

__all__ = ["Lowering", "Part"]

#: Bytes that buffers begin at multiples of.
_LINE = 64


class _Form(NamedTuple):
    """How a value lies: in planes as it is, with its pixels as channels, or in phases for windows of a stride; or, of
    few images of one pixel, as tokens."""

    value: str
    flat: bool = False
    tokens: bool = False
    #: Not codes, but the scales of tokens.
    scales: bool = False
    #: Image of the output, stride and phases.
    phases: tuple[tuple[int, int], tuple[int, int], tuple[tuple[int, int], ...]] | None = None


class _Place(NamedTuple):
    #: None of tokens.
    layout: PlaneLayout | None
    start: int


class _Arena:
    """Places for buffers that live from one step to another."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        """The first gap that is large enough."""
        size = -(-size // _LINE) * _LINE
        at = 0
        for start, end in sorted(self._taken):
            if start - at >= size:
                break
            at = max(at, end)
        self._taken.append((at, at + size))
        self.size = max(self.size, at + size)
        return at

    def give(self, start: int) -> None:
        self._taken = [one for one in self._taken if one[0] != start]


class Part(NamedTuple):
    """Steps of a program without calls of torch between them.

    Attributes
    ----------
    segment : Segment
    inputs, outputs : tuple of str
        Names of what it takes and gives.
    limited : tuple of str
        Those of the inputs whose elements go to the ends of the codes where they lie outside.
    steps : tuple of Step
        What it computes, in this order.
    """

    segment: Segment
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    limited: tuple[str, ...]
    steps: tuple[Step, ...]


class Lowering:
    """The steps of a program for a batch, as segments and the calls of torch between them.

    All codes lie in one arena, from the step that makes them to the last one that reads them, whatever comes between.

    Parameters
    ----------
    program : Program
    batch : int
        1 or more.
    weights : WeightStore
        Of the program.

    Attributes
    ----------
    parts : list of Part or Call
    arena : int
        Its bytes.
    """

    def __init__(self, program: Program, batch: int, weights: WeightStore) -> None:
        self._program, self._batch, self._weights = program, batch, weights
        self._lanes = find_lanes(program, batch)
        self._steps = [step for step in program.steps if not isinstance(step, Call)]
        self._dynamic = {step.output for step in self._steps if isinstance(step, Quantize) and step.dynamic}
        self._space = _Arena()
        self._places: dict[_Form, _Place] = {}
        self._tensors: dict[str, int] = {}
        runs = _runs(program)
        self._tabled = {product.output: product for run in runs for product in self._before_tables(run)}
        last = {form: i for i, run in enumerate(runs) for step in run for form in self._forms_of(step)}
        made: list[tuple[list[FrozenStep], _Run] | Call] = []
        for i, run in enumerate(runs):
            if not isinstance(run, _Run):
                made += run
                continue
            self._tensors = {name: k for k, name in enumerate((*run.inputs, *run.outputs))}
            made.append((self._run(run, {form for form, end in last.items() if end > i}), run))
        self.arena = self._space.size
        self.parts = [one if isinstance(one, Call) else self._part(*one) for one in made]

    def _run(self, run: _Run, later: set[_Form]) -> list[FrozenStep]:
        """The kernels' steps of a run; forms that are read later are left where they are."""
        last = {form: i for i, step in enumerate(run) for form in self._forms_of(step)}
        made: list[FrozenStep] = []
        for i, step in enumerate(run):
            made += self._lowered(step)
            for form in [form for form in self._places if form not in later and last.get(form, -1) <= i]:
                self._space.give(self._places.pop(form).start)
        return made

    def _part(self, steps: list[FrozenStep], run: _Run) -> Part:
        tensors = len(run.inputs) + len(run.outputs)
        outputs = tuple(range(len(run.inputs), tensors))
        segment = Segment(tuple(steps), self.arena, tensors, len(run.inputs), outputs)
        return Part(segment, run.inputs, run.outputs, run.limited, tuple(run))

    def _before_tables(self, run: _Run | list[Call]) -> Iterator[Product]:
        """Products whose codes nobody but a table reads, which they then look up themselves."""
        readers = [name for step in self._program.steps for name in step.inputs] + list(self._program.outputs)
        products = {step.output: step for step in run if isinstance(step, Product) and not self._has_few_tokens(step)}
        for step in run:
            if isinstance(step, Table) and step.inputs[0] in products and readers.count(step.inputs[0]) == 1:
                yield products[step.inputs[0]]

    # ---- what is where ----

    def _value(self, name: str) -> Value:
        return self._program.values[name]

    def _images(self, name: str) -> int:
        """How many images, or tokens, a value has."""
        return self._batch * self._value(name).rows

    def _forms_read(self, step: Step) -> list[_Form]:
        """The forms of values that a step reads."""
        if isinstance(step, Table) and step.inputs[0] in self._tabled:
            return self._forms_read(self._tabled[step.inputs[0]])
        if not isinstance(step, Product):
            return [_Form(name) for name in step.inputs if self._value(name).codes is not None]
        source, target = self._value(step.inputs[0]), self._value(step.output)
        taps = self._taps(step)
        first = _Form(step.inputs[0], taps is None and source.image != (1, 1), self._has_few_tokens(step))
        if taps is not None and taps.phases:
            first = _Form(step.inputs[0], phases=(target.image, step.window.stride, taps.phases))
        scales = [_Form(first.value, scales=True)] if first.value in self._dynamic else []
        return [first, *(_Form(name) for name in step.inputs[1:]), *scales]

    def _taps(self, product: Product) -> Taps | None:
        """How a product's window reads its input; None for features, and where an image is seen as such."""
        return self._own_taps(product, [f for other in self._steps for f in self._phases_beside(product, other)])

    def _own_taps(self, product: Product, shared: Iterable[tuple[int, int]] = ()) -> Taps | None:
        source, target = self._value(product.inputs[0]), self._value(product.output)
        if len(source.shape) == 1 or target.image == (1, 1):
            return None
        return taps_of(product.window, source.image, self._lanes[target.image], shared)

    def _phases_beside(self, product: Product, other: Step) -> tuple[tuple[int, int], ...]:
        """Phases of the same value that another product reads on the same lanes: a shortcut those of a 3x3 window."""
        if (not isinstance(other, Product) or other.inputs[0] != product.inputs[0]
                or other.window.stride != product.window.stride
                or self._value(other.output).shape[1:] != self._value(product.output).shape[1:]):
            return ()
        taps = self._own_taps(other)
        return () if taps is None else taps.phases

    def _has_few_tokens(self, product: Product) -> bool:
        """Whether planes would have hardly any lanes."""
        features = self._value(product.inputs[0]).image == product.window.kernel == (1, 1)
        return features and product.groups == 1 and self._images(product.output) <= most_tokens()

    def _layout(self, form: _Form) -> PlaneLayout:
        value = self._value(form.value)
        if form.flat:
            return self._lanes[1, 1].layout(math.prod(value.shape))
        if form.phases is None:
            return self._lanes[value.image].layout(value.shape[0])
        image, stride, phases = form.phases
        return self._lanes[image].phase_layout(value.shape[0], value.image, stride, phases)

    def _place(self, form: _Form) -> _Place:
        if form not in self._places:
            layout = None if form.tokens or form.scales else self._layout(form)
            if layout is not None:
                size = layout.lanes(self._images(form.value))
            else:
                # scales are read in whole units
                units = -(-self._images(form.value) // UNIT)
                size = 4 * UNIT * units if form.scales else self._tokens(form, 0).size
            self._places[form] = _Place(layout, self._space.take(size))
        return self._places[form]

    def _tokens(self, form: _Form, start: int) -> TokenBuffer:
        value = self._value(form.value)
        return TokenBuffer(self._images(form.value), value.shape[0], start, value.coded.zero_point)

    def _planes(self, form: _Form) -> tuple[PlaneLayout, int]:
        layout, start = self._place(form)
        assert layout is not None
        return layout, start

    def _buffer(self, form: _Form, view: int = 0) -> CodedBuffer:
        layout, start = self._planes(form)
        return CodedBuffer(layout, start, self._images(form.value), self._value(form.value).coded.zero_point, view)

    # ---- steps ----

    def _forms_of(self, step: Step) -> Iterator[_Form]:
        """The forms that a step reads, and those that it makes."""
        if not isinstance(step, Call) and step.output not in self._tabled:
            yield from self._forms_read(step)
            if self._value(step.output).codes is not None:
                yield from self._forms_made(step)

    def _forms_made(self, step: Step) -> list[_Form]:
        """The forms of a step's output that others read, and those that these are made of."""
        name = step.output
        forms = dict.fromkeys(form for one in self._steps for form in self._forms_read(one) if form.value == name)
        # a tensor is packed in phases as easily as in any other way
        packed = isinstance(step, Quantize) and forms and not any(form.flat for form in forms)
        return list(forms if packed else {_Form(name): None, **forms})

    def _lowered(self, step: Step) -> list[FrozenStep]:
        if step.output in self._tabled:  # with the table behind it
            return []
        forms = self._forms_made(step) if self._value(step.output).codes is not None else []
        if isinstance(step, Quantize):
            made = [self._packed(step, form) for form in forms if not (form.flat or form.scales)]
        else:
            made = _LOWERED[type(step)](self, step)
        for form in forms:
            if isinstance(step, Quantize) and not form.flat:
                continue
            if form.tokens:
                tokens = self._tokens(form, self._place(form).start)
                made.append(TokenGatherStep(self._buffer(_Form(form.value)), tokens))
            elif form.flat:
                made.append(CodedStep("flatten", self._buffer(_Form(form.value)), self._buffer(form)))
            elif form.phases is not None:
                made += self._phases(form)
        return made

    def _packed(self, step: Quantize, form: _Form) -> FrozenStep:
        codes, source = self._value(step.output).coded, self._tensors[step.inputs[0]]
        if form.tokens or step.dynamic:
            to = self._tokens(form, self._place(form).start) if form.tokens else self._buffer(form)
            return TokenQuantizeStep(source, to, inverse_scale(codes), self._scales(step.output))
        inverse = inverse_scale(codes).repeat(self._planes(form)[0].planes // codes.scale.shape[0])
        return PackStep(source, self._buffer(form), inverse)

    def _scales(self, name: str) -> int:
        """Where the scales of tokens are; -1 where they have none."""
        return self._place(_Form(name, scales=True)).start if name in self._dynamic else -1

    def _phases(self, form: _Form) -> list[FrozenStep]:
        """Copies of what every window of a stride reads at its first tap, its second one and so on."""
        assert form.phases is not None
        _, stride, phases = form.phases
        source = self._buffer(_Form(form.value))
        return [CodedStep("copy", source, self._buffer(form, view), (row, col, *stride))
                for view, (row, col) in enumerate(phases)]  # fmt: skip

    def _dequantized(self, step: Dequantize) -> list[FrozenStep]:
        source = self._value(step.inputs[0])
        return [CodedStep("unpack", self._buffer(_Form(step.inputs[0])), self._tensors[step.output], (),
                          (source.coded.scale,))]  # fmt: skip

    def _product(self, step: Product, table: Table | None = None) -> list[FrozenStep]:
        source, target = self._value(step.inputs[0]), self._value(step.output)
        form = self._forms_read(step)[0]
        factors = factors_of(step, [self._value(name) for name in step.inputs], target)
        given: tuple[Tensor, ...] = (factors.multiplier, factors.offset, factors.low, factors.high)
        residual = None
        if factors.residual is not None:
            given, residual = (*given, factors.residual), self._buffer(_Form(step.inputs[1]))
        result = step.output if table is None else table.output
        out = self._buffer(_Form(result)) if target.codes is not None else self._tensors[result]
        scales = self._scales(form.value)
        if form.tokens:
            tokens = self._tokens(form, self._place(form).start)
            weights = self._weights.of_tokens(step, source.coded.zero_point)
            return [TokenProductStep(weights, tokens, out, given, residual, scales)]
        layouts = self._planes(form)[0], self._lanes[target.image if len(source.shape) == 3 else (1, 1)].layout(
            step.weight.rows)  # fmt: skip
        rows = self._weights.of_planes(step, source, self._taps(step), layouts)
        looked_up = None if table is None else table.table.reshape(-1)
        return [ProductStep(rows, self._buffer(form), out, given, residual, scales, looked_up)]

    def _pool(self, step: Pool) -> list[FrozenStep]:
        source, target = self._value(step.inputs[0]), self._value(step.output)
        window, mean = step.window, step.kind == "mean"
        numbers = (*window.kernel, *window.stride, *window.dilation, window.padding[0], window.padding[2], int(mean),
                   int(step.count_padding))  # fmt: skip
        factors: tuple[Tensor, ...] = ()
        if mean:
            f = factors_of(step, [source], target)
            factors = f.multiplier, f.offset, torch.zeros_like(f.offset), torch.full_like(f.offset, 255.0)
        one, out = self._buffer(_Form(step.inputs[0])), self._buffer(_Form(step.output))
        return [CodedStep("pool", one, out, numbers, factors)]

    def _add(self, step: Add) -> list[FrozenStep]:
        f = factors_of(step, [self._value(name) for name in step.inputs], self._value(step.output))
        assert f.residual is not None
        one, other = (self._buffer(_Form(name)) for name in step.inputs)
        factors = f.multiplier, f.offset, f.low, f.high, f.residual
        return [CodedStep("add", one, self._buffer(_Form(step.output)), (), factors, other)]

    def _table(self, step: Table) -> list[FrozenStep]:
        if step.inputs[0] in self._tabled:
            return self._product(self._tabled[step.inputs[0]], step)
        return [CodedStep("table", self._buffer(_Form(step.inputs[0])), self._buffer(_Form(step.output)),
                          table=step.table.reshape(-1))]  # fmt: skip

    def _concat(self, step: Concat) -> list[FrozenStep]:
        (layout, start), zero = self._planes(_Form(step.output)), self._value(step.output).coded.zero_point
        made: list[FrozenStep] = []
        first = 0
        for name in step.inputs:
            channels = self._value(name).shape[0]
            part = CodedBuffer(layout, start, self._images(step.output), zero, 0, first, channels)
            made.append(CodedStep("copy", self._buffer(_Form(name)), part, (0, 0, 1, 1)))
            first += channels
        return made

    def _flatten(self, step: Flatten) -> list[FrozenStep]:
        kind, numbers = ("copy", (0, 0, 1, 1)) if self._value(step.inputs[0]).image == (1, 1) else ("flatten", ())
        return [CodedStep(kind, self._buffer(_Form(step.inputs[0])), self._buffer(_Form(step.output)), numbers)]


_LOWERED: dict[type[Step], Callable[[Lowering, Any], list[FrozenStep]]] = {
    Dequantize: Lowering._dequantized,
    Product: Lowering._product,
    Pool: Lowering._pool,
    Add: Lowering._add,
    Table: Lowering._table,
    Concat: Lowering._concat,
    Flatten: Lowering._flatten,
}


class _Run(list[Step]):
    """Steps between two calls of torch, and the names of the tensors that they take and give."""

    def __init__(self, steps: list[Step], program: Program, later: set[str]) -> None:
        super().__init__(steps)
        results = [step.output for step in steps if program.values[step.output].codes is None]
        self.inputs = tuple(dict.fromkeys(name for step in steps if isinstance(step, Quantize) for name in step.inputs))
        self.outputs = tuple(name for name in results if name in later)
        fixed = {name for step in steps if isinstance(step, Quantize) and not step.dynamic for name in step.inputs}
        self.limited = tuple(name for name in self.inputs if name in fixed)


def _runs(program: Program) -> list[_Run | list[Call]]:
    """Steps in runs, and the calls between them."""
    runs: list[list[Step]] = []
    for step in program.steps:
        if runs and isinstance(runs[-1][-1], Call) == isinstance(step, Call):
            runs[-1].append(step)
        else:
            runs.append([step])
    found: list[_Run | list[Call]] = []
    later = set(program.outputs)
    for run in reversed(runs):
        if isinstance(run[0], Call):
            found.append([step for step in run if isinstance(step, Call)])
        else:
            found.append(_Run(run, program, later))
        later |= {name for step in run for name in step.inputs}
    return found[::-1]
