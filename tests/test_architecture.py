"""The page on the package's rooms is that of its imports; and what lies in a room of its own."""

import ast
import importlib.util
from pathlib import Path

import pytest

import qsparseprop

DOCS = Path(__file__).resolve().parents[1] / "docs"

needs_docs = pytest.mark.skipif(not DOCS.is_dir(), reason="docs/ is not beside the folder of the tests")


def test_functions_of_autograd_lie_in_their_room():
    package = Path(qsparseprop.__file__).parent
    functions = {}  # class -> file
    classes = [(node, path) for path in package.rglob("*.py") for node in ast.walk(ast.parse(path.read_bytes()))
               if isinstance(node, ast.ClassDef)]  # fmt: skip
    known = {"Function"}
    while found := {node.name: path for node, path in classes if node.name not in functions
                    and any(ast.unparse(base).rpartition(".")[2] in known for base in node.bases)}:  # fmt: skip
        functions.update(found)
        known.update(found)
    assert "SparseProduct" in functions
    assert {path.parent for path in functions.values()} == {package / "nn" / "autograd"}


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw_architecture", DOCS / "draw_architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_docs
def test_the_pictures_are_those_of_the_imports(draw):
    text = draw.PAGE.read_text(encoding="utf-8")
    assert text == draw.redrawn(text), "python docs/draw_architecture.py draws them anew"


@needs_docs
def test_what_is_an_arrow(draw, tmp_path, monkeypatch):
    files = {
        "a/__init__.py": "from a import top",  # the front door
        # low is used by middle as well
        "a/top.py": '"""On `top`.\n\nMore.\n"""\nimport a.middle\nfrom a.low import f',
        "a/middle/__init__.py": '"""The "middle"."""',
        "a/middle/part.py": "def f():\n    from ..low import g\n    import torch\n",
        "a/low.py": "if typing.TYPE_CHECKING:\n    from a.top import T\nelse:\n    from a import _version",
        "a/_version.py": "",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(draw, "ROOT", tmp_path)
    assert draw.drawn("a").splitlines() == [
        "```mermaid",
        "flowchart TD",
        '    top["<b>top</b><br/>On top"]',
        """    middle["<b>middle</b><br/>The 'middle'"]""",
        '    low["<b>low</b>"]',
        "    middle --> low",
        "    top --> middle",
        "```",
    ]
    (tmp_path / "a/low.py").write_text("import a.top", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^low, middle, top of a use each other$"):
        draw.drawn("a")
    with pytest.raises(ValueError, match="no <!-- rooms"):
        draw.redrawn("no markers")
