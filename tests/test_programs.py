"""Generated modules and training scripts: what blocks do to them is what layers one by one do, and no blocks at all.

More of them, outside of the suite: ``PYTHONPATH=. python tests/_fuzz_programs.py SEED COUNT``.
"""

import ast

from hypothesis import given
from hypothesis import strategies as st

from qsparseprop.nn.deferred.pending import Pending

from ._helpers import examples
from ._program_faults import fault
from ._programs import STATEMENTS, Program, random_program, shrunk, source

_NAMES = [name for name, (weight, _) in STATEMENTS.items() for _ in range(int(weight))]
_NUMBERS = st.integers(0, 2**20 - 1)


@examples(300)
@given(st.builds(Program, _NUMBERS, st.lists(st.tuples(st.sampled_from(_NAMES), _NUMBERS), min_size=4, max_size=24)))
def test_blocks_make_no_difference_to_a_program(program):
    text = source(program)
    found = fault(text)
    assert found is None, f"{found}\n\n{text}"


def test_programs_are_python_and_shrink():
    for seed in range(50):
        ast.parse(source(random_program(seed)))
    program = random_program(3)
    program.body[5:5] = [("failure", 1)]
    small = shrunk(program, lambda p: "raise Failure" in source(p))
    assert [name for name, _ in small.body] == ["failure"]


_SUM = """
class Model(nn.Module):
    def __init__(self, log):
        super().__init__()
        self.conv, self.bn = pruned(nn.Conv2d(4, 4, 3, padding=1)), norm(nn.BatchNorm2d(4))

    def forward(self, x, log):
        return [F.relu(self.bn(self.conv(x)) + x)]


def step(model, log):
    ys = model(log.input((4, 4, 5, 5), requires_grad=True), log)
    log.see("outputs", *ys)
    log.loss(ys).backward()
    log.gradients(model)
"""


def test_a_fault_is_found(monkeypatch):
    assert fault(_SUM) is None
    plus = Pending.plus
    monkeypatch.setattr(Pending, "plus", lambda self, other: plus(self, 0.5 * other))
    assert "values of outputs" in fault(_SUM)
