"""`upslope chat` through pipes, and its session: turns, commands, replies that are the engine's own."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from letters_model import letters_folder

from upslope.build import load_inference
from upslope.cli import main
from upslope.commands.chat import COMMANDS
from upslope.commands.chat_session import SETTINGS, ChatSession
from upslope.data.chat import encode_prompt
from upslope.data.examples import examples_of
from upslope.data.records import read_records
from upslope.engine import Engine
from upslope.errors import DataError, ModelError
from upslope.options import ChatOptions
from upslope.types import Message, Prompt, SamplingParams

Talk = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(letters_folder(tmp_path_factory.mktemp("models") / "tiny", seed=2))


@pytest.fixture
def talk(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Pipe lines into the verb: its exit code, the lines of standard output, and standard error."""

    def through(*lines: str, model: str = tiny, options: tuple[str, ...] = ()) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        base = ["--dtype", "float32", "--max-tokens", "20", "--temperature", "0"]
        code = main(["chat", model, *base, *options])
        printed = capsys.readouterr()
        return code, printed.out.split("\n")[:-1], printed.err

    return through


def session(model: str, **changes: Any) -> ChatSession:
    return ChatSession(
        ChatOptions(**{"model": model, "dtype": "float32", "max_tokens": 20, "temperature": 0.0} | changes)
    )


def expected(model: str, *messages: Message, tools: Sequence[dict[str, Any]] = (), **params: Any) -> str:
    """What the engine, fresh and alone, replies to a conversation."""
    policy = load_inference(model, dtype="float32")
    engine = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=16)
    prompt = encode_prompt(policy.tokenizer, Prompt(0, messages=messages), tools=tools)
    wanted = SamplingParams(**{"max_tokens": 20, "temperature": 0.0} | params)
    return engine.generate([prompt], wanted, keys=[len(messages)])[0][0].text


def never() -> bool:
    return False


def quiet(piece: str) -> None:
    pass


def test_turns_build_on_each_other(tiny: str) -> None:
    chat = session(tiny, system="Be brief.")
    pieces: list[str] = []
    first = chat.say("Hello there.", pieces.append, never).completion.text
    assert "".join(pieces) == first
    said = [Message("system", "Be brief."), Message("user", "Hello there.")]
    assert first == expected(tiny, *said)
    second = chat.say("And you?", quiet, never).completion.text
    assert second == expected(tiny, *said, Message("assistant", first), Message("user", "And you?"))
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]


def test_later_turns_are_cheap(tiny: str) -> None:
    """All but the new text is found in the prefix cache, in blocks of 64 tokens."""
    chat = session(tiny)
    assert chat.say("x" * 150, quiet, never).cached_tokens == 0
    reply = chat.say("y" * 10, quiet, never)
    assert reply.cached_tokens == 128
    assert reply.prompt_tokens - reply.cached_tokens < 110


def test_pipe_prints_replies_only(tiny: str, talk: Talk) -> None:
    code, replies, notes = talk("Hello.", "", "And you?", "//etc?")
    assert code == 0
    assert len(replies) == 3
    first = expected(tiny, Message("user", "Hello."))
    assert replies[0] == first
    turns = [Message("user", "Hello."), Message("assistant", first), Message("user", "And you?")]
    assert replies[1] == expected(tiny, *turns)
    turns += [Message("assistant", replies[1]), Message("user", "/etc?")]
    assert replies[2] == expected(tiny, *turns)
    assert "> " not in notes


def test_a_line_goes_on_after_a_backslash(tiny: str, talk: Talk) -> None:
    assert talk("One\\", "two.")[1] == [expected(tiny, Message("user", "One\ntwo."))]


def test_retry_draws_anew_and_repeats_with_the_seed(talk: Talk) -> None:
    lines = ("/set temperature 1", "/set top_k 9", "Hello.", "/retry", "/retry")
    code, replies, _ = talk(*lines)
    assert code == 0
    assert len(set(replies)) == 3
    assert talk(*lines)[1] == replies
    assert talk(*lines, options=("--seed", "1"))[1] != replies


def test_undo_edit_new_system(tiny: str, talk: Talk) -> None:
    alone = expected(tiny, Message("user", "Hello."))
    other = expected(tiny, Message("user", "Bye."))
    briefly = expected(tiny, Message("system", "Brief."), Message("user", "Hello."))
    assert len({alone, other, briefly}) == 3
    code, replies, notes = talk(
        *("Hello.", "/undo", "Hello.", "/edit Bye.", "/new", "Hello.", "/new"),
        *("/system Brief.", "Hello.", "/system", "/new", "Hello."),
    )
    assert code == 0
    assert replies == [alone, alone, other, alone, briefly, alone]
    assert "taken back: Hello." in notes
    assert "the system turn is gone; it was: Brief." in notes


