from __future__ import annotations

import errno
import itertools
import math
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from upslope.atomic import point_to
from upslope.errors import RunError
from upslope.runs.folder import Run
from upslope.training import checkpoint
from upslope.training.checkpoint import (
    capture_random_state,
    damage,
    list_checkpoints,
    load,
    resolve,
    restore_random_state,
    save,
)


def small(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"w": torch.full((3,), float(step))}}


def store(folder: Path, step: int, **options: Any) -> Path:
    return save(folder, step, tensors=small(step), state={"step": step}, **options)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    weight = torch.randn(4, 6)
    tensors = {
        "policy": {
            "float32": weight,
            "transposed": weight.t(),
            "tied": weight,
            "part": weight[1:3],
            "bfloat16": weight.to(torch.bfloat16),
            "special": torch.tensor([math.nan, math.inf, -0.0]),
        },
        "optimizer": {
            "step": torch.tensor(7),
            "bytes": torch.arange(256, dtype=torch.uint8),
            "flags": torch.tensor([True, False]),
            "float64": torch.randn(3, dtype=torch.float64, requires_grad=True),
            "empty": torch.empty(0, 5),
        },
        "critic": {},
    }
    state = {"kl_coef": 0.1 + 0.2, "nan": math.nan, "text": "é", "none": None, "nested": {"list": [1, 2.5, True]}}
    path = save(tmp_path, 12, tensors=tensors, state=state)
    assert path == tmp_path / "step-00000012"
    for place in (path, tmp_path / "last"):
        loaded, loaded_state = load(place)
        assert loaded.keys() == tensors.keys()
        for group, named in tensors.items():
            assert loaded[group].keys() == named.keys()
            for name, tensor in named.items():
                other = loaded[group][name]
                assert other.dtype == tensor.dtype
                assert other.shape == tensor.shape
                assert torch.equal(
                    other.contiguous().view(-1).view(torch.uint8),
                    tensor.detach().contiguous().view(-1).view(torch.uint8),
                )
        assert math.isnan(loaded_state.pop("nan"))
        assert loaded_state == {key: value for key, value in state.items() if key != "nan"}


def test_loaded_tensors_are_not_windows_into_the_file(tmp_path: Path) -> None:
    path = store(tmp_path, 1)
    load(path)[0]["policy"]["w"].add_(1.0)
    assert load(path)[0]["policy"]["w"].tolist() == [1.0, 1.0, 1.0]


def test_large_tensors_are_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = torch.zeros(100)
    named = {"w": torch.zeros(10), "left": buffer[:50], "right": buffer[50:]}
    ready = checkpoint._distinct(named)
    assert all(ready[name].data_ptr() == tensor.data_ptr() for name, tensor in named.items())
    overlapping = checkpoint._distinct({"all": buffer, "part": buffer[10:20]})
    assert overlapping["all"].data_ptr() == buffer.data_ptr()
    assert overlapping["part"].data_ptr() != buffer[10:20].data_ptr()


