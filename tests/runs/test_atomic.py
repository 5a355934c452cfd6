from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

import pytest

from upslope import atomic
from upslope.atomic import (
    clean_leftovers,
    point_to,
    publish_folder,
    read_pointer,
    remove_folder,
    write_atomic,
)
from upslope.errors import RunError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_writing_bytes_text_and_by_function(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    write_atomic(path, "é")
    assert path.read_text() == "é"
    write_atomic(path, lambda file: file.write(b"by function"))
    assert path.read_bytes() == b"by function"
    assert names(tmp_path) == {"file"}


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def half(file: IO[bytes]) -> None:
        file.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.raises(RunError, match="file: cannot write: the disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == {"file"}


def test_the_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("folder" if os.path.isdir(f"/dev/fd/{descriptor}") else "file")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomic(tmp_path / "file", b"x")
    assert events == ["file", "rename", "folder"]


def test_a_pointer_is_durable_before_anything_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        events.append("durable" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "other")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append("switched")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    point_to(tmp_path / "last", "step-1")
    assert events == ["switched", "durable"]


def fill_and_fail(target: Path) -> None:
    with publish_folder(target) as inside:
        (inside / "a").write_text("a")
        raise ZeroDivisionError


def test_a_folder_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[tuple[int, int]] = set()
    real_fsync, real_rename = os.fsync, os.replace

    def identity(status: os.stat_result) -> tuple[int, int]:
        return status.st_dev, status.st_ino

    def fsync(descriptor: int) -> None:
        synced.add(identity(os.fstat(descriptor)))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        inside = [source, *source.rglob("*")]
        assert len(inside) == 4
        assert all(identity(path.stat()) in synced for path in inside)
        synced.clear()
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    with publish_folder(tmp_path / "folder") as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "a").write_text("a")
        (inside / "b").write_text("b")
    assert identity(tmp_path.stat()) in synced


def test_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with publish_folder(target) as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "a").write_text("a")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "a"
    with pytest.raises(RunError, match="already exists"), publish_folder(target):
        pass
    with pytest.raises(ZeroDivisionError):
        fill_and_fail(tmp_path / "other")
    assert names(tmp_path) == {"deep"}
    assert names(tmp_path / "deep") == {"folder"}
    remove_folder(target)
    assert names(tmp_path / "deep") == set()


def test_errors_name_the_path_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="absent/file: cannot write: No such file"):
        write_atomic(tmp_path / "absent" / "file", b"")
    assert "not writable" in str(atomic.disk_error(PermissionError(errno.EACCES, "denied"), tmp_path))


def test_pointers_switch_and_work_without_symbolic_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pointer = tmp_path / "last"
    assert read_pointer(pointer) is None
    point_to(pointer, "step-1")
    point_to(pointer, "step-2")
    assert os.readlink(pointer) == "step-2"
    assert read_pointer(pointer) == "step-2"

    def unsupported(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", unsupported)
    other = tmp_path / "best"
    point_to(other, "step-1")
    point_to(other, "step-3")
    assert other.read_text() == "step-3\n"
    assert read_pointer(other) == "step-3"
    assert names(tmp_path) == {"last", "best"}


def test_only_leftovers_of_dead_processes_are_cleaned(tmp_path: Path) -> None:
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    mine = f".upslope-tmp-{os.getpid()}-{atomic._TOKEN}-0-x"
    keep = {"kept", mine, f".upslope-tmp-{os.getppid()}-aaaa-0-x"}
    for name in keep | {f".upslope-tmp-{dead}-aaaa-0-x", f".upslope-tmp-{os.getpid()}-aaaa-0-x"}:
        (tmp_path / name).write_text("")
    folder = tmp_path / f".upslope-tmp-{dead}-aaaa-1-step"
    folder.mkdir()
    (folder / "half").write_text("")
    assert len(clean_leftovers(tmp_path)) == 3
    assert names(tmp_path) == keep
    assert len(clean_leftovers(tmp_path, exclusive=True)) == 1
    assert names(tmp_path) == {"kept", mine}
    assert clean_leftovers(tmp_path / "absent") == []
