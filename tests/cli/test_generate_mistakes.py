"""`upslope generate`: one line for every mistake, before anything is made where that can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generate_kit import generate, write, write_prompts
from letters_model import letters_folder
from safetensors.torch import load_file, save_file

from upslope.cli import main


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(letters_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a", "--prompts", "x.jsonl"], "prompt and prompts are both given"),
        (["--prompt", "a", "--resume"], "resume goes on with a file of prompts"),
        (["--prompt", "a", "--raw", "--system", "b"], "system is a turn of the chat template, which raw leaves out"),
        (["--prompt", "a", "--logprobs", "1"], "add --json or --output"),
        (["--prompt", "a", "--stream", "--json"], "stream prints one reply as text"),
        (["--prompt", "a", "--length-penalty", "2"], "it needs num_beams above 1"),
        (["--prompt", "a", "--temperature", "0", "--num-return-sequences", "2"], "would repeat one reply"),
        (["--prompt", "a", "--num-beams", "2", "--num-return-sequences", "3"], "at most num_beams, which is 2"),
        (["--prompt", "a", "--num-beams", "2", "--top-p", "0.5"], "top_p has no meaning in beam search"),
        (["--prompt", "a", "--num-beams", "2", "--logprobs", "1", "--json"], "0 gives the tokens' own log-probs"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; it must be at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "temperature is nan"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens is 0"),
        (["--prompt", "a", "--stop", ""], "stop holds an empty text"),
        (["--prompt", "a", "--kv-cache-gb", "0"], "kv_cache_gb is 0.0"),
    ],
)
def test_options_that_make_no_sense(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "no-such-model", *arguments]) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}, {"prompt": "x" * 600}], ":2: the prompt has 6"),
        ([{"prompt": "a"}, {"prompt": ""}], ":2: 'prompt' is empty"),
        ([{"prompt": "a", "tokens": [1]}], ":1: the column 'tokens' would be written over"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], ":1: a row of kind 'preference' is no prompt"),
        (
            [{"messages": [{"role": "assistant", "content": "a"}]}],
            ":1: the conversation ends with the assistant's reply",
        ),
        (
            [{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}],
            ":1: the conversation",
        ),
        ([{"question": "a"}], ":1: its keys ('question') are no known kind"),
    ],
)
def test_bad_rows_before_anything_is_made(
    rows: list[dict[str, Any]], words: str, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, output = write(tmp_path / "bad.jsonl", rows), tmp_path / "out.jsonl"
    assert generate("--prompts", path, "--output", str(output), "--system", "Brief.", model=tiny) == 3
    printed = capsys.readouterr()
    assert f"bad.jsonl{words}" in printed.err
    assert not output.exists()


def test_one_line_for_every_mistake(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = letters_folder(tmp_path / "plain")
    (plain / "chat_template.jinja").unlink()
    messages = write(tmp_path / "m.jsonl", [{"messages": [{"role": "user", "content": "b"}]}])
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    cases = [
        (3, ["--prompts", str(tmp_path / "none.jsonl")], tiny, "no such file"),
        (3, ["--prompt", ""], tiny, "prompt: the text is empty"),
        (3, ["--prompt", "x" * 600], tiny, "the model's context holds 512"),
        (3, ["--prompt", "a\udcff"], tiny, "not UTF-8"),
        (2, ["--prompt", "a", "--system", "b"], str(plain), "has none: leave it out"),
        (3, ["--prompts", messages], str(plain), "m.jsonl:1: messages need a chat template"),
        (3, ["--prompts", messages, "--raw"], tiny, "m.jsonl:1: messages need a chat template"),
        (4, ["--prompt", "a"], str(tmp_path / "nothing"), "no such folder"),
        (5, ["--prompt", "a", "--output", str(folder)], tiny, "folder.jsonl: exists"),
    ]
    for code, arguments, model, words in cases:
        assert generate(*arguments, model=model) == code, arguments
        printed = capsys.readouterr()
        assert words in printed.err
        assert printed.err.count("\n") == 1
    assert generate("--prompt", "a", "--temperature", "0", model=str(plain)) == 0  # no template: the text as it stands


def test_a_broken_model_names_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = letters_folder(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # a number, but what is computed with it is none
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert generate("--prompts", write_prompts(tmp_path), model=str(broken)) == 4
    assert "prompts.jsonl:1: the model's logits hold NaN" in capsys.readouterr().err
