"""Arguments that make no sense are refused by an error, and touch no memory that is not theirs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from ._corruptions import CALLS, CORRUPTIONS, corrupted_call, corruptions, valid
from ._helpers import PATIENCE, run_fuzzer, run_python

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("op", CORRUPTIONS)
@pytest.mark.parametrize("codes", [True, False])
def test_what_is_to_be_corrupted_works(op, codes):
    CALLS[op](**valid(op, codes))


@pytest.mark.parametrize(("op", "argument", "change"), corruptions(harmful=False))
def test_corrupted_arguments_are_refused(op, argument, change):
    with pytest.raises((TypeError, ValueError)) as error:
        corrupted_call(op, argument, change)
    assert str(error.value)


_IN_A_PROCESS = """
import json, os, signal, sys, types
package = types.ModuleType("tests")
package.__path__ = [sys.argv[1]]
sys.modules["tests"] = package
import torch
torch.set_num_threads(1)  # no team of threads, so that a fork is harmless
from tests import _corruptions
for case in json.loads(sys.argv[2]):
    if not os.fork():
        signal.setitimer(signal.ITIMER_PROF, int(sys.argv[3]))  # for loops without end; the time that it computes
        try:
            _corruptions.corrupted_call(*case)
        except (TypeError, ValueError):
            os._exit(0)
        except BaseException as error:
            print(case, repr(error), flush=True)
        os._exit(1)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status:
        print(*case, "accepted" if status == 1 else f"crashed: {status}", sep=": ", flush=True)
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_enormous_numbers_are_refused():
    cases = corruptions(harmful=True)
    assert len(cases) > 20
    process = run_python(_IN_A_PROCESS, str(Path(__file__).parent), json.dumps(cases), str(5 * PATIENCE))
    assert (process.stdout, process.returncode) == ("done\n", 0), process.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards memory by calls of Linux")
def test_random_corruptions_do_not_touch_memory_that_is_not_theirs(tmp_path):
    """In a process of its own, with every tensor at the edge of memory that must not be touched."""
    assert run_fuzzer("_fuzz", 0, 60, tmp_path)["refused"] > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards memory by calls of Linux")
def test_every_operator_that_torch_knows_refuses_nonsense():
    """All that are registered, each as often as the others; what has no valid call to be corrupted is an error."""
    tests = Path(__file__).parent
    script = ("import runpy, sys; sys.path += sys.argv.pop(1), sys.argv.pop(1)\n"
              "runpy.run_module('tests._fuzz_operators', run_name='__main__')")  # fmt: skip
    process = run_python(script, str(tests.parent), str(tests), "0", "15")
    assert process.returncode == 0, f"{process.stdout[-2000:]}\n{process.stderr[-3000:]}"
    found = json.loads(process.stdout.splitlines()[-1].removeprefix("done: "))
    assert found["operators"] >= 15
    assert found["refused"] > found["accepted"] / 3
