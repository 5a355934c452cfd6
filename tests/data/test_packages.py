"""One pinned wheel, fetched by pip from a folder of ours: no network, nothing installed."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from upslope.errors import ConfigError, DataError, RunError
from upslope.packages import extract_member, fetch_wheel

NAME, VERSION = "upslope-test-data", "1.0"
FILE = "upslope_test_data-1.0-py3-none-any.whl"
PAYLOAD = bytes(range(256)) * 5000


def read_member(wheel: Path, member: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return extract_member(wheel, member, Path(folder, "member")).read_bytes()


def build_wheel(folder: Path, payload: bytes = PAYLOAD) -> str:
    """A minimal valid wheel that depends on a package which does not exist; returns its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    info = "upslope_test_data-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nRequires-Dist: upslope-no-such-package\n"
    with zipfile.ZipFile(folder / FILE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("upslope_test_data/data.bin", payload)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / FILE).read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip is configured to find packages in this folder only."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def test_fetch_once_and_read(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = build_wheel(index)
    store = tmp_path / "cache" / "wheels"
    wheel = fetch_wheel(NAME, VERSION, sha256, store)
    assert wheel == store / FILE
    assert [path.name for path in store.iterdir()] == [FILE]  # no scratch left behind
    assert importlib.util.find_spec("upslope_test_data") is None
    assert read_member(wheel, "upslope_test_data/data.bin") == PAYLOAD
    copy = extract_member(wheel, "upslope_test_data/data.bin", tmp_path / "out" / "data.bin")
    assert copy.read_bytes() == PAYLOAD
    assert [path.name for path in copy.parent.iterdir()] == ["data.bin"]

    def no_pip(*_: object, **__: object) -> None:
        raise AssertionError("a wheel that is there is not fetched again")

    monkeypatch.setattr(subprocess, "run", no_pip)
    assert fetch_wheel("Upslope.Test_Data", VERSION, sha256, store) == wheel


def test_other_bytes_are_refused_and_nothing_is_kept(index: Path, tmp_path: Path) -> None:
    sha256 = build_wheel(index)
    build_wheel(index, b"other bytes")
    with pytest.raises(DataError, match=r"^upslope-test-data==1.0: the index serves a file with another sha256"):
        fetch_wheel(NAME, VERSION, sha256, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_copy_is_fetched_again(index: Path, tmp_path: Path) -> None:
    sha256 = build_wheel(index)
    store = tmp_path / "cache"
    store.mkdir()
    (store / FILE).write_bytes(b"half a download")
    assert read_member(fetch_wheel(NAME, VERSION, sha256, store), "upslope_test_data/data.bin") == PAYLOAD


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("upslope.packages.RETRIES", 1)
    with pytest.raises(DataError, match=r"the package index cannot be reached; connect to a network") as caught:
        fetch_wheel(NAME, VERSION, "0" * 64, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_version_the_index_does_not_have(index: Path, tmp_path: Path) -> None:
    sha256 = build_wheel(index)
    with pytest.raises(DataError, match=r"^upslope-test-data==2.0: .*No matching distribution"):
        fetch_wheel(NAME, "2.0", sha256, tmp_path / "cache")


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(ConfigError, match=r"needs pip, which is missing: python -m ensurepip --upgrade"):
        fetch_wheel(NAME, VERSION, "0" * 64, tmp_path)


def test_a_folder_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    sha256 = build_wheel(index)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(RunError, match=r"taken: cannot store upslope-test-data==1.0: "):
        fetch_wheel(NAME, VERSION, sha256, tmp_path / "taken")
    with pytest.raises(RunError, match=r"cannot be written"):
        extract_member(index / FILE, "upslope_test_data/data.bin", tmp_path / "taken" / "data.bin")


@pytest.mark.parametrize(
    ("name", "version", "sha256"),
    [("--index-url", "1.0", "0" * 64), ("a b", "1.0", "0" * 64), ("a", "1.0 --pre", "0" * 64), ("a", "1.0", "xyz")],
)
def test_arguments_that_could_be_options(name: str, version: str, sha256: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a package name, version and sha256"):
        fetch_wheel(name, version, sha256, tmp_path)


def test_members(tmp_path: Path) -> None:
    build_wheel(tmp_path)
    with pytest.raises(DataError, match=r"holds no 'upslope_test_data/data.bim'; did you mean '.*data.bin'"):
        read_member(tmp_path / FILE, "upslope_test_data/data.bim")
    with pytest.raises(DataError, match=r"no such wheel"):
        read_member(tmp_path / "none.whl", "x")
    content = bytearray((tmp_path / FILE).read_bytes())
    content[100:140] = bytes(40)
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable wheel"):
        read_member(tmp_path / FILE, "upslope_test_data/data.bin")
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"not a readable wheel"):
        extract_member(tmp_path / FILE, "x", tmp_path / "out")
    assert not (tmp_path / "out").exists()
