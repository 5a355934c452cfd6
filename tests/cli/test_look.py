"""A mistyped path is said before anything is loaded; names that are no paths are left to whatever reads them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from upslope import cli
from upslope.config import load
from upslope.errors import ConfigError
from upslope.loop.launch import begin
from upslope.loop.look import look
from upslope.options import EvalOptions, ExpertOptions, GRPOOptions, PretrainOptions, SFTOptions
from upslope.tasks.base import Task, load_task, made_first
from upslope.tasks.toys import KeyDoor


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gets no further than its options."""

    def only_options(name: str, *_: Any) -> Any:
        assert name == "upslope.options", f"{name} was loaded"
        return importlib.import_module(name)

    monkeypatch.setattr(cli, "importlib", type("Importlib", (), {"import_module": staticmethod(only_options)}))


MISTYPED = {
    "sft --data chats.jsonl": (3, "chats.jsonl: no such file; did you mean 'chat.jsonl'?"),
    "sft --data nowhere/chats.jsonl": (3, "nowhere/chats.jsonl: no such file (the folder nowhere does not exist)"),
    "sft --data chat.jsonl --eval-data dev.csv.gz": (3, "dev.csv.gz: no such file"),
    "expert --mix-ratio 0.5 --mix-data mix.parquet": (3, "mix.parquet: no such file"),
    "expert --from-run runs/a": (5, "runs/a: not a run folder (it has no config.toml)"),
    "classify --data chat.jsonl --test-data t.tsv": (3, "t.tsv: no such file"),
    "classify --data qqp:./glue": (3, "./glue: no such file"),
    "classify --data chat.jsonl --objective policy_gradient --rewards r.json": (3, "r.json: no such file"),
    "pretrain --data ./books": (3, "./books: no such file"),
    "ppo --task my_task.py:MyTask": (2, "my_task.py: no such file; did you mean 'my_tasks.py'?"),
    "grpo --task gsm8k:path=trian.jsonl": (3, "trian.jsonl: no such file; did you mean 'train.jsonl'?"),
    "grpo --reward length:target=4 my_rewards.py:fn@0.5": (2, "my_rewards.py: no such file"),
    "grpo --model ./model": (4, "./model: no such folder; give a model folder"),
    "ppo --critic runs/rm/checkpoints/last/model": (4, "runs/rm/checkpoints/last/model: no such folder"),
    "distill --teacher big.gguf --data chat.jsonl": (4, "big.gguf: no such folder"),
    "generate ~/no-model --prompt hi": (4, "~/no-model: no such folder"),
    "generate --prompts asks.txt": (3, "asks.txt: no such file"),
    "eval runs/nope --task chain_sum": (4, "runs/nope: no such folder; give a model folder, a .gguf file, a hub id"),
    "serve runs/nope": (4, "runs/nope: no such folder; give a model folder, a .gguf file, a hub id or an alias"),
    "eval used/nope --task chain_sum": (4, "used/nope: no such folder; give a model folder"),
    "serve --compare ./b": (4, "./b: no such folder; give a model folder"),
    "eval /no/model --perplexity chat.jsonl": (4, "/no/model: no such folder"),
    "eval --models smollm2-135m --perplexity wikitext:wiki.test.tokens": (3, "wiki.test.tokens: no such file"),
    "eval --models smollm2-135m --task gsm8k:eval_path=test.jsonl": (3, "test.jsonl: no such file"),
    "compare a.toml b.toml --max-seconds 9": (2, "a.toml: no such file"),
    "grpo --output-dir used": (5, "used: already holds a run; continue it with --resume, or choose another"),
}


@pytest.mark.parametrize("command", MISTYPED)
@pytest.mark.usefixtures("nothing_loaded")
def test_a_mistyped_path_is_said_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chat.jsonl", "my_tasks.py", "train.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "used").mkdir()
    for name in ("config.toml", "env.json"):
        (tmp_path / "used" / name).write_text("")
    code, message = MISTYPED[command]
    assert cli.main(command.split()) == code
    said = capsys.readouterr().err
    assert said.startswith(f"upslope: error: {message}")
    assert said.count("\n") == 1


WRONG = {
    "grpo --reward own.py:scoer": (2, "own.py has nothing called 'scoer'; did you mean 'score'?"),
    "grpo --reward broken.py:score": (2, "broken.py:1: SyntaxError: "),
    "ppo --reward lenght:target=4": (2, "no reward is called 'lenght'; did you mean 'length'?"),
    "ppo --reward length:traget=4@0.5": (2, "'length' has no parameter 'traget'; did you mean 'target'?"),
    "sft --data empty.jsonl": (3, "empty.jsonl: the file is empty"),
    "dpo --data cut.jsonl": (3, "cut.jsonl:1: invalid JSON at column 15"),
    "sft --data asked.jsonl": (3, "asked.jsonl:1: its keys ('answer', 'question') are no known kind of record"),
    "distill --data asked.jsonl --columns prompt=qestion": (
        3,
        "asked.jsonl:1: no column 'qestion' to take prompt from",
    ),
}


