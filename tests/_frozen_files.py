"""Files of frozen models that are damaged or forged; run as a program, it tries one after the other.

    python -m tests._frozen_files SEED COUNT FOLDER WAY PROGRAM

A file is refused by one sentence, or its program runs, by the kernels. Whatever else happens ends the process.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qsparseprop.inference.compiled import CompiledProgram
from qsparseprop.inference.files import load_program, save_program
from qsparseprop.inference.program import Program
from qsparseprop.inference.steps import Call

from ._frozen_programs import PROGRAMS

#: What torch's operators raise for arguments that do not go together.
_ERRORS_OF_CALLS = (RuntimeError, IndexError, TypeError, ValueError, KeyError, OverflowError, NotImplementedError)
#: Elements of inputs and windows that a test has time for.
_SMALL = 1 << 17


def split_file(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """The header of a file, its description, and its data."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["qsparseprop"]), data[8 + size :]


def join_file(path: Path, header: dict[str, Any], description: Any, data: bytes) -> None:
    """Write a file with another header or description. JSON may be text."""
    text = description if isinstance(description, str) else json.dumps(description)
    raw = json.dumps({**header, "__metadata__": {"qsparseprop": text}}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def try_file(path: Path) -> str:
    """Load a file and run its program; "refused", or what was run."""
    try:
        program = load_program(path)
    except ValueError as error:
        text = str(error)
        assert text.startswith(str(path)), text
        assert len(text) < 700, text
        assert "\n" not in text, text
        return "refused"
    if not is_small(program):
        return "large"
    inputs = [torch.randn(2, *[abs(n) for n in program.values[name].shape]) for name in program.inputs]
    try:
        outputs = CompiledProgram(program)(*inputs)
    except _ERRORS_OF_CALLS:
        assert any(isinstance(step, Call) for step in program.steps)
        return "refused by calls"
    assert len(outputs) == len(program.outputs)
    return "run"


def is_small(program: Program) -> bool:
    """Whether running it takes no time."""
    sizes = [math.prod(value.shape) for value in program.values.values()]
    windows = [math.prod(step.window.kernel) for step in program.steps if hasattr(step, "window")]
    return max(sizes) * max(windows, default=1) < _SMALL


# ---- ways to damage a file ----


def flipped(path: Path, rng: random.Random, count: int) -> Iterator[bytes]:
    """Bytes of the header and the length before it, one at a time; many of them digits and letters as before."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    places = rng.sample(range(end), min(count, end))
    for place in places:
        other = rng.choice([data[place] ^ 1 << rng.randrange(8), ord(rng.choice("0123456789-.eE\"{}[],:truefalsn \\"))])
        yield data[:place] + bytes([other]) + data[place + 1 :]


def damaged(path: Path, rng: random.Random, count: int) -> Iterator[bytes]:
    """Bytes of the tensors."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for _ in range(count):
        place = rng.randrange(start, len(data))
        yield data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]


def truncated(path: Path, rng: random.Random, count: int) -> Iterator[bytes]:
    """The beginning of a file, or a file that goes on."""
    data = path.read_bytes()
    yield data + b"\0"
    for _ in range(count):
        yield data[: rng.randrange(len(data))]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of nested ones."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield value, key
        yield from _places(each)


_WRONG: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 256, 1 << 16, (1 << 16) + 1, (1 << 31) - 1, 1 << 31, 1 << 63, -(1 << 63),
    10**40, 0.5, 1e-45, 1e38, 1e300, "", "v0", "v1", "v2", "v3", "\ud800", [], {}, [1], [0, 0], [1, 1],
    [65536, 65536], [2147483647], {"float": "nan"}, {"name": "v0"}, {"tuple": []}, {"dict": []},
    [[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]],
)  # fmt: skip


def edited(path: Path, rng: random.Random, count: int) -> Iterator[bytes]:
    """Fields of the description, and of what safetensors knows of tensors."""
    header, description, data = split_file(path)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "file"
        for _ in range(count):
            new_header, new = copy.deepcopy(header), copy.deepcopy(description)
            del new_header["__metadata__"]
            where = new if rng.random() < 0.9 else new_header
            for _ in range(rng.choice([1, 1, 1, 2])):
                places = list(_places(where))
                if places:  # the first edit may have left nothing
                    _edit(*rng.choice(places), places, rng)
            join_file(out, new_header, new, data)
            yield out.read_bytes()


def _edit(container: Any, key: Any, places: list[tuple[Any, Any]], rng: random.Random) -> None:
    way = rng.random()
    old = container[key]
    if way < 0.15:
        del container[key]
    elif way < 0.3 and isinstance(old, int | float):
        container[key] = old + rng.choice([1, -1, 7, 64])
    elif way < 0.6:  # what another place holds, which is often of the right kind
        other, place = rng.choice(places)
        same = [(c, k) for c, k in places if k == key]
        other, place = rng.choice(same) if rng.random() < 0.7 else (other, place)
        container[key] = copy.deepcopy(other[place]) if isinstance(other, list | dict) else other
    else:
        container[key] = copy.deepcopy(rng.choice(_WRONG))


WAYS: dict[str, Callable[[Path, random.Random, int], Iterator[bytes]]] = {
    "flipped": flipped, "damaged": damaged, "truncated": truncated, "edited": edited}  # fmt: skip


def main() -> None:
    """Try so many damaged files, and print what became of them."""
    seed, count, folder, way = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.manual_seed(seed)
    rng = random.Random(seed)
    found: Counter[str] = Counter()
    path = folder / "model.qsp"
    save_program(PROGRAMS[sys.argv[5]](), path)
    for data in WAYS[way](path, rng, count):
        out = folder / "last.qsp"  # what ended the process, if anything does
        out.write_bytes(data)
        faulthandler.dump_traceback_later(60, exit=True)
        found[try_file(out)] += 1
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(found))
    assert found["refused"] > 0


if __name__ == "__main__":
    main()
