"""`upslope generate`: what goes where, the engine's own replies, files that survive a kill."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from generate_kit import WORDS, generate, rows_of, write, write_prompts
from letters_model import letters_folder

from upslope.build import Policy, load_inference
from upslope.cli import main
from upslope.data.chat import encode_prompt
from upslope.data.examples import examples_of
from upslope.data.records import read_records
from upslope.engine import Engine
from upslope.runs.lines import MetricLines
from upslope.types import Completion, Message, Prompt, SamplingParams


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(letters_folder(tmp_path_factory.mktemp("models") / "tiny", seed=2))


@pytest.fixture(scope="module")
def policy(tiny: str) -> Policy:
    return load_inference(tiny, dtype="float32")


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return write_prompts(tmp_path)


def expected(policy: Policy, prompt: Prompt, **params: Any) -> list[Completion]:
    """The engine's replies to one prompt, alone."""
    engine = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=64)
    wanted = SamplingParams(**{"max_tokens": 12, "temperature": 0.0} | params)
    return engine.generate([encode_prompt(policy.tokenizer, prompt)], wanted, keys=[prompt.key])[0]


def asked(text: str, key: int = 0, system: str | None = None) -> Prompt:
    head = () if system is None else (Message("system", system),)
    return Prompt(key, messages=(*head, Message("user", text)))


def test_one_prompt_as_text(tiny: str, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", WORDS[0], "--temperature", "0", model=tiny) == 0
    printed = capsys.readouterr()
    reply = expected(policy, asked(WORDS[0]))[0]
    assert printed.out == reply.text + "\n"
    assert ("cut off by max_tokens = 12" in printed.err) == (reply.finish_reason == "length")


def test_streamed_text_is_the_same(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for more in ([], ["--stream"]):
        assert generate("--prompt", "Tell.", "--seed", "3", *more, model=tiny) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert len(printed[0]) > 1


def test_template_system_and_raw(tiny: str, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for more in (["--system", "Be brief."], ["--raw"]):
        assert generate("--prompt", "Tell.", "--temperature", "0", "--json", *more, model=tiny) == 0
        found += rows_of(capsys.readouterr().out)
    templated, raw = found
    assert templated["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Tell."},
    ]
    assert raw["prompt"] == "Tell."
    assert templated["completion"] == expected(policy, asked("Tell.", system="Be brief."))[0].text
    assert raw["completion"] == expected(policy, Prompt(0, text="Tell."))[0].text


def test_standard_input(tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("Zwölf\nund eins\n".encode())))
    assert generate("--raw", "--json", model=tiny) == 0
    assert rows_of(capsys.readouterr().out)[0]["prompt"] == "Zwölf\nund eins"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert generate(model=tiny) == 3
    assert "not UTF-8 at byte 3" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a" * ((1 << 26) + 1))))
    assert generate(model=tiny) == 3
    assert "standard input: more than 64 MiB; it is one prompt" in capsys.readouterr().err


def test_a_file_in_order_whatever_the_batch(
    tiny: str, policy: Policy, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "replies.jsonl"
    assert generate("--prompts", prompts, "--output", str(output), "--max-batch", "3", model=tiny) == 0
    assert capsys.readouterr().out == ""
    rows = rows_of(output.read_text())
    assert [row["id"] for row in rows] == list(range(len(WORDS)))
    for key, (row, text) in enumerate(zip(rows, WORDS, strict=True)):
        reply = expected(policy, asked(text, key), temperature=0.7)[0]
        assert row["prompt"] == [{"role": "user", "content": text}]
        assert (row["completion"], row["finish_reason"]) == (reply.text, reply.finish_reason)
    for batch in ("1", "64"):
        assert generate("--prompts", prompts, "--max-batch", batch, model=tiny) == 0
        printed = capsys.readouterr()
        assert printed.out == output.read_text()
        assert f"{len(WORDS)}/{len(WORDS)} prompts" in printed.err


def test_rows_can_be_trained_on(tiny: str, policy: Policy, prompts: str, tmp_path: Path) -> None:
    output = tmp_path / "replies.jsonl"
    assert (
        generate("--prompts", prompts, "--output", str(output), "--system", "Brief.", "--logprobs", "1", model=tiny)
        == 0
    )
    records = read_records(output)
    encoded = examples_of(records, policy.tokenizer, max_length=None)
    for key, (text, row, example) in enumerate(zip(WORDS, rows_of(output.read_text()), encoded.examples, strict=True)):
        prompt = encode_prompt(policy.tokenizer, asked(text, key, "Brief."))
        assert example.tokens[: len(prompt)] == prompt
        assert not any(example.mask[: len(prompt)])
        assert example.mask[len(prompt)]
        assert len(row["tokens"]) == len(row["logprobs"]) == len(row["top_logprobs"])


@pytest.mark.parametrize("kind", ["txt", "csv", "parquet", "messages", "completion", "json"])
def test_kinds_of_files(kind: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]
    turns.append({"role": "user", "content": "Tell."})
    path = tmp_path / f"prompts.{kind if kind in ('txt', 'csv', 'parquet', 'json') else 'jsonl'}"
    if kind == "txt":
        path.write_text("Tell.\n\nGo.\n")
    elif kind == "csv":
        path.write_text('prompt,answer\n"Tell.",1\n"Go.",2\n')
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"prompt": ["Tell.", "Go."], "answer": [1, 2]}), path)
    elif kind == "json":
        path.write_text(json.dumps([{"prompt": "Tell."}, {"prompt": "Go."}]))
    elif kind == "messages":
        write(path, [{"messages": turns}, {"messages": turns[-1:]}])
    else:
        write(path, [{"prompt": "Tell.", "completion": "It."}, {"prompt": "Go.", "completion": "No."}])
    assert generate("--prompts", str(path), model=tiny) == 0
    first, second = rows_of(capsys.readouterr().out)
    assert first["prompt"][-1] == {"role": "user", "content": "Tell."}
    assert len(first["prompt"]) == (3 if kind == "messages" else 1)
    if kind == "completion":
        assert second["reference"] == "No."
        assert second["completion"] != "No."
    if kind in ("csv", "parquet"):
        assert str(second["answer"]) == "2"


