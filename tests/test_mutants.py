"""The list of planted faults: it fits the sources, and the script tells what was noticed from what was not."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from upslope import options
from upslope.options.common import LaunchOptions


@pytest.fixture
def mutants(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(root / "scripts"))
    import mutants

    return mutants


def test_every_fault_can_be_planted_and_its_tests_exist(mutants: Any, root: Path) -> None:
    """Code that moved takes its faults along: an old text must occur exactly once."""
    found = mutants.listed()
    assert len(found) >= 120
    functions: dict[str, set[str]] = {}
    for mutant in found:
        for test in mutant.tests:
            file, _, rest = test.partition("[")[0].partition("::")
            if file not in functions:
                tree = ast.parse((root / file).read_text(encoding="utf-8"))
                kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
                functions[file] = {n.name for n in ast.walk(tree) if isinstance(n, kinds)}
            last = rest.rpartition("::")[2]
            assert not last or last in functions[file], f"{mutant.name}: there is no {test}"


PLACES = {
    *("model", "output_dir", "data", "eval_data", "test_data", "columns", "cache_dir", "task", "tokenizer"),
    *("text_column", "label_column", "pair_column", "token_column", "tag_column", "tag_scheme"),
}
"""Options that say where things are and what they are called."""
SIZES = {
    *("architecture", "vocab_size", "shared_vocabulary", "hidden_size", "intermediate_size"),
    *("num_layers", "num_heads", "norm", "lora_rank"),
}
"""Options that say what a new network looks like: its file says whether they were followed."""

LAUNCHED = set(LaunchOptions.__dataclass_fields__)
RL_CLASSES = options.RLOptions.__mro__
SHARED = {
    "training/optim.py": "BatchOptions",
    "loop/learner.py": "SFTOptions PretrainOptions Seq2SeqOptions",
    "loop/objective.py": "PPOOptions GRPOOptions ReinforceOptions",
}
"""Files that take the options of several verbs, whose names are not in them."""


def test_every_option_of_training_has_a_fault_that_ignores_or_bends_it(mutants: Any, root: Path) -> None:
    """In a file that knows the verb's options, where there are such files: PPO's `lam` is not REINFORCE's."""
    planted: dict[str, str] = {}
    for mutant in mutants.listed():
        planted[mutant.file] = planted.get(mutant.file, "") + mutant.old + "\n"
    texts = {file: (root / "src/upslope" / file).read_text(encoding="utf-8") + SHARED.get(file, "") for file in planted}
    verbs = [kind for kind in vars(options).values() if isinstance(kind, type) and issubclass(kind, options.RunOptions)]
    verbs = [kind for kind in verbs if not kind.__subclasses__()]
    assert len(verbs) >= 12
    bare = []
    for verb in verbs:
        shared = (options.RLOptions if issubclass(verb, options.RLOptions) else options.RunOptions).__dataclass_fields__
        own = [kind.__name__ for kind in verb.__mro__ if dataclasses.is_dataclass(kind) and kind not in RL_CLASSES]
        files = [file for file, text in texts.items() if any(name in text for name in own)]
        for name in sorted({field.name for field in dataclasses.fields(verb)} - PLACES - SIZES - LAUNCHED):
            said = planted.values() if name in shared else map(planted.get, files)
            if not re.search(rf"\.{name}\b|options, \"{name}\"", "\n".join(said)):
                bare.append(f"{verb.__name__}.{name}")
    assert not bare, f"give tests/mutants.toml faults in which these options are ignored: {', '.join(bare)}"


ENTRY = {
    "name": "kl-horizon",
    "fault": "the coefficient moves the wrong way",
    "file": "functional/kl.py",
    "old": "factor = 1.0 + error",
    "new": "factor = 1.0 - error",
    "tests": ["tests/functional/test_kl.py::TestAdaptiveKL"],
}


