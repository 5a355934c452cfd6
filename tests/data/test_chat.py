"""Loss masks and prompts: what the sampler is given is exactly how the training sequence begins."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizer_kit as kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from upslope.data.chat import (
    TooLongError,
    encode_completion,
    encode_conversation,
    encode_document,
    encode_prompt,
    load_tokenizer,
)
from upslope.data.pieces import encode_pieces
from upslope.data.template import ChatTemplate
from upslope.errors import DataError, ModelError
from upslope.types import Example, Message, Prompt

TALK = (
    Message("system", "Be brief."),
    Message("user", "What is the sum of 12 and 7?"),
    Message("assistant", "The answer is 19."),
    Message("user", "Hello?"),
    Message("assistant", "\n\nHello there"),
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 7}}}
WITH_TOOL = (
    Message("user", "What is the sum?"),
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "19", name="add"),
    Message("assistant", "The answer is 19."),
)


def trained_runs(example: Example, tokenizer: Any) -> list[str]:
    """The decoded text of every run of trained tokens."""
    runs: list[list[int]] = []
    for t, (token, flag) in enumerate(zip(example.tokens, example.mask, strict=True)):
        if flag:
            if t == 0 or not example.mask[t - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def check_prompts_are_prefixes(tokenizer: Any, messages: Sequence[Message]) -> Example:
    """For each assistant turn: the prompt is a prefix of the training tokens and the mask begins right behind it."""
    example = encode_conversation(tokenizer, messages)
    for k, turn in enumerate(messages):
        if turn.role == "assistant" and turn.train is not False:
            prompt = encode_prompt(tokenizer, Prompt(0, tuple(messages[:k])))
            assert example.tokens[: len(prompt)] == prompt
            assert example.mask[len(prompt)]
            assert not example.mask[len(prompt) - 1]
    return example


def test_chatml_mask_is_the_reply_and_its_end_token(chatml: Any) -> None:
    example = check_prompts_are_prefixes(chatml, TALK)
    assert trained_runs(example, chatml) == ["The answer is 19.<|im_end|>", "\n\nHello there<|im_end|>"]
    assert chatml.decode(example.tokens) == chatml.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in TALK], tokenize=False
    )
    assert not example.mask[-1]  # ChatML's newline after the end of turn
    assert chatml.decode(example.tokens[-1:]) == "\n"


def test_llama3_mask(llama3: Any) -> None:
    example = check_prompts_are_prefixes(llama3, TALK)
    assert trained_runs(example, llama3) == ["The answer is 19.<|eot_id|>", "Hello there<|eot_id|>"]
    assert example.tokens.count(llama3.bos_token_id) == 1  # the template's, not a second one
    assert example.mask[-1]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_word_marks_of_sentencepiece_tokenizers(scheme: str) -> None:
    tokenizer = kit.sentencepiece(kit.LLAMA2, scheme)
    talk = (TALK[1], TALK[2], TALK[3], Message("assistant", "hello world"))
    example = check_prompts_are_prefixes(tokenizer, talk)
    text = ChatTemplate(tokenizer).render(talk, add_generation_prompt=False).text
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.tokens == whole  # no mark is added where a reply begins, none lost where a turn begins
    # the decoder drops the mark of a run's first word
    assert [run.strip() for run in trained_runs(example, tokenizer)] == ["The answer is 19. </s>", "hello world </s>"]


def test_word_mark_is_not_added_to_a_reply_without_a_space() -> None:
    tokenizer = kit.sentencepiece(None)
    example = encode_completion(tokenizer, "the answer", "answer")
    reply = [token for token, flag in zip(example.tokens, example.mask, strict=True) if flag]
    assert not tokenizer.convert_ids_to_tokens(reply)[0].startswith("▁")
    assert tokenizer.decode(example.tokens[:-1]) == "the answeranswer"
    added = kit.byte_level(None, prefix=True)
    example = encode_completion(added, "the answer", "answer")
    assert added.decode(example.tokens[:-1]).strip() == "the answeranswer"


def test_a_reply_right_behind_a_special_token_keeps_its_word_mark() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
    )
    tokenizer = kit.sentencepiece(template)
    example = check_prompts_are_prefixes(tokenizer, (Message("user", "hello"), Message("assistant", "the answer")))
    text = "<|im_start|>hello<|im_end|><|im_start|>the answer<|im_end|>"
    assert example.tokens == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", [kit.MARKED, kit.MARKED_WITHOUT_END, kit.MARKED_WITH_NEWLINE])
def test_generation_marks_always_end_with_the_end_token(template: str) -> None:
    tokenizer = kit.byte_level(template)
    example = check_prompts_are_prefixes(tokenizer, TALK)
    assert trained_runs(example, tokenizer) == ["The answer is 19.<|im_end|>", "\n\nHello there<|im_end|>"]


def test_generation_marks_agree_with_the_masks_of_transformers(marked: Any) -> None:
    talk = TALK[:3]
    messages = [{"role": m.role, "content": m.content} for m in talk]
    theirs = marked.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ours = encode_conversation(marked, talk)
    assert ours.tokens == theirs["input_ids"]
    assert [int(flag) for flag in ours.mask] == theirs["assistant_masks"]


def test_marks_decide_what_inside_a_turn_is_trained() -> None:
    template = kit.MARKED.replace("{% generation %}", "{{ 'Hello ' }}{% generation %}")
    tokenizer = kit.byte_level(template)
    example = encode_conversation(tokenizer, TALK[1:3])
    assert trained_runs(example, tokenizer) == ["The answer is 19.<|im_end|>"]


def test_a_mark_that_misses_the_end_token_is_refused() -> None:
    template = kit.MARKED_WITHOUT_END.replace("{% endgeneration %}{{ '", "{% endgeneration %}{{ ' ok")
    with pytest.raises(DataError, match=r"message 3 of 3 \(assistant\).*generation block ends before.*im_end"):
        encode_conversation(kit.byte_level(template), TALK[:3])


def test_word_level_tokenizer() -> None:
    tokenizer = kit.word_level(kit.CHATML)
    example = check_prompts_are_prefixes(tokenizer, (TALK[1], Message("assistant", "Hello there")))
    trained = [token for token, flag in zip(example.tokens, example.mask, strict=True) if flag]
    assert tokenizer.convert_ids_to_tokens(trained) == ["Hello", "there", "<|im_end|>"]


def test_tool_messages_are_context_and_tool_calls_are_the_assistants_own(chatml: Any) -> None:
    example = check_prompts_are_prefixes(chatml, WITH_TOOL)
    first, second = trained_runs(example, chatml)
    assert first.startswith('<tool_call>{"type": "function"')
    assert first.endswith("</tool_call><|im_end|>")
    assert second == "The answer is 19.<|im_end|>"
    given_text = chatml.decode([t for t, flag in zip(example.tokens, example.mask, strict=True) if not flag])
    assert "<|im_start|>tool\n19<|im_end|>" in given_text


def test_tools_reach_the_template() -> None:
    tokenizer = kit.byte_level("{% if tools %}{{ tools | tojson }}{% endif %}" + kit.CHATML)
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    prompt = Prompt(0, (Message("user", "Hello"),))
    assert '"name": "add"' in tokenizer.decode(encode_prompt(tokenizer, prompt, tools=[tool]))
    assert '"name": "add"' not in tokenizer.decode(encode_prompt(tokenizer, prompt))


def test_train_overrides_a_turn(chatml: Any) -> None:
    talk = (*TALK[:2], Message("assistant", "The answer is 19.", train=False), *TALK[3:])
    example = check_prompts_are_prefixes(chatml, talk)
    assert trained_runs(example, chatml) == ["\n\nHello there<|im_end|>"]
    assert example.tokens == encode_conversation(chatml, TALK).tokens


def test_an_empty_mask_is_refused(chatml: Any) -> None:
    with pytest.raises(DataError, match=r"no assistant turn is trained on"):
        encode_conversation(chatml, TALK[:2])
    with pytest.raises(DataError, match=r"no assistant turn is trained on"):
        encode_conversation(chatml, (TALK[1], Message("assistant", "No.", train=False)))
    with pytest.raises(DataError, match=r"no messages"):
        encode_conversation(chatml, ())


def test_only_assistant_turns_can_be_trained(chatml: Any) -> None:
    with pytest.raises(DataError, match=r"message 1 of 2 \(user\): only assistant"):
        encode_conversation(chatml, (Message("user", "Hi", train=True), TALK[2]))


def test_an_empty_reply_trains_the_end_token(chatml: Any) -> None:
    example = encode_conversation(chatml, (TALK[1], Message("assistant", "")))
    assert trained_runs(example, chatml) == ["<|im_end|>"]


def test_a_conversation_that_begins_with_the_assistant(chatml: Any) -> None:
    opening = Message("assistant", "Hello there")
    with pytest.raises(DataError, match=r"message 1 of 3 \(assistant\)"):
        encode_conversation(chatml, (opening, *TALK[1:3]))
    talk = (Message("assistant", "Hello there", train=False), *TALK[1:3])
    assert trained_runs(check_prompts_are_prefixes(chatml, talk), chatml) == ["The answer is 19.<|im_end|>"]


def test_a_template_that_rewrites_history_is_refused_by_name() -> None:
    tokenizer = kit.byte_level(kit.REWRITING)
    with pytest.raises(DataError, match=r"message 3 of 5 \(assistant\).*not prefix-preserving.*train to false"):
        encode_conversation(tokenizer, TALK)
    talk = (*TALK[:2], Message("assistant", "The answer is 19.", train=False), *TALK[3:])
    example = check_prompts_are_prefixes(tokenizer, talk)
    assert trained_runs(example, tokenizer) == ["<think>\n\nHello there<|im_end|>"]


def test_a_prompt_the_training_text_does_not_begin_with_is_refused() -> None:
    template = kit.CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    with pytest.raises(DataError, match=r"message 3 of 3 \(assistant\).*not prefix-preserving.*prompted"):
        encode_conversation(kit.byte_level(template), TALK[:3])


def test_a_template_that_never_closes_a_turn_is_refused() -> None:
    with pytest.raises(DataError, match=r"never learn to stop"):
        encode_conversation(kit.byte_level(kit.UNCLOSED), TALK)


def test_a_template_without_a_generation_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"ignores add_generation_prompt.*assistant"):
        encode_conversation(kit.byte_level(kit.HEADLESS), TALK)


def test_without_a_template(chatml: Any) -> None:
    tokenizer = kit.byte_level(None)
    for call in (
        lambda: encode_conversation(tokenizer, TALK),
        lambda: encode_prompt(tokenizer, Prompt(0, TALK[:2])),
    ):
        with pytest.raises(DataError, match=r"no chat template: put a chat_template.jinja"):
            call()


def test_the_templates_own_refusal_is_passed_on(llama2: Any) -> None:
    with pytest.raises(DataError, match=r"refuses this conversation \(system, user.*only user and assistant"):
        encode_conversation(llama2, TALK)
    broken = kit.byte_level("{% for m in messages %}{{ m.content + 1 }}{% endfor %}")
    with pytest.raises(DataError, match=r"refuses this conversation"):
        encode_prompt(broken, Prompt(0, TALK[:2]))


def test_nothing_is_cut(chatml: Any) -> None:
    length = len(encode_conversation(chatml, TALK).tokens)
    assert len(encode_conversation(chatml, TALK, max_length=length).tokens) == length
    with pytest.raises(TooLongError, match=f"{length} tokens are more than max_length {length - 1}") as caught:
        encode_conversation(chatml, TALK, max_length=length - 1)
    assert (caught.value.length, caught.value.max_length) == (length, length - 1)


def test_tokenising_as_one_string_would_differ_and_we_do_not(chatml: Any) -> None:
    """The case the pieces exist for: newlines on both sides of the border between prompt and reply."""
    talk = (TALK[1], Message("assistant", "\n\nHello there"))
    example = check_prompts_are_prefixes(chatml, talk)
    text = ChatTemplate(chatml).render(talk, add_generation_prompt=False).text
    assert example.tokens != chatml(text, add_special_tokens=False)["input_ids"]


def test_prompts_of_text(chatml: Any, llama3: Any) -> None:
    assert encode_prompt(chatml, Prompt(0, text="Hello")) == chatml("Hello")["input_ids"]
    with_bos = encode_prompt(llama3, Prompt(0, text="Hello"))
    assert with_bos[0] == llama3.bos_token_id
    assert with_bos == encode_prompt(llama3, Prompt(0, text="<|begin_of_text|>Hello"))  # never twice
    assert encode_prompt(llama3, Prompt(0, TALK[:2])).count(llama3.bos_token_id) == 1
    for bad in (Prompt(3), Prompt(3, TALK[:2], "Hello"), Prompt(3, text="")):
        with pytest.raises(DataError, match=r"prompt 3"):
            encode_prompt(chatml, bad)


def test_prompt_is_what_transformers_gives(chatml: Any, llama3: Any, llama2: Any) -> None:
    for tokenizer, talk in ((chatml, TALK[:2]), (llama3, TALK[:2]), (llama2, TALK[1:2])):
        messages = [{"role": m.role, "content": m.content} for m in talk]
        theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert encode_prompt(tokenizer, Prompt(0, talk)) == theirs


def test_prompt_and_completion_of_text(chatml: Any, llama3: Any) -> None:
    for tokenizer in (chatml, llama3):
        example = encode_completion(tokenizer, "The sum is", " 19.")
        prompt = encode_prompt(tokenizer, Prompt(0, text="The sum is"))
        assert example.tokens[: len(prompt)] == prompt
        assert example.mask == [False] * len(prompt) + [True] * (len(example.tokens) - len(prompt))
        assert example.tokens[-1] == tokenizer.eos_token_id
        closed = encode_completion(tokenizer, "The sum is", " 19." + tokenizer.eos_token)
        assert closed.tokens == example.tokens  # one EOS, not two
    with pytest.raises(DataError, match=r"make both the same"):
        encode_completion(chatml, "The sum is", TALK[2:3])


def test_prompt_and_completion_of_messages(chatml: Any) -> None:
    """Replies inside the prompt are not trained on unless they say so; the completion may be a text."""
    as_messages = encode_completion(chatml, TALK[:4], TALK[4:])
    assert as_messages == encode_completion(chatml, TALK[:4], TALK[4].content)
    assert trained_runs(as_messages, chatml) == ["\n\nHello there<|im_end|>"]
    talk = (*TALK[:2], Message("assistant", "The answer is 19.", train=True), TALK[3])
    assert len(trained_runs(encode_completion(chatml, talk, TALK[4:]), chatml)) == 2


def test_a_reply_that_brings_its_own_end_is_refused(chatml: Any) -> None:
    """Rows exported with the template's tokens would teach two ends, or going on after one."""
    for content in ("19<|im_end|>", "19<|im_end|>\n20"):
        with pytest.raises(
            DataError, match=r"message 2 of 2 \(assistant\): its content holds '<\|im_end\|>', the token"
        ):
            encode_conversation(chatml, [Message("user", "7 + 12?"), Message("assistant", content)])
    asked = [Message("user", "What is <|im_end|>?"), Message("assistant", "A token.")]
    assert trained_runs(encode_conversation(chatml, asked), chatml) == ["A token.<|im_end|>"]


