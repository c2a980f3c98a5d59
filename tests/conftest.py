"""Fixtures shared by the tests."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Processes that share the machine (pytest -n) take each other's processors if each has a team of threads, which spin
# while they wait. Tests of threads ask for them. Read when the OpenMP runtime is loaded, with torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from qsparseprop._kernels import _dispatch
from qsparseprop.layout import costs
from qsparseprop.nn.deferred import conditions
from qsparseprop.utils import _layer_timing

from ._helpers import generator
from ._swapping import SHAPE, Net

# Expected values must not depend on the libraries that torch calls on some processors: .ci/nightly runs without them.
if os.environ.get("QSPARSEPROP_TEST_NO_MKLDNN"):
    torch.backends.mkldnn.set_flags(False)

# Which way products go must not depend on the machine, and nothing is written into anybody's home: with these costs, in
# the processes that tests start as well, dense rows are faster from half of the weights on.
_folder = tempfile.TemporaryDirectory(prefix="qsparseprop-")
os.environ["QSPARSEPROP_COSTS"] = str(Path(_folder.name, "costs.json"))
_COSTS = costs.Costs(spmm_list=1.0, spmm_dense=0.5, sddmm_list=1.0, sddmm_dense=0.5, interleave=1.0)
costs.costs_file().write_text(json.dumps({costs.cost_key(isa): _COSTS._asdict() for isa in _dispatch.built_isas()}))

# Jobs that a script starts in the background ignore Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Timings of a shared machine must not fail a test, and a failing example must be found again. At every push a third of
# the examples is tried, at night all (pytest --hypothesis-profile=nightly).
for _tier, _percent in ("push", 34), ("nightly", 100):
    hypothesis.settings.register_profile(
        _tier, max_examples=_percent, deadline=None, derandomize=True, print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )  # fmt: skip
hypothesis.settings.load_profile("push")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random numbers and leaves threads as they were."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _defer_small_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks form on the small tensors of tests, too."""
    monkeypatch.setattr(conditions, "LEAST_ELEMENTS", 0)


@pytest.fixture
def one_thread(_seeded: None) -> None:
    """Small tensors only: on a busy machine a team of threads costs more than the work. Some tests set their own."""
    torch.set_num_threads(1)


@pytest.fixture
def sparse_is_faster(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which layers a swap replaces must not depend on the machine."""

    def pays(dense, sparse, seen, decision, fuse):
        decision.dense_ms, decision.sparse_ms = 2.0, 1.0
        return True, None

    monkeypatch.setattr(_layer_timing, "_pays", pays)


@pytest.fixture
def net() -> Net:
    """A network with layers to replace."""
    return Net()


@pytest.fixture
def images() -> torch.Tensor:
    """An input of that network."""
    return torch.randn(SHAPE, generator=generator(1))


@pytest.fixture(params=_dispatch.built_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each instruction set that this machine can run."""
    if request.param not in _dispatch.supported_isas():
        pytest.skip(f"this processor cannot run the {request.param} kernels")
    previous = _dispatch.set_isa(request.param)
    yield request.param
    _dispatch.set_isa(previous)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with data and weights that are not part of the project; tests that want it skip where it is missing."""
    path = Path(os.environ.get("QSPARSEPROP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the folder of shared data, looked for at {path} (QSPARSEPROP_SHARED names another)")
    return path
