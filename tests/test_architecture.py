"""The house keeps its shape: floors of imports, small options, documented names, pinned parts, no foreign traces."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from upslope import cli, options
from upslope.config import coerce, hints_of, metadata_of, names_of

RECIPES = {"SFTOptions", "PPOOptions", "GRPOOptions"}
OPTIONS = [item for item in vars(options).values() if dataclasses.is_dataclass(item) and isinstance(item, type)]


def tracked(root: Path) -> list[Path]:
    """The files of the repository; in an unpacked archive, all files outside .venv and caches."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if done.returncode == 0:
        names = [root / line for line in done.stdout.splitlines()]
    else:
        names = [path for path in root.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return [path for path in names if path.is_file()]


def requirements_of(root: Path) -> list[str]:
    """Every line of pyproject.toml that asks for a package, those of the extras included."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [*project["dependencies"], *(line for some in project["optional-dependencies"].values() for line in some)]


def test_imports_go_down_the_floors(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts of pyproject.toml, [tool.importlinter]."""
    monkeypatch.syspath_prepend(str(root / "src"))
    program = (
        "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def imported(path: Path, module: str, modules: set[str]) -> set[str]:
    """The project's modules that a file imports, also inside functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if path.name != "__init__.py" else module.split(".")
            home = node.module if not node.level else ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{home}.{alias.name}" for alias in node.names} & modules
            found |= names or {str(home)} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found - {module}


def test_no_file_imports_itself_through_others(root: Path) -> None:
    """Wherever the imports stand: taking away, again and again, what imports nothing that is left, leaves nothing."""
    files = {
        ".".join(path.relative_to(root / "src").with_suffix("").parts).removesuffix(".__init__"): path
        for path in (root / "src/upslope").rglob("*.py")
    }
    left = {module: imported(path, module, set(files)) for module, path in files.items()}
    assert sum(map(len, left.values())) > len(files)
    while settled := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in settled:
            del left[module]
    assert not left, f"in circles, or above them: {sorted(left)}"


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_options_are_few(cls: type) -> None:
    """What a class adds to what all recipes share: at most 25, so that a recipe stays readable."""
    own = [name for name in vars(cls).get("__annotations__", {}) if name in cls.__dataclass_fields__]
    assert len(own) <= 25, own


def test_options_are_frozen_and_documented(root: Path) -> None:
    """Every option has a help text (the string under it), and every class can be checked."""
    files = sorted((root / "src/upslope/options").glob("*.py"))
    documented: dict[str, set[str]] = {}
    for node in [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]:
        if isinstance(node, ast.ClassDef):
            pairs = zip(node.body, node.body[1:], strict=False)
            documented[node.name] = {
                first.target.id
                for first, second in pairs
                if isinstance(first, ast.AnnAssign)
                and isinstance(first.target, ast.Name)
                and isinstance(second, ast.Expr)
                and isinstance(second.value, ast.Constant)
                and len(str(second.value.value)) > 5
            }
    for cls in OPTIONS:
        known = set().union(*(documented.get(parent.__name__, set()) for parent in cls.__mro__))
        assert set(cls.__dataclass_fields__) <= known, set(cls.__dataclass_fields__) - known
        assert cls.__dataclass_params__.frozen, cls
        assert callable(cls.validate), cls


@pytest.mark.parametrize("cls", OPTIONS, ids=lambda cls: cls.__name__)
def test_what_is_said_of_options_is_of_options(cls: Any) -> None:
    """Other spellings are nobody's name, and what help shows first or an option needs is there, with such a value."""
    hints = hints_of(cls)
    assert len(names_of(cls)) == len(hints) + sum("also" in metadata_of(cls, name) for name in hints)
    assert set(cls.FIRST.split()) <= set(hints)
    assert len(cls.FIRST.split()) <= 12
    for name in hints:
        other, _, values = metadata_of(cls, name).get("needs", "").partition("=")
        for value in filter(None, values.split(",")):
            coerce(other, value, hints[other], name)
        assert not other or other in hints


def test_every_options_class_has_a_verb() -> None:
    used = {verb.options for verb in cli.VERBS.values()}
    bases = {parent.__name__ for cls in OPTIONS for parent in cls.__mro__[1:]}
    assert {cls.__name__ for cls in OPTIONS} - bases == used
    assert used >= RECIPES


def test_no_foreign_traces(root: Path) -> None:
    """No file names the host of a package index or a path of one machine."""
    hosts = ["py" + "pi.org", "pythonh" + "osted.org", "registry.n" + "pmjs", "download.py" + "torch.org"]
    hosts += ["deb.deb" + "ian.org", "proxy.gol" + "ang.org", "crat" + "es.io"]
    places = ["/wo" + "rk/", "/ro" + "ot/", "/tm" + "p/w/", "/op" + "t/wheels", "/op" + "t/pypi", "/ho" + "me/"]
    pattern = re.compile("|".join(map(re.escape, hosts + places)))
    found = []
    for path in tracked(root):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{text[: match.start()].count(chr(10)) + 1}: {match[0]}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)


def test_pins_have_hashes_and_no_addresses(root: Path) -> None:
    for name in ("build", "locked", "compiled", "check"):
        text = (root / f"requirements/{name}.txt").read_text(encoding="utf-8")
        assert "://" not in text
        blocks = text.replace("\\\n", " ").splitlines()
        pins = [block for block in blocks if not block.startswith("#")]
        assert pins
        for pin in pins:
            assert re.match(r"[a-z0-9][a-z0-9.-]*==\S+ ", pin), pin
            assert re.search(r"--hash=sha256:[0-9a-f]{64}", pin), pin
            assert not re.match(r"(torch|triton|nvidia-|cuda-)[^r]*==", pin), f"{pin[:40]}: comes with torch"


def test_the_lock_covers_what_is_declared(root: Path) -> None:
    """Every dependency of pyproject.toml is pinned, to a version that the declaration allows."""
    pinned: dict[str, set[str]] = {}
    for path in (root / "requirements").glob("*.txt"):
        text = path.read_text(encoding="utf-8")
        for name, version in re.findall(r"^([A-Za-z0-9.-]+)==([^\s;]+)", text, re.MULTILINE):
            pinned.setdefault(canonicalize_name(name), set()).add(version)
    for line in requirements_of(root):
        requirement = Requirement(line)
        if requirement.name == "upslope":
            continue
        versions = pinned.get(canonicalize_name(requirement.name), set())
        assert versions, f"{line}: not in requirements/; run make lock"
        assert all(requirement.specifier.contains(version) for version in versions), f"{line}: pinned {versions}"


def test_what_is_imported_is_declared(root: Path) -> None:
    """Every package that the source imports is named in pyproject.toml, not merely brought along by another.

    But for Triton: the builds of torch that need it bring the one version that fits.
    """
    declared = {"triton"} | {
        canonicalize_name(Requirement(line).name).replace("-", "_") for line in requirements_of(root)
    }
    missing: dict[str, str] = {}
    for path in (root / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                if top not in sys.stdlib_module_names and top.lower() not in declared:
                    missing[top] = str(path)
    assert not missing, missing


def test_modules_are_short(root: Path) -> None:
    long = {path.name: n for path in (root / "src").rglob("*.py") if (n := len(path.read_text().splitlines())) > 500}
    assert not long, long


@pytest.mark.parametrize(
    "path", ["LICENSE", "README.md", "README.zh-CN.md", "CHANGELOG.md", "CONTRIBUTING.md", ".ci/run"]
)
def test_the_front_door(path: str, root: Path) -> None:
    assert (root / path).stat().st_size > 0


def test_ci_runs_what_users_run(root: Path) -> None:
    text = (root / ".ci/run").read_text(encoding="utf-8")
    assert "make test" in text
    assert "set -euo pipefail" in text
    assert (root / ".ci/run").stat().st_mode & 0o111
