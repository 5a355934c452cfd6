"""Resolve the dependencies of pyproject.toml anew and write the hash-pinned files in requirements/.

Run by a maintainer: `make lock`, which keeps the pins that still fit, or `make lock ARGS=--upgrade`, which takes the
newest. It makes a throwaway environment with the resolver `uv`, resolves once for Python 3.11 to 3.13 and all
platforms, and sets apart torch (torch.txt, whose version is the maintainer's choice) and the libraries that only its
CUDA build needs (cuda.txt): pip may be set up to take another index's build of it, which brings its own. The files name
versions and hashes, never an address.

What exists as a source archive only is built on the user's machine, without build isolation, so what builds it must be
pinned too: every such archive is unpacked and its build backend asked (PEP 517), and the answers are what build.txt
pins. A lock is written only when every other pin has a wheel for each supported Python, and when all of it was
installed into an empty environment without any cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import venv
from pathlib import Path

import set_up
import stranger

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "requirements"
TOOLS = ("uv>=0.9", "build>=1.2")
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31")  # the C library that README asks for

TORCH = re.compile(r"(torch|triton|pytorch-triton.*|nvidia-.*|cuda-.*)")
# Together all pins, each once.
FILES = ("torch.txt", "cuda.txt", "build.txt", "locked.txt", "compiled.txt", "check.txt")
COMPILED = {"pycosat"}  # source only, in C: installed where a compiler is, see upslope/extras.py
CHECK = {"pip-audit", "pyright", "ruff"}  # `make check` only
ELSEWHERE = re.compile(r"sys_platform == 'emscripten'|python_full_version >= '3\.1[4-9]'")

Pins = list[tuple[str, list[str]]]

# What a source tree (first argument) needs in order to be built as a wheel, and as an editable install, as JSON.
ASK_BACKEND = """
import json, sys
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv
with DefaultIsolatedEnv() as env:
    builder = ProjectBuilder.from_isolated_env(env, sys.argv[1])
    needed = set(builder.build_system_requires)
    env.install(needed)
    for kind in sys.argv[2:]:
        needed |= set(builder.get_requires_for_build(kind))
