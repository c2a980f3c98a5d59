"""References of the operators have the operators' names and arguments."""

import inspect

import pytest

from qsparseprop import ops
from qsparseprop.ops import reference
from qsparseprop.ops.reference._signature import reference_of

SHARED = sorted(set(ops.__all__) & set(reference.__all__))


@pytest.mark.parametrize("name", SHARED)
def test_signature(name):
    operator = getattr(ops, name)
    wanted = inspect.signature(getattr(operator, "function", operator))
    assert inspect.signature(getattr(reference, name)) == wanted


def test_other_names_are_refused():
    def transpose(x, images, columns, rows):
        return x

    with pytest.raises(TypeError, match="must be called so"):
        reference_of(ops.transpose)(transpose)
