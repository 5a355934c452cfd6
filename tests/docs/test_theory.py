"""The pages of theory run as printed, what they name exists, and the Chinese pages hold the same code and numbers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from upslope import functional, options
from upslope.cli import VERBS

from .markdown import Page, Step, run, shape_of

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
THEORY = DOCS / "theory"
CHAPTERS = sorted(THEORY.glob("0*.md"))
ERRORS = THEORY / "errors-in-circulation.md"
ENGLISH = [*CHAPTERS, ERRORS, THEORY / "README.md", DOCS / "faq" / "README.md"]
EVERY_PAGE = sorted([*DOCS.rglob("*.md"), *ROOT.glob("*.md")])
SVG = "{http://www.w3.org/2000/svg}"


def chinese_of(english: Path) -> Path:
    if english.parent.name == "faq":
        return english.with_name("README.zh-CN.md")
    return english.parent / "zh" / english.name


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS))


class Executed(NamedTuple):
    page: Page
    steps: list[Step]
    namespace: dict[str, Any]


@pytest.fixture(scope="module", params=ENGLISH, ids=name_of)
def executed(request: pytest.FixtureRequest) -> Executed:
    page = Page.read(request.param)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        return Executed(page, *run(page))
    finally:
        torch.set_default_dtype(torch.float32)  # pages compute in float64


def test_blocks_print_what_the_page_says(executed: Executed) -> None:
    for step in executed.steps:
        assert step.printed == step.expected, f"{executed.page.path}:{step.block.line}"


def test_every_number_in_the_text_was_computed(executed: Executed) -> None:
    unfounded = executed.page.numbers() - executed.page.executed_numbers()
    assert not unfounded, "no block holds or prints these"


def test_every_formula_names_what_computes_it(executed: Executed) -> None:
    for formula, names in zip(executed.page.blocks("math"), executed.page.captions(), strict=True):
        assert names, f"{executed.page.path}:{formula.line} is not followed by a line with → and a name"
        for name in names:
            assert name in executed.namespace or resolves(name), name


def test_code_fits_the_page(executed: Executed) -> None:
    long = [line for block in executed.page.blocks("python") for line in block.text.splitlines() if len(line) > 100]
    assert not long


def resolves(name: str) -> bool:
    """Whether a dotted name is a module's attribute."""
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


@pytest.mark.parametrize("english", ENGLISH, ids=name_of)
def test_the_chinese_page_has_the_same_blocks(english: Path) -> None:
    left, right = Page.read(english), Page.read(chinese_of(english))
    for kind in ("python", "text", "math"):
        ours, theirs = left.blocks(kind), right.blocks(kind)
        assert len(ours) == len(theirs), kind
        for a, b in zip(ours, theirs, strict=True):
            same = shape_of(a.text) == shape_of(b.text) if kind == "python" else a.text == b.text
            assert same, f"{right.path}:{b.line}"
    assert left.captions() == right.captions()
    assert not right.numbers() - left.executed_numbers()
    assert len(left.blocks("mermaid")) == len(right.blocks("mermaid"))
    headings = [len(re.findall(r"^#+ ", page.prose, re.MULTILINE)) for page in (left, right)]
    assert headings[0] == headings[1]


@pytest.mark.parametrize("english", ENGLISH, ids=name_of)
def test_the_chinese_page_is_chinese(english: Path) -> None:
    prose = Page.read(chinese_of(english)).prose
    letters = len(re.findall(r"[\u4e00-\u9fff]", prose))
    assert letters > 0.25 * len(re.sub(r"\s", "", prose))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=name_of)
def test_every_chapter_is_a_chapter(chapter: Path) -> None:
    page = Page.read(chapter)
    drawn = page.blocks("mermaid") + [target for target in page.links() if target.endswith(".svg")]
    assert drawn
    assert len(page.blocks("python")) >= 5
    assert page.blocks("math")
    assert "assert" in page.code


def test_the_chapters_are_complete() -> None:
    assert [path.name[:2] for path in CHAPTERS] == ["01", "02", "03", "04", "05", "06"]


def mermaid_blocks() -> list[tuple[str, str]]:
    return [(name_of(path), b.text) for path in sorted(DOCS.rglob("*.md")) for b in Page.read(path).blocks("mermaid")]


@pytest.mark.parametrize(("where", "text"), mermaid_blocks())
def test_mermaid_is_a_diagram(where: str, text: str) -> None:
    lines = [line.strip() for line in text.strip().splitlines()]
    assert re.fullmatch(r"flowchart (TD|TB|BT|LR|RL)", lines[0])
    assert text.count('"') % 2 == 0
    bare = re.sub(r'"[^"]*"', "", text)
    for opening, closing in ("()", "[]", "{}"):
        assert bare.count(opening) == bare.count(closing)
    assert sum(line.startswith("subgraph") for line in lines) == lines.count("end")
    arrows = [line for line in lines[1:] if "-->" in line]
    assert len(arrows) >= 3
    defined = set(re.findall(r"\b([A-Za-z]\w*)(?:\[|\(\(|\(\[|\{)", bare))
    for line in arrows:
        parts = re.split(r"\s*-->\s*(?:\|[^|]*\|\s*)?", re.sub(r'"[^"]*"', "", line))
        for part in parts:
            match = re.match(r"[A-Za-z]\w*", part)
            assert match is not None
            assert match.group() in defined, f"{where}: node {part} is never given a text"


