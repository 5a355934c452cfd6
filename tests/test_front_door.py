"""The set-up, the lock and CI's command, against a package index that is a folder: nothing comes from a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

BACKEND = """
import os, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "from_source-1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        info = "from_source-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: from-source\\nVersion: 1.0\\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        archive.writestr(f"{info}/RECORD", "")
    return name
"""


@pytest.fixture
def scripts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "scripts"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages here only."""
    folder = new(tmp_path / "simple")
    monkeypatch.setenv("PIP_INDEX_URL", folder.as_uri())
    return folder


def new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def offer(index: Path, name: str, file: str, content: bytes) -> str:
    """Put a file into the index; returns its pin."""
    (index / name).mkdir()
    (index / name / file).write_bytes(content)
    (index / name / "index.html").write_text(f'<a href="{file}">{file}</a>')
    return f"{name}==1.0 --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"


def wheel(name: str, module: str, version: str = "1.0") -> bytes:
    content, info = io.BytesIO(), f"{name}-{version}.dist-info"
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr(f"{name}.py", module)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return content.getvalue()


def source_archive(backend: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        text = f'[build-system]\nrequires = ["{backend}"]\nbuild-backend = "{backend}"\n'.encode()
        for name, data in (("pyproject.toml", text), ("PKG-INFO", b"Name: from-source\nVersion: 1.0\n")):
            member = tarfile.TarInfo(f"from_source-1.0/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def test_a_lock_is_refused_unless_what_builds_its_source_archives_is_pinned(
    index: Path, scripts: None, tmp_path: Path
) -> None:
    import lock

    backend = offer(index, "builder", "builder-1.0-py3-none-any.whl", wheel("builder", BACKEND))
    other = offer(index, "other", "other-1.0-py3-none-any.whl", wheel("other", ""))
    files = new(tmp_path / "requirements")
    source = offer(index, "from-source", "from_source-1.0.tar.gz", source_archive("builder"))
    (files / "locked.txt").write_text(source)
    (files / "compiled.txt").write_text(other)
    (files / "build.txt").write_text(other)
    with pytest.raises(SystemExit, match=r"(?s)no lock was written; it does not install from nothing:.*builder"):
        lock.install_from_nothing(new(tmp_path / "first"), files)
    (files / "build.txt").write_text(backend)
    (tmp_path / "first" / "empty").rename(new(tmp_path / "second") / "empty")  # still empty
    lock.install_from_nothing(tmp_path / "second", files)
    installed = [path.name for path in (tmp_path / "second" / "empty").glob("lib/python*/site-packages/*.dist-info")]
    assert {"builder-1.0.dist-info", "from_source-1.0.dist-info"} <= set(installed)


def test_a_failed_step_says_what_pip_said_and_nothing_of_idle_folders(scripts: None, tmp_path: Path) -> None:
    import set_up

    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    noise = "WARNING: Location 'file:///w/uv/' is ignored: it is neither a file nor a directory."
    python.write_text(f'#!/bin/sh\necho "{noise}"\necho "ERROR: no such part"\necho "its last words" >&2\nexit 1\n')
    python.chmod(0o755)
    with pytest.raises(set_up.Failed) as failure:
        set_up.pip(python, "install", "-r", "x.txt")
    assert str(failure.value).splitlines() == ["ERROR: no such part", "its last words"]
    assert noise in (tmp_path / "set-up.log").read_text()


def test_torch_is_the_one_that_was_pinned_or_said_to_be_another(
    scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import set_up

    python, offered, files = tmp_path / "env/bin/python", new(tmp_path / "offered"), new(tmp_path / "requirements")
    for name, value in (("CONFIG_FILE", os.devnull), ("NO_INDEX", "1"), ("FIND_LINKS", str(offered))):
        monkeypatch.setenv(f"PIP_{name}", value)
    set_up.environment(tmp_path / "env")

    def put(version: str) -> str:
        content = wheel("torch", "", version)
        (offered / f"torch-{version}-py3-none-any.whl").write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def installed() -> str:
        ask = "from importlib import metadata; print(*(d.version for d in metadata.distributions(name='torch')))"
        return subprocess.run([python, "-c", ask], capture_output=True, text=True).stdout.strip()

    digest = put("2.13.0")
    (files / "cuda.txt").write_text("")
    (files / "torch.txt").write_text(f"# torch\ntorch==2.13.0 \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(set_up.Failed, match=rf"(?s)DO NOT MATCH THE HASHES.*{digest}"):
        set_up.torch_and_its_libraries(python, files)
    assert installed() == ""
    (files / "torch.txt").write_text(f"torch==2.13.0 \\\n    --hash=sha256:{digest}\n")
    set_up.torch_and_its_libraries(python, files)
    assert (installed(), capsys.readouterr().out) == ("2.13.0", "")
    (offered / "torch-2.13.0-py3-none-any.whl").unlink()
    (files / "cuda.txt").write_text(f"nvidia-none==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(set_up.Failed, match="nvidia-none"):  # torch is there, what it needs is still to be had
        set_up.torch_and_its_libraries(python, files)
    digest = put("2.14.0+cpu")
    (files / "torch.txt").write_text(f"torch==2.14.0 \\\n    --hash=sha256:{'0' * 64}\n")
    set_up.torch_and_its_libraries(python, files)
    said = f"torch-2.14.0+cpu-py3-none-any.whl: from an index of your own, not checked; sha256 {digest}"
    assert (installed(), capsys.readouterr().out.strip()) == ("2.14.0+cpu", said)
    (offered / "torch-2.14.0+cpu-py3-none-any.whl").unlink()
    set_up.torch_and_its_libraries(python, files)
    assert capsys.readouterr().out == ""


AUDITED = {
    "dependencies": [
        {"name": "sound", "version": "1.0", "vulns": []},
        {"name": "weak", "version": "2.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}]},
        {"name": "unheard-of", "version": "3.0", "skip_reason": "not found"},
    ]
}


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (AUDITED, 1, "weak 2.0: PYSEC-1, mended in 2.1\naudit: 2 of 3 pins looked up, 1 known vulnerabilities; this"),
        ({"dependencies": AUDITED["dependencies"][:1]}, 0, "audit: 1 of 1 pins looked up, 0 known vulnerabilities\n"),
        (None, 0, "audit: the advisories could not be read, so no pin was looked up: no way to the index\n"),
    ],
)
def test_the_audit_says_what_it_found_and_what_it_could_not_look_up(
    answer: dict[str, object] | None, code: int, said: str, root: Path, tmp_path: Path
) -> None:
    fake(tmp_path, "python", f'exec {sys.executable} "$@"')
    fake(tmp_path, "pip-audit", "cat answer.json; echo no way to the index >&2; exit 1")
    (tmp_path / "answer.json").write_text("" if answer is None else json.dumps(answer))
    run = f"import sys; sys.executable = {str(tmp_path / 'python')!r}; sys.path.insert(0, {str(root / 'scripts')!r})"
    command = [sys.executable, "-c", f"{run}; import audit; sys.exit(audit.main())"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.startswith(said)


def test_every_pin_has_hashes_and_no_address(root: Path, scripts: None) -> None:
    import lock

    pinned = [line for name in lock.FILES for line in (root / "requirements" / name).read_text().splitlines()]
    heads = [line for line in pinned if "==" in line]
    assert len(heads) > 150
    assert all(line.endswith(" \\") for line in heads)  # a hash follows
    assert not [line for line in pinned if "://" in line or " @ " in line]


def fake(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_ci_runs_the_tests_as_a_stranger(root: Path, tmp_path: Path) -> None:
    """HOME and caches are new, pip's own settings are gone, the way to the index stays, a browser is a must."""
    programs = new(tmp_path / "bin")
    fake(programs, "make", 'echo "$@"; env; ls -A "$HOME" "$XDG_CACHE_HOME"')
    fake(programs, "id", "echo 1000")  # so that nothing is installed
    fake(programs, "chromium", "exit 1")
    own = {
        "PIP_FIND_LINKS": "/wheels",
        "PIP_EXTRA_INDEX_URL": "file:///more",
        "PIP_CONSTRAINT": "c.txt",
        "UV_FIND_LINKS": "/wheels",
        "PIP_INDEX_URL": "file:///the-index",
        "UPSLOPE_HOME": "/models",
        "XDG_CONFIG_HOME": "/configuration",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", root / ".ci/run"], env=os.environ | own, capture_output=True, text=True, check=True, timeout=60
    )
    command, *rest = done.stdout.splitlines()
    seen = dict(line.split("=", 1) for line in rest if "=" in line)
    assert command == "test"
    assert own.keys() & seen.keys() == {"PIP_INDEX_URL", "PATH"}
    assert seen["PIP_INDEX_URL"] == "file:///the-index"
    assert (seen["PIP_NO_CACHE_DIR"], seen["PIP_CONFIG_FILE"]) == ("1", "/dev/null")
    assert seen["UPSLOPE_TEST_BROWSER"] == "required"
    assert seen["HOME"] != os.environ["HOME"]
    assert rest[-3:] == [f"{seen['XDG_CACHE_HOME']}:", "", f"{seen['HOME']}:"]  # both empty
    assert not Path(seen["HOME"]).exists()


@pytest.mark.parametrize("required", [False, True])
def test_page_tests_without_a_browser(root: Path, tmp_path: Path, required: bool) -> None:
    """They are skipped, and the very last line says how to run them; or fail, where a browser is required."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PATH": str(tmp_path), "UPSLOPE_TEST_BROWSER": "required" if required else ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/serving/test_page_browser.py"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    last = done.stdout.splitlines()[-1]
    if required:
        assert done.returncode == 1
        assert " errors in " in last
    else:
        assert done.returncode == 0
        assert last.endswith("; to run them: apt install chromium, then make test")
        assert last.split(" ", 1)[1].startswith("page tests were skipped because neither chromium nor google-chrome")
