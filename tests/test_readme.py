"""What the README shows runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qsparseprop

README = Path(__file__).resolve().parents[1] / "README.md"

pytestmark = pytest.mark.skipif(not README.is_file(), reason="README.md is not beside the folder of the tests")


def test_the_ten_lines_print_the_table_and_the_gain(tmp_path):
    text = README.read_text(encoding="utf-8")
    section = text[text.index("\n## Ten lines\n") :]
    script = tmp_path / "ten_lines.py"
    script.write_text(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], encoding="utf-8")
    path = os.pathsep.join([str(Path(qsparseprop.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-W", "error", str(script)], env={**os.environ, "PYTHONPATH": path},
                          cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "QuantizedSparseLinear(in_features=2048, out_features=2048, bias=True, sparsity=0.9000)" in done.stdout
    assert re.search(r"^0 +Linear +2048x1024 +512x1024 +90\.0 % .* (sparse|dense: )", done.stdout, re.MULTILINE)
    assert re.search(r"[\d.]+ ms dense, [\d.]+ ms sparse, [\d.]+ times as fast\n$", done.stdout)


def test_what_the_readme_links_to_exists():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert "docs/finetune.png" in targets
    assert [target for target in targets if not (README.parent / target).exists()] == []
