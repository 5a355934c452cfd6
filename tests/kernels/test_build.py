"""Compiling the kernels: once, under a name that says of what, and with one clear line where it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from upslope import kernels

built = pytest.mark.skipif(kernels.problem() is not None, reason=f"no kernels: {kernels.problem()}")
wide = pytest.mark.skipif("avx512f" not in kernels.processor().split(), reason="this processor has no AVX-512")
REPORT = "from upslope import kernels; print(kernels.problem())"


def problem(tmp_path: Path, **environment: str) -> str:
    """What a fresh process says."""
    inherited = {name: value for name, value in os.environ.items() if name != "UPSLOPE_KERNELS"}
    env = {**inherited, "UPSLOPE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_they_can_be_switched_off(tmp_path: Path) -> None:
    assert problem(tmp_path, UPSLOPE_KERNELS="off") == "switched off by UPSLOPE_KERNELS"


@wide
def test_without_a_compiler_the_reason_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert problem(tmp_path, PATH=str(empty), CXX="c++") == "no C++ compiler (c++, g++, clang++) on the PATH"


@wide
def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    fake = tmp_path / "bad-c++"
    fake.write_text("#!/bin/sh\necho 'bad-c++: out of order' >&2\nexit 1\n")
    fake.chmod(0o755)
    said = problem(tmp_path, CXX=str(fake))
    assert said.endswith("could not compile them: bad-c++: out of order")
    assert not list((tmp_path / "kernels").glob("*"))


def test_a_compiler_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "slow-c++"
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("UPSLOPE_KERNELS", "on")
    monkeypatch.setattr(kernels, "_TIMEOUT_S", 0.2)
    monkeypatch.setattr(kernels, "processor", lambda: "avx512f")
    with pytest.raises(kernels.Unavailable, match=r"slow-c\+\+ took longer than 0\.2 s"):
        kernels.library.__wrapped__()


@built
def test_a_second_process_finds_the_library_made(tmp_path: Path) -> None:
    assert problem(tmp_path) == "None"
    (made,) = (tmp_path / "kernels").glob("*.so")
    stamp = made.stat().st_mtime_ns
    assert problem(tmp_path) == "None"
    assert made.stat().st_mtime_ns == stamp


@built
def test_a_damaged_library_is_compiled_again_and_said(tmp_path: Path) -> None:
    assert problem(tmp_path) == "None"
    (made,) = (tmp_path / "kernels").glob("*.so")
    whole = made.read_bytes()
    made.write_bytes(whole[: len(whole) // 2])
    env = {**os.environ, "UPSLOPE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", REPORT], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"
    assert done.stderr.splitlines() == [f"upslope: {made}: damaged, or of an earlier version; compiled again"]
    assert len(made.read_bytes()) == len(whole)


def test_a_library_is_taken_only_with_the_bytes_that_were_compiled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = tmp_path / "fake-c++"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nprintf library > "$2"\n')
    fake.chmod(0o755)
    target = tmp_path / "kernels" / "x.so"
    assert not kernels._whole(target)
    kernels._compile(str(fake), target)
    assert kernels._whole(target)
    assert capsys.readouterr().err == ""
    for spoil in (lambda: target.write_bytes(b"librar"), lambda: target.with_suffix(".sha256").unlink()):
        spoil()
        assert not kernels._whole(target)
        assert capsys.readouterr().err == f"upslope: {target}: damaged, or of an earlier version; compiled again\n"
        kernels._compile(str(fake), target)
        assert kernels._whole(target)


@built
def test_the_name_depends_on_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels._digest("c++")
    other = tmp_path / "other.cpp"
    other.write_text("// another")
    monkeypatch.setattr(kernels, "_sources", lambda: [other])
    assert kernels._digest("c++") != before


@built
def test_only_one_storage_type_on_the_cpu_is_usable() -> None:
    x = torch.zeros(2)
    assert kernels.usable(x, x)
    assert kernels.usable(x.bfloat16())
    assert not kernels.usable(x, x.bfloat16())
    assert not kernels.usable(x.double())
    assert not kernels.usable(x, torch.zeros(2, device="meta"))
