"""Any file given to `info` and `read_state_dict`: a table or one sentence; no traceback, no hang, not much memory."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from qsparseprop import nn as sparse_nn
from qsparseprop.cli import main
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.measurement_utils import measure_peak_rss
from qsparseprop.utils.state_files import read_state_dict, stored_bytes
from qsparseprop.utils.state_report import format_weights, weight_infos

from ._helpers import run_python


def zip_with(path, records, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def saved_bytes(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()


def torchscript(path):
    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))

        def forward(self, x):
            return x @ self.weight

    torch.jit.save(torch.jit.trace(Scripted(), torch.ones(1, 2)), path)


def npz(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))


def compressed(path):
    """Zeros of 40 MB in a file of 40 kB."""
    torch.save({"weight": torch.zeros(10_000_000, dtype=torch.float32).view(2, -1)}, path)
    zip_with(path, records_of(path), zipfile.ZIP_DEFLATED)


def lying_numel(path):
    torch.save({"weight": torch.arange(12.0).view(3, 4)}, path)
    records = records_of(path)
    (name,) = [name for name in records if name.endswith("data.pkl")]
    records[name] = records[name].replace(b"K\x0ct", b"J" + struct.pack("<i", 10**8) + b"t", 1)
    zip_with(path, records)


def lying_header(path):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))


FILES = {
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), "cannot read it"),
    "text": (lambda path: path.write_text("hello\nworld\n"), "cannot read it"),
    "numbers": (lambda path: path.write_text("I1\n."), "cannot read it"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "folder": (lambda path: path.mkdir(), "it is a folder"),
    "whole module": (lambda path: torch.save(nn.Linear(3, 4), path), r"torch\.nn\.modules\.linear\.Linear"),
    "whole module, old format": (
        lambda path: torch.save(nn.Linear(3, 4), path, _use_new_zipfile_serialization=False), "state_dict"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"weight": np.ones(3)})), "cannot read it|Python objects"),
    "torchscript": (torchscript, "TorchScript"),
    "onnx": (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.13\x3a" + bytes(50)), "cannot read it"),
    "truncated": (lambda path: path.write_bytes(saved_bytes({"a": torch.ones(50, 50)})[:-40]), "incomplete zip"),
    "truncated, old format": (
        lambda path: path.write_bytes(
            saved_bytes({"a": torch.ones(50, 50)}, _use_new_zipfile_serialization=False)[:-400]), "cannot read it"),
    "npz": (npz, "arrays of NumPy"),
    "zip": (lambda path: zip_with(path, {"a.txt": b"hello"}), "not from torch.save"),
    "compressed": (compressed, "compressed or forged"),
    # older versions of torch read the file, and we compare
    "lying numel": (lying_numel, "cannot read it|its tensors take 400000000 bytes"),
    "list": (lambda path: torch.save([torch.ones(3)], path), "it is a list"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "it is a Tensor"),
    "no tensors": (lambda path: torch.save({"a": 1, "b": {"c": torch.ones(3)}}, path), "its keys are a, b"),
    "nothing": (lambda path: torch.save({}, path), "its keys are none"),
    "numbered": (lambda path: torch.save({0: torch.ones(3), "a": torch.ones(3)}, path), "its keys are 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_no_file_of_weights_is_refused_by_a_sentence(kind, tmp_path, capsys):
    make, complaint = FILES[kind]
    path = tmp_path / "file"
    make(path)
    with pytest.raises(ConfigurationError, match=complaint) as caught:
        read_state_dict(path)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{path} holds no weights: ")
    with pytest.raises(SystemExit) as stop:
        main(["info", str(path)])
    assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights.safetensors", "weights"])
def test_lying_safetensors(name, tmp_path):
    pytest.importorskip("safetensors")
    lying_header(tmp_path / name)
    with pytest.raises(ConfigurationError, match="no valid file of safetensors"):
        read_state_dict(tmp_path / name)
    (tmp_path / name).write_bytes(struct.pack("<Q", 2**60) + b"{" + bytes(30))
    with pytest.raises(ConfigurationError, match=r"no valid file of safetensors|cannot read it"):
        read_state_dict(tmp_path / name)


def test_safetensors_of_any_name(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"module.weight": torch.eye(3)}, tmp_path / "weights.bin")
    assert torch.equal(read_state_dict(tmp_path / "weights.bin")["weight"], torch.eye(3))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_devices_and_pipes_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code = "import sys; from qsparseprop.utils.state_files import read_state_dict; read_state_dict(sys.argv[1])"
    process = run_python(code, str(tmp_path / "pipe"))  # it would wait
    assert "holds no weights: it is no regular file" in process.stderr.splitlines()[-1]
    with pytest.raises(ConfigurationError, match="no regular file"):
        read_state_dict("/dev/zero")


def test_memory_stays_in_proportion_to_the_file(tmp_path):
    compressed(tmp_path / "file")

    def read():
        with pytest.raises(ConfigurationError):
            read_state_dict(tmp_path / "file")

    peak = measure_peak_rss(read)
    if peak.of_call:
        assert peak.added_mb < 10


def test_old_files_that_claim_more_than_they_hold(tmp_path):
    # storages that nothing is read into: the list of keys behind the pickle is left out
    content = saved_bytes({"weight": torch.ones(1000, 1000)}, _use_new_zipfile_serialization=False)
    keys = content.rindex(b"\x80\x02]")
    path = tmp_path / "file"
    path.write_bytes(content[:keys] + pickle.dumps([], protocol=2))
    with pytest.raises(ConfigurationError, match="4000000 bytes"):
        read_state_dict(path)


def test_names_of_wrappers_and_prefixes(tmp_path):
    path = tmp_path / "file"
    state = {"module.a.weight": torch.eye(2), "note": "kept out"}
    for content in (state, {"state_dict": state}, {"model": state, "optimizer": {}}, {"model_state_dict": state}):
        torch.save(content, path)
        assert list(read_state_dict(path)) == ["a.weight"]
    # both would have the same name
    torch.save({"module.weight": torch.eye(2), "weight": torch.eye(3)}, path)
    assert set(read_state_dict(path)) == {"module.weight", "weight"}


# ---- tables of states that nobody has checked ----

HUGE = torch.ones(1).expand(10**6, 10**6)


def info_of(state, key="w"):
    (info,) = [info for info in weight_infos(state) if info.name == key]
    assert info.name in format_weights(weight_infos(state))
    return info


@pytest.mark.parametrize(("tensor", "nonzeros", "size", "note"), [
    (HUGE, None, 4, "share memory"),
    (torch.arange(3.0).as_strided((2, 2), (1, 1)), None, 12, "share memory"),
    (torch.empty(10**6, 10**6, device="meta"), None, 0, "meta"),
    (torch.tensor([[0.0, -0.0, 3.0]]).to(torch.float8_e4m3fn), 1, 3, ""),
    (torch.tensor([[0.0, 1.0, 3.0]]).to(torch.float8_e5m2), 2, 3, ""),
    (torch.tensor([[0.0, 1j, 3.0]]), 2, 24, ""),
    (torch.tensor([[0.0, 1j, 3.0]]).conj().imag, 1, 12, ""),
    (torch.eye(4).to_sparse(), 4, 4 * 16 + 16, ""),
    (torch.eye(4).expand(2, 4, 4)[0].T, 4, 64, ""),
    (torch.ones(0, 5), 0, 0, ""),
    (torch.tensor([[0.0, float("nan")]]), 1, 8, ""),
], ids=str)  # fmt: skip
def test_tensors_of_all_kinds(tensor, nonzeros, size, note):
    info = info_of({"w": tensor})
    assert info.shape == tuple(tensor.shape)
    assert (info.nonzeros, info.bytes) == (nonzeros, size)
    assert note in info.note


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state", "ignore:.*quantized.*deprecated")
def test_layouts_and_dtypes_that_are_not_counted():
    info = info_of({"w": torch.eye(4).to_sparse_csr()})
    assert (info.sparse, info.nonzeros, info.shape, info.bytes) == (True, 4, (4, 4), 4 * 4 + 8 * 5 + 8 * 4)
    others = {"q": torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8), "i": torch.eye(3, dtype=torch.int8),
              "big": torch.ones(1, dtype=torch.int64).expand(10**6, 10**6), "s": torch.tensor(3.0)}  # fmt: skip
    (other,) = weight_infos(others)
    assert other.shape == (16 + 9 + 10**12 + 1,)
    assert other.bytes == 16 + 9 + 8 + 4
    assert info_of({"w": nn.LazyLinear(3).weight}).note == "does not exist yet"
    assert [info.name for info in weight_infos({"a": "text", "_extra_state": {"b": 1}})] == ["(other)"]


def test_views_of_one_memory_are_not_counted_for_ever():
    block = torch.ones(100, 100)
    infos = weight_infos({str(i): block for i in range(100)})[:-1]
    assert [info.nonzeros for info in infos[:3]] == [10_000] * 3
    assert infos[-1].nonzeros is None
    assert "shares memory" in infos[-1].note


def sparse_state(**changes):
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(24).view(4, 6) % 3 == 1)
    return {**sparse_nn.QuantizedSparseLinear.from_dense(layer).state_dict(), **changes}


def test_sparse_layers():
    info = info_of(sparse_state(), "weight")
    assert (info.shape, info.nonzeros, info.note) == ((4, 6), 8, "")


@pytest.mark.parametrize("extra", [
    torch.tensor([1.0, 4.0, 6.0]), torch.tensor(1), torch.tensor([1]), torch.tensor([1, 4]), torch.tensor([1, 5, 6]),
    torch.tensor([1, 4, -6]), torch.tensor([1, 4, 1]), torch.ones(1, dtype=torch.int64).expand(10**12),
    torch.ones(3, dtype=torch.int64, device="meta"), torch.ones(3, dtype=torch.int64).to_sparse(),
    torch.ones(100, dtype=torch.int64), torch.tensor([[1, 4, 6]]),
], ids=str)  # fmt: skip
def test_extra_states_that_do_not_fit(extra):
    info = info_of(sparse_state(_extra_state=extra), "weight")
    assert "_extra_state does not fit" in info.note
    assert info.shape == (4, 5)


def test_extra_states_of_huge_sizes():
    info = info_of(sparse_state(_extra_state=torch.tensor([1, 4, 2**62, 2**62])), "weight")
    assert info.shape == (4, 2**62, 2**62)
    assert info.sparsity == pytest.approx(1)
    assert "reaches" in info_of({k: v for k, v in sparse_state().items() if k != "_extra_state"}, "weight").note
    # no tensor: as if it were not there
    assert "reaches" in info_of(sparse_state(_extra_state=[1, 4, 6]), "weight").note


@pytest.mark.parametrize("changes", [
    {"col_indices": torch.zeros(1, dtype=torch.int32).expand(10**12)}, {"col_indices": None}, {"crow_indices": HUGE},
    {"weight": HUGE}, {"weight": torch.ones(3)}, {"col_indices": torch.zeros(8, 1)}, {"weight": torch.eye(8)},
], ids=str)  # fmt: skip
def test_patterns_that_do_not_fit(changes):
    info = info_of(sparse_state(**changes), "weight")
    assert info.nonzeros is None
    assert "do not go together" in info.note


def test_patterns_without_values():
    expanded = {key: torch.zeros(1, dtype=dtype).expand(10**12)
                for key, dtype in (("weight", torch.float32), ("col_indices", torch.int32))}  # fmt: skip
    info = info_of(sparse_state(**expanded, _extra_state=torch.tensor([1, 4])), "weight")
    assert info.note == "its shape is not known"
    assert info.bytes == 4 + 4 + 4 * 5


def test_huge_tensors_in_a_file(tmp_path, capsys):
    torch.save({"w": torch.ones(1).expand(10**6, 10**6), "v": torch.eye(3)}, tmp_path / "file")
    assert main(["info", str(tmp_path / "file")]) == 0
    assert "1000000x1000000" in capsys.readouterr().out


def test_names_that_a_terminal_would_obey(tmp_path, capsys):
    torch.save({"a\x1b[2J\nb\ud800": torch.eye(3), "größe": torch.eye(2)}, tmp_path / "file")
    assert main(["info", str(tmp_path / "file")]) == 0
    printed = capsys.readouterr().out
    assert "a\\x1b[2J\\nb" in printed
    assert "größe" in printed


def test_names_that_are_none():
    with pytest.raises(TypeError, match="strings, got int"):
        weight_infos({0: torch.eye(3)})


def test_stored_bytes():
    assert stored_bytes(torch.ones(3, 4)[:, 1]) == 12
    assert stored_bytes(HUGE) == 4
    assert stored_bytes(torch.ones(2, device="meta")) is None
    assert stored_bytes(torch.eye(3).to_sparse()) is None


# ---- files damaged at random: in a process of its own, which may not crash, hang or grow ----

DAMAGED = """
import io, json, random, resource, sys
import torch
from torch import nn
from qsparseprop import nn as sparse_nn
from qsparseprop.utils.errors import ConfigurationError
from qsparseprop.utils.state_files import read_state_dict
from qsparseprop.utils.state_report import format_weights, weight_infos

