"""Equations of einsum: which of them are linear layers."""

from __future__ import annotations

__all__ = ["linear_equations"]


def linear_equations(equation: str, operands: int) -> tuple[bool | None, bool | None]:
    """How an equation of two operands is a linear layer: one that sums over the last dimension of a value.

    Parameters
    ----------
    equation : str
        Such as ``bsd,dk->bsk``.
    operands : int
        How many there are.

    Returns
    -------
    tuple of bool or None
        With the second operand for the weight, a matrix, and with the first one: whether it has the dimension that is
        summed over in front; None where it is no linear layer.
    """
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    if "->" not in equation or operands != 2 or len(terms) != 3:
        return None, None
    first, second, result = terms
    return _front(first, second, result), _front(second, first, result)


def _front(source: str, weight: str, result: str) -> bool | None:
    kept, summed = source[:-1], source[-1:]
    if len(weight) != 2 or weight[0] == weight[1] or not summed.isalpha() or summed not in weight:
        return None
    made = weight.replace(summed, "")
    letters = [*kept.replace("...", ""), summed, made]
    if result != kept + made or len(set(letters)) != len(letters) or not all(map(str.isalpha, letters)):
        return None
    return weight[0] == summed
