"""Frozen models in files: what is written is what is read, in few bytes, whole or not at all."""

from __future__ import annotations

import math
import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qsparseprop.inference.calls import Name
from qsparseprop.inference.containers import write_container
from qsparseprop.inference.data import from_json, to_json
from qsparseprop.inference.files import load_program, read_program, save_program
from qsparseprop.inference.packing import WAYS, pack_weight, part_sizes, unpack_weight
from qsparseprop.inference.program import Program
from qsparseprop.inference.reference import run_reference
from qsparseprop.inference.steps import Call, Product, Value, Weight, Window
from tests._frozen_programs import Builder, random_program
from tests._helpers import examples, run_python

safetensors = pytest.importorskip("safetensors", reason="files of frozen models are read by safetensors")


def weight_of(mask: Tensor, codes: Tensor) -> Weight:
    crow = torch.zeros(mask.shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return Weight(crow, mask.nonzero()[:, 1].to(torch.int32), codes[mask], torch.ones(mask.shape[0]), mask.shape[1])


def program_with_calls() -> tuple[Builder, Program]:
    """Codes, then operators of torch with a constant, arguments of every kind, and two results."""
    b = Builder(random.Random(5))
    name = b.product(b.add_input(3, 8, 8), 6, Window((3, 3)))
    plain = b.dequantize(name)
    b.add_step(
        Call((plain, "shift"), "sum", "aten.add.Tensor", (Name(plain), Name("shift")), {"alpha": 2}), Value((6, 6, 6))
    )
    b.add_step(Call(("sum",), "limited", "aten.clamp.default", (Name("sum"), -math.inf, 0.75)), Value((6, 6, 6)))
    b.add_step(Call(("limited",), "mean", "aten.mean.dim", (Name("limited"), [2, 3]), {"dtype": torch.float64}),
               Value((6,)))  # fmt: skip
    program = Program(tuple(b.inputs), ("mean", "limited"), b.values, tuple(b.steps),
                      {"shift": torch.randn(6, 1, 1), "unread": torch.ones(3)})  # fmt: skip
    return b, program


# ---- what comes back ----


@examples(30)
@given(seed=st.integers(0, 10**6))
def test_programs_come_back_bit_for_bit(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("files") / "model.qsp"
    builder, program = random_program(seed)
    save_program(program, path)
    loaded = load_program(path)
    inputs = builder.tensors(3)
    before, after = {}, {}
    run_reference(program, *inputs, watched=before)
    run_reference(loaded, *inputs, watched=after)
    assert (program.inputs, program.outputs) == (loaded.inputs, loaded.outputs)
    assert all(torch.equal(before[name], after[name]) for name in program.outputs)
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_calls_constants_and_what_is_said_about_a_program_come_back(tmp_path: Path) -> None:
    builder, program = program_with_calls()
    about = {"arguments": ((0, {"mask": 1}), {}), "shapes": [(None, 3, 8, 8)], "dtypes": (torch.float32, torch.int64)}
    save_program(program, tmp_path / "model.qsp", about)
    loaded = read_program(tmp_path / "model.qsp")
    assert loaded.about == about
    assert set(loaded.program.constants) == {"shift"}
    inputs = builder.tensors(2)
    for one, other in zip(run_reference(program, *inputs), run_reference(loaded.program, *inputs), strict=True):
        assert one.dtype is other.dtype
        assert torch.equal(one, other)


def test_constants_stay_in_the_file_and_what_kernels_walk_does_not(tmp_path: Path) -> None:
    _, program = program_with_calls()
    program = replace(program, constants={"shift": torch.randn(6, 1, 1).expand(6, 6, 6)})
    save_program(program, tmp_path / "model.qsp")
    loaded = load_program(tmp_path / "model.qsp")
    size = (tmp_path / "model.qsp").stat().st_size
    mapped = loaded.constants["shift"]
    assert torch.equal(mapped, program.constants["shift"])
    step = next(step for step in loaded.steps if isinstance(step, Product))
    own = [step.bias, step.weight.scale, step.weight.codes, step.weight.col_indices, step.weight.crow_indices]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in own)
    # the file may be replaced, and removed, while it is mapped
    (tmp_path / "model.qsp").unlink()
    assert torch.equal(mapped, program.constants["shift"])
    assert size > mapped.nbytes


def test_the_same_program_makes_the_same_file(tmp_path: Path) -> None:
    _, program = program_with_calls()
    for name in ("one", "other"):
        save_program(program, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_steps_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    builder, program = random_program(3)
    fewer = replace(program, outputs=program.outputs[:1])
    save_program(fewer, tmp_path / "model.qsp")
    loaded = load_program(tmp_path / "model.qsp")
    assert len(loaded.steps) < len(program.steps)
    inputs = builder.tensors(1)
    assert torch.equal(run_reference(loaded, *inputs)[0], run_reference(program, *inputs)[0])


def test_safetensors_reads_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.tensor(7, dtype=torch.int8),
               "c": torch.zeros(0, 5), "d": torch.randn(4, 3).t(), "e": torch.tensor([True, False]),
               "f": torch.randn(5).bfloat16(), "ä/1": torch.arange(3)}  # fmt: skip
    write_container(tmp_path / "file", {"x": 1}, tensors)
    from safetensors.torch import load_file

    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype is tensor.dtype
        assert torch.equal(found[name], tensor)


def test_plain_data_comes_back() -> None:
    for value in (None, True, 3, -(1 << 63), 0.5, math.inf, -math.inf, "x", (), [1, (2, [Name("y"), None])],
                  {"a": 1, 2: (3,)}, torch.float16, torch.channels_last, torch.device("cpu"),
                  torch.strided):  # fmt: skip
        found = from_json(to_json(value))
        assert found == value
        assert type(found) is type(value)
    assert math.isnan(from_json(to_json(math.nan)))
    for value in (1 << 63, object(), torch.ones(1), torch.device("meta"), 1j, b"x", {1.5: 2} and {(1,): object()}):
        with pytest.raises(ValueError, match="cannot be written"):
            to_json(value)


# ---- sizes ----


@pytest.mark.parametrize("columns", [64, 576, 4608])
@pytest.mark.parametrize(("zeros", "way", "most"), [
    (0.0, "matrix", 1.0), (0.1, "matrix", 1.13), (0.5, "bitmap", 1.27), (0.7, "bitmap", 1.45),
    (0.8, "elias-fano", 1.55),
    (0.9, "elias-fano", 1.68), (0.95, "elias-fano", 1.82), (0.98, "elias-fano", 2.0), (0.99, "elias-fano", 2.12),
])  # fmt: skip
def test_a_nonzero_takes_at_most_two_bytes_and_a_fifth(zeros: float, way: str, most: float, columns: int) -> None:
    g = torch.Generator().manual_seed(columns)
    mask = torch.rand(256, columns, generator=g) >= zeros
    packed = pack_weight(weight_of(mask, torch.randint(1, 128, mask.shape, generator=g).to(torch.int8)))
    assert packed.way == way
    assert sum(part.nbytes for part in packed.parts.values()) / packed.nonzeros <= most


def test_a_file_is_little_more_than_its_weights(tmp_path: Path) -> None:
    b = Builder(random.Random(0))
    name = b.add_input(512, 7, 7)
    for _ in range(3):
        name = b.product(name, 512, Window((3, 3), padding=(1, 1, 1, 1)), density=0.1)
    program = b.program(b.dequantize(name))
    save_program(program, tmp_path / "model.qsp")
    nonzeros = sum(int((step.weight.codes != 0).sum()) for step in program.steps if isinstance(step, Product))
    assert (tmp_path / "model.qsp").stat().st_size / nonzeros <= 1.75


def test_tensors_of_the_same_content_are_written_once(tmp_path: Path) -> None:
    b = Builder(random.Random(0))
    name = b.add_input(64, 9, 9)
    first = b.product(name, 64, Window((3, 3), padding=(1, 1, 1, 1)))
    again = replace(b.steps[-1], inputs=(first,), output="again")
    b.add_step(again, b.values[first])
    pooled = b.pool("again", "max", Window((2, 2)))
    program = b.program(b.dequantize(pooled))
    save_program(program, tmp_path / "model.qsp")
    step = next(step for step in program.steps if isinstance(step, Product))
    assert (tmp_path / "model.qsp").stat().st_size < 1.5 * step.weight.codes.numel() * 1.6
    loaded = load_program(tmp_path / "model.qsp")
    one, other = (step.weight for step in loaded.steps if isinstance(step, Product))
    assert one is other
    inputs = b.tensors(2)
    assert torch.equal(run_reference(loaded, *inputs)[0], run_reference(program, *inputs)[0])


@examples(200)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 40), columns=st.integers(1, 300),
       zeros=st.sampled_from([0.0, 0.1, 0.4, 0.8, 0.95, 0.999, 1.0]))  # fmt: skip
