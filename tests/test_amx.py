"""Products of dense rows in tiles: on AMX where the processor has it, elsewhere on a model of its instructions.

The model is compared with the manual's formulas, and how the instructions are encoded with the manual's encodings.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import Geometry, conv_geometry, linear_geometry
from qsparseprop.layout.pattern import dense_pattern
from qsparseprop.layout.plan import make_plan

from ._helpers import run_python

KERNELS = Path(__file__).resolve().parents[1] / "qsparseprop" / "_kernels"

pytestmark = pytest.mark.skipif("amx" not in _dispatch.built_isas(), reason="this build has no AMX")


# ---- products ----


@pytest.fixture(params=["amx", "amx_model"])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on tiles, and on their model."""
    if request.param not in _dispatch.supported_isas():
        pytest.skip(f"this processor cannot run the {request.param} kernels")
    previous = _dispatch.set_isa(request.param)
    yield request.param
    _dispatch.set_isa(previous)


def products(g: Geometry, images: int, groups: int, isa: str) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of input and values, of random codes: by dense rows on `isa`, by lists in portable C."""
    layouts = g.input_layout, g.output_layout
    inputs, outputs = (layout.channels for layout in layouts)
    columns = inputs // groups * len(g.tap_shift)
    crow, col, _ = dense_pattern(torch.rand(outputs, columns) < 0.8)
    lists, pattern = make_plan(crow, col, g, groups), ValuePattern(crow, col, columns)
    rows = [DenseRows(pattern, groups, g.tap_phase, g.tap_shift, *pair, swapped)
            for swapped, pair in ((False, layouts), (True, layouts[::-1]))]  # fmt: skip
    values = torch.randn(col.numel())
    x = ops.quantize_pack(torch.randn(images, inputs, *g.input_size), layouts[0], ops.Scheme("standard", (), True))
    dy = ops.quantize_pack(torch.randn(images, outputs, *g.output_size), layouts[1], ops.Scheme("symmetric", (), True))

    def run(forward, backward, isa):
        _dispatch.set_isa(isa)
        results = []
        for operand, part in ((x, forward), (dy, backward)):
            results.append(ops.empty_result(part, images, torch.float32, False))
            ops.products.multiply_plain(operand, values, part, results[-1], None, None)
        return [*results, ops.sddmm(x, dy, forward, images, values.numel())]

    before = _dispatch.active_isa()
    try:
        return run(*rows, isa), run(lists.forward, lists.backward, "scalar")
    finally:
        _dispatch.set_isa(before)


def assert_same(results: tuple[list[Tensor], list[Tensor]]) -> None:
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


# Rows, which are planes of the other product: fewer than tiles are for, a part of a tile, of a second, several blocks;
# planes: steps of equal size, parts that stay in the cache, more than are interleaved at a time.
@pytest.mark.parametrize(
    ("inputs", "outputs", "batch"),
    [(12, 3, 5), (13, 4, 64), (28, 16, 65), (33, 8, 130), (36, 17, 70), (50, 31, 64), (64, 32, 600), (65, 33, 64),
     (260, 48, 200), (300, 64, 64), (520, 70, 64), (1024, 40, 64), (1100, 100, 130), (40, 2100, 64),
     (17, 129, 1200)],
)  # fmt: skip
def test_linear_layers(tiles, inputs, outputs, batch):
    assert_same(products(linear_geometry(inputs, outputs), batch, 1, tiles))


# Offsets that no stride leads through, images side by side or one after the other, phases, bands of groups.
@pytest.mark.parametrize(
    ("inputs", "outputs", "size", "kernel", "stride", "groups", "innermost"),
    [(3, 16, 12, 3, 1, 1, False), (16, 16, 7, 3, 1, 1, True), (20, 40, 9, 3, 2, 1, False), (64, 70, 5, 1, 1, 1, False),
     (64, 24, 6, 1, 2, 1, True), (32, 66, 8, 2, 2, 2, False), (60, 60, 8, 3, 1, 3, True), (24, 24, 8, 3, 1, 24, False),
     (68, 33, 6, 3, 1, 1, False)],
)  # fmt: skip
def test_convolutions(tiles, inputs, outputs, size, kernel, stride, groups, innermost):
    batch, padding = 4, (kernel // 2,) * 4
    sizes = (size, size + 1), (kernel,) * 2, (stride,) * 2
    g = conv_geometry(inputs, outputs, *sizes, padding, (1, 1), batch, innermost)
    assert_same(products(g, batch, groups, tiles))


def test_lanes_whose_sums_are_flushed(tiles):
    """More units than a strip has, and than 32 bits hold sums of."""
    assert_same(products(conv_geometry(36, 40, (150, 150), (1, 1), (1, 1), (0,) * 4, (1, 1), 3, False), 3, 1, tiles))


def test_threads(tiles):
    """Each task brings up tiles of its own."""
    torch.set_num_threads(2)
    assert_same(products(linear_geometry(300, 200), 256, 1, tiles))


#: Operands that end where memory does: reading what lies behind one ends the process.
GUARDED = """
import ctypes, mmap, sys
import torch
from qsparseprop import ops
from qsparseprop._kernels import _dispatch
from qsparseprop._kernels._dense_rows import DenseRows
from qsparseprop._kernels._plan import ValuePattern
from qsparseprop.layout.geometry import conv_geometry
from qsparseprop.layout.pattern import dense_pattern

mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

def at_the_end(tensor):
    size = tensor.numel() * tensor.itemsize
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    assert not mprotect(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * mmap.PAGESIZE, mmap.PAGESIZE, 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * mmap.PAGESIZE - size)
    return flat.view(tensor.shape).copy_(tensor)

_dispatch.set_isa(sys.argv[1])
for inputs, outputs, kernel, groups in (52, 50, 1, 1), (76, 35, 1, 1), (36, 98, 3, 1), (20, 9, 3, 1), (48, 72, 3, 2):
    g = conv_geometry(inputs, outputs, (6, 7), (kernel,) * 2, (1, 1), (kernel // 2,) * 4, (1, 1), 3, False)
    columns = inputs // groups * kernel * kernel
    crow, col, _ = dense_pattern(torch.rand(outputs, columns) < 0.8)
    pattern, values = ValuePattern(crow, col, columns), torch.randn(col.numel())
    layouts = g.input_layout, g.output_layout
    x = ops.quantize_pack(torch.randn(3, inputs, 6, 7), layouts[0], ops.Scheme("standard"))
    dy = ops.quantize_pack(torch.randn(3, outputs, *g.output_size), layouts[1], ops.Scheme("symmetric"))
    guarded = [packed._replace(planes=at_the_end(packed.planes)) for packed in (x, dy)]
    rows = [DenseRows(pattern, groups, g.tap_phase, g.tap_shift, *pair, pair is not layouts)
            for pair in (layouts, layouts[::-1])]
    for i in range(2):
        weights = ops.quantize_weight(values, rows[i])
        found = ops.spmm(guarded[i], weights._replace(slots=at_the_end(weights.slots)), rows[i], 3)
        assert torch.equal(found, ops.spmm((x, dy)[i], weights, rows[i], 3))
    assert torch.equal(ops.sddmm(*guarded, rows[0], 3, len(values)), ops.sddmm(x, dy, rows[0], 3, len(values)))
print("done")
"""


def test_nothing_behind_the_operands_is_read(tiles):
    process = run_python(GUARDED, tiles)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "done\n"


def test_a_model_is_never_the_default():
    supported = _dispatch.supported_isas()
    assert supported[-1] != "amx_model"
    assert ("amx_model" in supported) == ("avx512vnni" in supported)
    if "amx" in supported:
        assert supported[-1] == "amx"


def test_it_can_be_switched_off():
    if "avx512vnni" not in _dispatch.supported_isas():
        pytest.skip("this processor cannot run the avx512vnni kernels")
    code = "from qsparseprop._kernels import _dispatch; print(_dispatch.active_isa())"
    assert run_python(code, QSPARSEPROP_ISA="avx512vnni").stdout.strip() == "avx512vnni"


# ---- the tile instructions ----

#: Each operation of amx_tiles.h as a function, with the literals that the macros want: as many as the kernels use.
PROGRAM = """
#include "isa/amx_tiles.h"
void config(const tile_config *c) { TILE_CONFIG(c); }
void release(void) { TILE_RELEASE(); }
void zero(void) { TILE_ZERO(0); }
void load_c(const void *p, int64_t stride) { TILE_LOAD(0, p, stride); }
void load_a(const void *p, int64_t stride) { TILE_LOAD(4, p, stride); }
void load_b(const void *p, int64_t stride) { TILE_LOAD(6, p, stride); }
void store(void *p, int64_t stride) { TILE_STORE(p, stride, 0); }
void dpbsud(void) { TILE_DPBSUD(0, 4, 6); }
void dpbusd(void) { TILE_DPBUSD(0, 4, 6); }
#ifdef ISA_TILE_MODEL
void same_tile(void) { TILE_DPBUSD(0, 4, 4); }
#endif
"""


def compiled(folder: Path, name: str, *flags: str) -> Path:
    """The program as a library or an object."""
    compiler = shutil.which(os.environ.get("CC", "cc").split()[0])
    if compiler is None or not (KERNELS / "isa" / "amx_tiles.h").is_file():
        pytest.skip("needs a C compiler and the sources")
    source, to = folder / "program.c", folder / name
    source.write_text(PROGRAM)
    command = [compiler, "-O1", "-fPIC", "-std=gnu11", f"-I{KERNELS}", *flags, str(source), "-o", str(to)]
    subprocess.run(command, check=True, timeout=60)
    return to


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("model"), "model.so", "-shared", "-DISA_TILE_MODEL")


def configuration(shapes: dict[int, tuple[int, int]], palette: int = 1) -> bytes:
    """The operand of ldtilecfg: rows and bytes of a row of each tile."""
    operand = bytearray(64)
    operand[0] = palette
    for tile, (rows, size) in shapes.items():
        operand[16 + 2 * tile], operand[48 + tile] = size, rows
    return bytes(operand)


def dot(c: Tensor, a: Tensor, b: Tensor, a_signed: bool) -> Tensor:
    """The manual's formula in int64: c[m][n] += sum of a[m][4 k + i] times b[k][4 n + i], modulo 2^32."""
    left = a.view(torch.int8).long() if a_signed else a.long()
    right = b.long() if a_signed else b.view(torch.int8).long()
    rows, columns = b.shape[0], b.shape[1] // 4
    right = right.view(rows, columns, 4).transpose(1, 2).reshape(4 * rows, columns)
    return (c.long() + left @ right).to(torch.int32)


def random_bytes(kind: str, *shape: int) -> Tensor:
    if kind == "random":
        return torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.tensor([0, 1, 127, 128, 255], dtype=torch.uint8)[torch.randint(0, 5, shape)]


@pytest.mark.parametrize("kind", ["random", "extreme"])
def test_the_model_multiplies_as_the_manual_says(model, kind):
    """All shapes of the three tiles; rows in memory are further apart than they are long."""
    library = ctypes.CDLL(str(model))
    for rows, groups, columns in torch.cartesian_prod(*[torch.arange(1, 17)] * 3).tolist():
        a, b = random_bytes(kind, rows, 80), random_bytes(kind, groups, 96)
        limits = torch.iinfo(torch.int32)
        c = torch.randint(limits.min, limits.max, (rows, 20), dtype=torch.int32)
        shapes = {0: (rows, 4 * columns), 4: (rows, 4 * groups), 6: (groups, 4 * columns)}
        for a_signed in (False, True):
            out = c.clone()
            library.config(configuration(shapes))
            for load, tensor, stride in ((library.load_c, c, 80), (library.load_a, a, 80), (library.load_b, b, 96)):
                load(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(stride))
            (library.dpbsud if a_signed else library.dpbusd)()
            library.store(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(80))
            library.release()
            expected = c.clone()
            expected[:, :columns] = dot(c[:, :columns], a[:, : 4 * groups], b[:, : 4 * columns], a_signed)
            assert torch.equal(out, expected)


def test_the_model_forgets(model):
    """Zeroing a tile, and a new configuration, which empties all of them."""
    library, shapes = ctypes.CDLL(str(model)), {0: (16, 64)}
    ones, out = torch.ones(16, 16, dtype=torch.int32), torch.empty(16, 16, dtype=torch.int32)
    for forget in (library.zero, lambda: library.config(configuration(shapes))):
        library.config(configuration(shapes))
        library.load_c(ctypes.c_void_p(ones.data_ptr()), ctypes.c_int64(64))
        forget()
        library.store(ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(64))
        assert not out.any()
    library.release()


WHOLE = {0: (16, 64), 4: (16, 64), 6: (16, 64)}


@pytest.mark.parametrize(
    ("shapes", "palette", "calls"),
    [(WHOLE, 1, ["release", "dpbsud"]), (WHOLE, 2, []), ({0: (17, 64)}, 1, []), ({0: (16, 65)}, 1, []),
     ({0: (16, 0)}, 1, []), ({0: (16, 64), 4: (16, 64)}, 1, ["dpbsud"]), (WHOLE | {0: (15, 64)}, 1, ["dpbsud"]),
     (WHOLE | {0: (16, 60)}, 1, ["dpbusd"]), (WHOLE | {6: (15, 64)}, 1, ["dpbusd"]), (WHOLE, 1, ["same_tile"]),
     ({4: (16, 64)}, 1, ["zero"])],
)  # fmt: skip
def test_the_model_refuses_what_a_processor_does(model, shapes, palette, calls):
    code = f"""
import ctypes
library = ctypes.CDLL({str(model)!r})
library.config({configuration(WHOLE)!r})
for call in ("zero", "dpbsud", "dpbusd"):
    getattr(library, call)()
print("ready", flush=True)
library.config({configuration(shapes, palette)!r})
for call in {calls!r}:
    getattr(library, call)()
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert process.stdout == "ready\n"
    assert process.returncode == -signal.SIGILL


def encoding(prefix: int, opcode: int, c: int, a: int, b: int) -> bytes:
    """VEX.128.<prefix>.0F38.W0 <opcode> 11:rrr:bbb: the first operand in ModRM.reg, then ModRM.r/m, then VEX.vvvv."""
    return bytes([0xC4, 0xE2, (~b & 15) << 3 | prefix, opcode, 0xC0 | c << 3 | a])


def test_instructions_are_encoded_as_the_manual_says(tmp_path):
    data = compiled(tmp_path, "program.o", "-c").read_bytes()
    for_66, for_f3, for_f2 = 1, 2, 3
    assert data.count(encoding(for_f3, 0x5E, 0, 4, 6)) == 1  # TDPBSUD tmm0, tmm4, tmm6
    assert data.count(encoding(for_66, 0x5E, 0, 4, 6)) == 1  # TDPBUSD tmm0, tmm4, tmm6
    assert data.count(encoding(for_f2, 0x49, 0, 0, 0)) == 1  # TILEZERO tmm0
    assert data.count(encoding(0, 0x49, 0, 0, 0)) == 1  # TILERELEASE
    # these have an operand in memory behind ModRM and SIB: rdi plus rsi once, from the arguments
    for tile in (0, 4, 6):
        assert data.count(bytes([0xC4, 0xE2, 0x78 | for_f2, 0x4B, tile << 3 | 4, 0x37])) == 1  # TILELOADD
    assert data.count(bytes([0xC4, 0xE2, 0x78 | for_f3, 0x4B, 4, 0x37])) == 1  # TILESTORED
    assert data.count(bytes([0xC4, 0xE2, 0x78, 0x49, 7])) == 1  # LDTILECFG


def test_products_in_the_built_module():
    """SpMM multiplies signed weights by unsigned codes, SDDMM unsigned codes by a signed gradient; and nothing else."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    listing = subprocess.run(["objdump", "-d", "-M", "intel", "--no-show-raw-insn", _dispatch.__file__],
                             capture_output=True, text=True, timeout=300, check=True).stdout  # fmt: skip
    found = {}
    for body in re.split(r"\n\n", listing):
        name = re.match(r"\n*\w+ <(\w+)", body)
        for instruction in re.findall(r"\b(tdp\w+) +(tmm\d,tmm\d,tmm\d)", body):
            found.setdefault(name[1], set()).add(instruction)
    if not any("__amx" in name for name in re.findall(r"<(\w+)>:", listing)):
        pytest.skip("the modules are stripped")
    two_by_two = {"tmm0,tmm4,tmm6", "tmm1,tmm4,tmm7", "tmm2,tmm5,tmm6", "tmm3,tmm5,tmm7"}
    assert found == {
        "spmm_dense_u8s8__amx": {("tdpbsud", o) for o in two_by_two | {"tmm2,tmm4,tmm6", "tmm3,tmm4,tmm7"}},
        "sddmm_dense_u8s8__amx": {("tdpbusd", o) for o in two_by_two},
    }


def test_tasks_release_their_tiles(tmp_path):
    if "amx" not in _dispatch.supported_isas():
        pytest.skip("this processor cannot run the amx kernels")
    source, library = tmp_path / "state.c", tmp_path / "state.so"
    source.write_text('void state(void *p) { __asm__ volatile("sttilecfg (%0)" : : "r"(p) : "memory"); }')
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    torch.set_num_threads(1)
    assert_same(products(linear_geometry(70, 70), 64, 1, "amx"))
    state = ctypes.create_string_buffer(b"\xff" * 64, 64)
    ctypes.CDLL(str(library)).state(state)
    assert state.raw == bytes(64)
