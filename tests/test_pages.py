"""Pages of the documentation: their code runs, their commands, links and names exist."""

import argparse
import ast
import importlib
import re
import shlex
import types

import pytest
import torch

import qsparseprop
from qsparseprop import cli

from . import _pages
from .test_docstrings import modules

PAGES = {str(path.relative_to(_pages.ROOT)): path.read_text(encoding="utf-8") for path in _pages.pages()}
pytestmark = pytest.mark.skipif("README.md" not in PAGES, reason="the pages are not beside the tests")


def with_python():
    return [name for name, text in PAGES.items() if any(block.language == "python" for block in _pages.blocks(text))]


@pytest.mark.parametrize("name", with_python())
@pytest.mark.usefixtures("sparse_is_faster")
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch, capsys):
    """One block after the other, as somebody would type them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = types.ModuleType("page")
    for block in _pages.blocks(PAGES[name]):
        if block.language in ("python", "before") and block.not_run is None:
            # tracebacks have the line of the page
            code = compile("\n" * block.line + block.code, name, "exec")
            exec(code, vars(page))


def test_what_does_not_run_says_why():
    skipped = [block for text in PAGES.values() for block in _pages.blocks(text) if block.not_run is not None]
    assert skipped
    assert [block for block in skipped if len(block.not_run) < 20] == []


def commands(text):
    """Commands for a shell in blocks and in backticks, as lists of words."""
    lines = [block.code for block in _pages.blocks(text) if block.language == "sh"]
    lines += [span for span in _pages.code_spans(text) if span.startswith(("python ", "torchrun "))]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        for command in re.split(r"&&|;", line):
            if words := shlex.split(command, comments=True):
                yield words


def qsparseprop_commands():
    return [pytest.param(words[3:], id=f"{name}: {' '.join(words[3:])}")
            for name, text in PAGES.items() for words in commands(text)
            if words[:3] == ["python", "-m", "qsparseprop"] and words[3:]]  # fmt: skip


@pytest.mark.parametrize("arguments", qsparseprop_commands())
def test_commands_are_what_the_parser_takes(arguments):
    words = [name for argument in arguments for name in argument.strip("{}").split(",")]
    parser = cli._build_parser()
    if words != arguments or arguments == ["COMMAND"]:  # "{info,bench}" stands for all of these
        (subcommands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        assert set(words) <= {*subcommands.choices, *arguments} or arguments[0] in subcommands.choices
        return
    if arguments[0].startswith("--"):
        assert arguments == ["--version"]
    elif len(arguments) > 1 or arguments[0] != "freeze":  # which alone is its name
        parser.parse_args(arguments)


def test_scripts_have_the_options_that_pages_show():
    missing = []
    for name, text in PAGES.items():
        for words in commands(text):
            script = next((word for word in words if re.match(r"(benchmarks|examples|docs|tests)/.*\.py$", word)), None)
            if words[0] not in ("python", "torchrun") or script is None:
                continue
            if not (_pages.ROOT / script).is_file():
                missing.append((name, script))
                continue
            folder = (_pages.ROOT / script).parent
            source = "".join(path.read_text(encoding="utf-8") for path in [_pages.ROOT / script, *folder.glob("_*.py")])
            options = [word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
            missing += [(name, script, option) for option in options if f'"{option}"' not in source]
    assert missing == []


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = _pages.ROOT / name
    broken = []
    for path, anchor in _pages.links(PAGES[name]):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in _pages.anchors(target.read_text(encoding="utf-8"))):
            broken.append((path, anchor))
    assert broken == []


#: The format of a file, and an operator of torch.
NO_PYTHON = {"qsparseprop.frozen", "qsparseprop.sparse_layer"}


def resolve(dotted):
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AttributeError(dotted)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.filterwarnings("ignore:qsparseprop.*is qsparseprop:DeprecationWarning")
def test_names_in_backticks_exist(name):
    wrong = []
    for span in _pages.code_spans(PAGES[name]):
        match = re.match(r"qsparseprop(?:\.\w+)+", span)
        if match and match[0] not in NO_PYTHON:
            try:
                resolve(match[0])
            except AttributeError:
                wrong.append(span)
    assert wrong == []


# ---- the reference ----


def test_the_reference_has_every_public_module():
    api = "".join(path.read_text(encoding="utf-8") for path in (_pages.ROOT / "docs" / "api").glob("*.md"))
    described = set(re.findall(r"automodule:: ([\w.]+)", api))
    # what these export is exported, and described, once more by those who use it
    again = {"qsparseprop.utils.cost_model", "qsparseprop.utils.swap_report"}
    assert described | again == {*modules()} - {"qsparseprop"}
    front = set(re.findall(r"^   ~qsparseprop\.[\w.]*\b(\w+)$", api, re.MULTILINE))
    assert front == {*qsparseprop.__all__} - {"__version__"}


# ---- migration ----


def test_every_new_name_of_the_migration_is_used():
    text = PAGES["docs/migration.md"]
    rows = re.findall(r"^\|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)[2:]
    names = {name for *_, new in rows for name in re.findall(r"`(qsparseprop[\w.]+)`", new)}
    assert len(names) > 12
    code = "".join(block.code for block in _pages.blocks(text) if block.language == "python")
    used = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert {name for name in names if name.rpartition(".")[2] not in used} == set()


# ---- troubleshooting ----


def sentences():
    """The strings of the package and of its build, each as one text: a NUL stands for what is put in."""
    package = _pages.ROOT / "qsparseprop"
    for path in [*package.rglob("*.py"), _pages.ROOT / "setup.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield " ".join(node.value.split())
            elif isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                yield " ".join("".join(parts).split())


def test_the_sentences_of_the_troubleshooting_are_the_packages():
    quoted = re.findall(r"^### `(.*)`$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    assert len(quoted) == PAGES["docs/troubleshooting.md"].count("\n### ") > 30
    known = list(sentences())
    for sentence in quoted:
        fixed = [re.escape(part.strip()) for part in sentence.split("...") if part.strip()]
        pattern = re.compile(".*?".join(fixed), re.DOTALL)
        assert any(pattern.search(text) for text in known), sentence