path, count = sys.argv[1], int(sys.argv[2])
random.seed(0)
torch.manual_seed(0)
layer = nn.Linear(20, 10)
with torch.no_grad():
    layer.weight *= torch.rand(10, 20) < 0.2
state = {**sparse_nn.QuantizedSparseLinear.from_dense(layer).state_dict(), "conv.weight": torch.randn(4, 3, 3, 3)}

def saved(content, **settings):
    buffer = io.BytesIO()
    torch.save(content, buffer, **settings)
    return buffer.getvalue()

sources = [saved({**state, "csr": torch.eye(4).to_sparse_csr()}), saved({"model": state}),
           saved(state, _use_new_zipfile_serialization=False)]
try:
    from safetensors.torch import save
    sources.append(save(state))
except ImportError:
    pass
found = {"read": 0, "refused": 0}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for index in range(count):
    data = bytearray(random.choice(sources))
    place, other = random.randrange(len(data)), random.randrange(len(data))
    kind = index % 5
    if kind == 0:
        del data[place:]
    elif kind == 1:  # mostly headers and pickles
        data[place % 1200 % len(data)] = random.randrange(256)
    elif kind == 2:
        data[place] ^= 1 << random.randrange(8)
    elif kind == 3:
        data[place : place + 8] = b"\\xff" * len(data[place : place + 8])
    else:
        data[place : place + 40] = data[other : other + 40]
    with open(path, "wb") as file:
        file.write(data)
    try:
        format_weights(weight_infos(read_state_dict(path)))
        found["read"] += 1
    except ConfigurationError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < len(path) + 400, error
        found["refused"] += 1
    except OSError:
        found["refused"] += 1
found["grown"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps(found))
"""


def test_damaged_files(tmp_path):
    pytest.importorskip("resource")
    count = 600
    process = run_python(DAMAGED, str(tmp_path / "file"), str(count), PYTHONWARNINGS="ignore")
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["read"] + found["refused"] == count
    assert found["read"] > count // 10
    assert found["refused"] > count // 10
    assert found["grown"] < 100_000  # kB: of files of some kB