def written(path: Path, *entries: dict[str, Any]) -> Path:
    tables = ["[[mutant]]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in entry.items()) for entry in entries]
    path.write_text("\n\n".join(tables))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old": "self.coef"}, r"occurs \d+ times"),
        ({"old": "no such line"}, "occurs 0 times"),
        ({"new": "factor = 1.0 + error"}, "its new text is the old one"),
        ({"file": "functional/no.py"}, "there is no src/upslope/functional/no.py"),
        ({"tests": ["tests/no.py::test_it"]}, "there is no tests/no.py"),
        ({"file": "../../scripts/mutants.py"}, r"there is no src/upslope/\.\."),
        ({"tests": []}, "no test is named"),
        ({"tests": "tests/functional/test_kl.py"}, "tests is a list of texts"),
        ({"file": 3}, "tests is a list of texts"),
        ({"fautl": "a typing error"}, "an entry has name, fault, file, old, new, tests, and nothing else"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_an_entry_that_does_not_fit_is_named(
    change: dict[str, Any], said: str, mutants: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        mutants.listed(written(tmp_path / "list.toml", ENTRY | change))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"kl-horizon: .*{said}", line)


def test_a_list_that_cannot_be_read_is_one_line(
    mutants: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = written(tmp_path / "twice.toml", ENTRY, ENTRY)
    twins = written(tmp_path / "twins.toml", ENTRY, ENTRY | {"name": "another"})
    (tmp_path / "broken.toml").write_text("[[mutant]]\nname = ")
    (tmp_path / "empty.toml").write_text("mutant = []")
    (tmp_path / "texts.toml").write_text('mutant = ["x"]')
    for path in (
        twice,
        twins,
        *(tmp_path / name for name in ("broken.toml", "empty.toml", "texts.toml", "absent.toml")),
    ):
        with pytest.raises(SystemExit):
            mutants.listed(path)
        (line,) = capsys.readouterr().err.splitlines()
        assert path.name in line


@pytest.mark.slow
def test_what_is_noticed_what_is_not_and_what_is_broken(root: Path, tmp_path: Path) -> None:
    harmless = ENTRY | {"name": "harmless", "new": "factor = +1.0 + error"}
    broken = ENTRY | {"name": "broken", "new": "factor = = error"}
    crash = ENTRY | {"name": "crash", "new": "factor = eror"}
    path = written(tmp_path / "list.toml", ENTRY, harmless, broken, crash)
    before = (root / "src/upslope/functional/kl.py").read_text()
    command = [sys.executable, "scripts/mutants.py", "--list", str(path), "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " noticed  kl-horizon" in done.stdout
    assert " NOT NOTICED  harmless" in done.stdout
    assert " BROKEN (pytest ended with 4)  broken" in done.stdout
    assert " BROKEN (it names what does not exist)  crash" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"planted": 4, "noticed": 1}
    assert (root / "src/upslope/functional/kl.py").read_text() == before
    red = written(tmp_path / "red.toml", ENTRY | {"tests": ["tests/functional/test_kl.py::test_no_such"]})
    wrong = subprocess.run([*command[:3], str(red)], cwd=root, capture_output=True, text=True, timeout=240)
    assert wrong.returncode == 2
    assert "does not exist" in wrong.stdout
    alone = subprocess.run([*command, "kl-horizon"], cwd=root, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0
    assert json.loads(alone.stdout.splitlines()[-1]) == {"planted": 1, "noticed": 1}


@pytest.mark.slow
def test_stopping_ends_the_forks_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    slow = ["tests/functional/test_unbiased.py", "tests/functional/test_kl.py", "tests/functional/test_returns.py"]
    path = written(tmp_path / "list.toml", ENTRY | {"tests": slow})
    command = [sys.executable, "scripts/mutants.py", "--list", str(path)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "planting 1" in process.stdout.readline()
    time.sleep(0.5)
    forks = [child.pid for child in psutil.Process(process.pid).children()]
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "\nstopped; nothing was changed\n")
    assert forks
    assert not any(psutil.pid_exists(pid) for pid in forks)
    assert not list(tmp_path.glob("mutants-*"))