def test_set_shows_and_changes(tiny: str, talk: Talk) -> None:
    code, replies, notes = talk("/set", "/set max-tokens 3", "/set stop 'a b' c!", "Hello.", "/set top_k 5")
    assert code == 0
    assert all(re.search(rf"^{name} ", notes, re.MULTILINE) for name in SETTINGS)
    assert "max_tokens 3" in notes
    assert "stop 'a b' 'c!'" in notes
    assert "top_k 5" in notes
    assert "cut off by max_tokens = 3" in notes
    assert replies == [expected(tiny, Message("user", "Hello."), max_tokens=3)]


@pytest.mark.parametrize(
    ("lines", "code", "words"),
    [
        (["/sav"], 2, "no command /sav; did you mean /save? There are: /new /system /set"),
        (["/zzzz"], 2, "no command /zzzz. There are: /new"),
        (["/set warmth 1"], 2, "no setting 'warmth'; there are: 'max_tokens'"),
        (["/set temperatur 1"], 2, "did you mean 'temperature'?"),
        (["/set temperature hot"], 2, "/set temperature: temperature must be a number, got 'hot'"),
        (["/set temperature -1"], 2, "temperature is -1.0; it must be at least 0"),
        (["/set temperature"], 2, "/set temperature takes one value"),
        (["/set stop 'a"], 2, "/set: No closing quotation"),
        (["/undo"], 3, "you have not said anything yet"),
        (["/retry"], 3, "there is no reply yet"),
        (["/edit"], 3, "you have not said anything yet"),
        (["Hi.", "/edit"], 2, "/edit wants the text"),
        (["/tokens"], 3, "no reply was drawn yet"),
        (["/save"], 2, "/save wants the name of a .jsonl file"),
        (["/save x.jsonl"], 3, "there is no reply to save yet"),
        (["/load"], 2, "/load wants the name of a file"),
        (["/load none.jsonl"], 3, "none.jsonl: no such file"),
        (["/new now"], 2, "/new takes nothing after it, got 'now'"),
        (["/model ./nowhere"], 4, "./nowhere: no such folder"),
        (["x" * 600], 3, "the context holds 512, the reply included: the turn was not sent"),
        (["a\udcff"], 3, "standard input: not UTF-8"),
    ],
)
def test_the_first_mistake_ends_a_pipe(lines: list[str], code: int, words: str, talk: Talk) -> None:
    found, replies, notes = talk(*lines, "Never said.")
    assert found == code
    assert words in notes
    assert notes.splitlines()[-1].startswith("upslope: error: ")
    assert len(replies) <= len(lines) - 1


def test_help_and_exit(talk: Talk) -> None:
    code, replies, notes = talk("/help", "/exit", "Never said.")
    assert (code, replies) == (0, [])
    assert all(re.search(rf"^/{name}\b.*\w$", notes, re.MULTILINE) for name in COMMANDS)


def test_saved_conversations_can_be_trained_on_and_taken_up(tiny: str, talk: Talk, tmp_path: Path) -> None:
    path = tmp_path / "saved.jsonl"
    lines = ("/system Brief.", "Hello.", f"/save {path}", "And you?", f"/save {path}")
    _, (first, second), _ = talk(*lines)
    records = read_records(path)
    said = [("system", "Brief."), ("user", "Hello."), ("assistant", first)]
    assert [(m.role, m.content) for m in records[0].messages] == said
    said += [("user", "And you?"), ("assistant", second)]
    assert [(m.role, m.content) for m in records[1].messages] == said
    tokenizer = load_inference(tiny).tokenizer
    encoded = examples_of(records, tokenizer, max_length=None)
    assert encoded.kept == [0, 1]
    trained = [t for t, m in zip(encoded.examples[1].tokens, encoded.examples[1].mask, strict=True) if m]
    assert tokenizer.decode(trained) == f"{first}<|im_end|>{second}<|im_end|>"
    code, replies, notes = talk(f"/load {path}", "/retry", "/undo", "And you?")
    assert (code, replies) == (0, [second, second])
    assert "conversation 2 of 2" in notes
    assert "system: Brief." in notes


