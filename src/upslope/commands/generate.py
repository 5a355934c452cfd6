"""`upslope generate`: complete one prompt, or a file of prompts to JSONL.

With what other verbs share: an engine for their options, text that is safe to show.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from upslope.atomic import read_object
from upslope.build import Policy, load_inference
from upslope.commands.generate_rows import Asked, ask_file, opened_rows, prompt_of, row_of
from upslope.data.chat import encode_prompt
from upslope.engine import Engine
from upslope.engine.request import check_prompt
from upslope.errors import ConfigError, DataError, ModelError, located
from upslope.models.attention.context import BLOCK, KVCache
from upslope.models.files.folders import GENERATION_CONFIG
from upslope.models.files.sources import say
from upslope.options import GenerateOptions
from upslope.options.inference import DecodingOptions
from upslope.runs.encoding import to_json
from upslope.runs.progress import Progress
from upslope.types import Completion, SamplingParams

# A model's text may hold escape sequences, which a terminal would obey: retitle, recolour, overwrite what was said.
DRAWN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_SHOWN: dict[int, int] = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
_SHOWN |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)


def open_engine(policy: Policy, *, sequences: int, longest: int, max_batch: int, kv_cache_gb: float) -> Engine:
    """An engine whose cache holds `sequences` of up to `longest` tokens, but takes no more than kv_cache_gb (GiB)."""
    blocks = min(sequences, max_batch) * -(-(longest + 1) // BLOCK)
    most = int(kv_cache_gb * 2**30 // KVCache.bytes_per_block(policy.model.spec, policy.model.dtype))
    return Engine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        max_batch=max_batch,
        num_blocks=min(blocks, most),
    )


def suggested(folder: Path, left: Iterable[str]) -> str:
    """What the model's generation_config.json suggests of the options `left` at their defaults, as they are written.

    Nothing of it is taken: the same options give the same distribution whatever lies in the model's folder.
    """
    path = folder / GENERATION_CONFIG
    said = read_object(path, ModelError) if path.is_file() else {}
    greedy = said.get("do_sample") is False
    names = [n for n in left if not greedy or n == "repetition_penalty"]
    values = [(n, said[n]) for n in names if isinstance(said.get(n), int | float) and said[n] != _OFF.get(n)]
    return " ".join(f"--{n.replace('_', '-')} {value:g}" for n, value in values)


def say_suggested(policy: Policy, options: DecodingOptions) -> None:
    """One line on standard error where the model suggests what the options leave out."""
    fields = type(options).__dataclass_fields__
    left = [name for name in DRAWN if getattr(options, name) == fields[name].default]
    if options.temperature == 0:
        left = [name for name in left if name == "repetition_penalty"]
    if words := suggested(policy.folder, left):
        say(f"{options.model}: its {GENERATION_CONFIG} suggests {words}; not taken unless you say so")


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template; an encoder-decoder's never has."""
    return getattr(tokenizer, "chat_template", None) is not None


def shown(text: str, stream: TextIO) -> str:
    """`text` as it may be written to `stream`: for a terminal, control characters become their pictures."""
    return text.translate(_SHOWN) if stream.isatty() else text


def run(options: GenerateOptions) -> int:
    """Print or write the replies; see GenerateOptions for what goes where.

    Raises ConfigError: no prompt, or a system turn for a model without a chat template; DataError: a prompt that is
    empty, too long or not text, naming its row, before anything is generated; RunError: --output cannot be written
    or resumed.
    """
    text = None if options.prompts is not None else _text(options)
    policy = load_inference(options.model, dtype=options.dtype)
    if options.num_beams == 1:
        say_suggested(policy, options)
    templated = has_template(policy.tokenizer) and not options.raw
    if options.system is not None and not templated:
        raise ConfigError(f"system is a turn of the chat template, and {options.model} has none: leave it out")
    if text is not None:
        where = "prompt" if options.prompt is not None else "standard input"
        asked = [Asked(where, prompt_of(text, where=where, templated=templated, system=options.system))]
    else:
        assert options.prompts is not None
        asked = ask_file(options.prompts, templated=templated, system=options.system, columns=options.columns)
    encoded = [_encode(policy, one) for one in asked]
    engine = open_engine(
        policy,
        sequences=len(asked) * max(options.num_return_sequences, options.num_beams),
        longest=max(len(t) + min(options.max_tokens, policy.model.room(len(t))) for t in encoded),
        max_batch=options.max_batch,
        kv_cache_gb=options.kv_cache_gb,
    )
    if options.output is not None:
        _to_file(engine, asked, encoded, options)
    elif options.prompts is not None:
        _to_stdout(engine, asked, encoded, options)
    else:
        _answer_one(engine, asked[0], encoded[0], options)
    return 0


def sampling_params(options: GenerateOptions) -> SamplingParams:
    """The options as the engine takes them."""
    return SamplingParams(
        max_tokens=options.max_tokens,
        n=options.num_return_sequences,
        temperature=options.policy_temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        stop=options.stop,
        seed=options.seed,
        logprobs=options.logprobs or None,
        beam_width=options.num_beams,
        length_penalty=options.length_penalty,
    )


