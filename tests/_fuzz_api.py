"""Calls public functions with arguments that make no sense, one or two at a time.

    python -m tests._fuzz_api SEED CALLS [FOLDER]
    python -m tests._fuzz_api each FIRST:CALLS [FOLDER]

The second form takes every argument of every function with every value in turn, from the FIRST of these calls on.

Every call works, and what it gives is consistent; or it is refused by an error of a documented kind with a sentence in
it, and has changed nothing: models and torch's own settings are what they were, bit for bit. A call that is neither is
printed, and written into the folder as a case for tests/test_corpus.py. A crash, a hang or memory out of all proportion
ends the process; what was called last is printed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import _fuzz_objects
from ._fuzz_objects import MODELS, VALUES
from ._fuzz_targets import GOOD, Target, consistent, file_of_this_process, targets

MEMORY = 1 << 30  # bytes that all calls may take together
#: A call of the slowest function, which times layers, takes a second.
SECONDS = 60
#: What is Python's, of arguments that are mistaken for others: nobody is told anything.
_SILENT = re.compile(r"INTERNAL ASSERT|NoneType' object|^\s*$")


WITHOUT_A_GOOD_CALL = ("load", "read_state_dict", "Finetuner.load_state_dict")


_OF_LAYERS = re.compile(r"torch.nn.modules.(?!module\.py)")


class Found(AssertionError):
    """A call was neither right nor refused."""


def make(name: str) -> Any:
    """An argument by its name, anew."""
    return next(group for group in (GOOD, MODELS, VALUES) if name in group)[name]()


# ---- what must not have changed ----


def _bits(t: Any) -> Any:
    """What a tensor holds."""
    if not isinstance(t, Tensor) or t.is_meta:
        return None
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        return t.dtype, t.shape, t.stride(), bytes(t.detach().untyped_storage())
    return t.dtype


def _keys(module: nn.Module) -> list[str]:
    # what some models of _fuzz_objects count themselves, and what lies in them under other names
    return sorted(k for k in vars(module) if k not in ("calls", "grown"))


def snapshot(value: Any) -> Any:
    """Modules, parameters, modes, hooks and attributes of a model, and the bits of its tensors."""
    if not isinstance(value, nn.Module) or "_modules" not in vars(value) or isinstance(value, torch.jit.ScriptModule):
        return _bits(value)
    found: list[Any] = []
    for name, module in value.named_modules(remove_duplicate=False):
        if name.endswith("grown"):
            continue
        tensors = {k: (id(t), _bits(t), getattr(t, "requires_grad", None))
                   for k, t in (*module._parameters.items(), *module._buffers.items())}  # fmt: skip
        hooks = [len(vars(module).get(k, ())) for k in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")]
        found.append((name, id(module), type(module), module.training, tensors, hooks, _keys(module)))
    return found


def settings() -> Any:
    """Those of torch that a call could leave behind."""
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(),
            torch.get_num_threads(), torch.is_autocast_enabled("cpu"), torch._C._len_torch_function_stack(),
            torch._C._autograd._saved_tensors_hooks_is_enabled(), torch.get_default_device(), os.getcwd())  # fmt: skip


# ---- a call ----


def run_case(case: dict[str, Any], known: dict[str, Target]) -> str:
    """ "refused" or "accepted"; a `Found` says what is neither."""
    target = known[case["target"]]
    torch.manual_seed(0)
    arguments = {name: make(value) for name, value in case["arguments"].items()}
    before = {name: snapshot(value) for name, value in arguments.items()}
    around = settings()
    refusal: Exception | None = None
    result = None
    try:
        result = target.call(**arguments)
    except SystemError as error:
        raise Found(f"SystemError: {error}") from error
    except Exception as error:
        refusal = error
    if settings() != around:
        raise Found(f"left torch's settings as {settings()}, they were {around}")
    file_of_this_process().unlink(missing_ok=True)
    if refusal is not None:
        print(f"  {type(refusal).__name__}: {refusal}"[:300].encode(errors="replace").decode())
        _check_refusal(refusal, target)
        for name, value in arguments.items():
            after = snapshot(value)
            if not target.trains and before[name] != after:
                difference = _difference(before[name], after)
                raise Found(f"refused with {refusal!r}, but {name} has changed: {difference}")
        return "refused"
    for value in (result, *arguments.values()):
        if not _was_broken(value, case):
            consistent(value)
    return "accepted"


def _was_broken(value: Any, case: dict[str, Any]) -> bool:
    """Whether it cannot be looked at, which is nobody's fault but the test's."""
    return any("freed" in name or name in ("uncalled", "sparse nan") for name in case["arguments"].values())


def _difference(before: Any, after: Any) -> str:
    if not isinstance(before, list) or len(before) != len(after):
        return "its modules"
    for old, new in zip(before, after, strict=True):
        if old != new:
            return f"{old[0]!r}: {[(a, b) for a, b in zip(old, new, strict=True) if a != b]}"[:500]
    return "nothing"


def _check_refusal(error: Exception, target: Target) -> None:
    frames = traceback.extract_tb(error.__traceback__)
    # what the argument itself has raised: a model or a function of tests/_fuzz_objects.py, or a layer of torch's
    if frames[-1].filename == _fuzz_objects.__file__ or _OF_LAYERS.search(frames[-1].filename):
        return
    where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "qsparseprop" in f.filename), "")
    if not isinstance(error, target.errors):
        raise Found(f"{type(error).__name__} of {where}: {error}") from error
    if _SILENT.search(str(error)):
        raise Found(f"{type(error).__name__} without a sentence, of {where}: {error}") from error


# ---- at random ----


def random_case(rng: random.Random, known: dict[str, Target]) -> dict[str, Any]:
    """A call whose arguments are right except for one or two, sometimes more, sometimes none."""
    name = rng.choice(list(known))
    arguments = dict(known[name].arguments)
    count = min(rng.choice([0, 1, 1, 1, 1, 2, 2, 3]), len(arguments))
    for key in rng.sample(list(arguments), count):
        models = arguments[key] in MODELS
        groups = rng.choices([MODELS, VALUES, GOOD], [0.75, 0.2, 0.05] if models else [0.03, 0.87, 0.1])[0]
        arguments[key] = rng.choice(list(groups))
    return {"target": name, "arguments": arguments}


def each_case(known: dict[str, Target]) -> Iterator[dict[str, Any]]:
    """Every argument of every function with every value, the others being right; models first."""
    for name, target in known.items():
        for key, usual in target.arguments.items():
            groups = (MODELS, VALUES) if usual in MODELS or usual.endswith("layer") else (VALUES,)
            for value in (value for group in groups for value in group):
                yield {"target": name, "arguments": {**target.arguments, key: value}}


def limit_memory(more: int) -> None:
    """End the process, by MemoryError, when it takes so many bytes more than now."""
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))


def main() -> None:
    """Try so many calls, and say what became of them."""
    known = targets()
    if sys.argv[1] == "each":
        first, calls = map(int, sys.argv[2].split(":"))
        cases: Iterator[dict[str, Any]] = itertools.islice(each_case(known), first, first + calls)
    else:
        rng = random.Random(int(sys.argv[1]))
        cases = (random_case(rng, known) for _ in range(int(sys.argv[2])))
    folder = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(tempfile.mkdtemp())
    counts = Counter[str]()
    for target in known:  # what works, which also imports what it needs
        outcome = run_case({"target": target, "arguments": known[target].arguments}, known)
        assert outcome == "accepted" or target in WITHOUT_A_GOOD_CALL, target
    limit_memory(MEMORY)
    for case in cases:
        print(json.dumps(case), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            counts[run_case(case, known)] += 1
        except AssertionError as error:
            counts["found"] += 1
            print(f"FOUND {error}\n{traceback.format_exc()}", flush=True)
            if folder is not None:
                _write(case, folder, str(error))
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(counts))
    sys.exit(counts["found"] > 0)


def _write(case: dict[str, Any], folder: Path, error: str) -> None:
    text = json.dumps({**case, "found": error[:300]}, indent=1)
    (folder / f"api-{abs(hash(json.dumps(case))) % 10**8}.json").write_text(f"{text}\n")


if __name__ == "__main__":
    main()