def test_a_model_folder_lies_inside_and_is_verified(tmp_path: Path) -> None:
    def write_model(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    path = store(tmp_path, 1, write_model=write_model)
    assert set(load(path)[0]) == {"policy"}
    (path / "model" / "model.safetensors").write_bytes(b"weight!")
    with pytest.raises(RunError, match=r"model/model\.safetensors is damaged"):
        load(path)


def test_bad_arguments_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for error, options in [
        (TypeError, {"state": {"a": {1: 2}}}),
        (TypeError, {"state": {"a": object()}}),
        (ValueError, {"keep_last": 0}),
        (ValueError, {"tensors": {"../policy": {}}}),
    ]:
        with pytest.raises(error):
            save(folder, 1, **{"tensors": {}, "state": {}, **options})
    with pytest.raises(ValueError, match="step"):
        save(folder, -1, tensors={}, state={})
    assert not folder.exists() or names(folder) == set()


@pytest.mark.parametrize("name", ["policy.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("how", ["truncated", "missing", "flipped"])
def test_a_damaged_newest_checkpoint_is_said_and_never_loaded(tmp_path: Path, name: str, how: str) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step, keep_last=3)
    path = tmp_path / "step-00000003"
    file = path / name
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif how == "missing":
        file.unlink()
    else:
        data[0 if name == "manifest.json" else -1] ^= 1
        file.write_bytes(data)
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        load(path)
    with pytest.raises(RunError, match="resume from another"):
        load(tmp_path / "last")
    found = resolve(tmp_path, "last")
    assert (found.path.name, found.step) == ("step-00000002", 2)
    assert "step-00000003 is damaged" in found.note
    assert name in found.note
    assert "using step-00000002" in found.note
    assert "\n" not in found.note
    with pytest.raises(RunError, match="step-00000003"):
        resolve(tmp_path, 3)


def test_resolving_names(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no complete checkpoint: there is none yet"):
        resolve(tmp_path / "absent")
    with pytest.raises(RunError, match="no such checkpoint yet"):
        load(tmp_path / "last")
    store(tmp_path, 1, keep_last=None)
    with pytest.raises(RunError, match="no best"):
        resolve(tmp_path, "best")
    store(tmp_path, 2, keep_last=None, best=True)
    store(tmp_path, 3, keep_last=None)
    for which, step in [("last", 3), ("best", 2), (1, 1), ("1", 1), ("step-00000002", 2)]:
        found = resolve(tmp_path, which)
        assert (found.step, found.path, found.note) == (step, tmp_path / f"step-{step:08d}", "")
    with pytest.raises(RunError, match=r"no such checkpoint; .*step-00000001, step-00000002, step-00000003"):
        resolve(tmp_path, 9)
    (tmp_path / "step-00000002" / "state.json").unlink()
    with pytest.raises(RunError, match=r"state\.json is missing"):
        resolve(tmp_path, "best")


def test_resuming_in_one_call(tmp_path: Path) -> None:
    assert checkpoint.resume(tmp_path / "absent", keep_last=1) is None
    for step in (1, 2, 3):
        store(tmp_path, step, keep_last=None, best=step == 1)
    (tmp_path / "last").unlink()
    point_to(tmp_path / "best", "step-00000002")
    found = checkpoint.resume(tmp_path, keep_last=1)
    assert found is not None
    assert found[0].step == 3
    assert found[1]["policy"]["w"].tolist() == [3.0] * 3
    assert found[2] == {"step": 3}
    assert os.readlink(tmp_path / "last") == "step-00000003"
    assert os.readlink(tmp_path / "best") == "step-00000001"
    assert names(tmp_path) == {"last", "best", "step-00000001", "step-00000003"}
    for path in tmp_path.glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(RunError, match=r"no complete checkpoint: .*manifest\.json is missing"):
        checkpoint.resume(tmp_path, keep_last=1)


def test_what_is_not_accepted_changes_no_file(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step, keep_last=None)
    before = names(tmp_path)

    def refuse(found: checkpoint.Resolved, state: dict[str, Any]) -> None:
        raise RunError(f"step {found.step} holds {state}")

    with pytest.raises(RunError, match="step 3 holds"):
        checkpoint.resume(tmp_path, keep_last=1, accept=refuse)
    assert names(tmp_path) == before


def test_peeking_reads_the_newest_state_that_can_be_read(tmp_path: Path) -> None:
    assert checkpoint.peek(tmp_path) is None
    for step in (1, 2, 3):
        store(tmp_path, step, keep_last=None)
    (tmp_path / "step-00000003/state.json").write_text("x" * len('{"step": 3}'))
    found = checkpoint.peek(tmp_path)
    assert found == (tmp_path / "step-00000002", {"step": 2})


def test_a_future_format_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path, 1)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert damage(path) == "checkpoint format 2, this program reads 1"


def test_going_back_and_saving_again_keeps_the_new_branch_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        store(tmp_path, step, keep_last=None, best=step == 3)
    again = save(tmp_path, 2, tensors=small(20), state={"branch": "new"}, keep_last=2)
    assert again.name == "step-00000002.1"
    assert resolve(tmp_path).path == again
    assert resolve(tmp_path).note == ""
    assert resolve(tmp_path, 2).path == again
    assert load(again)[1] == {"branch": "new"}
    assert names(tmp_path) == {"last", "best", "step-00000003", "step-00000002.1"}


@settings(max_examples=40, deadline=None)
@given(
    plan=st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=12),
    keep=st.one_of(st.none(), st.integers(1, 4)),
)
def test_retention_keeps_the_newest_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, plan: list[tuple[int, bool]], keep: int | None
) -> None:
    folder = tmp_path_factory.mktemp("keep")
    saved: list[str] = []
    best = None
    for step, is_best in plan:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda descriptor: None)  # Slow on a busy disk, and not the question here.
            path = store(folder, step, keep_last=keep, best=is_best)
        saved.append(path.name)
        best = path.name if is_best else best
        present = names(folder) - {"last", "best"}
        expected = set(saved if keep is None else saved[-keep:]) | ({best} if best else set())
        # A name may be used again after its first holder was deleted; the newest holder counts.
        assert present == expected
        assert os.readlink(folder / "last") == path.name
        assert all(damage(folder / name) is None for name in present)
        if best:
            assert os.readlink(folder / "best") == best
    assert [each.path.name for each in list_checkpoints(folder)][-1] == saved[-1]


