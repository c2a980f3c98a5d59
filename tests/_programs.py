"""Random modules, and random training scripts around them, as Python that can be read.

A program is a list of statements, each a name and a number from which its details are drawn; those that do not go with
what stands before them write nothing, so that any statement can be left out: that is how programs are shrunk, by
hypothesis as well as by `shrunk`. `source` writes a program down; `_program_runs` runs it, and `_program_faults`
compares the runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from . import _program_statements  # noqa: F401 -- fills the table
from ._program_writer import STATEMENTS, Program, Writer

__all__ = ["STATEMENTS", "Program", "random_program", "shrunk", "source"]


def random_program(seed: int) -> Program:
    rng = random.Random(seed)
    names, weights = list(STATEMENTS), [weight for weight, _ in STATEMENTS.values()]
    body = rng.choices(names, weights, k=rng.randint(4, 24))
    return Program(rng.randrange(2**20), [(name, rng.randrange(2**20)) for name in body])


def shrunk(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The smallest program that is found to fail, too."""
    size = max(1, len(program.body) // 2)
    while True:
        start, smaller = 0, False
        while start < len(program.body):
            rest = Program(program.head, program.body[:start] + program.body[start + size :])
            if fails(rest):
                program, smaller = rest, True
            else:
                start += size
        if size == 1 and not smaller:
            break
        size = max(1, size // 2)
    for head in range(4):  # a plainer input
        if fails(Program(head, program.body)):
            return Program(head, program.body)
    return program


def source(program: Program) -> str:
    """The program in Python."""
    rng = random.Random(program.head)
    c = rng.choice((4, 6))
    n = rng.choice((2, 3, 4, 4, 2, 3, 5, 1)) if rng.random() < 0.97 else 0
    shape = rng.choice(((n, c, 5, 4), (n, c, 4, 4), (n, c, 4, 4), (n, c, 7), (n + 5, c), (n, 3, c)))
    options = ["requires_grad=True"] * (rng.random() < 0.6)
    options += ["dtype=torch.bfloat16"] * (rng.random() < 0.06)
    options += ["channels_last=True"] * (rng.random() < 0.3 and len(shape) == 4)
    w = Writer(rng, [("x", shape)], todo=list(program.body), low_precision="dtype=torch.bfloat16" in options)
    first, last = rng.randrange(2**20), random.Random(rng.randrange(2**20))
    w.todo.insert(0, ("layer", first))
    while w.todo:
        w.statement()
    kept = [name for name, _ in w.tensors if last.random() < 0.15]
    outputs = ", ".join(dict.fromkeys([*kept, w.tensors[-1][0]]))
    scheme = last.choice(({},) * 6 + ({"grad": "stochastic"}, {"granularity": "tensor"}, {"input": "standard"},
                                      {"check_finite": True}, {"input": "sawb"}, {"grad": "dithered"}))  # fmt: skip
    text = ["class Model(nn.Module):", *[f"    options = {scheme}\n"] * bool(scheme),
            "    def __init__(self, log):", "        super().__init__()", "        self.kept = None"]  # fmt: skip
    text += [f"        self.{name} = {expression}" for name, expression, _ in w.modules]
    text += ["    " + line for line in w.phases["init"]]
    text += ["", "    def forward(self, x, log):", *w.lines, f"        return [{outputs}]"]
    text += ["", "", "def step(model, log):"]
    text += w.phases["before"]
    text += [f"    x = log.input({', '.join([str(shape), *options])})"]
    text += [
        "    " + last.choice(
            ("ys = model(x, log)",) * 8
            + ("ys = model(x, log) + model(x, log)",
               "with torch.set_grad_enabled(log.call == 1):\n        ys = model(x, log)",
               "with torch.inference_mode(log.call == 0):\n        ys = model(x, log)"))
    ]  # fmt: skip
    text += w.phases["between"] + ["    log.see('outputs', *ys)"] * (last.random() < 0.6)
    text += ["    " + last.choice(
        ("log.loss(ys).backward()",) * 8
        + ("log.loss(ys).backward(retain_graph=True)\n    log.loss(ys).backward()",
           "for y in ys:\n        log.loss([y]).backward(retain_graph=True)",
           "log.grad(log.loss(ys), [*log.features, *model.parameters()])",
           "log.grad(log.loss(ys), [*log.features[:1], x])",
           "log.second(ys, x)"))
    ]  # fmt: skip
    text += w.phases["after"] + ["    log.gradients(model)"]
    text += ["    model.zero_grad()"] * (last.random() < 0.7)
    return "\n".join(text) + "\n"