def _text(options: GenerateOptions) -> str:
    """--prompt, else all of standard input without its last line break."""
    text = options.prompt
    if text is None:
        if sys.stdin.isatty():
            raise ConfigError("no prompt: give --prompt TEXT or --prompts FILE, or pipe a text to standard input")
        try:
            raw = sys.stdin.buffer.read((1 << 26) + 1)
            if len(raw) > 1 << 26:
                raise DataError("standard input: more than 64 MiB; it is one prompt: give many with --prompts FILE")
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: not UTF-8 at byte {error.start + 1}; convert it") from None
        text = text.removesuffix("\n").removesuffix("\r")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError("prompt: not UTF-8; convert it")
    if not text:
        raise DataError(f"{'standard input' if options.prompt is None else 'prompt'}: the text is empty")
    return text


def _encode(policy: Policy, asked: Asked) -> list[int]:
    """The prompt's tokens, of which the model must be able to take all."""
    spec = policy.model.spec
    with located(asked.where, DataError):
        tokens = encode_prompt(policy.tokenizer, asked.prompt, tools=asked.tools)
        policy.model.check_prompt(check_prompt(tokens, spec.input_vocab_size, spec.max_positions))
    return tokens


def _answer_one(engine: Engine, asked: Asked, tokens: list[int], options: GenerateOptions) -> None:
    """One prompt on standard output: streamed, as texts, or as a row."""
    out, params = sys.stdout, sampling_params(options)
    if (options.stream or out.isatty()) and not (options.json or params.n > 1 or params.beam_width > 1):
        completions = [_stream(engine, tokens, params, out)]
    else:
        completions = engine.generate([tokens], params)[0]
        if options.json:
            print(to_json(row_of(asked, completions, options, engine.tokenizer)), file=out)
        for number, completion in enumerate([] if options.json else completions, 1):
            if len(completions) > 1:
                out.flush()
                print(f"-- reply {number} of {len(completions)}", file=sys.stderr, flush=True)
            print(shown(completion.text, out), file=out)
    if any(c.finish_reason == "length" for c in completions):
        room = engine.model.room(len(tokens))
        limit = f"max_tokens = {params.max_tokens}" if params.max_tokens <= room else f"the context: {room} tokens left"
        print(f"upslope: cut off by {limit}", file=sys.stderr)


def _stream(engine: Engine, tokens: list[int], params: SamplingParams, out: TextIO) -> Completion:
    completion = None
    try:
        for event in engine.stream(tokens, params):
            print(shown(event.text, out), end="", file=out, flush=True)
            completion = event.completion
    finally:
        print(file=out)
    assert completion is not None
    return completion


def _to_stdout(engine: Engine, asked: list[Asked], encoded: list[list[int]], options: GenerateOptions) -> None:
    """Rows as they are done. On a terminal the rows themselves are the progress."""
    out = sys.stdout  # the bar takes the name sys.stdout for itself while it is shown
    with nullcontext() if out.isatty() else Progress(len(asked), "generate", unit="prompt") as progress:
        for rows in _rows(engine, asked, encoded, options, progress):
            print(*map(to_json, rows), sep="\n", file=out, flush=True)


def _to_file(engine: Engine, asked: list[Asked], encoded: list[list[int]], options: GenerateOptions) -> None:
    with opened_rows(options, asked) as (lines, written):
        try:
            with Progress(len(asked), "generate", unit="prompt", done=written) as progress:
                for rows in _rows(engine, asked, encoded, options, progress):
                    for row in rows:
                        lines.append(row)
                    lines.flush()
                    written += len(rows)
        except KeyboardInterrupt:
            hint = "; the same with --resume goes on" if options.prompts is not None else ""
            print(f"upslope: {written} of {len(asked)} rows are in {lines.path}{hint}", file=sys.stderr)
            raise


def _rows(
    engine: Engine, asked: list[Asked], encoded: list[list[int]], options: GenerateOptions, progress: Progress | None
) -> Iterator[list[dict[str, Any]]]:
    """The rows that are still to be made, in the order of the input, as many at a time as a step completes.

    A prompt's place seeds its replies. Replies that overtake an earlier one wait for it. So that what waits, which a
    kill would lose, stays little, at most eight batches are under way.
    """
    params = sampling_params(options)
    window = max(1, 8 * engine.scheduler.max_batch // max(params.n, params.beam_width))
    place_of: dict[int, int] = {}
    found: dict[int, dict[int, Completion]] = {}
    opened = written = 0 if progress is None else progress.done
    while written < len(asked):
        while opened < len(asked) and opened - written < window:
            with located(asked[opened].where):
                place_of[engine.add(encoded[opened], params, key=opened)] = opened
            opened += 1
        for event in engine.step():
            place = place_of[event.request_id]
            if event.error is not None:
                with located(asked[place].where):
                    raise event.error
            if event.completion is not None:
                found.setdefault(place, {})[event.sample] = event.completion
        rows = []
        # beams come all in one step, and fewer than n where too few could be had
        while len(samples := found.get(written, {})) == params.n or (samples and params.beam_width > 1):
            rows.append(row_of(asked[written], [samples[i] for i in sorted(samples)], options, engine.tokenizer))
            del found[written]
            written += 1
        if rows:
            yield rows
        if rows and progress is not None:
            progress.advance(len(rows), {"tokens": engine.stats.generated_tokens})