def test_documents(chatml: Any, llama3: Any) -> None:
    plain = encode_document(chatml, "Hello there")
    assert plain.tokens == [*chatml("Hello there")["input_ids"], chatml.eos_token_id]
    assert plain.mask == [False] + [True] * (len(plain.tokens) - 1)
    with_bos = encode_document(llama3, "Hello there")
    assert with_bos.tokens[0] == llama3.bos_token_id
    assert with_bos.mask[1]  # the first word is trained where BOS stands before it
    with pytest.raises(DataError, match=r"no tokens"):
        encode_document(chatml, "")
    endless = kit.byte_level(None)
    endless.eos_token = None
    with pytest.raises(DataError, match=r"no EOS token"):
        encode_document(endless, "Hello")


BYTES = kit.byte_level(None)
CONTENT = st.text(alphabet=st.sampled_from("aeH lo\n\t.?'é日🙂1"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=st.lists(st.tuples(CONTENT, CONTENT, st.sampled_from([None, False])), min_size=1, max_size=4))
@pytest.mark.parametrize("family", ["chatml", "llama3", "marked"])
def test_every_prompt_is_a_prefix(turns: list[tuple[str, str, bool | None]], family: str, request: Any) -> None:
    tokenizer = request.getfixturevalue(family)
    messages = [Message("system", "Be brief.")]
    for asked, reply, train in turns:
        messages += [Message("user", asked), Message("assistant", reply, train=train)]
    messages += [Message("user", "Hello?"), Message("assistant", "19")]
    example = check_prompts_are_prefixes(tokenizer, messages)
    rendered = ChatTemplate(tokenizer).render(messages, add_generation_prompt=False)
    assert tokenizer.decode(example.tokens) == rendered.text
    end = tokenizer.eos_token
    replies = [reply for _, reply, train in turns if train is None] + ["19"]
    trim = family == "llama3"
    assert trained_runs(example, tokenizer) == [(reply.strip() if trim else reply) + end for reply in replies]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 30), max_size=4))
