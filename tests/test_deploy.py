"""The container and the system service: what can be checked without building the one or starting the other."""

from __future__ import annotations

import fnmatch
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from upslope import cli, config
from upslope.errors import ConfigError, DataError, ModelError
from upslope.options import ServeOptions

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def stages(root: Path) -> list[list[Instruction]]:
    """The Containerfile's instructions (name, rest), one list per FROM; those before the first in none."""
    text = re.sub(r"^\s*#.*\n", "", (root / "deploy/Containerfile").read_text(), flags=re.MULTILINE)
    found: list[list[Instruction]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            found.append([])
        if name and found:
            found[-1].append((name, rest.strip()))
    return found


@pytest.fixture(scope="module")
def unit(root: Path) -> dict[str, list[str]]:
    """The unit's settings, each with its values in order."""
    settings: dict[str, list[str]] = {}
    for line in (root / "deploy/upslope.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


def copied(stages: list[list[Instruction]]) -> list[str]:
    """What is copied out of the repository."""
    words = [rest.split() for stage in stages for name, rest in stage if name == "COPY"]
    return [source for some in words if not some[0].startswith("--from=") for source in some[:-1]]


def instruction(stage: list[Instruction], name: str) -> str:
    return [rest for found, rest in stage if found == name][-1]


def pins(path: Path) -> dict[str, set[str]]:
    """Names to the versions that a requirements file allows."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE):
        found.setdefault(name, set()).add(version)
    return found


def test_everything_copied_exists_and_is_not_ignored(stages: list[list[Instruction]], root: Path) -> None:
    sources = copied(stages)
    assert {"pyproject.toml", "src", "requirements/serve.txt"} <= set(sources)
    rules = [line for line in (root / ".containerignore").read_text().splitlines() if line and line[0] != "#"]
    for source in sources:
        assert (root / source).exists(), source
        ignored = False
        for rule in rules:  # the last that fits decides
            if any(fnmatch.fnmatch(part, rule.lstrip("!")) for part in (source, source.split("/")[0])):
                ignored = not rule.startswith("!")
        assert not ignored, f"{source} is left out by .containerignore"


def test_what_is_copied_builds_the_package(stages: list[list[Instruction]], root: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    for source in copied(stages):
        target = tmp_path / source
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(root / source, target) if (root / source).is_dir() else shutil.copy(root / source, target)
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "out"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next((tmp_path / "out").iterdir())).namelist()
    for path in (root / "src").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert str(path.relative_to(root / "src")) in names


def test_installs_are_pinned(stages: list[list[Instruction]], root: Path) -> None:
    """All but another index's torch by hash, from the copied files, and the versions those of the lock."""
    commands = [
        c.strip() for name, rest in stages[0] if name == "RUN" for c in re.split(r"&&|;|\bthen\b|\belse\b", rest)
    ]
    installs = [c for c in commands if c.startswith("pip install")]
    assert len(installs) == 5
    files = [word for c in installs for word in shlex.split(c) if word.startswith("requirements/")]
    assert set(files) == {source for source in copied(stages) if source.startswith("requirements/")}
    others = [command for command in installs if "--require-hashes" not in command]
    assert others == [
        'pip install --index-url "${TORCH_INDEX}" "$(grep -o \'^torch==[0-9.]*\' requirements/torch.txt)"',
        "pip install --no-deps --no-build-isolation .",
    ]
    assert {instruction(stage, "FROM") for stage in stages} == {"${BASE} AS build", "${BASE}"}
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", (root / "deploy/Containerfile").read_text(), re.MULTILINE)
    assert "pip check" in commands
    serve, locked = pins(root / "requirements/serve.txt"), pins(root / "requirements/locked.txt")
    assert "--hash=sha256:" in (root / "requirements/serve.txt").read_text()
    assert {name: versions for name, versions in serve.items() if name in locked and locked[name] != versions} == {}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    names = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in wanted}  # type: ignore[index]
    assert names <= {*serve, *pins(root / "requirements/build.txt"), *pins(root / "requirements/torch.txt")}


def test_the_last_user_has_no_rights(stages: list[list[Instruction]]) -> None:
    last = stages[-1]
    names = [name for name, _ in last]
    user, group = map(int, instruction(last, "USER").split(":"))
    assert min(user, group) > 0
    assert "RUN" not in names[names.index("USER") :]
    assert "COPY" not in names[names.index("USER") :]
    assert not any(name == "ADD" for stage in stages for name, _ in stage)
    assert not any("API_KEY" in rest for stage in stages for name, rest in stage if name in ("ENV", "ARG"))
    owned = next(rest for name, rest in last if name == "RUN" and "useradd" in rest)
    writable = json.loads(instruction(last, "VOLUME"))
    assert all(f"-o {user} -g {group}" in owned and folder in owned for folder in writable)
    environment = " ".join(rest for name, rest in last if name == "ENV")
    assert f"UPSLOPE_HOME={writable[0]}" in environment
    assert instruction(last, "WORKDIR") == writable[1]


def test_the_image_has_a_compiler(stages: list[list[Instruction]]) -> None:
    """The kernels are compiled where they run: the last stage needs what upslope/kernels looks for."""
    assert any(name == "RUN" and "install" in rest and "g++" in rest.split() for name, rest in stages[-1])


def test_the_entry_point_needs_a_key(stages: list[list[Instruction]], monkeypatch: pytest.MonkeyPatch) -> None:
    program, verb, *arguments = [*json.loads(instruction(stages[-1], "ENTRYPOINT")), *json.loads(command(stages))]
    assert (program, verb) == ("upslope", "serve")
    monkeypatch.delenv("UPSLOPE_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="UPSLOPE_API_KEY"):
        cli.parse(verb, ServeOptions, arguments)
    monkeypatch.setenv("UPSLOPE_API_KEY", "secret")
    options = cli.parse(verb, ServeOptions, arguments)
    assert options.host == "0.0.0.0"
    assert str(options.port) == instruction(stages[-1], "EXPOSE")


def command(stages: list[list[Instruction]]) -> str:
    return instruction(stages[-1], "CMD")


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on loopback that answers every request with `status`; its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_health_check(stages: list[list[Instruction]]) -> None:
    """It asks a route of the application that needs no key, and fails where the server drains or is gone."""
    pytest.importorskip("fastapi")
    from upslope.serving.server import create_app

    check = instruction(stages[-1], "HEALTHCHECK")
    words = json.loads(check[check.index("CMD") + 3 :])
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", words[-1])
    assert url is not None
    assert int(url[1]) == ServeOptions().port
    app = create_app({}, ServeOptions(api_key="secret"))
    assert url[2] in app.openapi()["paths"]

    def healthy(port: int) -> bool:
        asked = [sys.executable, *words[1:-1], words[-1].replace(f":{url[1]}/", f":{port}/")]
        return subprocess.run(asked, capture_output=True, timeout=60).returncode == 0

    assert words[0] == "python"
    with answering(200) as port:
        assert healthy(port)
    assert not healthy(port)
    with answering(503) as port:
        assert not healthy(port)


def test_the_health_route_needs_no_key() -> None:
    pytest.importorskip("fastapi")
    client = pytest.importorskip("fastapi.testclient")
    from upslope.serving.server import create_app

    with client.TestClient(create_app({}, ServeOptions(api_key="secret")), base_url="http://127.0.0.1") as http_client:
        assert http_client.get("/health").status_code == 200
        assert http_client.get("/v1/models").status_code == 401


def test_docker_reads_the_containerfile(root: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=60).returncode:
        pytest.skip("no docker daemon answers here")
    check = [docker, "build", "--check", "-f", "deploy/Containerfile", "."]
    done = subprocess.run(check, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    environment = {**os.environ, "SYSTEMD_PAGER": "cat", "LC_ALL": "C"}
    return subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_systemd_accepts_the_unit(root: Path, tmp_path: Path) -> None:
    good = root / "deploy/upslope.service"
    done = analyze("verify", str(good))
    assert done.returncode == 0
    assert "upslope" not in done.stdout + done.stderr
    bad = tmp_path / "upslope.service"
    bad.write_text(good.read_text().replace("ProtectSystem=", "ProtectSytem="))
    assert "ProtectSytem" in analyze("verify", str(bad)).stderr


def test_systemd_finds_the_unit_little_exposed(root: Path, tmp_path: Path) -> None:
    good = root / "deploy/upslope.service"
    if "--threshold" not in analyze("--help").stdout:
        pytest.skip("this systemd-analyze does not rate unit files")
    done = analyze("security", "--offline=yes", "--threshold=20", str(good))
    assert done.returncode == 0, done.stdout
    bare = tmp_path / "upslope.service"
    bare.write_text("[Service]\nExecStart=/bin/true\n")
    assert analyze("security", "--offline=yes", "--threshold=20", str(bare)).returncode != 0


def test_the_unit_fits_the_server(unit: dict[str, list[str]], root: Path) -> None:
    options = config.load(ServeOptions, root / "deploy/serve.toml")
    assert options.on_loopback
    assert options.api_key is None
    seconds = re.fullmatch(r"(\d+)s", unit["TimeoutStopSec"][0])
    assert seconds is not None
    assert int(seconds[1]) > max(options.drain_seconds, ServeOptions().drain_seconds)
    codes = {str(kind.exit_code) for kind in (ConfigError, DataError, ModelError)}
    assert set(unit["RestartPreventExitStatus"][0].split()) == codes
    assert "MemoryDenyWriteExecute" not in unit
    assert unit.get("ProcSubset", ["all"]) == ["all"]
    environment = dict(pair.split("=", 1) for pair in unit["Environment"][0].split())
    assert environment["UPSLOPE_HOME"] == f"%C/{unit['CacheDirectory'][0]}"
    assert unit["WorkingDirectory"] == [f"%S/{unit['StateDirectory'][0]}"]


def test_the_start_command_hands_the_key_on(unit: dict[str, list[str]], tmp_path: Path) -> None:
    """As systemd runs it: quotes taken off, $$ for $. Without the credential the server is not started."""
    said = unit["ExecStart"][0]
    assert "api-key" in unit["LoadCredential"][0]
    program = tmp_path / "upslope"
    program.write_text('#!/bin/sh\necho "started: $UPSLOPE_API_KEY: $*"\n')
    program.chmod(0o755)
    words = [word.replace("$$", "$") for word in shlex.split(said)]
    assert words[:2] == ["/bin/sh", "-c"]
    words[2] = words[2].replace("/opt/upslope/bin/upslope", str(program))
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path), "PATH": os.environ["PATH"]}
    without = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert without.returncode != 0
    assert without.stdout == ""
    (tmp_path / "api-key").write_text("secret key\n")
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout == "started: secret key: serve --config /etc/upslope/serve.toml\n"
