"""The notebook among the examples runs, cell by cell in one namespace, as a kernel would run it."""

import json
import types

import pytest
import torch

from . import _pages

NOTEBOOK = _pages.ROOT / "examples" / "prune_finetune_serve.ipynb"

pytestmark = pytest.mark.skipif(not NOTEBOOK.is_file(), reason="the examples are not beside the tests")


def code_cells():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.nightly
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("safetensors")
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    notebook = types.ModuleType("notebook")
    for number, cell in enumerate(code_cells(), 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), vars(notebook))
    assert notebook.measure_accuracy(notebook.served, notebook.test) > 90
    assert (tmp_path / "digits.qsp").is_file()
    assert "% as served" in capsys.readouterr().out


def test_what_the_notebook_keeps_is_small():
    """It holds text only, of a run from the first cell to the last one, and cells that compile."""
    for number, cell in enumerate(code_cells(), 1):
        compile("".join(cell["source"]), f"cell {number}", "exec")
        assert cell["execution_count"] == number
        assert {output["output_type"] for output in cell["outputs"]} <= {"stream"}
    assert NOTEBOOK.stat().st_size < 20_000
