"""What pruning is asked for, checked before any layer is changed."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from qsparseprop import arguments
from qsparseprop.contents import is_convertible, unreadable
from qsparseprop.nn._dense import held

__all__ = ["check_prunable", "refuse_unknown"]


def refuse_unknown(given: Collection[str], known: Collection[str], sentence: str, argument: str = "skip") -> None:
    """Raise an error if a name is given that is not known, or what is no name at all.

    Raises
    ------
    TypeError
        For a string in place of several, or something else.
    ValueError
        `sentence`, and the names that are not known.
    """
    given = tuple(arguments.names(given, argument))
    for name in given:
        arguments.instance(name, str, f"each of {argument}", "a name")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{sentence}: {', '.join(map(arguments.shown, unknown))}")


def check_prunable(name: str, module: nn.Module) -> None:
    """Refuse a layer whose weight torch's pruning cannot mask: it would say so after it has masked those before it.

    Raises
    ------
    ValueError
        With the layer's name, and what is wrong with its weight.
    """
    if not {"weight", "weight_orig"} & set(module._parameters):
        problem: str | None = "it is no parameter, but made of others; make that permanent first"
    else:
        weight = held(module, "weight")
        problem = unreadable(weight)
        if problem is None and not is_convertible(weight.dtype):
            problem = f"it is of {weight.dtype}"
        if problem is None and weight.is_inference():
            problem = "it was made in torch.inference_mode"
    if problem is not None:
        raise ValueError(f"the weight of {name or 'the model'} cannot be pruned: {problem}")