def test_every_way_gives_the_weight_back(seed: int, rows: int, columns: int, zeros: float) -> None:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=g) >= zeros
    weight = weight_of(mask, torch.randint(-127, 128, mask.shape, generator=g).to(torch.int8))
    packed = pack_weight(weight)
    found = unpack_weight(packed, weight.scale)
    assert torch.equal(found.dense(), weight.dense())
    assert found.codes.all()  # those that are zero are left out
    assert {name: part.numel() for name, part in packed.parts.items()} == part_sizes(
        packed.way, rows, columns, packed.nonzeros
    )
    sizes = [sum(part_sizes(way, rows, columns, packed.nonzeros).values()) for way in WAYS]
    assert sum(part.numel() for part in packed.parts.values()) == min(sizes)


# ---- whole or not at all ----


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits of files are POSIX's")
    _, program = program_with_calls()
    path = tmp_path / "model.qsp"
    save_program(program, path)
    before = path.read_bytes()
    code = """
import resource, signal, sys
from qsparseprop.inference.files import load_program, save_program
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
program = load_program(sys.argv[1])
for room in (0, 1, 100, 2000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        save_program(program, sys.argv[1])
    except OSError as error:
        print(error.filename == sys.argv[1])
"""
    process = run_python(code, str(path))
    assert (process.returncode, process.stdout.split()) == (0, ["True"] * 4), process.stderr
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_process_that_is_killed_leaves_the_file_before(tmp_path: Path) -> None:
    _, program = program_with_calls()
    path = tmp_path / "model.qsp"
    save_program(program, path)
    before = path.read_bytes()
    code = """
import os, sys
from qsparseprop.inference import files
from qsparseprop.utils import files as whole
program = files.load_program(sys.argv[1])
os.replace = lambda *names: os._exit(9)
files.save_program(program, sys.argv[1])
"""
    assert run_python(code, str(path)).returncode == 9
    assert path.read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
