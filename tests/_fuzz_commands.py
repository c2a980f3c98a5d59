"""Calls the command line with arguments that make no sense.

    python -m tests._fuzz_commands SEED CALLS

Every call ends with 0, 1 or 2; what is refused is refused by one sentence, without a traceback.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsparseprop.cli import finetune
from qsparseprop.cli import main as command
from qsparseprop.training import Finetuner

from ._fuzz_objects import dense

VALUES = ("", " ", "0", "1", "2", "-1", "0.5", "1e400", "nan", "inf", "1,3,8,8", "1,,3", "0,3", "99999999999999999999",
          "x", "mlp", "resnet20", "data.npz", "empty", "folder", "weights.pt", "none", "uniform", "global", "gradual",
          "bf16", "fp32", "digits", "os:system", "a:b:c", ":", "/dev/null", "/nowhere/at/all", "\udcff", "é" * 300,
          "--help", "--", "../x", "run", "adamw", "sgd", "Linear(8, 8)", "Linear(8",
          "Conv2d(2, 2, 3)", "imagenet")  # fmt: skip
SMALL = ["finetune", "--data", "data.npz", "--model", "mlp", "--batch-size", "8", "--quiet", "--no-compare",
         "--out", "run", "--threads", "1", "--sparsity", "0.8", "--width", "4"]  # fmt: skip
FLAGS = {
    "info": ["info"],
    "freeze": ["freeze", "run/last.pt", "--out", "model.qsp", "--samples", "8", "--threads", "1"],
    "resume": ["finetune", "--resume", "--quiet", "--out", "run"],
    "finetune": SMALL,
    "bench": ["bench", "--layer", "Linear(8, 8)", "--input", "4,8", "--sparsity", "0.9"],
}
MORE = ("--epochs", "--pretrain-epochs", "--image-size", "--learning-rate", "--seed", "--prune", "--precision",
        "--data", "--model", "--weights", "--normalize", "--resume", "--compare", "--new-head", "--out", "--width",
        "--threads",
        "--compress-saved", "--optimizer", "--nonsense", "--version", "--help", "--input", "--inference")  # fmt: skip


def arguments(rng: random.Random) -> list[str]:
    """A command that works, with one to three parts changed."""
    found = list(FLAGS[rng.choice(list(FLAGS))])
    for _ in range(rng.choice([1, 1, 2, 3])):
        place = rng.randrange(1, len(found) + 1)
        change = rng.choice(["value", "value", "more", "more", "drop", "odd"])
        if change == "value" and place < len(found) and not found[place].startswith("--"):
            found[place] = rng.choice(VALUES)
        elif change == "more":
            found += [rng.choice(MORE), *([rng.choice(VALUES)] if rng.random() < 0.8 else [])]
        elif change == "drop" and len(found) > 1:
            del found[place - 1]
        else:
            found.insert(place, rng.choice(VALUES))
    return found


def limit_work() -> None:
    """Trainings end after a few steps, and comparisons before they begin."""
    step, left = Finetuner.train_step, iter(range(1 << 60))

    def limited(self: Finetuner, inputs: Any, targets: torch.Tensor) -> float:
        if next(left) % 20 == 19:
            raise RuntimeError("trained long enough")
        return step(self, inputs, targets)

    def too_long(*ignored: Any) -> int:
        raise RuntimeError("a comparison takes minutes")

    Finetuner.train_step = limited  # type: ignore[method-assign]
    finetune._compare = too_long  # type: ignore[assignment]


def run(given: list[str]) -> int:
    """The exit code; anything but a sentence is an error."""
    # as Python opens them: a name that is no text can be part of a message, not of a result
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = command(given)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    assert code in (0, 1, 2), (given, code)
    err.seek(0)
    text = err.read()
    assert "Traceback" not in text, (given, text)
    if code:
        last = text.strip().splitlines()[-1]
        assert "python -m qsparseprop" in last, (given, text)
        assert len(last) < 1000, (given, text)
    return code


def main() -> None:
    """Try so many commands, and say what became of them."""
    seed, calls = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit_work()
    rng, counts = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        generator = np.random.default_rng(0)
        np.savez("data.npz", images=generator.integers(0, 255, (64, 8, 8), np.uint8), labels=np.arange(64) % 4)
        Path("folder").mkdir()
        Path("empty").touch()
        torch.save(dense().state_dict(), "weights.pt")
        for number in range(calls):
            given = arguments(rng)
            print(number, ascii(given), flush=True)
            faulthandler.dump_traceback_later(120, exit=True)
            code = run(given)
            counts[("done", "failed", "refused")[code]] += 1
        faulthandler.cancel_dump_traceback_later()
        os.chdir("/")
    print("done:", json.dumps(counts))


if __name__ == "__main__":
    main()
