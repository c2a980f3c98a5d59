"""One OpenMP runtime: torch's, whatever its name, whoever else brings one, and whichever compiler built the modules."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qsparseprop import config
from qsparseprop._kernels import _dispatch, _runtime

from ._helpers import run_python, sampled

OPENMP = Path(__file__).resolve().parents[1] / "qsparseprop" / "_kernels" / "openmp"

needs_torchs = pytest.mark.skipif(
    _dispatch.openmp_of != "torch" or not config.openmp_runtimes(),
    reason="another runtime, or a system that tells of none",
)

COMPUTE = """
import qsparseprop.nn, torch
torch.set_num_threads(2)
layer = qsparseprop.nn.QuantizedSparseLinear.from_dense(torch.nn.Linear(300, 300))
layer(torch.randn(200, 300)).sum().backward()
"""
#: The same lines for processes that do not have the package, too.
SHOW = """
with open("/proc/self/maps") as maps:
    paths = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
print(*sorted(p for p in paths if any(name in p for name in ("libgomp", "libomp", "libiomp"))), sep="\\n")
"""


def runtimes(code: str) -> set[str]:
    """Paths of the runtimes that are mapped in a process of its own after this code."""
    process = run_python(code + SHOW)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.split())


@needs_torchs
@pytest.mark.parametrize(
    ("before", "after"),
    sampled([("import sklearn.cluster", ""), ("import torch, sklearn.cluster", ""), ("", "import sklearn.cluster"),
             ("import sklearn.cluster, torch", ""), ("", "import torch"), ("import torch", "")], every=2),
)  # fmt: skip
def test_the_package_brings_no_runtime(before, after):
    if "sklearn" in before + after:
        pytest.importorskip("sklearn")
    without = runtimes(f"import torch\n{before}\n{after}\n")
    assert without, "torch has none?"
    assert runtimes(f"{before}\n{COMPUTE}\n{after}\n") == without


@needs_torchs
@pytest.mark.parametrize("order", ["import qsparseprop, sklearn.cluster", "import sklearn.cluster, qsparseprop"])
def test_the_kernels_threads_are_torchs(order):
    """Where scikit-learn has brought a runtime, its threads stay as they are."""
    pytest.importorskip("sklearn")
    process = run_python(f"""
{order}
import ctypes, torch, threadpoolctl
entry = ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value # the modules name no library
torchs = ctypes.CDLL(torch.__path__[0] + "/lib/libtorch_cpu.so")
assert entry == ctypes.cast(torchs.GOMP_parallel, ctypes.c_void_p).value
assert len([i for i in threadpoolctl.threadpool_info() if i["user_api"] == "openmp"]) == 2
""")
    assert process.returncode == 0, process.stderr


@needs_torchs
def test_a_runtime_that_torch_keeps_to_itself_is_shared():
    """As in builds whose first library does not load it, with a name that nobody else knows."""
    process = run_python("""
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_runtime", sys.argv[1])
runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtime)
everybodys = ctypes.CDLL(None)
assert not hasattr(everybodys, "GOMP_parallel"), "Python itself has one"
found = runtime.share_runtime(["/no/such/library.so", sys.argv[2]], system=[])
assert hasattr(ctypes.CDLL(None), "GOMP_parallel")
assert not hasattr(ctypes.CDLL(None), "THPVariable_Wrap"), "all of torch is everybody's"
assert runtime.share_runtime([], system=[]) == found, "it is there now"
print(found)
""", _runtime.__file__, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.strip()).resolve() in {Path(path).resolve() for path in runtimes("import torch")}


@pytest.mark.skipif(sys.platform == "win32", reason="the modules name their runtime there")
def test_the_systems_runtime_is_the_last_resort():
    process = run_python("""
import ctypes, importlib.util, sys
spec = importlib.util.spec_from_file_location("_runtime", sys.argv[1])
runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runtime)
assert runtime.share_runtime([], system=["libno-such-runtime.so.7"]) is None
assert runtime.share_runtime([], system=["libno-such-runtime.so.7", sys.argv[2]]) == sys.argv[2]
""", _runtime.__file__, next(iter(config.openmp_runtimes()), "libgomp.so.1"))  # fmt: skip
    assert process.returncode == 0, process.stderr


def test_torch_without_a_runtime_is_refused_by_a_sentence(monkeypatch):
    monkeypatch.setattr(_runtime, "share_runtime", lambda callers: None)
    with pytest.raises(ImportError, match="QSPARSEPROP_NO_OPENMP=1"):
        _runtime.share_torchs_runtime()


#: Cython's loops, in both schedules: every index once, whatever the number of threads, and what the last one wrote.
LOOPS = """
#include <omp.h>
#include <stdio.h>
#include <string.h>
static long hits[400];
int main(void)
{
    for (int threads = 1; threads <= 5; threads++)
        for (long n = 0; n < 400; n += n < 20 ? 1 : 37)
            for (int parallel = 0; parallel < 2; parallel++) {
                long i, last = -1;
                int entered = 0;
                memset(hits, 0, sizeof hits);
                #pragma omp parallel if(parallel) num_threads(threads)
                {
                    #pragma omp for nowait lastprivate(i, last) schedule(static)
                    for (i = 0; i < n; i++) { __sync_fetch_and_add(&hits[i], 1); last = i; }
                    #pragma omp barrier
                    #pragma omp for lastprivate(i, last) schedule(dynamic)
                    for (i = 0; i < n; i++) { __sync_fetch_and_add(&hits[i], 10); last = i; }
                    #pragma omp for nowait schedule(dynamic, 7)
                    for (i = 0; i < n; i++) __sync_fetch_and_add(&hits[i], 100);
                    __sync_fetch_and_add(&entered, 1);
                }
                for (i = 0; i < n; i++)
                    if (hits[i] != 111)
                        return printf("index %ld of %ld: %ld\\n", i, n, hits[i]), 1;
                if (entered != (parallel ? threads : 1) || (n && last != n - 1))
                    return printf("%d of %d threads, %ld last of %ld\\n", entered, threads, last, n), 1;
            }
    return 0;
}
"""


@pytest.mark.skipif(not (OPENMP / "kmpc.c").is_file(), reason="needs the sources")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the file is empty")
@pytest.mark.skipif(not (shutil.which("clang") and shutil.which("gcc")), reason="needs clang, and gcc for its runtime")
def test_clangs_loops_run_on_gnus_runtime(tmp_path):
    (tmp_path / "loops.c").write_text(LOOPS)
    strict = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror"]
    flags = [*strict, "-fopenmp", "-O2", f"-I{OPENMP}", "-DQSPARSEPROP_OPENMP=1"]
    for source in (tmp_path / "loops.c", OPENMP / "kmpc.c"):
        subprocess.run(["clang", *flags, "-c", source, "-o", tmp_path / f"{source.stem}.o"], check=True)
    program = tmp_path / "loops"
    subprocess.run(["gcc", tmp_path / "loops.o", tmp_path / "kmpc.o", "-lgomp", "-o", program], check=True)
    for _ in range(3):
        process = subprocess.run([program], env={"OMP_WAIT_POLICY": "passive"}, stdout=subprocess.PIPE, check=False)
        assert process.returncode == 0, process.stdout
