"""The list of planted faults: it fits the sources, and the script tells what was noticed from what was not."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


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
    *("model", "output_dir", "data", "eval_data", "test_data", "cache_dir", "task", "tokenizer"),
    *("text_column", "label_column", "pair_column", "token_column", "tag_column", "tag_scheme"),
}
"""Options that say where things are and what they are called."""
SIZES = {
    *("architecture", "vocab_size", "shared_vocabulary", "hidden_size", "intermediate_size"),
    *("num_layers", "num_heads", "norm", "lora_rank"),
}
"""Options that say what a new network looks like: its file says whether they were followed."""
LAUNCH = {"resume", "allow_changed_data", "dry_run", "json"}


def test_every_option_of_training_has_a_fault_that_ignores_or_bends_it(mutants: Any) -> None:
    import upslope.options as options

    verbs = [x for x in vars(options).values() if isinstance(x, type) and issubclass(x, options.RunOptions)]
    assert len(verbs) > 10
    names = {field.name for verb in verbs for field in dataclasses.fields(verb)} - PLACES - SIZES - LAUNCH
    planted = " ".join(mutant.old for mutant in mutants.listed())
    bare = sorted(name for name in names if not re.search(rf"\.{name}\b", planted))
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
        ({"new": "factor = 1.0 + error"}, "the new text be another"),
        ({"file": "functional/no.py"}, "there is no src/upslope/functional/no.py"),
        ({"tests": ["tests/no.py::test_it"]}, "there is no tests/no.py"),
        ({"tests": []}, "no test is named"),
        ({"fautl": "a typing error"}, "fautl"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_an_entry_that_does_not_fit_is_named(change: dict[str, Any], said: str, mutants: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"kl-horizon: .*{said}"):
        mutants.listed(written(tmp_path / "list.toml", ENTRY | change))


def test_two_faults_of_one_name_are_refused(mutants: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="kl-horizon: the name is taken"):
        mutants.listed(written(tmp_path / "list.toml", ENTRY, ENTRY))


@pytest.mark.slow
def test_what_is_noticed_what_is_not_and_what_is_broken(root: Path, tmp_path: Path) -> None:
    harmless = ENTRY | {"name": "harmless", "new": "factor = 1.0 + 1.0 * error"}
    broken = ENTRY | {"name": "broken", "new": "factor = = error"}
    path = written(tmp_path / "list.toml", ENTRY, harmless, broken)
    before = (root / "src/upslope/functional/kl.py").read_text()
    command = [sys.executable, "scripts/mutants.py", "--list", str(path), "--json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stdout + done.stderr
    assert " noticed  kl-horizon" in done.stdout
    assert " NOT NOTICED  harmless" in done.stdout
    assert " BROKEN (pytest ended with 4)  broken" in done.stdout
    assert "not noticed: " in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {"planted": 3, "noticed": 1}
    assert (root / "src/upslope/functional/kl.py").read_text() == before
    alone = subprocess.run([*command, "kl-horizon"], cwd=root, capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0
    assert json.loads(alone.stdout.splitlines()[-1]) == {"planted": 1, "noticed": 1}
