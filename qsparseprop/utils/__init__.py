"""What works on whole models: conversion, pruning, what is saved for the backward pass, measurement.

Trainings were here as well, and comparisons; importing them by those paths gives what has moved, and a warning.
"""

import importlib as _importlib
import importlib.abc as _abc
import importlib.machinery as _machinery
import sys as _sys
import types as _types
import warnings as _warnings

__all__: list[str] = []

#: Modules that were here, with the names that they have in `qsparseprop` now.
_MOVED = {
    "bench": "benchmarking.bench",
    "bench_report": "benchmarking.bench_report",
    "break_even": "benchmarking.break_even",
    "compare": "benchmarking.compare",
    "compare_report": "benchmarking.compare_report",
    "compare_worker": "benchmarking.compare_worker",
    "data": "training.data",
    "dense_modes": "benchmarking.dense_modes",
    "finetuner": "training.finetuner",
    "models": "training.models",
    "setup_run": "training.setup_run",
    "training_run": "training.run",
    "weights": "training.weights",
}


class _FindMoved(_abc.MetaPathFinder, _abc.Loader):
    """Lets an old path import the module of the new one: the same module, not another copy of it."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> _machinery.ModuleSpec | None:
        prefix = f"{__name__}."
        if not fullname.startswith(prefix):
            return None
        name, _, rest = fullname.removeprefix(prefix).partition(".")
        if name not in _MOVED:
            return None
        new = f"{__package__.rpartition('.')[0]}.{_MOVED[name]}{'.' if rest else ''}{rest}"
        return _machinery.ModuleSpec(fullname, self, loader_state=new)

    def create_module(self, spec: _machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: _types.ModuleType) -> None:
        spec = module.__spec__
        assert spec is not None
        _warnings.warn(f"{spec.name} is {spec.loader_state} now", DeprecationWarning, stacklevel=2)
        # what the import system gives its caller is what it finds here in the end
        _sys.modules[spec.name] = _importlib.import_module(spec.loader_state)


# Before the others: below a package that has moved, they would find a module's file and load it a second time.
_sys.meta_path.insert(0, _FindMoved())
