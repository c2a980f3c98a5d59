"""Draws the rooms of the package and what they import into architecture.md: ``python docs/draw_architecture.py``.

Pictures are Mermaid text between two markers. A box is a module or package with the first line of its docstring; an
arrow is an import, one inside of a function included, one for annotations only (``if TYPE_CHECKING:``) left out. An
arrow that a way through other boxes makes superfluous is not drawn. Of several packages in one picture those behind the
first one are drawn as far as that uses them.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"

#: Packages whose insides are drawn, by the names of their markers.
PICTURES = {
    "rooms": ("qsparseprop",),
    "blocks": ("qsparseprop.nn.blocks", "qsparseprop.nn.autograd", "qsparseprop.nn.deferred"),
}

#: Not drawn: who starts the program, and what everything may read.
_LEFT_OUT = {"__init__", "__main__", "_version"}


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """Names and files of everything below a package, itself included."""
    folder = ROOT.joinpath(*package.split("."))
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def _run_time(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
        return
    children = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        children = iter(node.orelse)
    for child in children:
        yield from _run_time(child)


def _imported(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Names of the modules that a file imports, as far as they are `known`."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in _run_time(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        source = ".".join([*base, *filter(None, [node.module])])
        for alias in node.names:
            yield f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source


def _room(name: str, packages: Sequence[str]) -> str | None:
    """The part of a package that a module lies in, or None outside of them, and for what is not drawn."""
    for package in packages:
        if name.startswith(f"{package}."):
            room = name.removeprefix(f"{package}.").split(".")[0]
            return None if room in _LEFT_OUT else f"{package}.{room}"
    return None


def rooms_of(*packages: str) -> tuple[dict[str, str], dict[str, set[str]]]:
    """What the parts of packages say of themselves, and which of the others each of them imports; by their names."""
    modules = {name: path for package in packages for name, path in _modules(package)}
    about_of: dict[str, str] = {}
    uses: dict[str, set[str]] = {}
    for name, path in modules.items():
        room = _room(name, packages)
        if room is None:
            continue
        if name == room:
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            about_of[room] = text.partition("\n")[0].replace("`", "").replace('"', "'").rstrip(".")
        found = (_room(target, packages) for target in _imported(name, path, set(modules)))
        uses.setdefault(room, set()).update(target for target in found if target not in (None, room))
    return about_of, uses


def _reach(uses: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    queue = [start]
    while queue:
        for target in uses[queue.pop()] - seen:
            seen.add(target)
            queue.append(target)
    return seen


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def drawn(*packages: str) -> str:
    """The picture of a package, or of several.

    Raises
    ------
    ValueError
        If two of its parts use each other: there is no picture of that with all arrows downwards.
    """
    about_of, uses = rooms_of(*packages)
    reach = {room: _reach(uses, room) for room in uses}
    circle = sorted(room for room in uses if room in reach[room])
    if circle:
        raise ValueError(f"{', '.join(map(_last, circle))} of {packages[0]} use each other")
    first = {room for room in uses if room.startswith(f"{packages[0]}.")}
    uses = {room: uses[room] for room in first.union(*(reach[room] for room in first))}
    # the package's own name only where there are others
    named = {room: "/".join(room.split(".")[-min(len(packages), 2) :]) for room in uses}
    boxes = {room: name.replace("/", "_") for room, name in named.items()}
    lines = ["```mermaid", "flowchart TD"]
    # the longest ways first, so that what uses most stands on top
    for room in sorted(uses, key=lambda room: (-len(reach[room]), room)):
        about = "<br/>".join(textwrap.wrap(about_of.get(room, ""), 36))
        lines.append(f'    {boxes[room]}["<b>{named[room]}</b>{"<br/>" if about else ""}{about}"]')
    for room in sorted(uses):
        direct = {target for target in uses[room] if not any(target in reach[other] for other in uses[room])}
        lines += [f"    {boxes[room]} --> {boxes[target]}" for target in sorted(direct)]
    return "\n".join([*lines, "```"])


def redrawn(text: str) -> str:
    """The page with its pictures drawn anew."""
    for marker, packages in PICTURES.items():
        begin, end = f"<!-- {marker}: drawn by draw_architecture.py -->", f"<!-- end of {marker} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"the page has no {begin} with {end} behind it")
        text = f"{before}{begin}\n{drawn(*packages)}\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(redrawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
