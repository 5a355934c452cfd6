"""A resumed run is made of what its checkpoint was made of, or says what has changed; its templates keep its clock."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import typing
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoder_kit import encoder_folder
from hypothesis import given
from hypothesis import strategies as st
from preference_kit import pair_rows, write
from test_recipes import TASK, rl
from test_resume import comparable
from tiny_model import CHATML, tiny_folder

import upslope.options as all_options
from upslope.cli import main
from upslope.config import PLUGINS, hints_of
from upslope.errors import ConfigError, RunError
from upslope.loop import fingerprint, launch
from upslope.loop.distill_items import load_items
from upslope.manifest import read_manifest, write_manifest
from upslope.options import DistillOptions, DPOOptions, GRPOOptions, RunOptions, SFTOptions
from upslope.recipes.dpo import dpo
from upslope.recipes.grpo import grpo
from upslope.recipes.sft import load_examples, sft
from upslope.runs.folder import Run
from upslope.types import Message, Prompt

COMMON = ("--max-steps", "2", "--eval-samples", "2", "--dtype", "float32", "--lr-scheduler-type", "constant")
SAMPLING = ("--num-prompts", "2", "--num-generations", "2", "--max-completion-length", "3", "--num-train-prompts", "8")
PAIRS = [{"prompt": f"Say {i:02}", "completion": f"{i:02} a b"} for i in range(24)]


def swap(path: Path) -> None:
    """Exchange two rows: the same size, and the same time of modification."""
    before = path.stat()
    lines = path.read_text().splitlines(keepends=True)
    lines[1], lines[2] = lines[2], lines[1]
    path.write_text("".join(lines))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def append(path: Path) -> None:
    text = path.read_text()
    path.write_text(text + text.splitlines(keepends=True)[-1].replace("23", "99"))


def cut(path: Path) -> None:
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-4]))


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# edited\n")


def reword(path: Path) -> None:
    text = path.read_text()
    wide, close = "<|im_end|>\n", "<|im_end|>"
    path.write_text(text.replace(wide, close) if wide in text else text.replace(close, wide))


def rows_digest(*prompts: Prompt) -> str:
    learner = SimpleNamespace(trained_on=lambda: (None, map(fingerprint.prompt_row, prompts)))
    return fingerprint.of_learner(learner)[fingerprint.ROWS]


def test_all_that_a_reward_sees_of_a_prompt_is_in_the_digest() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = (Message("assistant", "", tool_calls=(call,)), Message("tool", "2", "add", tool_call_id="c"))
    prompt = Prompt(1, turns, answer="2", metadata={"question": "1 + 1", "tests": ("a", {"n": 2}), 3: {"x", "y"}})
    more = {"function": {"name": "add", "arguments": {"a": 2}}}
    others = [
        replace(prompt, metadata={**prompt.metadata, "tests": ("a", {"n": 3})}),
        replace(prompt, metadata={}),
        replace(prompt, messages=(replace(turns[0], tool_calls=({**call, **more},)), turns[1])),
        replace(prompt, messages=(turns[0], replace(turns[1], name="sum"))),
        replace(prompt, messages=(turns[0], replace(turns[1], tool_call_id="d"))),
    ]
    assert len({rows_digest(p) for p in [prompt, *others]}) == 6
    same = replace(prompt, metadata={3: {"y", "x"}, "tests": ["a", {"n": 2}], "question": "1 + 1"})
    assert rows_digest(same) == rows_digest(prompt)
    here, there = (replace(prompt, metadata={"judge": object(), "files": {Path("a")}}) for _ in range(2))
    assert rows_digest(here) == rows_digest(there)


class Case(typing.NamedTuple):
    verb: str
    words: list[str]
    file: str
    change: Callable[[Path], None]
    said: str


def rows_case(folder: Path, verb: str, change: Callable[[Path], None], *words: str) -> Case:
    rows: list[dict[str, Any]] = PAIRS
    if verb == "dpo":
        rows = [{**row, "chosen": row["chosen"][:2], "rejected": row["rejected"][:2]} for row in pair_rows(24)][10:]
    write(folder / "rows.jsonl", rows)
    return Case(verb, ["--data", str(folder / "rows.jsonl"), *words], "rows.jsonl", change, "rows.jsonl (--data)")


def cases(folder: Path) -> dict[str, Callable[[], Case]]:
    """Name -> a run in `folder`, whose model is folder/model, and what is then done to one of its files."""
    model = ("--model", str(folder / "model"))

    def of_task(verb: str, file: str, option: str, *words: str) -> Case:
        (folder / "helper.py").write_text("NAME = 'letter'\n")
        (folder / "letter.py").write_text(TASK.replace("class Letter", "import helper\n\nclass Letter"))
        (folder / "mine.py").write_text(
            "def mine(prompts, completions):\n    return [len(text) for text in completions]\n"
        )
        task = ("--task", f"{folder / 'letter.py'}:Letter")
        return Case(verb, [*model, *task, *SAMPLING, *words], file, edit, f"{file} (--{option})")

    def classify(change: Callable[[Path], None]) -> Case:
        encoder_folder(folder / "bert")
        with (folder / "rows.csv").open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(
                [("text", "label"), *((f"the film {i}", ("up", "at")[i % 2]) for i in range(10, 34))]
            )
        words = [
            "--model",
            str(folder / "bert"),
            "--data",
            str(folder / "rows.csv"),
            "--eval-share",
            "0.25",
            "--max-length",
            "32",
        ]
        return Case("classify", words, "rows.csv", change, "rows.csv (--data)")

    def in_prompts(change: Callable[[Path], None], *words: str) -> Case:
        write(folder / "rows.jsonl", PAIRS)
        task = f"pairs:path={folder / 'rows.jsonl'},eval_fraction=0.4"
        return Case("grpo", [*model, "--task", task, *SAMPLING, *words], "rows.jsonl", change, "rows.jsonl (--task)")

    def distill(change: Callable[[Path], None]) -> Case:
        case = rows_case(folder, "distill", change, *model, "--teacher", str(folder / "model"))
        return case._replace(words=[*case.words, *SAMPLING[:6]])

    def pretrain(change: Callable[[Path], None]) -> Case:
        (folder / "text.txt").write_text("".join(f"line {i:02} of a text\n" for i in range(40)))
        words = ["--data", str(folder / "text.txt"), "--tokenizer", "char", "--hidden-size", "32"]
        words += ["--num-layers", "1", "--context-length", "16", "--cache-dir", str(folder / "cache")]
        return Case("pretrain", words, "text.txt", change, "text.txt (--data)")

    def template(verb: str) -> Case:
        asked = [{"role": "user", "content": "Say it"}]
        rows = [{"messages": [*asked, {"role": "assistant", "content": letter * 3}]} for letter in "abcdefgh"]
        write(folder / "rows.jsonl", rows)
        words = [*model, "--data", str(folder / "rows.jsonl")]
        return Case(verb, words, "model/chat_template.jinja", reword, "the chat template")

    small = ("--tokenizer", "word", "--hidden-size", "16", "--num-layers", "1", "--num-heads", "2")
    return {
        "sft swapped": lambda: rows_case(folder, "sft", swap, *model),
        "sft appended": lambda: rows_case(folder, "sft", append, *model),
        "sft cut": lambda: rows_case(folder, "sft", cut, *model),
        "sft template": lambda: template("sft"),
        "dpo swapped": lambda: rows_case(folder, "dpo", swap, *model, "--loss", "simpo"),
        "dpo cut": lambda: rows_case(folder, "dpo", cut, *model),
        "classify swapped": lambda: classify(swap),
        "classify cut": lambda: classify(cut),
        "seq2seq swapped": lambda: rows_case(folder, "seq2seq", swap, *small),
        "seq2seq cut": lambda: rows_case(folder, "seq2seq", cut, *small),
        "distill swapped": lambda: distill(swap),
        "distill appended": lambda: distill(append),
        "pretrain swapped": lambda: pretrain(swap),
        "pretrain cut": lambda: pretrain(cut),
        "grpo task": lambda: of_task("grpo", "letter.py", "task"),
        "grpo what the task imports": lambda: of_task("grpo", "helper.py", "task"),
        "ppo reward": lambda: of_task("ppo", "mine.py", "reward", "--reward", f"{folder / 'mine.py'}:mine@0.5"),
        "grpo prompts swapped": lambda: in_prompts(swap),
        "grpo prompts cut, rollouts wait": lambda: in_prompts(cut, "--rollout-lag", "2"),
    }


def contents(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("env.json", ".lock") and "db" not in p.name]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("name", cases(Path()))
def test_what_has_changed_is_refused_by_name_unless_allowed(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    case = cases(tmp_path)[name]()
    run = tmp_path / "run"
    assert main([case.verb, *case.words, *COMMON, "--output-dir", str(run)]) == 0
    before = contents(run)
    case.change(tmp_path / case.file)
    again = [case.verb, "--resume", "--output-dir", str(run), "--max-steps", "3", "--keep-last", "1"]
    capsys.readouterr()
    assert main(again) == 5
    if "(--" in case.said:  # a file, which a dry run looks at, too
        assert main([*again, "--dry-run"]) == 5
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{case.said} has changed since {run / 'checkpoints/step-00000002'} was written" in said
    assert said.endswith("--allow-changed-data")
    assert contents(run) == before
    assert main([*again, "--allow-changed-data"]) == 0
    assert f"{case.said} has changed" in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert "allow_changed_data = false" in (run / "config.toml").read_text()
    assert main([case.verb, "--resume", "--output-dir", str(run), "--max-steps", "4"]) == 0  # the yes was for once
    case.change(tmp_path / case.file)
    capsys.readouterr()
    assert main([case.verb, "--resume", "--output-dir", str(run), "--max-steps", "5"]) == 5
    assert f"{case.said} has changed" in capsys.readouterr().err


CLOCK = "{% macro now() %}{{ strftime_now('%d %H:%M:%S.%f') }}{% endmacro %}<|im_start|>system\n{{ now() }}<|im_end|>\n"
MORNING, NEXT_DAY = datetime(2026, 3, 1, 9, 30, 0, 123456), datetime(2026, 3, 2, 10, 0)


@pytest.fixture
def clocked(tiny: Path, tmp_path: Path) -> Path:
    """A model whose template says the time to the microsecond."""
    shutil.copytree(tiny, tmp_path / "clocked")
    (tmp_path / "clocked/chat_template.jinja").write_text(CLOCK + CHATML)
    return tmp_path / "clocked"


def _grpo(model: Path, task: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return grpo(GRPOOptions(**rl(model, task, folder, eval_every=1, lr_scheduler_type="constant", **changes)))


def _sft(model: Path, task: str, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {"batch_size": 4, "num_examples": 12, "eval_samples": 3, "eval_every": 1, "dtype": "float32"}
    settings |= {"model": str(model), "task": task, "output_dir": str(folder), "lr_scheduler_type": "constant"}
    return sft(SFTOptions(**settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", [_sft, _grpo])
def test_the_clock_of_a_template_is_the_runs_start(
    recipe: Callable[..., Any], clocked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "letter.py").write_text(TASK)
    task = f"{tmp_path / 'letter.py'}:Letter"
    monkeypatch.setattr(launch, "now", lambda: MORNING)
    recipe(clocked, task, tmp_path / "whole", max_steps=4)
    recipe(clocked, task, tmp_path / "parts", max_steps=2)
    monkeypatch.setattr(launch, "now", lambda: NEXT_DAY)
    recipe(clocked, task, tmp_path / "parts", max_steps=4, resume=True)
    recipe(clocked, task, tmp_path / "later", max_steps=4)
    whole, parts, later = (comparable(tmp_path / name) for name in ("whole", "parts", "later"))
    for name, tensor in whole["tensors"].items():
        assert torch.equal(parts["tensors"][name], tensor), name
    assert parts["metrics"] == whole["metrics"]
    assert parts["arrays"] == whole["arrays"]
    assert later["metrics"] != whole["metrics"]


def test_every_prompt_of_a_run_has_one_time(clocked: Path, tmp_path: Path) -> None:
    """Without a word about the clock: what was sampled after is what was sampled before, evaluations too."""
    from tiny_model import tiny_tokenizer

    (tmp_path / "letter.py").write_text(TASK)
    task = f"{tmp_path / 'letter.py'}:Letter"
    _grpo(clocked, task, tmp_path / "run", max_steps=2)
    _grpo(clocked, task, tmp_path / "run", max_steps=3, resume=True)
    with Run.open(tmp_path / "run", read_only=True) as run:
        prompts = [run.store.rollout(row.id).arrays["prompt_tokens"] for row in run.store.rollouts(limit=-1)]
    times = {tiny_tokenizer().decode(tokens).split("<|im_end|>")[0] for tokens in prompts}
    assert len(prompts) > 50
    assert len(times) == 1


def test_outside_a_run_a_template_reads_the_time_of_day(clocked: Path) -> None:
    from upslope.data.chat import load_tokenizer
    from upslope.data.template import ChatTemplate, clock_at
    from upslope.types import Message

    template = ChatTemplate(load_tokenizer(clocked))

    def text() -> str:
        return template.render([Message("user", "a")], add_generation_prompt=True).text

    with clock_at(MORNING):
        assert "01 09:30:00.123456" in text()
    assert text() != text()


def aged(run: Path, *, without: tuple[str, ...] = ("fingerprint", "clock")) -> None:
    """Make the last checkpoint one of an older version."""
    path = (run / "checkpoints/last").resolve()
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k not in without}))
    found = read_manifest(path)
    (path / "manifest.json").unlink()
    write_manifest(path, step=found.step, serial=found.serial, best=found.best)


def test_an_older_checkpoint_resumes_with_one_warning(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, run = write(tmp_path / "rows.jsonl", PAIRS), tmp_path / "run"
    given = ["sft", "--model", str(tiny), "--data", rows, *COMMON, "--output-dir", str(run)]
    assert main(given) == 0
    aged(run)
    capsys.readouterr()
    assert main(["sft", "--resume", "--output-dir", str(run), "--max-steps", "3"]) == 0
    warned = [line for line in capsys.readouterr().err.splitlines() if "without a fingerprint" in line]
    assert len(warned) == 1
    state = json.loads((run / "checkpoints/last/state.json").read_text())
    assert set(state["fingerprint"]) >= {f"{rows} (--data)", "the tokenizer", "the chat template", "the training rows"}
    aged(run)
    cut(Path(rows))
    assert main(["sft", "--resume", "--output-dir", str(run), "--max-steps", "4"]) == 5
    assert "the training rows (22 -> 18) have changed" in capsys.readouterr().err.splitlines()[-1]
    resumed = ["sft", "--resume", "--output-dir", str(run), "--max-steps", "4", "--allow-changed-data"]
    assert main(resumed) == 0


def test_other_rows_by_an_option_are_refused_with_its_name(tiny: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", pair_rows(24))
    given = {"model": str(tiny), "data": data, "loss": "simpo", "output_dir": str(tmp_path / "run"), "dtype": "float32"}
    dpo(DPOOptions(**given, max_steps=1))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"the training rows \(22 -> 24, .*eval_samples 200 -> 0 have changed"):
        dpo(DPOOptions(**given, max_steps=2, eval_samples=0, resume=True))  # type: ignore[arg-type]


def test_distill_trains_on_the_same_rows_whatever_eval_samples_is(tmp_path: Path) -> None:
    from tiny_model import tiny_tokenizer

    data = write(tmp_path / "rows.jsonl", PAIRS)
    for eval_samples, held in ((0, 0), (1, 1), (200, 2)):
        o = DistillOptions(teacher="t", data=data, eval_samples=eval_samples)
        items, held_out, _ = load_items(o, tiny_tokenizer(), None)
        assert (len(items), len(held_out)) == (22, held)
        same = SFTOptions(data=data, eval_samples=eval_samples)
        assert [item.example for item in items] == load_examples(same, tiny_tokenizer(), None)[0]


def test_another_set_of_labels_cannot_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = cases(tmp_path)["classify swapped"]()
    run = ["--output-dir", str(tmp_path / "run")]
    assert main(["classify", *case.words, *COMMON, *run]) == 0
    path = tmp_path / "rows.csv"
    path.write_text(path.read_text().replace(",at", ",zz"))
    assert main(["classify", "--resume", *run, "--max-steps", "3", "--allow-changed-data"]) == 5
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "rows.csv: the labels are others than in the run (at, zz)" in said


def test_the_models_a_run_leans_on_are_part_of_it(tiny: Path, tmp_path: Path) -> None:
    """The reference of a KL term is loaded anew: another one would be another objective."""
    from upslope.models.files.weights import load, save_folder

    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "letter.py").write_text(TASK)
    given = rl(tmp_path / "model", f"{tmp_path / 'letter.py'}:Letter", tmp_path / "run", beta=0.1, max_steps=1)
    grpo(GRPOOptions(**given))
    weights = load(tmp_path / "model", torch.float32)
    weights["model.norm.weight"] *= 2
    config = json.loads((tmp_path / "model/config.json").read_text())
    shutil.rmtree(tmp_path / "other", ignore_errors=True)
    save_folder(tmp_path / "other", config, weights)
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path / "model/model.safetensors")
    with pytest.raises(RunError, match=r"model\.safetensors \(--model\) has changed"):
        grpo(GRPOOptions(**given | {"max_steps": 2, "resume": True}))


def test_allowing_belongs_to_resuming() -> None:
    with pytest.raises(ConfigError, match="goes with resume"):
        SFTOptions(data="x", allow_changed_data=True).validate()


NO_INPUT = {
    *("output_dir", "cache_dir"),  # where a run writes
    *("from_run", "tokenizer"),  # in the run folder, and in its checkpoint, once it has begun
    *("text_column", "label_column", "pair_column", "columns"),
    "lora_target_modules",
}


def test_every_option_that_may_name_a_file_is_covered() -> None:
    """A new option of text is listed in fingerprint.py, or here with its reason."""
    known = {*fingerprint.FILES, *fingerprint.MODELS, *PLUGINS, *NO_INPUT}
    kinds = [c for c in vars(all_options).values() if isinstance(c, type) and issubclass(c, RunOptions)]
    assert len(kinds) > 10
    for kind in kinds:
        texts = {name for name, hint in hints_of(kind).items() if hint is str or str in typing.get_args(hint)}
        assert texts <= known, (kind, texts - known)


def test_files_behind_a_spec(tmp_path: Path) -> None:
    (tmp_path / "pack").mkdir()
    for name in ("task.py", "near.py", "pack/inner.py", "unused.py", "words.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "task.py").write_text("import json\nfrom near import x\n")
    (tmp_path / "near.py").write_text("def f():\n    import pack.inner\n    import task\n")
    tiny_folder(tmp_path / "judge")
    spec = f"{tmp_path / 'task.py'}:T:path={tmp_path / 'words.txt'},level=3,mood=words"
    o = GRPOOptions(model="m", task=spec, reward=("length:target=3", f"reward_model:path={tmp_path / 'judge'}@0.5"))
    names = {name.replace(f"{tmp_path}/", "") for name in fingerprint.of_files(o)}
    tasks = {f"{name} (--task)" for name in ("task.py", "near.py", "pack/inner.py", "words.txt")}
    assert names == tasks | {"judge/config.json (--reward)", "judge/model.safetensors (--reward)"}


def test_large_files_cost_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "WHOLE", 1000)
    monkeypatch.setattr(fingerprint, "BLOCK", 10)
    path, content = tmp_path / "large", bytearray(range(256)) * 40
    path.write_bytes(content)
    whole = fingerprint.file_digest(path)
    for place in (0, 5, len(content) - 1):
        path.write_bytes(content[:place] + b"!" + content[place + 1 :])
        assert fingerprint.file_digest(path) != whole
    path.write_bytes(content + b"!")
    assert fingerprint.file_digest(path) != whole
    path.write_bytes(content)
    assert fingerprint.file_digest(path) == whole


VALUES = st.recursive(
    st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.none() | st.floats(allow_nan=False).filter(bool),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


def digest_of(value: Any) -> str:
    digest = hashlib.sha256()
    fingerprint._feed(digest, value)
    return digest.hexdigest()


@given(VALUES, VALUES)
def test_rows_are_alike_only_if_their_digests_are(one: Any, other: Any) -> None:
    def as_lists(value: Any) -> Any:
        if isinstance(value, dict):
            return [[key, as_lists(item)] for key, item in sorted(value.items())]
        return [as_lists(item) for item in value] if isinstance(value, list) else value

    assert (digest_of(one) == digest_of(other)) == (repr(as_lists(one)) == repr(as_lists(other)))
