import os
import platform
from pathlib import Path

import pytest
import torch

import qsparseprop
from qsparseprop import config
from qsparseprop._kernels import _dispatch

from ._helpers import run_python, sampled

KEYS = {"qsparseprop", "torch", "python", "platform", "isa_built", "isa_supported", "isa_chosen", "openmp",
        "openmp_runtimes", "openmp_waiting", "threads", "cpu", "processors", "compiler", "torch_build"}  # fmt: skip
CHOSEN = "from qsparseprop._kernels import _dispatch; print(_dispatch.active_isa())"


def test_get_config():
    found = config.get_config()
    assert found.keys() >= KEYS
    assert found["qsparseprop"] == qsparseprop.__version__
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["isa_built"][0] == "scalar"
    assert set(found["isa_supported"]) <= set(found["isa_built"])
    assert found["isa_chosen"] in found["isa_supported"]
    assert isinstance(found["openmp"], bool)
    assert 1 <= found["processors"] <= os.cpu_count()
    assert found["cpu"]
    assert found["compiler"].split()[0] in ("GCC", "Clang", "unknown")
    assert "\n" not in found["torch_build"]
    assert all(os.path.isabs(path) for path in found["openmp_runtimes"])


@pytest.mark.parametrize(
    ("told", "name"),
    [("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n\nmodel name\t: another\n", "Some CPU @ 2 GHz"),
     ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\nCPU part\t: 0xd46\n",
      f"{platform.machine()}, implementer 0x41, part 0xd0c"),
     ("nothing of the kind\n", platform.processor() or platform.machine())],
)  # fmt: skip
def test_processors_have_names(monkeypatch, told, name):
    """What is measured on one machine is not to be taken for another, which may share its home directory."""
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert config.cpu_model() == name


def test_threads_follow_torch():
    if not config.get_config()["openmp"]:
        pytest.skip("a build without OpenMP")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert config.get_config()["threads"] == threads


def test_show_config(capsys):
    assert qsparseprop.show_config() is None
    out = capsys.readouterr().out
    lines = out.splitlines()
    found = config.get_config()
    assert len(lines) == len(found)
    for line, value in zip(lines, found.values(), strict=True):
        label, shown = line[:40].rstrip(), line[40:].strip()
        assert label
        assert shown
        if isinstance(value, str):
            assert shown == value
        elif isinstance(value, list):
            assert shown == (", ".join(value) or "unknown")
        elif isinstance(value, bool):
            assert shown.startswith("yes" if value else "no")
        else:
            assert shown == str(value)
    assert "QSPARSEPROP_ISA" in out
    assert f"OpenMP runtimes ({len(found['openmp_runtimes'])} mapped, 1 is right)" in out
    assert len(lines) < 24  # one screen


def test_public_names():
    for name in qsparseprop.__all__:
        assert hasattr(qsparseprop, name)


def test_the_widest_instruction_set_is_the_default():
    process = run_python(CHOSEN)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == _dispatch.supported_isas()[-1]


@pytest.mark.parametrize("isa", sampled(_dispatch.supported_isas()))
def test_the_environment_chooses_the_instruction_set(isa):
    process = run_python(CHOSEN, QSPARSEPROP_ISA=f" {isa.upper()} ")
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == isa


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices():
    process = run_python("import qsparseprop", QSPARSEPROP_ISA="mmx")
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    assert "QSPARSEPROP_ISA=mmx" in last
    for name in _dispatch.built_isas():
        assert name in last


@pytest.mark.parametrize("isa", sorted(set(_dispatch.built_isas()) - set(_dispatch.supported_isas())))
def test_an_instruction_set_that_the_processor_lacks_is_an_error(isa):
    process = run_python("import qsparseprop", QSPARSEPROP_ISA=isa)
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError")
    for name in (isa, *_dispatch.supported_isas()):
        assert name in last


def test_an_empty_variable_is_no_choice():
    process = run_python(CHOSEN, QSPARSEPROP_ISA="  ")
    assert process.stdout.strip() == _dispatch.supported_isas()[-1]


def test_set_isa():
    before = _dispatch.active_isa()
    try:
        assert _dispatch.set_isa("scalar") == before
        assert _dispatch.active_isa() == config.get_config()["isa_chosen"] == "scalar"
        with pytest.raises(ValueError, match=r"'mmx'.*scalar"):
            _dispatch.set_isa("mmx")
        assert _dispatch.active_isa() == "scalar"
    finally:
        _dispatch.set_isa(before)
