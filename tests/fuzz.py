"""Fuzzing at length: calls that make no sense, corrupted files and generated programs, each in a process of its own.

    python tests/fuzz.py                            # what .ci/nightly runs: 10,000 calls, 2,000 files of each kind, ...
    python tests/fuzz.py --share 0.01               # a hundredth of everything
    python tests/fuzz.py --only states frozen --seed 7
    python tests/fuzz.py --hours 8                  # again and again, with other seeds, until the time is over

Nothing may crash, hang, take memory out of all proportion, be accepted though it is inconsistent, or change anything
though it is refused. What does is printed at the end and written into a folder (``--found``): put it into tests/corpus/
once it is mended, which tests/test_corpus.py runs at every push.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
#: Of address space; processes limit themselves further, once torch is there.
MEMORY = 16 << 30


class Kind(NamedTuple):
    """One fuzzer: which of tests/_fuzz*.py, what it counts, and how much of it is tried a night."""

    module: str
    unit: str
    count: int
    #: how much one process does, and how long it may take
    chunk: int
    seconds: int = 900
    #: further arguments, one set a process, in turn
    ways: tuple[tuple[str, ...], ...] = ((),)


_FROZEN = tuple((way, kind) for way in ("flipped", "damaged", "truncated", "edited")
                for kind in ("small", "random", "tokens"))  # fmt: skip
KINDS = {
    "api": Kind("_fuzz_api", "calls", 12_000, 1000),
    "commands": Kind("_fuzz_commands", "calls", 500, 100),
    "operators": Kind("_fuzz", "calls", 6_000, 400),
    "tensors": Kind("_fuzz_tensors", "calls", 5_000, 500),
    "states": Kind("_fuzz_states", "checkpoints", 2_000, 250, ways=(("torch",),)),
    "safetensors": Kind("_fuzz_states", "checkpoints", 2_000, 250, ways=(("safetensors",),)),
    "trainings": Kind("_fuzz_trainings", "checkpoints", 2_000, 250),
    "data": Kind("_fuzz_data", "files", 6_000, 1000),
    "frozen": Kind("_frozen_files", "checkpoints", 4_000, 250, ways=_FROZEN),
    "programs": Kind("_fuzz_programs", "programs", 20_000, 2_500, 3600),
}  # fmt: skip


class Outcome(NamedTuple):
    """What became of one process."""

    counts: Counter[str]
    #: what went wrong, if anything did
    problem: str
    output: str


def environment() -> dict[str, str]:
    """Where processes find the package that is tested, wherever it is installed, and the tests."""
    import qsparseprop

    package = str(Path(qsparseprop.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([package, str(ROOT)]), "PYTHONFAULTHANDLER": "1"}


def run_chunk(kind: Kind, seed: int, count: int, way: tuple[str, ...], folder: Path) -> Outcome:
    """Run one process. What it has found is in the folder."""
    command = [sys.executable, "-m", f"tests.{kind.module}", str(seed), str(count), str(folder), *way]
    with (folder / "output").open("w+", errors="replace") as output:
        process = subprocess.Popen(command, env=environment(), cwd=folder, stdout=output, stderr=subprocess.STDOUT,
                                   preexec_fn=_limit)  # fmt: skip
        try:
            code: int | str = process.wait(kind.seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = f"no end within {kind.seconds} s"
        output.seek(0)
        text = output.read()
    done = [line for line in text.splitlines() if line.startswith("done: ")]
    counts = Counter(json.loads(done[-1].removeprefix("done: "))) if done else Counter[str]()
    problem = "" if code == 0 else f"{' '.join(command[1:3])} {seed} {count} {' '.join(way)} ended with {code}"
    return Outcome(counts, problem, text)


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def keep(name: str, outcome: Outcome, folder: Path, found: Path) -> None:
    """Put what a process has found, or the last that it did, beside other findings."""
    found.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{time.time_ns() % 10**10}"
    for path in folder.iterdir():
        if path.suffix == ".json" or path.name.startswith("last"):
            shutil.copy(path, found / f"{stem}-{path.name}")
    (found / f"{stem}.txt").write_text(f"{outcome.problem}\n\n{outcome.output[-20_000:]}")


def fuzz(name: str, count: int, seed: int, found: Path, tell: Callable[[str], None]) -> tuple[Counter[str], int, float]:
    """Run one fuzzer: what became of what it tried, how many processes did not end well, and seconds."""
    kind, counts, problems, start = KINDS[name], Counter[str](), 0, time.monotonic()
    chunks = -(-count // kind.chunk) if len(kind.ways) == 1 else max(len(kind.ways), -(-count // kind.chunk))
    for index in range(chunks):
        share = count // chunks + (index < count % chunks)
        if not share:
            continue
        with tempfile.TemporaryDirectory(prefix="fuzz-") as made:
            folder = Path(made)
            outcome = run_chunk(kind, seed + index, share, kind.ways[index % len(kind.ways)], folder)
            counts += outcome.counts
            if outcome.problem:
                problems += 1
                keep(name, outcome, folder, found)
                tell(f"{outcome.problem}, see {found}")
    return counts, problems, time.monotonic() - start


def main() -> None:
    """Run the fuzzers that are asked for, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    add("--share", type=float, default=1.0, help="of what is tried a night")
    add("--seed", type=int, default=int(time.strftime("%y%m%d")) * 1000, help="the first; today's date if not given")
    add("--hours", type=float, default=0.0, help="go on, with other seeds, until so many hours are over")
    add("--found", type=Path, default=Path("fuzz-found"), help="folder for what is found")
    arguments = parser.parse_args()
    end, seed, failed = time.monotonic() + 3600 * arguments.hours, arguments.seed, 0
    while True:
        print(f"seed {seed}\n{'kind':<12} {'tried':>7} {'unit':<11} {'seconds':>7}  outcomes", flush=True)
        for name in arguments.only:
            count = max(1, round(KINDS[name].count * arguments.share))
            counts, problems, seconds = fuzz(name, count, seed, arguments.found.resolve(), print)
            outcomes = ", ".join(f"{value} {key}" for key, value in sorted(counts.items()))
            bad = f"; {problems} PROCESSES FAILED" if problems else ""
            print(f"{name:<12} {counts.total():>7} {KINDS[name].unit:<11} {seconds:>7.0f}  {outcomes}{bad}", flush=True)
            failed += problems
        seed += 100
        if time.monotonic() >= end:
            sys.exit(failed > 0)


if __name__ == "__main__":
    main()
