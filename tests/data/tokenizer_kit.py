"""Small real tokenizers, built here, and the chat templates of the families."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "user\nassistant\nsystem\ntool\n\n\n\nHello there, how are you?\n\n",
    "The sum of 12 and 7 is 19.\n\nThe answer is 19.\n",
    "What is the sum? I do not know the answer, user.\n\n",
    "INST /INST SYS user assistant the the the answer answer Hello Hello hello world",
]

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>' + (call | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns are supported') }}{% endif %}"
    "{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
MARKED_WITH_NEWLINE = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}",
)
# Every reply but the last loses its reasoning once a further turn follows.
REWRITING = CHATML.replace(
    "message['content'] }}",
    "(('<think>' if message['role'] == 'assistant' and loop.last else '') + message['content']) }}",
)
UNCLOSED = CHATML.replace("{{ '<|im_end|>\n' }}{% endfor %}", "{{ '\n' }}{% endfor %}")
HEADLESS = CHATML[: CHATML.index("{% if add_generation_prompt")]

SPECIALS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<s>", "</s>",
]  # fmt: skip


def _wrap(core: Tokenizer, eos: str, bos: str | None, template: str | None) -> Any:
    extra = {} if bos is None else {"bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, **extra)
    tokenizer.chat_template = template
    return tokenizer


def byte_level(
    template: str | None,
    *,
    eos: str = "<|im_end|>",
    bos: str | None = None,
    adds_bos: bool = False,
    prefix: bool = False,
) -> Any:
    """Byte-level BPE with GPT-2's split, as in the SmolLM, Llama 3 and Qwen families."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return _wrap(core, eos, bos, template)


def sentencepiece(template: str | None, scheme: str = "always") -> Any:
    """BPE whose first word carries a mark, as in the Llama 2 and Mistral families."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *SPECIALS], show_progress=False)
    core.train_from_iterator([*CORPUS, *bytes_], trainer)
    return _wrap(core, "</s>", "<s>", template)


def word_level(template: str | None) -> Any:
    """One token per word."""
    words = sorted({word for line in CORPUS for word in line.replace(",", " , ").replace("?", " ? ").split()})
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIALS, *words, "Be", "brief", "."])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(SPECIALS)
    return _wrap(core, "<|im_end|>", None, template)
