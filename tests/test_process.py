"""Importing the package leaves the process as it was."""

import re
import subprocess
import sys

import pytest

from qsparseprop import config

from ._helpers import example, run_python, sampled

pytestmark = pytest.mark.usefixtures("one_thread")


def test_importing_leaves_the_process_as_it_was():
    """Denormals survive, in every thread, and there is one OpenMP runtime."""
    process = run_python("""
import qsparseprop
import torch
from qsparseprop import config
from qsparseprop.nn import QuantizedSparseLinear
import qsparseprop.utils.network_utils
layer = QuantizedSparseLinear.from_dense(torch.nn.Linear(300, 300))
layer(torch.randn(200, 300)).sum().backward()
tiny = torch.full((1 << 20,), 1e-40)
assert (tiny * 0.5 != 0).all() and (tiny + tiny > tiny).all(), "denormals are flushed to zero"
import numpy
assert (numpy.full(10, 1e-40, numpy.float32) * numpy.float32(0.5) != 0).all()
print(torch.get_num_threads(), len(config.openmp_runtimes()))
""")
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[0] == run_python("import torch; print(torch.get_num_threads())").stdout.strip()


def test_one_openmp_runtime():
    runtimes = config.openmp_runtimes()
    if not runtimes:
        pytest.skip("this operating system does not tell what is mapped")
    if not config.get_config()["openmp"]:
        pytest.skip("a build without OpenMP")
    layer, _, x = example("QuantizedSparseLinear")
    layer(x)
    process = run_python("""
import qsparseprop.nn
import torch
qsparseprop.nn.QuantizedSparseLinear.from_dense(torch.nn.Linear(300, 300))(torch.randn(200, 300)).sum().backward()
from qsparseprop import config
print(*config.openmp_runtimes(), sep="\\n")
""")
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.split("\n")) == 2, process.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux' loader")
def test_modules_find_torchs_openmp_first():
    """Whatever its name is: what is in the global scope comes before what a module asks for."""
    if not any("torch" in path for path in config.openmp_runtimes()):
        pytest.skip("torch has brought no OpenMP runtime along")
    process = run_python("""
import ctypes
import qsparseprop._kernels._dispatch
address = ctypes.cast(ctypes.CDLL(None).omp_get_max_threads, ctypes.c_void_p).value
for line in open("/proc/self/maps"):
    first, last = (int(number, 16) for number in line.split()[0].split("-"))
    if first <= address < last:
        print(line.split()[5])
""")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() in config.openmp_runtimes()
    assert "torch" in process.stdout


@pytest.mark.parametrize(
    ("before", "after"),
    sampled([({}, "threads that wait for others +GOMP_SPINCOUNT="),
             ({"GOMP_SPINCOUNT": "7"}, "threads that wait for others +GOMP_SPINCOUNT=7\n"),
             ({"OMP_WAIT_POLICY": "active"}, "threads that wait for others +OMP_WAIT_POLICY=active\n")], every=2),
)  # fmt: skip
def test_threads_of_the_program_sleep_soon_unless_somebody_says_otherwise(monkeypatch, before, after):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    process = subprocess.run([sys.executable, "-m", "qsparseprop", "info"], capture_output=True, text=True, check=True)
    assert re.search(after, process.stdout), process.stdout


def test_the_environment_of_other_programs_stays_as_it_is(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    process = run_python("import os, qsparseprop; from qsparseprop.cli import main; main(['info']); "
                         "print('GOMP_SPINCOUNT' in os.environ)")  # fmt: skip
    assert process.stdout.endswith("False\n"), process.stdout


FORK = """
import os, sys, warnings
import torch
from qsparseprop.inference import freeze
from qsparseprop.nn import QuantizedSparseLinear, SparseLinear

torch.set_num_threads(2)
dense, x = torch.nn.Linear(1024, 512), torch.randn(600, 1024)
models = [QuantizedSparseLinear.from_dense(dense), SparseLinear.from_dense(dense), freeze(dense, [x])]
with torch.no_grad():
    expected = [model(x).tolist() for model in models]
    child = os.fork()
    if not child:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            same = [model(x).tolist() == y for model, y in zip(models, expected)]
        same = all(same) and len(found) == 1 and "was forked" in str(found[0].message)
        torch.set_num_threads(1)
        (x @ x.T).sum()  # as the sentence says
        os._exit(0 if same else 1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP runtime")
def test_a_process_that_was_forked_after_threads_were_used_computes_with_one():
    """It waited for threads that it has not; torch's own operators still do."""
    process = run_python(FORK)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["0"], process.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="of GNU's OpenMP runtime")
def test_workers_of_data_loaders_compute_without_a_warning():
    process = run_python("""
import torch
from qsparseprop.nn import QuantizedSparseLinear

torch.set_num_threads(2)
layer = QuantizedSparseLinear.from_dense(torch.nn.Linear(512, 512))
x = torch.randn(40, 300, 512)

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return len(x)
    def __getitem__(self, i):
        with torch.no_grad():
            return layer(x[i])

loader = torch.utils.data.DataLoader(Data(), 8, num_workers=2, multiprocessing_context="fork")
with torch.no_grad():
    assert torch.equal(torch.cat(list(loader)), torch.stack([layer(one) for one in x]))
""")
    assert process.returncode == 0, process.stderr
    assert "was forked" not in process.stderr
