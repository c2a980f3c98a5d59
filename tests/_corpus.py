"""Runs what fuzzers have found, and is mended.

    python -m tests._corpus FILE

A file of calls (``.jsonl``, see tests/_fuzz_api.py) ends as each line says; a checkpoint (``.pt``, ``.safetensors``) or
a frozen model (``.qsp``) is refused by one sentence, or read. A crash ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import warnings
from pathlib import Path

import torch

from qsparseprop.training import CheckpointError
from qsparseprop.training.finetuner import read_checkpoint
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.state_files import read_state_dict

from ._frozen_files import try_file
from ._fuzz_api import Found, run_case
from ._fuzz_targets import targets


def run_calls(path: Path) -> list[str]:
    """What is wrong with the calls of a file."""
    known, wrong = targets(), []
    for line in path.read_text().splitlines():
        case = json.loads(line)
        print(line, flush=True)
        faulthandler.dump_traceback_later(100, exit=True)
        try:
            outcome = run_case(case, known)
        except Found as error:
            outcome = str(error)
        if outcome != case["outcome"]:
            wrong.append(f"{line}: {outcome}")
    faulthandler.cancel_dump_traceback_later()
    return wrong


def read_file(path: Path) -> None:
    """Read a file in every way that it may be meant for."""
    if path.suffix == ".qsp":
        try_file(path)
        return
    for read, refusal in ((read_state_dict, ConfigurationError), (read_checkpoint, CheckpointError)):
        if path.suffix == ".safetensors" and read is read_checkpoint:
            continue
        try:
            read(path)
        except refusal as error:
            print(error)


def main() -> None:
    """Run one file."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    wrong = run_calls(path) if path.suffix == ".jsonl" else read_file(path)
    if wrong:
        sys.exit("\n".join(wrong))
    print("done")


if __name__ == "__main__":
    main()
