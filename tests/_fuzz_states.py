"""Loads corrupted checkpoints.

    python -m tests._fuzz_states SEED COUNT FOLDER {torch,safetensors}

A crash, a hang or memory out of all proportion ends the process; the last file is in the folder then. What is refused
by the check of sparse modules has changed nothing, and what is loaded is what the tensors say.
"""

import contextlib
import copy
import faulthandler
import io
import json
import random
import re
import resource
import sys
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import nn
from torch.nn.utils import prune

from qsparseprop.nn import accept_dense_state
from qsparseprop.nn._weight import SparseWeight
from qsparseprop.utils.network_utils import swap_modules_for_state, swap_modules_with_sparse
from qsparseprop.utils.state_files import read_state_dict
from qsparseprop.utils.state_report import format_weights, weight_infos

MEMORY = 128 << 20  # bytes that loading may take; the files have some 30 kB
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool,
          torch.complex64, torch.float8_e4m3fn, torch.float32, torch.uint8]  # fmt: skip
INTEGERS = [0, 1, -1, 2, 7, 64, 1 << 20, (1 << 31) - 1, -(1 << 31), 1 << 40, (1 << 63) - 1]


def dense_model(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 30), nn.ReLU(),
                          nn.Linear(30, 4, bias=False), nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 1))  # fmt: skip
    for index in (0, 4, 6, 8):
        weight = model[index].weight
        weight.data *= torch.rand(weight.shape) < 0.3
    return model


def sparse_model(seed):
    return swap_modules_with_sparse(dense_model(seed), (2, 3, 6, 6), include_dense=False, verbose=False, min_sparsity=0)


def states():
    """States to corrupt: sparse, dense, and dense with masks."""
    yield {k: v.detach() for k, v in sparse_model(1).state_dict().items()}
    yield {k: v.detach() for k, v in dense_model(2).state_dict().items()}
    model = dense_model(3)
    for index in (0, 4):
        prune.l1_unstructured(model[index], "weight", 0.5)
    yield {k: v.detach() for k, v in model.state_dict().items()}


def change_numbers(t):
    new = t.clone().reshape(-1)
    for _ in range(random.choice([1, 1, 3])):
        if new.numel():
            place = random.randrange(new.numel())
            if t.is_floating_point():
                new[place] = random.choice([float("nan"), float("inf"), 0.0, 1e30, -3.0])
            elif t.dtype != torch.bool:
                limits = torch.iinfo(t.dtype)
                value = random.choice([*INTEGERS, int(new[place]) + 1, int(new[place]) - 1])
                new[place] = max(limits.min, min(limits.max, value))
    return new.view(t.shape)


def share_memory(t):
    """Of its own shape, all elements but one dimension's in the same place."""
    return t.as_strided(t.shape, (0,) * (t.ndim - 1) + (1,)) if t.ndim > 1 else t[:1].expand(t.shape)


TENSORS = {
    "numbers": change_numbers, "huge": lambda t: t.reshape(-1)[:1].expand(10**6, 10**6),
    "large": lambda t: t.reshape(-1)[:1].expand(random.choice([10**9, 2**31, 2**40])),
    "shared": share_memory, "flipped": lambda t: t.flip(0), "transposed": lambda t: t.transpose(0, -1),
    "shorter": lambda t: t[:-1], "longer": lambda t: torch.cat([t, t]), "deeper": lambda t: t[None],
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0], "overlapping": lambda t: t.as_strided(t.shape, (1,) * t.ndim),
    "dtype": lambda t: t.to(random.choice(DTYPES)), "meta": lambda t: t.to("meta"), "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]), "negative": lambda t: torch._neg_view(-t),
    "conjugate": lambda t: torch.complex(torch.zeros(t.shape), -t.float()).conj().imag, "list": lambda t: t.tolist(),
    "parameter": lambda t: nn.Parameter(t), "none": lambda t: None, "number": lambda t: 7, "dict": lambda t: {"a": t},
    "zero": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype), "empty": lambda t: t[:0],
    "bits": lambda t: t.view(torch.uint8), "csr": lambda t: t.reshape(t.shape[0], -1).to_sparse_csr(),
}  # fmt: skip


def corrupt(state):
    """A corrupted copy, and what was done."""
    state, done = dict(state), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        keys = list(state)
        key = random.choice(keys)
        kind = random.choice([*TENSORS] * 2 + ["numbers"] * 8 + ["drop", "rename", "swap", "swap", "add", "add"])
        if kind == "drop":
            del state[key]
        elif kind == "rename":
            state[random.choice([key + "_orig", "x." + key, key[1:], key.upper(), "4.crow_indices"])] = state.pop(key)
        elif kind == "swap":
            other = random.choice(keys)
            state[key], state[other] = state[other], state[key]
        elif kind == "add":
            state[random.choice(["", ".", "5.crow_indices", "4..weight", "a.crow_indices", 3, "4._extra_state"])] = (
                torch.zeros(3))
        elif isinstance(state[key], torch.Tensor):
            with contextlib.suppress(Exception):  # not every change is one of every tensor
                state[key] = TENSORS[kind](state[key])
        done.append((kind, key))
    return state, done


