"""What users import, from where, and what importing it costs; the paths of before."""

import ast
import importlib
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qsparseprop
from qsparseprop import benchmarking, cli, training, utils
from qsparseprop import nn as sparse_nn
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_dense, swap_modules_with_sparse

PACKAGE = Path(qsparseprop.__file__).parent
UPPER_ROOMS = ("utils", "training", "benchmarking", "cli")


def test_every_name_of_the_front_door_is_that_of_its_home():
    assert set(qsparseprop.__all__) == {*qsparseprop._HOMES, "__version__"}
    assert set(qsparseprop.__all__) <= set(dir(qsparseprop))
    for name, home in qsparseprop._HOMES.items():
        assert getattr(qsparseprop, name) is getattr(importlib.import_module(f"qsparseprop.{home}"), name)
    with pytest.raises(AttributeError, match="swap_modules_with_spares"):
        _ = qsparseprop.swap_modules_with_spares


def test_type_checkers_are_told_the_same_homes():
    (block,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")  # fmt: skip
    told = {alias.name: node.module.removeprefix("qsparseprop.") for node in block.body for alias in node.names}
    assert told == qsparseprop._HOMES


def test_importing_the_package_imports_little_beside_torch():
    """That is to take at most 50 ms beyond torch's own time; modules can be counted on any machine."""
    code = "import sys, torch; before = set(sys.modules); import qsparseprop; print(*set(sys.modules) - before)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = process.stdout.split()
    assert [name for name in loaded if not name.lstrip("_").startswith(("qsparseprop", "cython_"))] == []
    assert {name.split(".")[1] for name in loaded if "." in name}.isdisjoint({"nn", *UPPER_ROOMS})


@pytest.mark.parametrize("old", [*utils._MOVED, "finetuner.trainer", "finetuner.history"])
def test_old_paths_give_the_modules_of_the_new_ones(old, monkeypatch):
    name, _, rest = old.partition(".")
    new = f"qsparseprop.{utils._MOVED[name]}{'.' if rest else ''}{rest}"
    old = f"qsparseprop.utils.{old}"
    wanted = importlib.import_module(new)
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is {new} now$") as caught:
        found = importlib.import_module(old)
    assert found is wanted
    assert (wanted.__name__, wanted.__spec__.name) == (new, new)
    assert len(caught) == 1 + (bool(rest) and f"qsparseprop.utils.{name}" not in sys.modules)


def test_an_old_path_in_a_pickle_and_in_a_from_import(monkeypatch):
    for name in ("qsparseprop.utils.finetuner", "qsparseprop.utils.data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(utils, "data", raising=False)
    with pytest.warns(DeprecationWarning, match="training.finetuner now"):
        assert pickle.loads(b"cqsparseprop.utils.finetuner\nHistory\n.") is training.History
    with pytest.warns(DeprecationWarning, match="training.data now") as caught:
        from qsparseprop.utils import data
    assert data is importlib.import_module("qsparseprop.training.data")
    assert caught[0].filename == __file__
    with pytest.raises(ModuleNotFoundError, match=r"qsparseprop\.utils\.no_such"):
        importlib.import_module("qsparseprop.utils.no_such")


def test_what_goes_by_position_and_what_by_name_only():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[0].weight[:, 1:] = 0
    swapped = swap_modules_with_sparse(model, (4, 8), False, False, True, True)  # inplace, verbose, prototype, quantize
    assert isinstance(swapped[0], sparse_nn.FakeQuantLinear)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match="positional"):
        swap_modules_with_sparse(model, (4, 8), False, False, True, True, ["1"])
    with pytest.raises(TypeError, match="positional"):
        swap_modules_for_state(model, {}, True)
    with pytest.raises(TypeError, match="positional"):
        swap_modules_with_dense(model, False)


def public_modules():
    yield from ("qsparseprop", "qsparseprop.config", "qsparseprop.quantization", "qsparseprop.nn")
    yield from sorted({getattr(sparse_nn, name).__module__ for name in sparse_nn.__all__ if name[0].isupper()})
    for package in (utils, training, cli, benchmarking):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not any(part.startswith("_") for part in found.name.split(".")):
                yield found.name


@pytest.mark.parametrize("name", [*public_modules()])
def test_modules_say_what_is_public(name):
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert hasattr(module, public)
