"""A comparison on a tiny model: equal budgets, paired intervals, a page without scripts, and resume."""

from __future__ import annotations

import html.parser
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_model import tiny_folder

from upslope import cli
from upslope.errors import ConfigError, RunError
from upslope.options import CompareOptions
from upslope.studies.compare import compare, curve, read_entries, table

TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Message, Reward


class Letter(Task):
    name = "letter"

    def prompts(self, split, n, *, seed):
        found = (chat_prompt(f"Say <b>{i}</b>", answer="a") for i in range(500))
        return select_prompts(found, split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(text.count("a") / 4, correct="a" in text) for text in completions]

    def demonstration(self, prompt):
        return (*prompt.messages, Message("assistant", "aaaa"))
"""
SHARED = """
eval_every = 2
eval_samples = 6
max_completion_length = 5
max_steps = 50
learning_rate = 3e-3
dtype = "float32"
"""
RL = "num_prompts = 4\nnum_generations = 4\nnum_train_prompts = 40\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("compare")
    tiny_folder(folder / "tiny")
    (folder / "letter.py").write_text(TASK)
    head = f'model = "{folder / "tiny"}"\ntask = "{folder / "letter.py"}:Letter"\n'
    (folder / "sft_a.toml").write_text(head + SHARED + "batch_size = 8\nnum_examples = 40\n")
    (folder / "grpo_b.toml").write_text(head + SHARED + RL)
    return {"folder": str(folder), "sft": str(folder / "sft_a.toml"), "grpo": str(folder / "grpo_b.toml")}


def options(files: dict[str, str], folder: Path, **changes: Any) -> CompareOptions:
    given = CompareOptions(
        configs=(files["sft"], files["grpo"]),
        seeds=2,
        max_tokens=300,
        eval_samples=10,
        samples_shown=3,
        output_dir=str(folder),
    )
    return replace(given, **changes)


class Page(html.parser.HTMLParser):
    """Counts tags and collects what a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_whole_comparison(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    result = compare(options(files, folder))
    assert result["stopped"] == "done"
    assert set(result["runs"]) == {"sft_a", "grpo_b"}
    for runs in result["runs"].values():
        assert set(runs) == {"0", "1"}
        for run in runs.values():
            assert run["trained_tokens"] >= 300, "the whole budget was spent"
            assert run["stopped"].startswith("max_tokens")
            assert len(run["quality"]) == 10
            assert [p["samples"] for p in run["curve"]] == sorted(p["samples"] for p in run["curve"])
            assert all(p["seconds"] > 0 for p in run["curve"])
    rows = {row["label"]: row for row in result["recipes"]}
    assert rows["start"]["gain"]["value"] == 0.0
    assert rows["start"]["kl"] == 0.0
    assert rows["sft_a"]["quality"]["value"] == 1.0, "what was demonstrated was learned"
    assert rows["sft_a"]["kl"] > 0.0
    for row in rows.values():
        assert row["quality"]["low"] <= row["quality"]["value"] <= row["quality"]["high"]
    (pair,) = result["pairs"]
    assert (pair["a"], pair["b"]) == ("sft_a", "grpo_b")
    assert pair["value"] == pytest.approx(rows["grpo_b"]["quality"]["value"] - rows["sft_a"]["quality"]["value"])
    assert json.loads((folder / "compare.json").read_text())["recipes"] == result["recipes"]
    assert "grpo_b" in table(result)

    page = Page((folder / "report.html").read_text())
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags
    assert "b" not in page.tags, "a prompt's markup stays text"
    assert "Say <b>" in "".join(page.words)


def test_finished_runs_are_kept_on_resume(files: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    o = options(files, folder, seeds=1)
    first = compare(o)
    with pytest.raises(RunError, match="not empty"):
        compare(o)
    (folder / "grpo_b" / "seed-0" / "measured.json").unlink()
    stamp = (folder / "sft_a" / "seed-0" / "summary.json").stat().st_mtime_ns
    again = compare(replace(o, resume=True))
    assert (folder / "sft_a" / "seed-0" / "summary.json").stat().st_mtime_ns == stamp
    assert again["runs"]["sft_a"] == first["runs"]["sft_a"]
    ours, theirs = again["runs"]["grpo_b"]["0"], first["runs"]["grpo_b"]["0"]
    assert {k: ours[k] for k in ("quality", "kl", "replies", "steps")} == {
        k: theirs[k] for k in ("quality", "kl", "replies", "steps")
    }


def test_curve_counts_what_a_step_trains_on(files: dict[str, str], tmp_path: Path) -> None:
    compare(options(files, tmp_path / "c", seeds=1))
    points = curve(tmp_path / "c" / "grpo_b" / "seed-0", 16)
    assert [p["samples"] for p in points] == [16 * p["step"] for p in points]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"configs": ("sft",)}, "two or more"),
        ({"max_seconds": 5.0}, "exactly one"),
        ({"max_tokens": None}, "exactly one"),
        ({"resume": True, "output_dir": None}, "output_dir"),
        ({"seeds": 0}, "seeds"),
    ],
)
def test_bad_options(files: dict[str, str], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        options(files, tmp_path, **changes).validate()


def test_what_cannot_be_compared(files: dict[str, str], tmp_path: Path) -> None:
    folder = Path(files["folder"])
    other = folder / "ppo_c.toml"
    other.write_text(f'model = "elsewhere"\ntask = "{folder / "letter.py"}:Letter"\n')
    with pytest.raises(ConfigError, match=r"differ in model .*give --model"):
        read_entries(options(files, tmp_path, configs=(files["sft"], str(other))))
    assert read_entries(options(files, tmp_path, configs=(files["sft"], str(other)), model="m"))[1].options.model == "m"
    odd = folder / "mine.toml"
    odd.write_text("")
    with pytest.raises(ConfigError, match=r"mine\.toml: its name must begin with the recipe"):
        read_entries(options(files, tmp_path, configs=(files["sft"], str(odd))))
    data = folder / "sft_data.toml"
    data.write_text('data = "x.jsonl"\n')
    with pytest.raises(ConfigError, match=r"sft_data\.toml: no task"):
        read_entries(options(files, tmp_path, configs=(str(data), files["grpo"])))
    with pytest.raises(ConfigError, match="two configurations are called sft_a"):
        read_entries(options(files, tmp_path, configs=(files["sft"], files["sft"])))


def test_command_takes_files_as_words(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", files["sft"], files["grpo"], "--seeds", "1", "--max-tokens", "60", "--eval-samples", "4"]
    assert cli.main([*words, "--output-dir", str(tmp_path / "c")]) == 0
    assert "report.html" in capsys.readouterr().out