def test_several_replies(tiny: str, policy: Policy, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        generate("--prompts", prompts, "--num-return-sequences", "3", "--top-k", "50", "--seed", "5", model=tiny) == 0
    )
    for key, row in enumerate(rows_of(capsys.readouterr().out)):
        replies = expected(policy, asked(WORDS[key], key), n=3, temperature=0.7, top_k=50, seed=5)
        assert [one["completion"] for one in row["completions"]] == [reply.text for reply in replies]
        assert len({one["completion"] for one in row["completions"]}) > 1
    assert generate("--prompt", "Tell.", "--num-return-sequences", "2", model=tiny) == 0
    printed = capsys.readouterr()
    replies = expected(policy, asked("Tell."), n=2, temperature=0.7)
    assert printed.out == "".join(reply.text + "\n" for reply in replies)
    assert "reply 2 of 2" in printed.err


def test_beam_search(tiny: str, policy: Policy, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--num-beams", "4", "--num-return-sequences", "2", "--length-penalty", "0.5", "--logprobs", "0"]
    assert generate("--prompts", prompts, *options, "--max-batch", "5", model=tiny) == 0
    for key, row in enumerate(rows_of(capsys.readouterr().out)):
        replies = expected(policy, asked(WORDS[key], key), n=2, temperature=1.0, beam_width=4, length_penalty=0.5)
        assert [one["tokens"] for one in row["completions"]] == [reply.tokens for reply in replies]
        scores = [sum(one["logprobs"]) / len(one["tokens"]) ** 0.5 for one in row["completions"]]
        assert scores[0] >= scores[1]


def test_logprobs(tiny: str, policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "Tell.", "--temperature", "0", "--logprobs", "3", "--json", model=tiny) == 0
    row = rows_of(capsys.readouterr().out)[0]
    reply = expected(policy, asked("Tell."))[0]
    assert row["tokens"] == reply.tokens
    assert row["logprobs"] == reply.policy_logprobs
    for token, logprob, top in zip(row["tokens"], row["logprobs"], row["top_logprobs"], strict=True):
        assert len(top) == 3
        assert (top[0]["id"], top[0]["logprob"]) == (token, logprob)
        assert top[0]["token"] == policy.tokenizer.decode([token])
        assert sorted((one["logprob"] for one in top), reverse=True) == [one["logprob"] for one in top]


def test_stop_ends_the_text(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--prompt", "Tell.", "--temperature", "0", "--json", model=tiny) == 0
    whole = rows_of(capsys.readouterr().out)[0]["completion"]
    stop = whole[4:6]
    assert generate("--prompt", "Tell.", "--temperature", "0", "--json", "--stop", "@@@", stop, model=tiny) == 0
    row = rows_of(capsys.readouterr().out)[0]
    assert row["completion"] == whole[: whole.index(stop)]
    assert row["finish_reason"] == "stop"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_takes_nothing_from_standard_output(
    tiny: str, prompts: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich puts its console, on standard error, in the place of sys.stdout while a bar is shown."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert generate("--prompts", prompts, model=tiny) == 0
    assert len(rows_of(capsys.readouterr().out)) == len(WORDS)
    assert "7/7" in terminal.getvalue()
    assert "completion" not in terminal.getvalue()


def test_a_terminal_never_obeys_the_model(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny random model soon says control characters: raw in a pipe, as pictures on a terminal."""
    arguments = ["--prompt", "Tell.", "--temperature", "5", "--max-tokens", "200", "--seed", "4"]
    assert generate(*arguments, model=tiny) == 0
    piped = capsys.readouterr().out
    assert "\x1b" in piped
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert generate(*arguments, model=tiny) == 0
    seen = terminal.getvalue()
    assert not {c for c in seen if c < " " and c not in "\n\t"}
    assert seen == piped.translate({i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {0x7F: 0x2421})


def test_resume_ends_as_if_never_stopped(
    tiny: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert generate("--prompts", prompts, "--output", str(whole), model=tiny) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    arguments = ["--prompts", prompts, "--output", str(cut)]
    assert generate(*arguments, "--resume", model=tiny) == 0  # nothing there yet: a start
    assert cut.read_bytes() == whole.read_bytes()
    for end in (0, 1, len(lines[0]), len(lines[0]) + 20, len(b"".join(lines[:4])) - 1, len(whole.read_bytes())):
        cut.write_bytes(whole.read_bytes()[:end])
        assert generate(*arguments, "--resume", "--max-batch", "2", model=tiny) == 0
        assert cut.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert main(["generate", "--config", f"{cut}.toml"]) == 5
    assert "exists; go on with it by --resume" in capsys.readouterr().err
    assert main(["generate", "--config", f"{cut}.toml", "--resume"]) == 0


def test_ctrl_c_says_what_is_written(
    tiny: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    synced = []

    def interrupted(file: MetricLines) -> None:
        synced.append(file)
        if len(synced) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricLines, "flush", interrupted)
    arguments = ["--prompts", prompts, "--output", str(output), "--max-batch", "1"]
    assert generate(*arguments, model=tiny) == 130
    assert f"2 of {len(WORDS)} rows are in {output}; the same with --resume goes on" in capsys.readouterr().err
    assert generate(*arguments, "--resume", model=tiny) == 0
    assert [row["id"] for row in rows_of(output.read_text())] == list(range(len(WORDS)))


def test_resume_refuses_what_would_mix(
    tiny: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = ["--prompts", prompts, "--output", str(output), "--resume"]
    assert generate(*arguments, model=tiny) == 0
    made = output.read_bytes()
    capsys.readouterr()
    assert generate(*arguments, "--seed", "1", model=tiny) == 5
    assert "made with seed = 0, now it is 1" in capsys.readouterr().err
    Path(prompts).write_text(Path(prompts).read_text().replace("Why?", "How?"))
    assert generate(*arguments, model=tiny) == 5
    assert f"out.jsonl:5: not the prompt of {prompts}:5" in capsys.readouterr().err
    Path(prompts).write_text('{"prompt": "Name a colour."}\n')
    assert generate(*arguments, model=tiny) == 5
    assert "more rows than the 1 prompts" in capsys.readouterr().err
    with output.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert generate(*arguments, model=tiny) == 5
    assert "another process is writing it" in capsys.readouterr().err
    Path(f"{output}.toml").unlink()
    Path(prompts).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in WORDS))
    assert generate(*arguments, model=tiny) == 5
    assert "out.jsonl.toml: gone" in capsys.readouterr().err
    assert output.read_bytes() == made


def test_killed_runs_lose_nothing_that_was_written(tiny: str, tmp_path: Path, root: Path) -> None:
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": text} for text in WORDS[:4]])
    script = Path(__file__).with_name("kill_generate.py")
    command = [sys.executable, str(script), tiny, prompts, str(tmp_path / "runs")]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] >= 10
    assert report["resumed_with_rows"] >= 4


def test_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write(
        tmp_path / "pairs.jsonl", [{"prompt": f"{a} {b}", "completion": f"{b} {a}"} for a in "abc" for b in "def"]
    )
    run = tmp_path / "run"
    shape = [
        "--hidden-size",
        "32",
        "--num-layers",
        "1",
        "--num-heads",
        "2",
        "--max-length",
        "12",
        "--tokenizer",
        "word",
    ]
    steps = ["--max-steps", "30", "--learning-rate", "0.01", "--eval-samples", "2", "--dtype", "float32"]
    assert main(["seq2seq", "--data", pairs, "--output-dir", str(run), *shape, *steps, "--eval-every", "0"]) == 0
    capsys.readouterr()
    model = str(run / "checkpoints" / "last" / "model")
    for search in (["--temperature", "0"], ["--num-beams", "3"]):
        assert generate("--prompts", pairs, *search, model=model) == 0
        rows = rows_of(capsys.readouterr().out)
        assert [row["prompt"] for row in rows] == [f"{a} {b}" for a in "abc" for b in "def"]
        assert sum(row["completion"] == row["reference"] for row in rows) >= 5
    assert generate("--prompt", "a d", "--temperature", "0", "--stream", model=model) == 0
    assert capsys.readouterr().out.strip()
    assert generate("--prompt", "a d", "--system", "b", model=model) == 2


def test_the_real_model(smollm2_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opening = ["--raw", "--prompt", "The capital of France is", "--temperature", "0", "--max-tokens", "3"]
    assert main(["generate", str(smollm2_folder), *opening]) == 0
    assert "Paris" in capsys.readouterr().out