def corrupt_bytes(data, kinds=("flip", "flip", "cut", "move", "pickle", "pickle", "pickle")):
    """Flipped bits, bytes that lie elsewhere, a file that ends early, or other numbers in the pickle of the archive."""
    kind = random.choice(kinds)
    if kind == "pickle":
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
            for name in old.namelist():
                content = bytearray(old.read(name))
                if name.endswith("data.pkl"):
                    for _ in range(random.choice([1, 1, 2, 4])):
                        place = random.randrange(len(content))
                        # operands of BININT and BININT1 follow K, M and J
                        marks = [m.start() + 1 for m in re.finditer(rb"[KMJ]", bytes(content[:-8]))]
                        place = random.choice([place, *random.sample(marks, min(5, len(marks)))])
                        content[place] = random.choice([content[place] ^ 1 << random.randrange(8), 0, 255])
                new.writestr(name, bytes(content))
        return out.getvalue()
    data = bytearray(data)
    if kind == "cut":
        return bytes(data[: random.randrange(len(data))])
    for _ in range(random.choice([1, 4, 30])):
        a, b = random.randrange(len(data)), random.randrange(len(data))
        if kind == "move":
            data[a : a + 16] = data[b : b + 16]
        else:
            data[a] ^= 1 << random.randrange(8)
    return bytes(data)


def corrupt_safetensors(data):
    """Other dtypes, shapes, places and names in the header, or other bytes."""
    if random.random() < 0.4:
        kinds, end = ("flip", "flip", "cut", "move"), random.choice([300, len(data)])
        return corrupt_bytes(data[:end], kinds) + data[end:]
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for _ in range(random.choice([1, 1, 2])):
        key, other = random.choice(list(header)), random.choice(list(header))
        entry = header[key] if isinstance(header[key], dict) else {}
        change = random.choice(["dtype", "shape", "numbers", "swap", "drop", "rename", "twice", "odd", "metadata"])
        if change == "dtype":
            entry["dtype"] = random.choice(["F32", "F16", "BF16", "I8", "U8", "I32", "BOOL", "F8_E4M3", "F64", "X", 3])
        elif change == "shape":
            entry["shape"] = random.choice([[], [0], [-1], [1 << 40], [1 << 62, 4], [2**64], [[1]], "x", None,
                                            entry.get("shape", [])[::-1], [1, *entry.get("shape", [])]])
        elif change == "numbers" and len(entry.get("data_offsets", ())) == 2:
            entry["data_offsets"][random.randrange(2)] += random.choice([1, -1, 4, -4, 1 << 31, -(1 << 31), 1 << 63])
        elif change == "swap":
            header[key], header[other] = header[other], header[key]
        elif change in ("drop", "rename"):
            held = header.pop(key)
            if change == "rename":
                header[random.choice(["", "4.crow_indices", "x", f"{key}x", "__metadata__", "\0"])] = held
        elif change == "twice":
            header[f"{key}.1"] = entry
        elif change == "odd":
            header[key] = random.choice([None, 3, [], {}, "x", {"dtype": "F32"}])
        else:
            header["__metadata__"] = random.choice([{}, {"a": "b"}, {"a": 1}, [], None])
        if not header:
            break
    text = json.dumps(header).encode()
    length = random.choice([len(text)] * 9 + [0, 1 << 40, 1 << 63, len(text) - 1])
    return length.to_bytes(8, "little") + text + data[8 + size :]


# ---- what must have happened ----


def values(t):
    return t.detach().resolve_neg().double()


def wanted(state, name, module, choice):
    """The dense weight that a state stands for."""
    found = {k[len(name) + 1 :]: v for k, v in state.items() if isinstance(k, str) and k.startswith(name + ".")}
    shape = module.weight_shape
    if "weight_orig" in found and "weight_mask" in found:
        weight = values(found["weight_orig"]) * values(found["weight_mask"])
        pattern = found["weight_mask"] != 0
    elif "weight" not in found:
        return None
    elif found["weight"].ndim == len(shape):
        weight = values(found["weight"])
        pattern = weight != 0
    elif "crow_indices" in found and "col_indices" in found:
        dense = torch.sparse_csr_tensor(found["crow_indices"].long(), found["col_indices"].long(),
                                        values(found["weight"]), module._matrix_shape())  # fmt: skip
        return dense.to_dense().view(shape)
    else:
        return None
    return torch.where(module.mask() if choice == "keep_pattern" else pattern, weight, 0.0)


