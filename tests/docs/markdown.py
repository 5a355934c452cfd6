"""Reading Markdown pages: fenced blocks, prose, links, anchors, and running a page's code from top to bottom."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_ARXIV = re.compile(r"\b\d{4}\.\d{5}\b")
_DECIMAL = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)")


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, and the line in the page on which the text begins."""

    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text(encoding="utf-8"))

    def blocks(self, *kinds: str) -> list[Block]:
        """Fenced blocks in order; all of them, or those of these languages."""
        found = [
            Block(m.group(1), m.group(2), self.text[: m.start()].count("\n") + 2) for m in _FENCE.finditer(self.text)
        ]
        return [block for block in found if not kinds or block.kind in kinds]

    @property
    def prose(self) -> str:
        """The page without its fenced blocks."""
        return _FENCE.sub("", self.text)

    @property
    def code(self) -> str:
        """All its Python."""
        return "\n".join(block.text for block in self.blocks("python"))

    def links(self) -> list[str]:
        """Targets of links and images inside the repository, outside fenced blocks."""
        text = re.sub(r"`[^`\n]*`", "", self.prose)
        return [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]

    def anchors(self) -> set[str]:
        """The anchors that headings make, as GitHub names them."""
        titles = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}

    def captions(self) -> list[list[str]]:
        """For each formula, the names in the line that must follow it: `→` and names in backticks; [] without one."""
        found = []
        for m in _FENCE.finditer(self.text):
            if m.group(1) == "math":
                line = self.text[m.end() :].lstrip("\n").split("\n", 1)[0]
                found.append(re.findall(r"`([\w.]+)`", line) if line.startswith("→ ") else [])
        return found

    def numbers(self) -> set[float]:
        """Decimal numbers in the prose; neither arXiv numbers nor what stands in a link's target."""
        text = _LINK.sub("", self.prose)
        return {float(n) for n in _DECIMAL.findall(_ARXIV.sub("", text))}

    def executed_numbers(self) -> set[float]:
        """Decimal numbers in code and in its output; of 1.5e9 the part before the e."""
        text = "\n".join(block.text for block in self.blocks("python", "text"))
        return {float(n) for n in re.findall(r"(?<![\w.])\d+\.\d+", text)}


@dataclass(frozen=True)
class Step:
    """A Python block that ran: what it printed, and what the page says it prints (the `text` block that follows)."""

    block: Block
    printed: str
    expected: str


def run(page: Page) -> tuple[list[Step], dict[str, Any]]:
    """Execute a page's Python blocks from top to bottom in one namespace, which is returned too; no warning passes."""
    namespace: dict[str, Any] = {"__name__": page.path.stem}
    steps: list[Step] = []
    blocks = page.blocks()
    for block, after in zip(blocks, [*blocks[1:], Block("", "", 0)], strict=False):
        if block.kind != "python":
            continue
        printed = io.StringIO()
        # blank lines in front, so that a traceback names the page's own line
        code = compile("\n" * (block.line - 1) + block.text, str(page.path), "exec")
        with contextlib.redirect_stdout(printed), warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            exec(code, namespace)
        steps.append(Step(block, printed.getvalue(), after.text if after.kind == "text" else ""))
    return steps, namespace


def shape_of(code: str) -> str:
    """What a piece of code does, comments and layout aside."""
    return ast.dump(ast.parse(code))
