"""What frozen models give: results of the types that the model has, and what files make of them."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from qsparseprop.inference import FrozenModule, freeze, load, save
from qsparseprop.inference.data import from_json, to_json
from qsparseprop.utils.errors import ConfigurationError

from ._frozen import data


class Scores(NamedTuple):
    logits: Tensor
    features: Any = None


@dataclass
class Registered:
    logits: Tensor
    features: Any = None


@dataclass
class Unknown:
    logits: Tensor


@dataclass
class Strict:
    logits: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.logits, Tensor):
            raise TypeError("logits must be a tensor")


torch.export.register_dataclass(Registered, serialized_type_name="tests.Registered")
torch.export.register_dataclass(Strict, serialized_type_name="tests.Strict")


class Gives(nn.Module):
    """Two layers, in a result of any type."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features, self.classify, self.make = nn.Linear(6, 8), nn.Linear(8, 3), make

    def forward(self, x: Tensor) -> Any:
        features = self.features(x).relu()
        return self.make(self.classify(features), features)


def counted(logits: Tensor, features: Tensor) -> Any:
    found = defaultdict(list)
    found["logits"] = [logits, features]
    return found


MAKERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "namedtuple": Scores,
    "with None": lambda logits, features: Scores(logits),
    "ordered": lambda logits, features: OrderedDict(out=logits, aux=features),
    "dataclass": Registered,
    "nested": lambda logits, features: [Scores(logits, OrderedDict(aux=features)), {"again": (features,)}],
    "queue": lambda logits, features: deque([logits, features]),
    "defaults": counted,
}


def same(one: Any, other: Any) -> bool:
    """Of the same types, and tensors of the same shapes."""
    leaves, spec = _pytree.tree_flatten(one)
    others, like = _pytree.tree_flatten(other)
    return type(one) is type(other) and spec == like and all(
        (a is None and b is None) or a.shape == b.shape for a, b in zip(leaves, others, strict=True))  # fmt: skip


@pytest.mark.parametrize("kind", list(MAKERS))
def test_results_have_the_types_of_the_models(kind: str) -> None:
    model, x = Gives(MAKERS[kind]), data(16, 6)
    frozen = freeze(model, [x])
    assert isinstance(frozen, FrozenModule)
    assert frozen.freeze_report.whole
    with torch.no_grad():
        found, exact = frozen(x), model(x)
    assert same(found, exact)
    for one, other in zip(_pytree.tree_leaves(found), _pytree.tree_leaves(exact), strict=True):
        assert one is other is None or float((one - other).norm() / other.norm()) < 0.02
    assert same(copy.deepcopy(frozen)(x[:3]), model(x[:3]))


def test_types_that_torch_does_not_know_or_that_take_no_numbers_are_frozen_in_parts() -> None:
    for make in (Unknown, Strict):
        model, x = Gives(lambda logits, features, make=make: make(logits)), data(16, 6)
        frozen = freeze(model, [x])
        assert not isinstance(frozen, FrozenModule)
        assert not frozen.freeze_report.whole
        assert frozen.freeze_report.reason
        assert type(frozen(x)) is make
        assert [layer.quantised for layer in frozen.freeze_report] == [True, True]


def test_ordered_dicts_are_saved(tmp_path: Path) -> None:
    model, x = Gives(MAKERS["ordered"]), data(16, 6)
    frozen = freeze(model, [x])
    save(frozen, tmp_path / "model.qsp")
    again = load(tmp_path / "model.qsp")
    assert same(again(x), model(x))
    assert torch.equal(again(x)["out"], frozen(x)["out"])


@pytest.mark.parametrize(("kind", "name"), [("namedtuple", "Scores"), ("dataclass", "Registered"), ("nested", "Scores"),
                                            ("queue", "deque"), ("defaults", "defaultdict")])  # fmt: skip
def test_types_that_files_do_not_have_are_refused(kind: str, name: str, tmp_path: Path) -> None:
    frozen = freeze(Gives(MAKERS[kind]), [data(16, 6)])
    with pytest.raises(ConfigurationError, match=rf"its result is a {name}, .*OrderedDicts can be saved"):
        save(frozen, tmp_path / "model.qsp")
    assert list(tmp_path.iterdir()) == []


def test_dicts_in_files() -> None:
    for value in ({"a": 1}, OrderedDict(b=2, a=(1, None))):
        found = from_json(to_json(value))
        assert type(found) is type(value)
        assert list(found.items()) == list(value.items())
    with pytest.raises(ValueError, match="it is a defaultdict"):
        to_json(defaultdict(list, a=1))
