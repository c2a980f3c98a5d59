"""Files and functions are no longer than a reader can keep in mind."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TESTS = ROOT / "qsparseprop", ROOT / "tests"
#: Of a file, with everything; of a function, without comments, empty lines and its docstring.
LINES, CODE_LINES = 450, 60
KINDS = ("*.py", "*.pyi", "*.pyx", "*.pxd")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)

pytestmark = pytest.mark.skipif(not PACKAGE.is_dir(), reason="the package's sources are not beside the tests")


def code_lines(source):
    """How many lines of code each function has."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = lines.intersection(range(node.lineno, node.end_lineno + 1))
            if ast.get_docstring(node) is not None:
                own.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
            yield node.name, len(own)


def test_what_is_counted():
    source = 'def f(\n    a,\n):\n    """Two\n\n    lines."""\n\n    # why\n    return """of\n\n    three"""\n'
    assert list(code_lines(source)) == [("f", 6)]


def test_files():
    sources = [path for folder in (PACKAGE, TESTS) for kind in KINDS for path in folder.rglob(kind)]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {name: n for name, n in lengths.items() if n > LINES} == {}


def test_functions():
    found = [(str(path.relative_to(ROOT)), name, n)
             for folder in (PACKAGE, TESTS) for path in folder.rglob("*.py")
             for name, n in code_lines(path.read_text(encoding="utf-8"))]  # fmt: skip
    assert [(path, name, n) for path, name, n in found if n > CODE_LINES] == []
