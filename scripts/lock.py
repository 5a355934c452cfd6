"""Resolve the dependencies of pyproject.toml anew and write the hash-pinned files in requirements/.

Run by a maintainer: `make lock`. It makes a throwaway environment with the resolver `uv`, resolves once for Python
3.11 to 3.13 and all platforms, and takes out torch with the libraries that only torch's own accelerator builds need:
torch is installed before, by its version alone, so that pip may choose the platform's build. The files name
versions and hashes, never an address.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "requirements"
UV = "uv>=0.9"
NEWEST_PYTHON = (3, 13)

TORCH = re.compile(r"(torch|triton|pytorch-triton.*|nvidia-.*|cuda-.*)")
BUILD = ["setuptools", "hatchling", "editables"]  # what builds the source-only parts and this project
COMPILED = {"pycosat"}  # source only, in C: installed where a compiler is, see upslope/extras.py
CHECK = ["pyright", "ruff"]  # `make check` only
ELSEWHERE = re.compile(r"sys_platform == 'emscripten'|python_full_version >= '3\.1[4-9]'")


def main() -> None:
    """Resolve everything once, then divide it into files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    wanted = [line for line in wanted if not line.startswith("upslope[")]
    wanted += BUILD + [line for line in (OUT / "torch.txt").read_text().splitlines() if not line.startswith("#")]
    checkers = [line for line in wanted if name_of(line) in CHECK]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        uv = install_uv(work)
        everything = resolve(uv, work, wanted)
        constraints = "".join(f"{head}\n" for head, _ in everything)
        build_names = {name_of(head) for head, _ in resolve(uv, work, BUILD, constraints)}
        check_names = {name_of(head) for head, _ in resolve(uv, work, checkers, constraints)}
        others = [line for line in wanted if name_of(line) not in CHECK]
        main_names = {name_of(head) for head, _ in resolve(uv, work, others, constraints)}
        served = [*project["dependencies"], *extras["serve"]]
        serve_names = {name_of(head) for head, _ in resolve(uv, work, served, constraints)}
    chosen = [
        (head, hashes) for head, hashes in everything if not TORCH.fullmatch(name_of(head)) and not elsewhere(head)
    ]
    write("build.txt", "What builds the parts that come as source, and upslope itself.", chosen, build_names)
    run_names = main_names - build_names - COMPILED
    write("locked.txt", "Everything upslope and its tests run on, torch excepted.", chosen, run_names)
    what = "What the container image runs on: the pins of locked.txt that `serve` needs."
    write("serve.txt", what, chosen, serve_names & run_names)
    write("compiled.txt", "Parts in C that come as source only.", chosen, COMPILED)
    write("check.txt", "What only `make check` uses.", chosen, check_names - run_names - build_names)


def install_uv(work: Path) -> Path:
    """A throwaway environment with the resolver in it; returns the program's path."""
    venv.create(work / "env", with_pip=True)
    python = work / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", UV], check=True)
    return work / "env" / "bin" / "uv"


def resolve(uv: Path, work: Path, wanted: list[str], constraints: str = "") -> list[tuple[str, list[str]]]:
    """Pins of everything `wanted` needs on Python 3.11 and later: ("name==1.0 ; marker", [hashes])."""
    (work / "in.txt").write_text("\n".join(wanted))
    (work / "constraints.txt").write_text(constraints)
    # Local wheel folders of this machine must not decide what others get.
    own = {"UV_FIND_LINKS", "UV_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in own}
    options = "--quiet --no-config --universal --generate-hashes --no-annotate --no-header --python-version 3.11"
    command = [str(uv), "pip", "compile", *options.split(), "-c", str(work / "constraints.txt"), str(work / "in.txt")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    pins: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        bare = line.strip().removesuffix("\\").strip()
        if bare.startswith("--hash="):
            pins[-1][1].append(bare)
        elif bare:
            pins.append((bare, []))
    return pins


def elsewhere(head: str) -> bool:
    """True for a pin whose marker asks only for what the project does not support."""
    return " ; " in head and bool(ELSEWHERE.search(head.split(" ; ", 1)[1]))


def name_of(requirement: str) -> str:
    """The normalised name a requirement starts with."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise SystemExit(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def write(file: str, what: str, pins: list[tuple[str, list[str]]], names: set[str]) -> None:
    """Write the pins of these names; a pin without a hash or with an address stops everything."""
    lines = [f"# {what} Made by `make lock`; do not edit.\n"]
    for head, hashes in pins:
        if name_of(head) not in names:
            continue
        if not hashes or "//" in head or "@" in head:
            raise SystemExit(f"{head}: no hash, or an address instead of a version")
        lines.append(" \\\n    ".join([head, *sorted(hashes)]) + "\n")
    (OUT / file).write_text("".join(lines))
    print(f"requirements/{file}: {len(lines) - 1} pins")


if __name__ == "__main__":
    if sys.version_info[:2] > NEWEST_PYTHON:
        raise SystemExit("resolve with a supported Python (3.11 to 3.13): make lock PYTHON=python3.11")
    main()
