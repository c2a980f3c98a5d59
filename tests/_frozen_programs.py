"""Programs of frozen models at random: every kind of step, images of any size, values that are read more than once."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qsparseprop.inference.calls import Name
from qsparseprop.inference.checks import sees_pixels
from qsparseprop.inference.program import Program
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

#: Of linear layers.
POINT = Window()
KINDS = ("product", "product", "same", "residual", "max", "mean", "table", "add", "concat", "flatten")


@dataclass
class Builder:
    """A program that grows step by step; `rng` chooses whatever is not said."""

    rng: random.Random
    values: dict[str, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def _name(self) -> str:
        return f"v{len(self.values)}"

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(1 << 30))

    def codes(self, channels: int, zero: int | None = None) -> Codes:
        """Scales about one, and a zero point of any kind."""
        scale = torch.rand(channels, generator=self._generator()) * 0.02 + 0.01
        return Codes(scale, self.rng.choice([0, 128, 128, 57, 255]) if zero is None else zero)

    def add_step(self, step: Step, value: Value) -> str:
        self.values[step.output] = value
        self.steps.append(step)
        return step.output

    def add_input(self, *shape: int) -> str:
        name = self._name()
        self.values[name] = Value(shape)
        self.inputs.append(name)
        return self.add_step(Quantize((name,), self._name()), Value(shape, self.codes(shape[0])))

    def weight(self, rows: int, columns: int, density: float) -> Weight:
        g = self._generator()
        mask = torch.rand(rows, columns, generator=g) < density
        crow = torch.zeros(rows + 1, dtype=torch.int32)
        crow[1:] = mask.sum(1).cumsum(0)
        codes = torch.randint(-127, 128, (int(mask.sum()),), generator=g).to(torch.int8)
        # sums then spread over the codes of the output
        scale = (torch.rand(rows, generator=g) + 0.5) / (4000 * math.sqrt(max(columns * density, 1)))
        return Weight(crow, mask.nonzero()[:, 1].to(torch.int32), codes, scale, columns)

    def product(self, name: str, rows: int, window: Window = POINT, groups: int = 1, density: float = 0.3,
                residual: str | None = None, floats: bool = False, limited: bool = False) -> str:  # fmt: skip
        source = self.values[name]
        weight = self.weight(rows, source.shape[0] // groups * math.prod(window.kernel), density)
        shape = (rows,) if len(source.shape) == 1 else (rows, *window.output_size(source.image))
        low, high = (0.0, self.rng.choice([math.inf, 1.5])) if limited else (-math.inf, math.inf)
        inputs = (name,) if residual is None else (name, residual)
        bias = torch.randn(rows, generator=self._generator())
        step = Product(inputs, self._name(), weight, bias, window, groups, low, high)
        return self.add_step(step, Value(shape, None if floats else self.codes(rows)))

    def pool(self, name: str, kind: str, window: Window, count_padding: bool = True) -> str:
        source = self.values[name]
        shape = (source.shape[0], *window.output_size(source.image))
        codes = source.codes if kind == "max" else self.codes(source.shape[0])
        return self.add_step(Pool((name,), self._name(), kind, window, count_padding), Value(shape, codes))

    def table(self, name: str) -> str:
        shape = self.values[name].shape
        size = (256,) if self.rng.random() < 0.5 else (shape[0], 256)
        table = torch.randint(0, 256, size, generator=self._generator()).to(torch.uint8)
        return self.add_step(Table((name,), self._name(), table), Value(shape, self.codes(shape[0])))

    def add(self, name: str, other: str) -> str:
        shape = self.values[name].shape
        low = self.rng.choice([0.0, -math.inf])
        return self.add_step(Add((name, other), self._name(), low), Value(shape, self.codes(shape[0])))

    def concat(self, *names: str) -> str:
        sources = [self.values[name] for name in names]
        codes = Codes(torch.cat([s.coded.scale for s in sources]), sources[0].coded.zero_point)
        shape = (sum(s.shape[0] for s in sources), *sources[0].shape[1:])
        return self.add_step(Concat(names, self._name()), Value(shape, codes))

    def flatten(self, name: str) -> str:
        source = self.values[name]
        pixels = math.prod(source.shape[1:])
        codes = Codes(source.coded.scale.repeat_interleave(pixels), source.coded.zero_point)
        return self.add_step(Flatten((name,), self._name()), Value((source.shape[0] * pixels,), codes))

    def dequantize(self, name: str) -> str:
        return self.add_step(Dequantize((name,), self._name()), Value(self.values[name].shape))

    def program(self, *outputs: str) -> Program:
        return Program(tuple(self.inputs), outputs, dict(self.values), tuple(self.steps))

    def tensors(self, batch: int) -> list[Tensor]:
        """Inputs, some elements of which lie outside of the range of codes."""
        g = self._generator()
        return [torch.randn(batch, *self.values[name].shape, generator=g) * 2 for name in self.inputs]


def random_window(rng: random.Random, image: tuple[int, int]) -> Window:
    """One that fits into an image."""
    while True:
        kernel = rng.randint(1, 4), rng.randint(1, 4)
        padding = [rng.randint(0, 2) for _ in range(4)]
        window = Window(kernel, (rng.randint(1, 3), rng.randint(1, 3)), (*padding,),
                        (rng.randint(1, 2), rng.randint(1, 2)))  # fmt: skip
        if min(window.output_size(image)) >= 1:
            return window


def pool_window(rng: random.Random, image: tuple[int, int]) -> Window:
    """One that never lies in the padding alone."""
    while True:
        window = random_window(rng, image)
        if sees_pixels(window, image, window.output_size(image)):
            return window


def random_program(seed: int) -> tuple[Builder, Program]:
    """A program of a handful of steps on images, with every coded value that nobody reads as an output."""
    rng = random.Random(seed)
    b = Builder(rng)
    image = rng.choice([(1, 1), (3, 5), (7, 7), (8, 8), (13, 4), (20, 17)])
    known = [b.add_input(rng.choice([1, 3, 6, 16]), *image)]
    for _ in range(rng.randint(1, 7)):
        name = rng.choice(known)
        value = b.values[name]
        kind = rng.choice(KINDS)
        if len(value.shape) == 1 or kind == "product":
            groups = rng.choice([g for g in (1, 2, 3, value.shape[0]) if value.shape[0] % g == 0])
            rows = groups * rng.choice([1, 2, 5, 70 // groups + 1])
            window = Window() if len(value.shape) == 1 else random_window(rng, value.image)
            known.append(b.product(name, rows, window, groups, rng.choice([0.0, 0.1, 0.5, 1.0]),
                                   limited=rng.random() < 0.5))  # fmt: skip
        elif kind in ("same", "residual"):
            window = Window((3, 3), (1, 1), (1, 1, 1, 1))
            residual = name if kind == "residual" else None
            known.append(b.product(name, value.shape[0], window, residual=residual, limited=True))
        elif kind == "max":
            known.append(b.pool(name, "max", pool_window(rng, value.image)))
        elif kind == "mean":
            whole = Window(value.image)
            window = whole if rng.random() < 0.3 else pool_window(rng, value.image)
            known.append(b.pool(name, "mean", window, rng.random() < 0.5))
        elif kind == "table":
            known.append(b.table(name))
        elif kind == "add":
            same = [other for other in known if b.values[other].shape == value.shape]
            known.append(b.add(name, rng.choice(same)))
        elif kind == "concat":
            same = [other for other in known if b.values[other].shape[1:] == value.shape[1:]
                    and b.values[other].coded.zero_point == value.coded.zero_point]  # fmt: skip
            known.append(b.concat(name, rng.choice(same), name))
        elif math.prod(value.shape) < 2000:
            known.append(b.flatten(name))
        if isinstance(b.steps[-1], Product) and rng.random() < 0.4:
            known[-1] = b.table(known[-1])  # which nobody else reads
    read = {name for step in b.steps for name in step.inputs}
    outputs = [b.dequantize(name) for name in known if name not in read]
    if rng.random() < 0.5:
        name = rng.choice(known)
        window = Window() if len(b.values[name].shape) == 1 else random_window(rng, b.values[name].image)
        outputs.append(b.product(name, 5, window, floats=True, limited=rng.random() < 0.5))
    return b, b.program(*outputs)


# ---- those whose files are damaged ----


def small_program() -> Program:
    """One of each kind of step that can be made to do harm."""
    b = Builder(random.Random(2))
    codes = b.codes
    b.codes = lambda channels, zero=None: replace(codes(channels, zero), scale=torch.full((channels,), 0.02))
    name = b.product(b.add_input(3, 6, 6), 4, Window((3, 3), padding=(1, 1, 1, 1)), limited=True)
    name = b.pool(b.table(b.add(name, name)), "mean", Window((2, 2), (2, 2)))
    plain = b.dequantize(b.product(b.flatten(name), 5))
    b.add_step(Call((plain, "c"), "y", "aten.add.Tensor", (Name(plain), Name("c")), {"alpha": 2}), Value((5,)))
    return Program(tuple(b.inputs), ("y",), b.values, tuple(b.steps), {"c": torch.randn(5)})


def tokens_program() -> Program:
    """Four tokens a sample, which have scales of their own, between calls."""
    b = Builder(random.Random(1))
    b.values["x"] = Value((4, 6))
    b.inputs.append("x")
    b.add_step(Call(("x",), "flat", "aten.reshape.default", (Name("x"), [-1, 6])), Value((6,), None, 4))
    b.add_step(Quantize(("flat",), "q", True), Value((6,), b.codes(6, 128), 4))
    b.add_step(Product(("q",), "p", b.weight(5, 6, 0.5), torch.randn(5), low=0.0), Value((5,), None, 4))
    b.add_step(Call(("p",), "back", "aten.reshape.default", (Name("p"), [-1, 4, 5])), Value((4, 5)))
    return b.program("back")


PROGRAMS = {"small": small_program, "random": lambda: random_program(3)[1], "tokens": tokens_program}
