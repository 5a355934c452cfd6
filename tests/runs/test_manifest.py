"""Whether a folder still holds what its inventory said."""

from __future__ import annotations

import os
from pathlib import Path

from upslope.manifest import damaged_file, inventory


def test_what_is_changed_removed_or_cut_is_named_and_what_is_added_is_not(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name in ("a", "b", "model/c"):
        (tmp_path / name).write_bytes(name.encode())
    listed = inventory(tmp_path)
    assert listed.keys() == {"a", "b", "model/c"}
    (tmp_path / "more").write_text("x")
    assert damaged_file(tmp_path, listed) is None
    (tmp_path / "model/c").write_bytes(b"another")
    assert damaged_file(tmp_path, listed) == "model/c is damaged (its SHA-256 differs)"
    assert damaged_file(tmp_path, listed, deep=False) is None, "sizes alone are compared"
    (tmp_path / "b").write_bytes(b"bb")
    assert damaged_file(tmp_path, listed, deep=False) == "b has 2 bytes instead of 1"
    (tmp_path / "a").unlink()
    assert damaged_file(tmp_path, listed) == "a is missing"


def test_a_file_changed_within_one_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """Its size and time of modification are those it had: only what has long been as it is need not be read again."""
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    listed, status = inventory(tmp_path), file.stat()
    assert damaged_file(tmp_path, listed) is None
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (status.st_ino, status.st_mtime_ns)
    assert damaged_file(tmp_path, listed) == "weights is damaged (its SHA-256 differs)"
