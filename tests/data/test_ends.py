"""What ends a turn is said once, whichever file or template says it, and carried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ends_kit import END, EOS, PLAIN, folder_ending, tokenizer_ending
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_model import CHATML
from transformers import AutoModelForCausalLM, GenerationConfig

from upslope.build import load_inference
from upslope.data.chat import closing_tokens, load_tokenizer, turn_ends, write_ends
from upslope.errors import ModelError

# Phi-3's way: the EOS after a conversation's last turn only.
EOS_LAST = PLAIN.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
MARKED = CHATML.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}",
)
CALLS = PLAIN.replace(
    "<|end|>\n",
    "{% for c in m['tool_calls'] or [] %}[{{ c['function']['name'] }}]{% endfor %}"
    "{{ '<|call|>' if m['tool_calls'] else '<|end|>' }}\n",
)
CALL_BY_CALL = CALLS.replace("]{% endfor %}{{ '<|call|>'", "]<|call|>{% endfor %}{{ ''")
TEMPLATES = {
    "closed by its own": (PLAIN, [END]),
    "closed by its own, EOS at the very end": (EOS_LAST, [EOS, END]),
    "closed by EOS": (CHATML.replace("<|im_end|>", EOS), [EOS]),
    "a marked block, and more behind it": (MARKED, [END]),
    "tool calls closed otherwise": (CALLS, [END, "<|call|>"]),
    "every call closed, which ends no turn": (CALL_BY_CALL, [END]),
    "a mark around the reply": (PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}<|end|>*"), []),
    "plain text": (CHATML.replace("<|im_end|>", "</turn>"), []),
    "refuses": ("{{ raise_exception('no') }}", []),
    "broken": ("{% for m in %}", []),
    "no replies": ("{{ messages[0]['content'] }}<|end|>", []),
    "none": (None, []),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_closes_a_turn_of_the_template(kind: str) -> None:
    template, wanted = TEMPLATES[kind]
    assert closing_tokens(tokenizer_ending(template, "<|call|>")) == wanted


def _say(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**known, **values}))


def test_the_templates_end_is_one_beside_eos(tmp_path: Path) -> None:
    policy = load_inference(folder_ending(tmp_path / "m"), dtype="float32")
    eos, end = policy.tokenizer.convert_tokens_to_ids([EOS, END])
    assert policy.eos_token_ids == (eos, end)
    _say(tmp_path / "m", "generation_config.json", eos_token_id=[7, eos])
    assert policy.eos_token_ids == (7, eos, end)


def test_config_json_is_read_where_transformers_reads_it(tmp_path: Path) -> None:
    folder = folder_ending(tmp_path / "m", None)
    tokenizer = load_tokenizer(folder)
    _say(folder, "config.json", eos_token_id=[0, 1])
    assert turn_ends(folder, tokenizer) == (tokenizer.eos_token_id,)
    (folder / "generation_config.json").unlink()
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert theirs == [0, 1]
    assert turn_ends(folder, tokenizer) == (0, 1, tokenizer.eos_token_id)
    _say(folder, "config.json", eos_token_id=None, text_config={"eos_token_id": 3})
    assert turn_ends(folder, tokenizer) == (3, tokenizer.eos_token_id)


def test_what_is_written_is_what_transformers_reads(tmp_path: Path) -> None:
    folder = folder_ending(tmp_path / "m")
    ends = turn_ends(folder, load_tokenizer(folder))
    _say(folder, "generation_config.json", temperature=0.5, eos_token_id=9)
    write_ends(folder, ends)
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "eos_token_id": list(ends),
        "temperature": 0.5,
    }
    (folder / "generation_config.json").unlink()
    _say(folder, "config.json", eos_token_id=ends[0], bos_token_id=5)
    write_ends(folder, ends[:1])
    assert not (folder / "generation_config.json").exists()  # config.json says it
    write_ends(folder, ends)
    made = GenerationConfig.from_pretrained(folder)
    assert (made.eos_token_id, made.bos_token_id) == (list(ends), 5)


BAD = {
    "a word": ("eos_token_id", "</s>", "eos_token_id is '</s>'; it must be a token id or a list of them"),
    "a fraction": ("eos_token_id", [1, 2.5], r"eos_token_id is \[1, 2.5\]"),
    "true": ("eos_token_id", True, "eos_token_id is True"),
    "negative": ("eos_token_id", -1, "eos_token_id is -1"),
    "beyond the vocabulary": ("eos_token_id", 5000, "eos_token_id is token 5000, but the model has only"),
}


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("kind", BAD)
def test_ids_that_are_none_are_one_line(tmp_path: Path, kind: str, file: str) -> None:
    policy = load_inference(folder_ending(tmp_path / "m"), dtype="float32")
    (tmp_path / "m" / "generation_config.json").unlink()
    name, value, message = BAD[kind]
    _say(tmp_path / "m", file, **{name: value})
    with pytest.raises(ModelError, match=message) as found:
        _ = policy.eos_token_ids
    assert f"m/{file}" in str(found.value)
    assert "\n" not in str(found.value)


def test_no_end_at_all_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    tokenizer = tokenizer_ending(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"says what ends a turn; write eos_token_id into generation_config.json"):
        turn_ends(tmp_path, tokenizer)
    for rubbish in ("{", "[1]", "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")):
        (tmp_path / "generation_config.json").write_text(rubbish, encoding="latin-1")
        with pytest.raises(ModelError, match=r"generation_config.json: (cannot be read as JSON|holds no JSON object)"):
            turn_ends(tmp_path, tokenizer)


_JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=_JSON)
def test_whatever_the_file_says_it_is_ids_or_one_error(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    tokenizer = tokenizer_ending(None)
    fine = value is None or type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))
    if fine and all(0 <= i < 300 for i in ([value] if isinstance(value, int) else value or [])):
        ends = turn_ends(tmp_path, tokenizer, vocab_size=300)
        assert all(type(token) is int and 0 <= token < 300 for token in ends)
    else:
        with pytest.raises(ModelError, match=r"\A[^\n]*eos_token_id[^\n]*\Z"):
            turn_ends(tmp_path, tokenizer, vocab_size=300)
