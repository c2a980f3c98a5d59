"""What programs are, and how their statements are written, see `_programs`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

#: name -> (how often, what writes it)
STATEMENTS: dict[str, tuple[float, Callable[[Writer], object]]] = {}


@dataclass
class Program:
    """What the input is like and the statements, as numbers."""

    head: int
    body: list[tuple[str, int]]

    def __repr__(self) -> str:
        return f"Program({self.head}, {self.body})"


@dataclass
class Writer:
    """What has been written so far, and which tensors there are."""

    rng: random.Random
    tensors: list[tuple[str, tuple[int, ...]]]
    lines: list[str] = field(default_factory=list)
    modules: list[tuple[str, str, tuple[int, ...]]] = field(default_factory=list)  # name, expression, channels
    phases: dict[str, list[str]] = field(default_factory=lambda: {"init": [], "before": [], "between": [], "after": []})
    indent: int = 2
    names: int = 0
    own: set[str] = field(default_factory=set)  # that may be changed in place
    hidden: bool = False  # inside of a function that may run twice
    viewing: bool = True
    low_precision: bool = False  # of the input: layers of torch do not mix dtypes
    todo: list[tuple[str, int]] = field(default_factory=list)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def one_of(self, *choices):
        return self.rng.choice(choices)

    def write(self, text: str) -> None:
        self.lines += ["    " * self.indent + line for line in text.split("\n")]

    def script(self, phase: str, text: str) -> None:
        """A statement of the script, in one of the calls or in all."""
        if self.chance(0.6):
            text = f"if log.call == {self.rng.randrange(3)}:\n    " + text.replace("\n", "\n    ")
        self.phases[phase] += ["    " + line for line in text.split("\n")]

    def tensor(self, fits: Callable[[tuple[int, ...]], bool] = lambda shape: True, change: bool = False):
        """One of the tensors, as a rule the last one."""
        found = [(n, s) for n, s in self.tensors if fits(s) and (not change or n in self.own or self.chance(0.03))]
        if not found:
            return None, ()
        return found[-1] if self.chance(0.7) else self.rng.choice(found)

    def new(self, shape: tuple[int, ...], expression: str) -> str:
        name = f"t{self.names}"
        self.names += 1
        self.write(f"{name} = {expression}")
        self.tensors.append((name, shape))
        self.own.add(name)
        if self.chance(0.4):
            self.write(f"log.look({name!r}, {name})")
        return name

    def module(self, expression: str, channels: tuple[int, ...] = ()) -> str:
        name = f"m{len(self.modules)}"
        self.modules.append((name, expression, channels))
        return f"self.{name}"

    def block(self, n: int) -> None:
        """The next statements, further to the right."""
        before, self.indent = len(self.lines), self.indent + 1
        for _ in range(n):
            self.statement()
        self.indent -= 1
        if len(self.lines) == before:
            self.write("    pass")

    def statement(self) -> None:
        if self.todo:
            name, number = self.todo.pop(0)
            outer, self.rng = self.rng, random.Random(number)
            STATEMENTS[name][1](self)
            self.rng = outer


def statement(weight: float):
    def register(function: Callable[[Writer], object]):
        STATEMENTS[function.__name__.strip("_")] = weight, function
        return function

    return register