def test_load_keeps_tools_and_waits_for_a_reply(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello."}], "tools": tools}) + "\n")
    model = shutil.copytree(tiny, tmp_path / "with tools")
    template = model / "chat_template.jinja"
    template.write_text("{{ tools | map(attribute='function.name') | join(' ') if tools }}" + template.read_text())
    chat = session(str(model))
    chat.load(read_records(path)[0])
    with pytest.raises(DataError, match="/retry draws it"):
        chat.say("More.", quiet, never)
    reply = expected(str(model), Message("user", "Hello."), tools=tools)
    assert chat.retry(quiet, never).completion.text == reply
    assert [dict(tool) for tool in chat.tools] == tools
    path.write_text('{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"one.jsonl:1: a row of kind 'text'"):
        chat.load(read_records(path)[0])
    assert len(chat.turns) == 2


def test_tokens_have_their_probabilities(tiny: str, talk: Talk) -> None:
    code, _, notes = talk("Hello.", "/tokens")
    assert code == 0
    chat = session(tiny)
    completion = chat.say("Hello.", quiet, never).completion
    rows = re.findall(r"^ *([\d.]+)%  ('.*?'|\".*?\") +([\d.]+)% ", notes, re.MULTILINE)
    assert len(rows) == len(completion.tokens)
    for (shown, text, other), token, logprob in zip(rows, completion.tokens, completion.policy_logprobs, strict=True):
        assert float(shown) == pytest.approx(100 * math.exp(logprob), abs=0.051)
        assert float(other) <= float(shown)
        assert text == repr(chat.tokenizer.decode([token]))
    assert f"{len(rows)} tokens, log-prob {sum(completion.policy_logprobs):.3f} at temperature 1" in notes


def test_another_model_goes_on(tiny: str, talk: Talk, tmp_path: Path) -> None:
    other = str(letters_folder(tmp_path / "other", seed=5))
    code, (first, second), _ = talk("Hello.", f"/model {other}", "And you?")
    assert code == 0
    turns = [Message("user", "Hello."), Message("assistant", first), Message("user", "And you?")]
    assert second == expected(other, *turns) != expected(tiny, *turns)


def test_a_full_context_is_told_and_nothing_dropped(tiny: str, talk: Talk) -> None:
    chat = session(tiny, max_tokens=400)
    reply = chat.say("x" * 460, quiet, never)
    assert reply.limit == 512 - reply.prompt_tokens < 50
    before = list(chat.turns)
    with pytest.raises(DataError, match="nothing was left out"):
        chat.say("y" * 100, quiet, never)
    assert chat.turns == before
    assert not chat.engine.busy
    code, _, notes = talk("x" * 460, options=("--max-tokens", "400"))
    assert code == 0
    assert "the context of 512 tokens is full" in notes


def test_the_cache_may_hold_less_than_the_model(tiny: str) -> None:
    assert session(tiny).context == 512
    small = session(tiny, kv_cache_gb=1e-4)
    assert small.context == small.engine.pool.num_blocks * 64 < 512
    with pytest.raises(DataError, match=f"the context holds {small.context}"):
        small.say("x" * small.context, quiet, never)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stopped_reply_keeps_what_came(after: int, tiny: str) -> None:
    whole = session(tiny, max_tokens=60).say("Hello.", quiet, never).completion
    assert len(whole.tokens) == 60
    chat = session(tiny, max_tokens=60)
    asked = [False] * after + [True]
    reply = chat.say("Hello.", quiet, lambda: asked.pop(0)).completion
    assert reply.finish_reason == "cancelled"
    assert reply.tokens == whole.tokens[:after]
    assert whole.text.startswith(reply.text)
    assert [m.content for m in chat.turns] == (["Hello.", reply.text] if after else [])
    assert not chat.engine.busy
    assert chat.say("Hello.", quiet, never).completion.text


def test_a_failed_reply_changes_nothing(tiny: str) -> None:
    chat = session(tiny)
    chat.say("Hello.", quiet, never)
    before = list(chat.turns)
    norm = dict(chat.engine.model.named_parameters())["model.norm.weight"]
    kept = norm.detach().clone()
    norm.data.fill_(float("nan"))
    for attempt in (lambda: chat.say("More.", quiet, never), lambda: chat.retry(quiet, never)):
        with pytest.raises(ModelError, match="NaN"):
            attempt()
        assert chat.turns == before
    norm.data.copy_(kept)

    def broken(piece: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        chat.say("More.", broken, never)
    assert chat.turns == before
    assert not chat.engine.busy


def test_models_that_cannot_chat(tmp_path: Path, talk: Talk) -> None:
    plain = letters_folder(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    code, replies, notes = talk("Hello.", model=str(plain))
    assert (code, replies) == (4, [])
    assert "it has no chat template to talk through; use upslope generate" in notes


def test_standard_input_that_is_no_text(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert main(["chat", tiny]) == 3
    assert "standard input: not UTF-8" in capsys.readouterr().err