def assert_right(model, state, choice, loaded):
    for name, module in model.named_modules():
        complete = not any(k.startswith(name + ".") for k in loaded.missing_keys)
        if isinstance(module, SparseWeight) and not module.weight.is_meta and complete:
            right = wanted(state, name, module, choice)
            if right is not None:
                right = right.to(module.weight.dtype).double()
                found = module.dense_weight().detach().double()
                assert torch.equal(found.nan_to_num(7), right.nan_to_num(7)), name


def run_sparse(model):
    """Sparse modules compute, whatever has been loaded."""
    for module in model.modules():
        if isinstance(module, SparseWeight) and not module.weight.is_meta:
            inputs = module.weight_shape[1] * getattr(module, "groups", 1)
            x = torch.randn(2, inputs, *(5,) * (len(module.weight_shape) - 2))
            module(x)
            module.mask(), module.dense_weight()


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    now = model.state_dict()
    return all(k in now and (v.is_meta or torch.equal(now[k].nan_to_num(7) if v.is_floating_point() else now[k],
                                                      v.nan_to_num(7) if v.is_floating_point() else v))
               for k, v in before.items())  # fmt: skip


def load(model, state, choice, strict, assign):
    """How a load of a state went."""
    before = snapshot(model)
    context = contextlib.nullcontext() if choice is None else accept_dense_state(choice)
    try:
        with context:
            loaded = model.load_state_dict(state, strict=strict, assign=assign)
    except Exception as error:
        refusal = error
    else:
        refusal = None
    run_sparse(model)  # also where torch has refused something after it had loaded the rest
    if refusal is None:
        assert_right(model, state, choice, loaded)
        return "loaded"
    text = str(refusal)
    assert text, repr(refusal)
    assert not isinstance(refusal, MemoryError), repr(refusal)
    assert not re.search("allocate memory|INTERNAL ASSERT", text), text
    assert "nothing was loaded" not in text or unchanged(model, before), text
    return "refused"


def read(path):
    """A state from a file, or None: by the package, whose refusals are sentences, or by the library of the format."""
    if random.random() < 0.5:
        try:
            return read_state_dict(path)
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"{path} holds no weights: "), text
            assert "\n" not in text, text
            assert len(text) < 700, text
            return None
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of their own, whatever it is
        return None
    return state if isinstance(state, dict) else None


def write(state, done, path):
    """Write a state, corrupted bytes of it where nothing else is wrong, and read it; "none" if that cannot be done."""
    try:
        if path.suffix == ".safetensors":
            data = save_tensors({k: plain(v) for k, v in state.items()})
        else:
            file = io.BytesIO()
            torch.save(state, file)
            data = file.getvalue()
    except Exception:  # what the library cannot save
        return "none"
    if not done or random.random() < 0.2:
        data = (corrupt_safetensors if path.suffix == ".safetensors" else corrupt_bytes)(data)
    path.write_bytes(data)
    return read(path)


def plain(value):
    """As safetensors takes it; what is no tensor stays what it is, which it refuses."""
    is_plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
    if not is_plain or value.is_nested or value.is_quantized or value.numel() > 1 << 20:
        return value
    return value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


def main():
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    path = Path(sys.argv[3], {"torch": "last.pt", "safetensors": "last.safetensors"}[sys.argv[4]])
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(seed)
    originals, model, counts = list(states()), sparse_model(0), Counter()
    model(torch.zeros(2, 3, 6, 6))
    with torch.device("meta"):  # torch imports a lot for it
        dense_model(0)
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    for number in range(count):
        faulthandler.dump_traceback_later(60, exit=True)
        state, done = corrupt(random.choice(originals)) if random.random() < 0.75 else (random.choice(originals), [])
        print(number, done, flush=True)
        if random.random() < 0.7 or not done or path.suffix == ".safetensors":
            loaded = write(state, done, path)
            if loaded is None:
                counts["no file"] += 1
                continue
            state = state if loaded == "none" else loaded  # what cannot be saved is loaded from memory
        choice = random.choice([None, "keep_pattern", "take_zeros"])
        strict, assign = random.random() < 0.5, random.random() < 0.4
        way = random.choice(["load", "load", "fresh", "meta", "info"])
        print("  ", way, choice, strict, assign, flush=True)
        if way == "load":
            counts[load(copy.deepcopy(model), state, choice, strict, assign)] += 1
            continue
        try:
            if way == "info":
                format_weights(weight_infos(state))
                counts["described"] += 1
                continue
            with torch.device("meta" if way == "meta" else "cpu"):
                fresh = dense_model(0)
            fresh = swap_modules_for_state(fresh, state)
        except (ValueError, AttributeError, TypeError):
            counts["refused"] += 1
            continue
        counts[load(fresh, state, choice, strict, assign)] += 1
    faulthandler.cancel_dump_traceback_later()
    print("done:", json.dumps(counts))
    assert counts["refused"] > count // 5
    assert counts["loaded"] > count // 20


if __name__ == "__main__":
    main()
