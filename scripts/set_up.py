"""Fill an environment with the pinned parts of requirements/ and with upslope itself: what `make .venv` does.

Six lines say where it is. What pip says goes to set-up.log in the environment, and is shown when a step fails.
Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IDLE = re.compile(r"WARNING: Location .* is ignored")  # pip says it once for every part and every unused folder
Variables = Mapping[str, str] | None
PINNED = ("--require-hashes", "--no-deps", "--no-build-isolation", "--use-pep517")


class Failed(Exception):
    """A step did not succeed; the text is all that the command printed."""


def main() -> None:
    """Make or mend .venv."""
    folder, requirements = ROOT / ".venv", ROOT / "requirements"
    begun = time.monotonic()
    try:
        say(1, f"an environment for Python {sys.version_info[0]}.{sys.version_info[1]} in .venv")
        python = environment(folder)
        say(2, f"{len(pins(requirements))} pinned parts, each checked against its hash")
        pinned_parts(python, requirements)
        if can_compile():
            say(3, "the parts in C that are compiled here")
            compiled_parts(python, requirements)
        else:
            say(3, "no C compiler with Python's headers: a few puzzles of reasoning-gym are left out")
        say(4, f"{torch_pin(requirements)} (some 200 MB as a build for CPUs; with CUDA libraries several GB)")
        torch_and_its_libraries(python, requirements)
        say(5, "upslope itself, from src/")
        pip(python, "install", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    except Failed as failure:
        print(failure, file=sys.stderr)
        sys.exit("== set-up failed: the reason is above; when it is mended, run the same command again, it goes on")
    except KeyboardInterrupt:
        sys.exit("\n== set-up stopped; the same command goes on")
    say(6, f"ready after {time.monotonic() - begun:.0f} s")


def say(step: int, what: str) -> None:
    """One line of progress."""
    print(f"== set-up {step}/6: {what}", flush=True)


def environment(folder: Path) -> Path:
    """The Python of the environment in `folder`, which is made where it is missing or broken."""
    python = folder / "bin" / "python"
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return python
    try:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
    except (subprocess.CalledProcessError, ImportError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        said = getattr(error, "output", None) or b""
        remedy = "this Python cannot make environments; on Debian and Ubuntu: apt install python3-venv"
        raise Failed(f"{said.decode(errors='replace')}{error}\n{remedy}") from error
    except OSError as error:
        raise Failed(f"{folder}: {error}") from error
    return python


def pinned_parts(python: Path, requirements: Path, variables: Variables = None) -> None:
    """Everything but torch: first what builds the parts that come as source, then all the rest."""
    pip(python, "install", *PINNED, "-r", str(requirements / "build.txt"), variables=variables)
    pip(python, "install", *PINNED, "-r", str(requirements / "locked.txt"), variables=variables)


def compiled_parts(python: Path, requirements: Path, variables: Variables = None) -> None:
    """What has to be compiled and can be done without."""
    pip(python, "install", *PINNED, "-r", str(requirements / "compiled.txt"), variables=variables)


def torch_and_its_libraries(python: Path, requirements: Path) -> None:
    """torch: the package index's own build by its hash; another index's build by its version, and said.

    A build such as 2.13.0+cpu cannot be in the public index, which takes no such versions: it comes from an index or a
    folder that this machine's pip was told of, and brings that index's libraries.
    """
    pin = torch_pin(requirements)
    asked = [python, "-c", "from importlib import metadata; print('torch==' + metadata.version('torch'))"]
    have = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    if have.partition("+")[0] != pin:
        with tempfile.TemporaryDirectory(dir=python.parent.parent) as folder:
            pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, pin)
            (wheel,) = Path(folder).iterdir()
            have = f"torch=={wheel.name.split('-')[1]}"
            if "+" in have:
                digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
                print(f"   {wheel.name}: from an index of your own, not checked; sha256 {digest}", flush=True)
                pip(python, "install", str(wheel))
            else:
                local = ("--no-index", "--find-links", folder)
                pip(python, "install", *PINNED, *local, "-r", str(requirements / "torch.txt"))
    if "+" not in have:
        pip(python, "install", *PINNED, "-r", str(requirements / "cuda.txt"))


def torch_pin(requirements: Path) -> str:
    """`torch==version`, as torch.txt pins it."""
    return next(iter(re.findall(r"^torch==[^ \\\n]+", (requirements / "torch.txt").read_text(), re.MULTILINE)))


def pip(python: Path, *arguments: str, variables: Variables = None) -> None:
    """`pip` of that Python, with these arguments; Failed with what pip said where it fails.

    variables: the environment variables; None: this process's own.
    """
    command = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments, "--quiet"]
    done = subprocess.run(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
    )
    with (python.parent.parent / "set-up.log").open("a", encoding="utf-8") as log:
        log.write(f"$ pip {' '.join(arguments)}\n{done.stdout}")
    if done.returncode:
        raise Failed("\n".join(line for line in done.stdout.splitlines() if not IDLE.match(line)))


def pins(requirements: Path) -> list[str]:
    """The pins (`name==version`, with their markers) of build.txt and locked.txt, without hashes."""
    text = "".join((requirements / name).read_text() for name in ("build.txt", "locked.txt"))
    return re.findall(r"^([a-z0-9][^\\\n]*==[^\\\n]*?) \\$", text, re.MULTILINE)


def can_compile() -> bool:
    """Whether a C compiler is on the path and Python.h where this interpreter expects it."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(compiler) is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


if __name__ == "__main__":
    main()