@pytest.mark.parametrize("where", ["save_file", "fsync", "publish", "replace"])
def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store(tmp_path, 1, best=True)
    real_replace = os.replace

    def full(*given: Any, **_: object) -> None:
        if where == "save_file":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        if where == "publish" and not given[1].name.startswith("step-"):
            return real_replace(*given)
        raise OSError(errno.ENOSPC, "No space left on device")

    place = checkpoint if where == "save_file" else os
    monkeypatch.setattr(place, "replace" if where == "publish" else where, full)
    with pytest.raises(RunError, match=r"step-00000002.*disk is full.*--resume") as caught:
        store(tmp_path, 2)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"step-00000001", "last", "best"}
    assert load(tmp_path / "last")[1] == {"step": 1}
    store(tmp_path, 2)
    assert load(tmp_path / "last")[1] == {"step": 2}


def test_an_interrupt_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, 1)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path, 2)
    assert names(tmp_path) == {"step-00000001", "last"}


def test_an_old_checkpoint_goes_only_after_the_new_one_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(tmp_path, 1)
    real = shutil.rmtree
    removed: list[str] = []

    def rmtree(path: Path, *args: Any, **kwargs: Any) -> None:
        assert load(tmp_path / "last")[1] == {"step": 2}
        removed.append(Path(path).name)
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    store(tmp_path, 2)
    assert len(removed) == 1
    assert removed[0].endswith("step-00000001")


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "disk"
    mount.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def log_for_ever(run: Run) -> None:
    for step in itertools.count(2):
        run.log(step, {f"metric/{i}": step / 7 for i in range(20)})


def test_a_really_full_disk(tiny_disk: Path) -> None:
    with Run.create(output_dir=tiny_disk / "run", verb="sft", config_toml="") as run:
        run.log(1, {"loss": 1.0})
        store(run.checkpoints, 1)
        with pytest.raises(RunError, match="disk is full"):
            save(run.checkpoints, 2, tensors={"policy": {"w": torch.zeros(1_000_000)}}, state={})
        assert names(run.checkpoints) == {"step-00000001", "last"}
        with pytest.raises(RunError, match="disk is full"):
            log_for_ever(run)
        logged = [line["step"] for line in run.metric_lines()]
        assert logged == list(range(1, len(logged) + 1))
        assert load(run.checkpoints / "last")[1] == {"step": 1}
    with Run.open(tiny_disk / "run", read_only=True) as viewer:
        assert viewer.store.last_step() in {len(logged), len(logged) - 1}


def test_random_generators_continue_where_they_were(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    random.gauss(0.0, 1.0)  # leaves a second value waiting, in Python and in numpy
    np.random.standard_normal(3)
    torch.randn(3)
    tensors, state = capture_random_state()
    save(tmp_path, 1, tensors={"random": tensors}, state={"random": state})

    def draw() -> list[Any]:
        return [
            random.random(), random.gauss(0.0, 1.0), np.random.standard_normal(3).tolist(), np.random.rand(),
            torch.randn(5).tolist(), torch.randperm(9).tolist(),
        ]  # fmt: skip

    expected = draw()
    loaded, loaded_state = load(tmp_path / "last")
    assert restore_random_state(loaded["random"], loaded_state["random"]) == []
    assert draw() == expected
    assert draw() != expected


def test_random_state_of_other_machines_is_said() -> None:
    tensors, state = capture_random_state()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    (note,) = restore_random_state({**tensors, f"cuda.{count}": torch.zeros(16, dtype=torch.uint8)}, state)
    assert f"CUDA device {count} not restored" in note
    with pytest.raises(RunError, match="lacks the random state of torch"):
        restore_random_state({name: tensors[name] for name in ("python", "numpy")}, state)
    with pytest.raises(RunError, match="another kind of generator"):
        restore_random_state(tensors, {**state, "numpy": {**state["numpy"], "bit_generator": "PCG64"}})
