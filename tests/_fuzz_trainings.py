"""Loads corrupted checkpoints of trainings.

    python -m tests._fuzz_trainings SEED COUNT FOLDER

A checkpoint is refused by a `CheckpointError`, and the training is what it was, bit for bit; or it is loaded, and the
training goes on. A crash or a hang ends the process; the last file is in the folder then.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import random
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qsparseprop.training import CheckpointError, Finetuner, NonFiniteLossError
from qsparseprop.training.finetuner.checkpoint import write_checkpoint
from qsparseprop.utils.pruning_utils import GradualPruner

from ._frozen_files import _WRONG, _edit, _places
from ._fuzz_api import limit_memory
from ._fuzz_objects import sparse
from ._fuzz_states import TENSORS, corrupt_bytes

MEMORY = 256 << 20
BATCHES = [(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(4))] * 2


def tuner(kind: int) -> Finetuner:
    """A training of sparse layers, with all that a checkpoint can hold, or less."""
    model = sparse()
    if kind == 0:
        return Finetuner(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = GradualPruner(model, optimizer, 0.95, end_step=20)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=100)
    return Finetuner(model, optimizer, scheduler=scheduler, stateful={"pruner": pruner}, after_step=pruner.step)


def corrupt(content: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with other values, tensors or keys somewhere."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = list(_places(content))
        if not places:
            break
        # most places are numbers of a generator's state or of the record
        holder, key = rng.choice([p for p in places if isinstance(p[0], dict)] or places)
        if isinstance(holder, tuple):
            continue
        value = holder[key]
        if isinstance(value, Tensor) and rng.random() < 0.8:
            try:
                holder[key] = TENSORS[rng.choice(list(TENSORS))](value)
            except Exception:
                holder[key] = value[:0] if value.ndim else None
        elif isinstance(value, Tensor):
            holder[key] = rng.choice(_WRONG)
        else:
            _edit(holder, key, places, rng)
    return content


def bits(value: Any) -> Any:
    """What can be compared, of everything that a training consists of."""
    if isinstance(value, Tensor):
        return value.dtype, value.shape, value.detach().contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    return [bits(v) for v in value] if isinstance(value, list | tuple) else repr(value)


def load(path: Path, kind: int) -> str:
    """What became of a file."""
    ours = tuner(kind)
    for images, labels in BATCHES[:1]:
        ours.train_step(images, labels)
    before = bits(ours.state_dict())
    try:
        ours.load(path)
    except CheckpointError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.strip()
        assert "INTERNAL ASSERT" not in refusal, refusal
        assert bits(ours.state_dict()) == before, "refused, but it has changed"
        return "refused"
    try:
        ours.train_step(*BATCHES[0])
    except NonFiniteLossError:
        return "not finite"
    except Exception as error:  # an optimizer's or a schedule's own settings may say what cannot be done here
        if not any("torch/optim" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
            raise
        return "cannot go on"
    ours.state_dict()
    return "loaded"


def main() -> None:
    """Try so many files, and say what became of them."""
    seed, count, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3], "last.pt")
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(seed)
    rng, counts = random.Random(seed), Counter[str]()
    contents = []
    for kind in (0, 1):
        torch.manual_seed(seed)
        first = tuner(kind)
        for images, labels in BATCHES:
            first.train_step(images, labels)
        contents.append(copy.deepcopy(first.state_dict()))
        write_checkpoint(contents[kind], path)
        assert load(path, kind) == "loaded"
    limit_memory(MEMORY)
    for number in range(count):
        faulthandler.dump_traceback_later(60, exit=True)
        kind, structured = rng.randrange(2), rng.random() < 0.7
        print(number, kind, structured, flush=True)
        try:
            write_checkpoint(corrupt(contents[kind], rng) if structured else contents[kind], path)
        except Exception:  # what torch cannot save
            counts["no file"] += 1
            continue
        if not structured:
            path.write_bytes(corrupt_bytes(path.read_bytes()))
        counts[load(path, kind)] += 1
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(counts))
    assert counts["refused"] > count // 5


if __name__ == "__main__":
    main()