def test_pieces_lose_nothing(text: str, cuts: list[int]) -> None:
    tokenizer = BYTES
    borders = sorted({min(cut, len(text)) for cut in cuts})
    ids, starts = encode_pieces(tokenizer, text, borders)
    assert tokenizer.decode(ids) == text
    assert starts == sorted(starts)
    assert all(border in starts for border in borders if border < len(text))


def test_load_tokenizer_round_trip(chatml: Any, tmp_path: Path) -> None:
    chatml.save_pretrained(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert encode_conversation(loaded, TALK) == encode_conversation(chatml, TALK)
    assert load_tokenizer(str(tmp_path / "model")).chat_template == kit.CHATML


def test_a_text_that_the_tokenizer_cannot_encode(chatml: Any, tmp_path: Path) -> None:
    """A pattern of its own that goes back and forth without end: the Rust code gives up with a panic."""
    chatml.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
    state["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, state["pre_tokenizer"]]}
    path.write_text(json.dumps(state), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert encode_prompt(tokenizer, Prompt(0, text="aab"))
    with pytest.raises(DataError, match=r"the tokenizer cannot encode 'aaa.*; mend tokenizer.json"):
        encode_prompt(tokenizer, Prompt(0, text="a" * 50))
    with pytest.raises(DataError, match="the tokenizer cannot encode"):
        encode_conversation(tokenizer, [Message("user", "a" * 50), Message("assistant", "b")])


def test_load_tokenizer_errors(chatml: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such model folder"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"no tokenizer here \(expected tokenizer.json\)"):
        load_tokenizer(tmp_path)
    chatml.save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for broken in (whole[: len(whole) // 2], "{}", ""):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ModelError, match=r"cannot be read|is empty"):
            load_tokenizer(tmp_path)


@pytest.fixture(scope="module")
def real() -> Any:
    folder = os.environ.get("UPSLOPE_TEST_MODEL")
    if not folder:
        pytest.skip("UPSLOPE_TEST_MODEL names no model folder")
    return load_tokenizer(folder)


def test_real_tokenizer(real: Any) -> None:
    example = check_prompts_are_prefixes(real, TALK)
    runs = trained_runs(example, real)
    assert [run.replace(real.eos_token, "").strip() for run in runs] == ["The answer is 19.", "Hello there"]
    assert all(run.endswith(real.eos_token) for run in runs)
    messages = [{"role": m.role, "content": m.content} for m in TALK[:2]]
    theirs = real.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(real, Prompt(0, TALK[:2])) == theirs