def test_others_may_read_the_file_as_they_may_any_other(tmp_path: Path) -> None:
    _, program = program_with_calls()
    save_program(program, tmp_path / "model.qsp")
    (tmp_path / "other").write_bytes(b"x")
    assert (tmp_path / "model.qsp").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_program_that_could_not_be_loaded_is_not_written(tmp_path: Path) -> None:
    _, program = program_with_calls()
    steps = tuple(replace(s, operator="aten.empty_like.default") if isinstance(s, Call) else s for s in program.steps)
    with pytest.raises(ValueError, match=r"aten\.empty_like\.default.*not among the operators"):
        save_program(replace(program, steps=steps), tmp_path / "model.qsp")
    complex_ = replace(program, constants={"shift": torch.randn(6, 1, 1, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"constants/shift.*known dtype"):
        save_program(complex_, tmp_path / "model.qsp")
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_an_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program = program_with_calls()
    save_program(program, tmp_path / "model.qsp")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'qsparseprop\[inference\]'"):
        load_program(tmp_path / "model.qsp")


def test_large_gaps_take_no_more() -> None:
    """A row of 65,536 columns with three nonzeros, and none at all."""
    weight = Weight(torch.tensor([0, 3, 3], dtype=torch.int32), torch.tensor([0, 40000, 65535], dtype=torch.int32),
                    torch.tensor([1, -127, 127], dtype=torch.int8), torch.ones(2), 65536)  # fmt: skip
    packed = pack_weight(weight)
    assert sum(part.numel() for part in packed.parts.values()) <= 12
    found = unpack_weight(packed, weight.scale)
    assert np.array_equal(found.col_indices, [0, 40000, 65535])
    assert np.array_equal(found.codes, [1, -127, 127])
