"""The pages of the documentation as tests read them: blocks of code, what is in backticks, links, and headings.

A page says in comments, which neither GitHub nor the site shows, what its code needs that it does not show, and which
of it cannot run:

    <!-- before:
    model = make_model()
    -->
    <!-- not run: needs several machines -->
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_PART = re.compile(
    r"^(?P<indent> *)(?:"
    r"<!-- before:\n(?P<before>.*?)^ *-->"
    r"|<!-- not run: (?P<reason>[^\n]*?) -->"
    r"|```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$)",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A fenced block, or code that is not shown (language "before")."""

    language: str
    code: str
    line: int
    not_run: str | None = None


def pages() -> list[Path]:
    """All pages of the site, CHANGELOG.md and what the directives of Sphinx fill excepted."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in found if path.is_file() and path.parent.name != "api"]


def blocks(text: str) -> list[Block]:
    """The blocks of a page in their order."""
    found, reason = [], None
    for match in _PART.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["reason"] is not None:
            reason = match["reason"]
            continue
        language = "before" if match["before"] is not None else match["language"]
        code = match["before"] if match["before"] is not None else match["code"]
        found.append(Block(language, textwrap.dedent(code), line, reason))
        reason = None
    return found


def without_code(text: str) -> str:
    """The text between the blocks."""
    return _PART.sub("", text)


def code_spans(text: str) -> list[str]:
    """What is in single backticks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_code(text))]


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\]\([^)]*\)", "]", heading)).strip().lower().replace(" ", "-")
            for heading in headings}  # fmt: skip


def links(text: str) -> list[tuple[str, str]]:
    """Targets of links and pictures on this side of the web: path and anchor."""
    found = re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?\)", without_code(text))
    return [(path, anchor) for path, anchor in found if path or anchor]
