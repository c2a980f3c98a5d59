"""Processes that others start, and limits that the system sets: the same integers, by any number of threads."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qsparseprop

from ._helpers import sampled

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="start methods and limits of Linux")

#: What all processes compute: a layer's output and gradients, a frozen model's output, and packed codes, as bits.
WORK = """
import os, sys, warnings
import torch
from qsparseprop import ops
from qsparseprop.inference import freeze
from qsparseprop.layout.geometry import linear_geometry
from qsparseprop.nn import QuantizedSparseConv2d, QuantizedSparseLinear

def bits(t):
    return t.detach().contiguous().view(torch.uint8).flatten().tolist()

def work(threads=None):
    warnings.simplefilter("error")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(300, 200), torch.nn.Conv2d(8, 12, 3, padding=1)
    for layer in linear, conv:
        layer.weight.data *= torch.rand(layer.weight.shape) < 0.3
    x, images = torch.randn(150, 300), torch.randn(20, 8, 9, 7)
    found = []
    layers = QuantizedSparseLinear.from_dense(linear), QuantizedSparseConv2d.from_dense(conv)
    for layer, given in zip(layers, (x, images)):
        torch.manual_seed(1)  # gradients are rounded at random
        given = given.clone().requires_grad_()
        y = layer(given)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        found += map(bits, (y, given.grad, layer.weight.grad, layer.bias.grad))
    with torch.no_grad():
        found.append(bits(freeze(linear, [x])(x)))
    found.append(bits(ops.quantize_pack(x[:, :, None, None], linear_geometry(300, 200).input_layout,
                                        ops.Scheme("absmax"))[0]))
    return found
"""

STARTS = (
    WORK
    + """
def child(queue, threads):
    queue.put((torch.get_num_threads(), work(threads)))

if __name__ == "__main__":
    import multiprocessing
    expected = work(2)  # threads are in use here
    context = multiprocessing.get_context(sys.argv[1])
    if sys.argv[2]:
        context.set_forkserver_preload(sys.argv[2].split(","))
    for threads in (1, 3):
        queue = context.Queue()
        process = context.Process(target=child, args=(queue, threads))
        process.start()
        _, found = queue.get(timeout=250)
        process.join()
        assert process.exitcode == 0, process.exitcode
        assert found == expected, threads
    print("same")
"""
)

SENT = """
import sys
import torch
from torch import nn
from qsparseprop import swap_modules_with_sparse
from qsparseprop.inference import freeze
from qsparseprop.nn import SparseLinear

def child(model, frozen, single, x, queue):
    queue.put([t.tolist() for t in (model(x), frozen(x), single(x), single.mask().sum())])
    with torch.no_grad():
        model[0].bias.add_(1)  # parameters are shared, as those of dense layers are

if __name__ == "__main__":
    import multiprocessing
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)).requires_grad_(False)
    model[0].weight.mul_(torch.rand(30, 40) < 0.1)
    model[2].weight.zero_()  # no nonzeros
    swap_modules_with_sparse(model, (5, 40), include_dense=False, verbose=False)
    x = torch.randn(5, 40)
    frozen, single = freeze(model, [x]), SparseLinear.from_dense(nn.Linear(40, 3)).requires_grad_(False)
    expected = [t.tolist() for t in (model(x), frozen(x), single(x), single.mask().sum())]
    bias = model[0].bias.clone()
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(model, frozen, single, x, queue))
    process.start()
    assert queue.get(timeout=250) == expected
    process.join()
    assert process.exitcode == 0, process.exitcode
    assert torch.equal(model[0].bias, bias + 1)
    print("same")
"""

PRINTS = (
    WORK
    + """
if __name__ == "__main__":
    import hashlib
    from qsparseprop.config import usable_processors
    from qsparseprop.ops.threads import thread_count
    found = work(int(sys.argv[1]) if len(sys.argv) > 1 else None)
    print(hashlib.sha256(repr(found).encode()).hexdigest(), torch.get_num_threads(), thread_count(),
          usable_processors())
"""
)


PROGRAM = """
import os, sys
os.execv(sys.executable, [sys.executable, "-m", "qsparseprop", "info"])
"""


@pytest.fixture
def run(tmp_path):
    """Run a script, which processes that it starts can import, with the package that is tested."""

    def started(script: str, *arguments: str, before: tuple[str, ...] = (), **environment: str) -> list[str]:
        file = tmp_path / "script.py"
        file.write_text(script)
        package = str(Path(qsparseprop.__file__).parents[1])
        inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        process = subprocess.run([*before, sys.executable, str(file), *arguments], capture_output=True, text=True,
                                 env={**inherited, "PYTHONPATH": path, **environment}, timeout=300,
                                 check=False)  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        return process.stdout.split()

    return started


STARTED = [("forkserver", "qsparseprop.nn"), ("forkserver", ""), ("spawn", "")]


@pytest.mark.parametrize(("method", "preload"), sampled(STARTED))
def test_processes_that_are_started_anew_compute_with_threads(run, method, preload):
    """The server of "forkserver" may have imported the package: it has used no threads, so that its children can."""
    assert run(STARTS, method, preload) == ["same"]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_models_are_sent_to_processes_that_are_started_anew(run, method):
    """As ``torch.multiprocessing.spawn(train, args=(model,))`` does."""
    assert run(SENT, method) == ["same"]


def test_number_of_threads_of_the_environment(run):
    results = {}
    for number in ("1", "2", "5"):
        result, threads, ours, _ = run(PRINTS, OMP_NUM_THREADS=number)
        assert threads == ours
        assert threads == number or int(number) > len(os.sched_getaffinity(0))  # MKL takes no more than these
        results[number] = result
    results["set"] = run(PRINTS, "3", OMP_NUM_THREADS="1")[0]
    assert len(set(results.values())) == 1, results


def test_affinity(run):
    """One processor, and more threads than that: slower, and the same."""
    one = str(min(os.sched_getaffinity(0)))
    result, threads, _, usable = run(PRINTS)
    limited = run(PRINTS, before=("taskset", "-c", one))
    assert limited == [result, "1", "1", "1"]
    assert run(PRINTS, "3", before=("taskset", "-c", one)) == [result, "3", "3", "1"]
    assert usable == str(len(os.sched_getaffinity(0))) or int(usable) < int(threads)


def test_affinity_that_changes_while_threads_are_there(run):
    limit = "work(2); os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); found = work("
    script = PRINTS.replace("found = work(", limit)
    result, *_, usable = run(script, "2")
    assert usable == "1"
    assert result == run(PRINTS)[0]


@pytest.fixture
def group():
    """A control group of one's own that gives half a processor, of version 2 or 1; only a few may make one."""
    root = Path("/sys/fs/cgroup")
    parent = root if (root / "cgroup.controllers").exists() else root / "cpu"
    folder = parent / f"qsparseprop-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        try:
            if parent is root:
                (folder / "cpu.max").write_text("50000 100000")
            else:
                (folder / "cpu.cfs_quota_us").write_text("50000")
        except OSError as error:
            pytest.skip(f"control groups limit no processors here: {error}")
        yield folder
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


@pytest.mark.nightly
def test_control_group(run, group):
    """Half a processor's worth of time is one thread, which is what the command line then starts."""
    enter = ("sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh")
    result, *_, usable = run(PRINTS, before=enter)
    assert usable == "1"
    assert result == run(PRINTS)[0]
    text = " ".join(run(PROGRAM, before=enter))
    assert re.search(r"processors that may be used 1\b", text), text
    assert text.endswith("threads (torch.get_num_threads()) 1"), text
