"""Generated modules and training scripts: what blocks do to them is what layers one by one do, and no blocks at all.

More of them, outside of the suite: ``PYTHONPATH=. python tests/_fuzz_programs.py SEED COUNT``.
"""

import ast

from hypothesis import given, settings
from hypothesis import strategies as st

from qsparseprop.nn.deferred.pending import Pending

from ._program_runs import fault
from ._programs import STATEMENTS, Program, random_program, shrunk, source

_NAMES = [name for name, (weight, _) in STATEMENTS.items() for _ in range(int(weight))]
_NUMBERS = st.integers(0, 2**20 - 1)


@settings(max_examples=300)
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


def test_a_fault_is_found(monkeypatch):
    """A summand that is lost."""
    plus = Pending.plus
    monkeypatch.setattr(Pending, "plus", lambda self, other: plus(self, 0 * other))
    texts = [source(random_program(n)) for n in range(40)]
    assert any(fault(text) for text in texts if " + " in text)