@pytest.mark.parametrize("path", sorted(THEORY.glob("figures/*.svg")), ids=name_of)
def test_svg_is_well_formed_readable_and_used(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    width, height = (float(x) for x in root.attrib["viewBox"].split()[2:])
    assert root.find(f"{SVG}title") is not None
    assert root.find(f"{SVG}desc") is not None
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    light, dark = style.split("@media", 1)
    named = set(re.findall(r"\.(\w+) \{", light))
    assert named == set(re.findall(r"\.(\w+) \{", dark)), "a class without a colour in one of the themes"
    for element in root.iter():
        for used in element.attrib.get("class", "").split():
            assert used in named
        for key, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.attrib.get(key, 0)) <= limit
    pages = [*CHAPTERS, *map(chinese_of, CHAPTERS)]
    assert any(target.endswith(f"/{path.name}") for page in pages for target in Page.read(page).links())


def test_all_the_errors_are_corrected() -> None:
    text = ERRORS.read_text(encoding="utf-8")
    entries = re.split(r"^## (\d+)\. ", text, flags=re.MULTILINE)[1:]
    assert [int(number) for number in entries[::2]] == list(range(1, 22))
    for number, entry in zip(entries[::2], entries[1::2], strict=True):
        for part in ("**Claim.**", "**Wrong:**", "**Right:**"):
            assert part in entry, f"{number}: {part}"
        assert "```python" in entry, number
        assert "assert " in entry or "```text" in entry, number


@pytest.mark.parametrize("path", EVERY_PAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_inside_the_repository_resolve(path: Path) -> None:
    page = Page.read(path)
    for link in page.links():
        target, _, anchor = link.partition("#")
        place = (path.parent / target).resolve() if target else path
        assert place.exists(), link
        assert place.is_relative_to(ROOT), link
        if anchor and place.suffix == ".md":
            assert anchor in Page.read(place).anchors(), link


def test_the_index_lists_every_page() -> None:
    for index in (THEORY / "README.md", THEORY / "zh" / "README.md"):
        links = set(Page.read(index).links())
        assert {path.name for path in [*CHAPTERS, ERRORS]} <= links


@pytest.mark.parametrize("english", ENGLISH, ids=name_of)
def test_options_and_verbs_exist(english: Path) -> None:
    fields = {f.name for name in options.__all__ for f in fields_of(getattr(options, name))}
    for page in (Page.read(english), Page.read(chinese_of(english))):
        named = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z][a-z-]*)", page.prose)}
        assert named <= fields
        assert set(re.findall(r"`upslope (\w+)[ `]", page.prose)) <= set(VERBS)


def fields_of(thing: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()


# The table of papers


class Entry(NamedTuple):
    paper: str
    functions: list[str]
    tests: list[str]
    recipes: list[str]


def entries() -> list[Entry]:
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", (DOCS / "papers.md").read_text(), re.MULTILINE)
    names = [[re.findall(r"`([^`]+)`", cell) for cell in row[1:]] for row in rows]
    return [
        Entry(row[0], *found)
        for row, found in zip(rows, names, strict=True)
        if row[0] != "paper" and "---" not in row[0]
    ]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.paper[:40])
def test_what_the_table_of_papers_names_exists(entry: Entry) -> None:
    assert re.search(r"\b(19|20)\d\d\b", entry.paper), "no year"
    assert entry.functions
    for name in entry.functions:
        assert resolves(f"upslope.functional.{name}") or resolves(f"upslope.{name}"), name
    assert entry.tests
    sources = ""
    for name in entry.tests:
        assert (ROOT / name).is_file(), name
        sources += (ROOT / name).read_text(encoding="utf-8")
    for name in entry.functions:
        assert re.search(rf"\b{name.rpartition('.')[2]}\b", sources), f"{name} does not occur in {entry.tests}"
    for name in entry.recipes:
        if name.startswith(("configs/", "src/", "docs/", "benchmarks/")):
            assert (ROOT / name).is_file(), name
        else:
            assert name.split()[0] in VERBS, name


def public_functions() -> list[str]:
    found = []
    for module_name in functional.__all__:
        module = getattr(functional, module_name)
        for name, thing in inspect.getmembers(module, lambda x: inspect.isfunction(x) or inspect.isclass(x)):
            if not name.startswith("_") and thing.__module__ == module.__name__:
                found.append(f"{module_name}.{name}")
    return found


def test_every_function_is_in_the_chapters_or_the_table() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in [*CHAPTERS, DOCS / "papers.md"])
    missing = [name for name in public_functions() if not re.search(rf"\b{name.rpartition('.')[2]}\b", text)]
    assert not missing