print(json.dumps(sorted(needed)))
"""


def main(upgrade: bool) -> None:
    """Resolve everything once, divide it into files, install them from nothing, and only then replace the old ones."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    wanted = [line for line in wanted if not line.startswith("upslope[")]
    wanted.append(set_up.torch_pin(OUT))
    checkers = [line for line in wanted if name_of(line) in CHECK]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tools = install_tools(work)
        kept = "" if upgrade else "".join((OUT / name).read_text() for name in FILES)
        (work / "kept.txt").write_text(kept)
        sources = source_only(tools, work, usable(resolve(tools, work, wanted)))
        build = builders(tools, work, sources)
        everything = resolve(tools, work, wanted + build)
        constraints = "".join(f"{head}\n" for head, _ in everything)

        def names(lines: list[str]) -> set[str]:
            return {name_of(head) for head, _ in resolve(tools, work, lines, constraints)}

        build_names = names(build)
        run_names = names([line for line in wanted if name_of(line) not in CHECK]) - build_names - COMPILED
        chosen = usable(everything)
        new = work / "requirements"
        new.mkdir()
        torch = [pin for pin in everything if TORCH.fullmatch(name_of(pin[0])) and not elsewhere(pin[0])]
        cuda = {name_of(head) for head, _ in torch} - {"torch"}
        write(new / "torch.txt", "torch, as the package index has it.", torch, {"torch"})
        write(new / "cuda.txt", "What torch's CUDA build needs.", torch, cuda)
        write(new / "build.txt", "What builds the parts that come as source, and upslope itself.", chosen, build_names)
        write(new / "locked.txt", "Everything upslope and its tests run on, torch excepted.", chosen, run_names)
        what = "What the container image runs on: the pins of locked.txt that `serve` needs."
        served = names([*project["dependencies"], *extras["serve"]])
        write(new / "serve.txt", what, chosen, served & run_names)
        write(new / "compiled.txt", "Parts in C that come as source only.", chosen, COMPILED)
        write(new / "check.txt", "What only `make check` uses.", chosen, names(checkers) - run_names - build_names)
        check_wheels(tools, work, chosen, {name for name, _ in sources})
        install_from_nothing(work, new)
        for file in sorted(new.iterdir()):
            shutil.copy(file, OUT)


def install_tools(work: Path) -> Path:
    """A throwaway environment with the resolver and a build frontend in it; returns its folder of programs."""
    venv.create(work / "tools", with_pip=True)
    tools = work / "tools" / "bin"
    subprocess.run([tools / "python", "-m", "pip", "install", "--quiet", *TOOLS], check=True)
    return tools


def ask_resolver(tools: Path, work: Path, wanted: list[str], *options: str) -> str:
    """What `uv pip compile` says of these requirements; a refusal stops everything."""
    (work / "in.txt").write_text("\n".join(wanted))
    # Local wheel folders of this machine must not decide what others get.
    own = {"UV_FIND_LINKS", "UV_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in own}
    command = [tools / "uv", "pip", "compile", "--quiet", "--no-config", "--no-header", *options, work / "in.txt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"no lock was written; the resolver says:\n{done.stderr}")
    return done.stdout


def resolve(tools: Path, work: Path, wanted: list[str], constraints: str = "") -> Pins:
    """Pins of everything `wanted` needs on Python 3.11 and later: ("name==1.0 ; marker", [hashes])."""
    (work / "constraints.txt").write_text(constraints)
    shutil.copy(work / "kept.txt", work / "out.txt")  # the resolver prefers the pins that its output file has
    options = ["--universal", "--generate-hashes", "--no-annotate", "--python-version", PYTHONS[0]]
    ask_resolver(tools, work, wanted, *options, "-c", str(work / "constraints.txt"), "-o", str(work / "out.txt"))
    pins: Pins = []
    for line in (work / "out.txt").read_text().splitlines():
        bare = line.strip().removesuffix("\\").strip()
        if bare.startswith("--hash="):
            pins[-1][1].append(bare)
        elif bare:
            pins.append((bare, []))
    return pins


def source_only(tools: Path, work: Path, pins: Pins) -> list[tuple[str, Path]]:
    """The pins that exist as a source archive only, each with its unpacked source tree."""
    options = ["--universal", "--no-deps", "--format", "pylock.toml", "--python-version", PYTHONS[0]]
    lock = tomllib.loads(ask_resolver(tools, work, [head for head, _ in pins], *options))
    found = []
    for package in lock["packages"]:
        if package.get("wheels"):
            continue
        source = package["sdist"]
        archive = work / source["url"].rpartition("/")[2].partition("#")[0]
        with urllib.request.urlopen(source["url"], timeout=60) as stream:
            archive.write_bytes(stream.read())
        if hashlib.sha256(archive.read_bytes()).hexdigest() != source["hashes"]["sha256"]:
            raise SystemExit(f"{archive.name}: not the archive that the index describes")
        shutil.unpack_archive(archive, work / "source" / package["name"])
        (tree,) = (work / "source" / package["name"]).iterdir()
        found.append((package["name"], tree))
    print(f"source archives only: {', '.join(name for name, _ in found) or 'none'}")
    return found


def builders(tools: Path, work: Path, sources: list[tuple[str, Path]]) -> list[str]:
    """What the build backends of these source trees, and of this project, ask for."""
    needed = set()
    for name, tree, kinds in [*((*source, ["wheel"]) for source in sources), ("upslope", ROOT, ["wheel", "editable"])]:
        command = [tools / "python", "-c", ASK_BACKEND, tree, *kinds]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: its build backend does not answer:\n{done.stderr}")
        asked = json.loads(done.stdout.splitlines()[-1])
        print(f"  {name} is built by {', '.join(asked)}")
        needed |= set(asked)
    return sorted(needed)


def check_wheels(tools: Path, work: Path, pins: Pins, sources: set[str]) -> None:
    """Stop unless every pin but the source archives has a wheel for each Python and platform that is supported."""
    wanted = [head for head, _ in pins if name_of(head) not in sources]
    for python in PYTHONS:
        for platform in PLATFORMS:
            options = ["--no-deps", "--only-binary", ":all:", "--python-version", python]
            ask_resolver(tools, work, wanted, *options, "--python-platform", platform)


def install_from_nothing(work: Path, requirements: Path) -> None:
    """Stop unless the files install, in the set-up's own way, into an empty environment without any cache."""
    python, variables = work / "empty" / "bin" / "python", stranger.environment(work)
    try:
        set_up.environment(work / "empty")
        set_up.pinned_parts(python, requirements, variables)
        if set_up.can_compile():
            set_up.compiled_parts(python, requirements, variables)
    except set_up.Failed as failure:
        raise SystemExit(f"no lock was written; it does not install from nothing:\n{failure}") from None


def usable(pins: Pins) -> Pins:
    """The pins without torch and its libraries, and without what only unsupported platforms ask for."""
    return [(head, hashes) for head, hashes in pins if not TORCH.fullmatch(name_of(head)) and not elsewhere(head)]


def elsewhere(head: str) -> bool:
    """True for a pin whose marker asks only for what the project does not support."""
    return " ; " in head and bool(ELSEWHERE.search(head.split(" ; ", 1)[1]))


def name_of(requirement: str) -> str:
    """The normalised name a requirement starts with."""
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    if found is None:
        raise SystemExit(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def write(file: Path, what: str, pins: Pins, names: set[str]) -> None:
    """Write the pins of these names; a pin without a hash or with an address stops everything."""
    lines = [f"# {what} Made by `make lock`; do not edit.\n"]
    for head, hashes in pins:
        if name_of(head) not in names:
            continue
        if not hashes or "//" in head or "@" in head:
            raise SystemExit(f"{head}: no hash, or an address instead of a version")
        lines.append(" \\\n    ".join([head, *sorted(hashes)]) + "\n")
    file.write_text("".join(lines))
    print(f"requirements/{file.name}: {len(lines) - 1} pins")


if __name__ == "__main__":
    if f"{sys.version_info[0]}.{sys.version_info[1]}" not in PYTHONS:
        raise SystemExit("resolve with a supported Python (3.11 to 3.13): make lock PYTHON=python3.11")
    main(upgrade="--upgrade" in sys.argv[1:])