@pytest.mark.parametrize("command", WRONG)
@pytest.mark.usefixtures("nothing_loaded")
def test_a_wrong_reward_or_first_row_is_said_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("raise SystemExit('run here')\ndef score(prompts, completions): ...\n")
    Path("broken.py").write_text("def score(\n")
    Path("empty.jsonl").write_text("")
    Path("cut.jsonl").write_text('{"prompt": "a"\n')
    Path("asked.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    code, message = WRONG[command]
    teacher = ["--teacher", "smollm2-135m"] if command.startswith("distill") else []
    assert cli.main([*command.split(), *teacher]) == code
    assert capsys.readouterr().err.startswith(f"upslope: error: {message}")


def test_a_task_is_made_before_the_model_is_loaded_and_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Task] = []
    monkeypatch.setattr(KeyDoor, "__init__", lambda self: made.append(self))
    with made_first("key_door"):
        assert len(made) == 1
        assert load_task("key_door") is made[0]
        assert load_task("key_door") is not made[0]
    with pytest.raises(ConfigError, match="did you mean 'key_door'"), begin(GRPOOptions(task="key_dor")):
        pytest.fail("the model would have been loaded")


@pytest.mark.parametrize("name", ["o\udcff\udcfe", "a\nb", "a\x1b[31mb", "a\x7f", "a\0b"])
@pytest.mark.parametrize("command", ["sft --data d.jsonl", "compare a.toml b.toml --max-seconds 9"])
@pytest.mark.usefixtures("nothing_loaded")
def test_a_run_folder_has_a_name_of_one_line(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command.split(), "--output-dir", name]) == 2
    said = capsys.readouterr().err
    assert "a control character, or not UTF-8; choose another name" in said
    assert said.count("\n") == 1
    SFTOptions(data="d.jsonl", output_dir="o a\u3000ñ日本").validate()


def test_what_may_be_no_path_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    look(SFTOptions(data="owner/data-set:config", model="owner/name-v1.5"))
    look(GRPOOptions(reward=("length:target=4@0.5", "reward_model:path=owner/rm"), model="run/checkpoints/step-7"))
    look(PretrainOptions(data=("books/**/*.txt",), tokenizer="word"))
    look(EvalOptions(models=("smollm2-135m",), benchmark=("qqp:owner/glue",), harness=("hellaswag",)))
    look(ExpertOptions(task="reasoning:name=chain_sum"))
    look(SFTOptions(data="owner/name", output_dir="run"))


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("grpo --lr 1", "--learning-rate"),
        ("grpo --bs 1", "--num-prompts"),
        ("sft --bs 1", "--batch-size"),
        ("sft --epochs 1", "--num-epochs"),
        ("ppo --num-train-epochs 1", "--max-steps"),
        ("sft --per-device-train-batch-size 1", "--batch-size"),
        ("sft --model_name_or_path m", "--model"),
        ("grpo --dataset_name d", "--task"),
        ("sft --outptu-dir d", "--output-dir"),
    ],
)
def test_what_other_tools_call_an_option_leads_to_ours(
    words: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    assert f"; did you mean '{option}'?" in capsys.readouterr().err


def test_a_configuration_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbflearning_rate = 0.5\nlr = 1\n")
    with pytest.raises(ValueError, match=r"c.toml:2: unknown key 'lr'; did you mean 'learning_rate'\?"):
        load(GRPOOptions, path)
    path.write_bytes(b"\xef\xbb\xbflearning_rate = 0.5\n")
    assert load(GRPOOptions, path).learning_rate == 0.5


@pytest.mark.parametrize("verb", ["grpo", "sft", "seq2seq", "distill", "pretrain", "tag"])
def test_explain_takes_a_verb_and_needs_nothing_else(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", verb]) == 0
    assert "step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verb", "said", "shown"),
    [
        ("classify", "a.csv:1: no column 'text'; set text_column to its name", "set --text-column to its name"),
        ("tag", "a:3: tags of another kind need tag_scheme = none", "need --tag-scheme none"),
        ("sft", "c.toml:3: max_steps is -1", "c.toml:3: max_steps is -1"),
        ("sft", "--max-steps: max_steps is -1", "--max-steps: max_steps is -1"),
        ("sft", "a.jsonl:1: unknown key 'max_steps'", "unknown key 'max_steps'"),
        ("eval", "runs/max_steps: no such folder", "runs/max_steps: no such folder"),
        ("runs", "runs/a: holds no max_steps", "holds no max_steps"),
    ],
)
def test_an_option_is_named_as_it_is_typed(
    verb: str, said: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """But where the place names a file of options, or the option itself, or where the name is a value."""

    def refused(_: list[str]) -> int:
        raise ConfigError(said)

    monkeypatch.setattr(cli, "_main", refused)
    assert cli.main([verb]) == 2
    assert shown in capsys.readouterr().err
