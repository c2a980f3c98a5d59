"""How many processors a process may use."""

import os
import subprocess
import sys

import pytest

from qsparseprop import _processors, config
from qsparseprop.cli import _openmp


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Eight processors, and control groups that a test says."""
    monkeypatch.setattr(_processors, "visible_processors", lambda: 8)
    monkeypatch.setattr(_openmp, "visible_processors", lambda: 8)
    monkeypatch.setattr(_processors, "_PROC", tmp_path / "self")
    monkeypatch.setattr(_processors, "_CGROUP", tmp_path / "cgroup")

    def write(own, **files):
        (tmp_path / "self").write_text(own)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_max", ".max").replace("_cfs", ".cfs")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("own", "files", "wanted"),
    [
        ("", {}, 8),
        ("0::/", {"cpu_max": "max 100000"}, 8),
        ("0::/", {"cpu_max": "200000 100000"}, 2),
        ("0::/", {"cpu_max": "150000 100000"}, 2),
        ("0::/", {"cpu_max": "5000 100000"}, 1),
        ("0::/", {"cpu_max": "3200000 100000"}, 8),
        ("0::/", {"cpu_max": "nonsense"}, 8),
        ("0::/", {"cpu_max": "0 0"}, 8),
        # the least of a group and those that it is in
        ("0::/a/b", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "max 100000"}, 3),
        ("0::/a/b", {"a__cpu_max": "300000 100000", "a__b__cpu_max": "500000 100000"}, 3),
        # of a container the path may be one outside
        ("0::/../docker/x", {"cpu_max": "400000 100000"}, 4),
        # version 1
        ("4:cpu,cpuacct:/a\n2:memory:/a", {"cpu,cpuacct__a__cpu_cfs_quota_us": "200000",
                                            "cpu,cpuacct__a__cpu_cfs_period_us": "100000"}, 2),
        ("4:cpu,cpuacct:/", {"cpu,cpuacct__cpu_cfs_quota_us": "-1", "cpu,cpuacct__cpu_cfs_period_us": "100000"}, 8),
    ],
)  # fmt: skip
def test_limits_of_control_groups(groups, own, files, wanted):
    groups(own, **files)
    assert _processors.allowed_processors() == wanted
    assert config.usable_processors() == wanted


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinities are Linux's")
def test_affinity():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " \
           "from qsparseprop._processors import *; print(visible_processors(), allowed_processors())"  # fmt: skip
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["1", "1"]


def test_the_program_starts_as_many_threads_as_it_may_use(groups, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for given, limit, wanted in ((None, "200000 100000", "2"), ("5", "200000 100000", "5"), (None, "max 100000", None)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        groups("0::/", cpu_max=limit)
        _openmp.prepare_threads()
        assert os.environ.get("OMP_NUM_THREADS") == wanted
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
