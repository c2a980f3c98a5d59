"""Docstrings of what users call: numpydoc's own checks (`[tool.numpydoc_validation]` says which)."""

import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import qsparseprop.utils

ROOT = Path(__file__).resolve().parents[1]

validate = pytest.importorskip("numpydoc.validate")
hooks = pytest.importorskip("numpydoc.hooks.validate_docstrings")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the checks are not beside the tests")

ROOMS = ["qsparseprop", "qsparseprop.config", "qsparseprop.inference", "qsparseprop.nn", "qsparseprop.ops",
         "qsparseprop.quantization", "qsparseprop.training", "qsparseprop.training.data",
         "qsparseprop.training.processes"]  # fmt: skip


def modules():
    """The public ones."""
    inside = (module.name for module in pkgutil.iter_modules(qsparseprop.utils.__path__))
    return [*ROOMS, *(f"qsparseprop.utils.{name}" for name in inside if not name.startswith("_"))]


def public_objects():
    """Functions, classes and their methods, by name."""
    found = {}
    for name in modules():
        module = importlib.import_module(name)
        for key in module.__all__:
            # an operator is an object that calls a function
            value = getattr(module, key)
            value = getattr(value, "function", value)
            is_ours = getattr(value, "__module__", "").startswith("qsparseprop") and "_kernels" not in value.__module__
            if not is_ours or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            found[f"{value.__module__}.{value.__qualname__}"] = value
            if inspect.isclass(value):
                for method in vars(value):
                    bound = getattr(value, method)
                    if not method.startswith("_") and (inspect.isfunction(bound) or inspect.ismethod(bound)):
                        found[f"{value.__module__}.{value.__qualname__}.{method}"] = bound
    return found


def _constructs(kind):
    """Whether a class has arguments of its own, not those of the class that it is derived from."""
    return "__init__" in vars(kind) or "_fields" in vars(kind) or (kind.__init__ is object.__init__)


def errors(value, checks):
    doc = validate.get_doc_object(value)
    found = [(code, text) for code, text in validate.validate(doc)["errors"] if code in checks]
    raw = inspect.getdoc(value) or ""
    if raw.startswith("See "):  # another one's arguments, named there
        return []
    if inspect.isclass(value):
        # what is an attribute of the same name is described as such
        attributes = {name.strip() for entry in doc["Attributes"] for name in entry.name.split(",")}
        known = attributes | {name.strip() for entry in doc["Parameters"] for name in entry.name.split(",")}
        # protocols are not called
        called = _constructs(value) and not getattr(value, "_is_protocol", False)
        arguments = set(inspect.signature(value).parameters) if called else set()
        found = [(code, text) for code, text in found if code != "PR01"]
        if arguments - known and "PR01" in checks:
            found.append(("PR01", f"arguments {sorted(arguments - known)} are documented nowhere"))
    if "----" not in raw:  # a sentence says what is given back; with sections that has its own
        found = [(code, text) for code, text in found if code != "RT01"]
    return found


OBJECTS = public_objects()


@pytest.mark.parametrize("name", OBJECTS)
def test_docstring(name):
    assert errors(OBJECTS[name], hooks.parse_config(ROOT)["checks"]) == []


def test_what_is_found():
    def documented(x, y):
        """Add.

        Parameters
        ----------
        x : int

        Raises
        ------
        ValueError
            Never.
        """
        return x + y

    found = errors(documented, {"PR01", "RT01", "SS03"})
    assert [code for code, _ in found] == ["PR01", "RT01"]
