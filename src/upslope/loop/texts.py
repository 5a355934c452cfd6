"""What pretraining starts from: the texts, a tokenizer (trained, taken over, or the model's), and a network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from upslope.build import Policy, load_policy
from upslope.cache import cache_root
from upslope.data.chat import load_tokenizer, token_count
from upslope.data.corpus import Corpus, TokenStream, corpus_files, open_corpus, texts_of
from upslope.data.train_tokenizer import CAUSAL_SPECIALS, KINDS, MASKED_SPECIALS, train_tokenizer
from upslope.devices.hardware import choose_dtype, device_of_machine
from upslope.errors import ConfigError, DataError, ModelError
from upslope.loop.kept import DataAccount, Split, tell_part
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.encoder.network import Encoder, load_encoder, new_encoder
from upslope.models.files.folders import read_config
from upslope.models.files.sources import resolve
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.models.protocol import CausalModel
from upslope.options.supervised import PretrainOptions
from upslope.runs.progress import counted, told

Objective = Literal["causal", "masked"]


@dataclass(frozen=True, slots=True)
class Texts:
    """Training and held-out text, and the corpus that the former is from."""

    train: TokenStream
    held_out: TokenStream
    corpus: Corpus

    def account(self, windows: int, held_out: int) -> DataAccount:
        """Rows are windows of tokens; no text is left out of them."""
        return DataAccount({"train": Split("data", windows), "eval": Split("the held-out text", held_out)})


def objective_of(options: PretrainOptions) -> Objective:
    """What is predicted. ConfigError when the model that is trained on cannot be trained that way."""
    if options.new:
        return "masked" if options.architecture == "encoder" else "causal"
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    kind = read_config(resolve(options.model)).get("model_type")
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if options.objective == ("causal" if masked else "masked"):
        raise ConfigError(
            f"objective {options.objective} does not fit {options.model}: {kind} is {'an' if masked else 'no'} encoder"
        )
    return "masked" if masked else "causal"


def start_tokenizer(options: PretrainOptions, objective: Objective) -> Any:
    """The tokenizer: the resumed run's, the model's, another folder's, or a new one trained on the data."""
    if options.resume and options.output_dir is not None:
        saved = Path(options.output_dir) / "checkpoints" / "last" / "model"
        if saved.is_dir():
            return load_tokenizer(saved)
    if not options.new:
        return load_tokenizer(resolve(options.model))
    choice = options.tokenizer or "bpe"
    if choice not in KINDS:
        if not Path(choice).expanduser().is_dir():
            raise ConfigError(f"tokenizer {choice!r}: give {', '.join(KINDS)}, or a folder with a tokenizer in it")
        return load_tokenizer(choice)
    return train_tokenizer(
        counted(texts_of(corpus_files(options.data)), "training the tokenizer", unit="text"),
        choice,
        options.vocab_size or 4096,
        special_tokens=MASKED_SPECIALS if objective == "masked" else CAUSAL_SPECIALS,
    )


def load_texts(options: PretrainOptions, tokenizer: Any, *, max_eval_tokens: int | None) -> Texts:
    """The texts as tokens; `max_eval_tokens` of the held-out text are used."""
    cache = Path(options.cache_dir).expanduser() if options.cache_dir else cache_root() / "corpora"
    files = corpus_files(options.data)
    with told("encoding the text; the next run finds it encoded"):
        corpus = open_corpus(files, tokenizer, cache=cache)
    if options.eval_data:
        held = corpus_files(options.eval_data)
        if twice := sorted({p.resolve() for p in files} & {p.resolve() for p in held}):
            raise DataError(f"{twice[0]}: is both in data and in eval_data; held-out text must not be trained on")
        whole = open_corpus(held, tokenizer, cache=cache)
        held_out = whole.head(max_eval_tokens)
        tell_part(len(held_out.tokens), len(whole.head().tokens), f"held-out tokens of {', '.join(options.eval_data)}")
        return Texts(corpus.head(), held_out, corpus)
    train, held_out = corpus.split(0.1, max_eval_tokens)
    tell_part(len(held_out.tokens), len(corpus.split(0.1)[1].tokens), "held-out tokens")
    return Texts(train, held_out, corpus)


def start_policy(options: PretrainOptions, tokenizer: Any, folder: Path) -> Policy:
    """The causal network to train: `--model`, or a new one, whose tokenizer files go to `folder`."""
    if not options.new:
        policy = load_policy(options)
        if options.context_length > policy.model.spec.max_positions:
            _refuse_length(options, policy.model.spec.max_positions)
        return policy
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token (eos_token); a causal model needs one to stop")
    device = device_of_machine()
    dtype, _ = choose_dtype(options.dtype, device)
    torch.manual_seed(options.seed)
    model = _new_model(options, len(tokenizer), _special_ids(tokenizer))
    tokenizer.save_pretrained(str(folder))
    (folder / "generation_config.json").write_text(json.dumps(_special_ids(tokenizer), indent=2) + "\n")
    masters = {}
    if dtype != torch.float32:
        masters = {name: p.detach().to(device) for name, p in model.named_parameters()}
    model.to(device=device, dtype=dtype)
    return Policy(model=model, tokenizer=tokenizer, folder=folder, masters=masters)


def start_encoder(options: PretrainOptions, tokenizer: Any) -> Encoder:
    """The encoder to train: `--model`, or a new BERT."""
    missing = [name for name in ("mask_token_id", "pad_token_id") if getattr(tokenizer, name) is None]
    if missing:
        raise ModelError(f"the tokenizer has no {missing[0].removesuffix('_id')}; the masked objective needs one")
    device = device_of_machine()
    dtype, _ = choose_dtype(options.dtype, device)
    if options.lora_rank:
        raise ConfigError("lora_rank: the masked objective trains all weights; set it to 0")
    if not options.new:
        encoder = load_encoder(
            resolve(options.model), "masked", gradient_checkpointing=options.gradient_checkpointing, seed=options.seed
        )
        encoder.check_tokens(token_count(tokenizer), options.model)
        if encoder.max_positions is not None and options.context_length > encoder.max_positions:
            _refuse_length(options, encoder.max_positions)
        return encoder.to_compute(dtype, device)
    width, heads = _width_and_heads(options)
    encoder = new_encoder(
        "masked",
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_layers=options.num_layers or 4,
        num_heads=heads,
        intermediate_size=options.intermediate_size or 4 * width,
        max_positions=options.context_length,
        pad_token_id=tokenizer.pad_token_id,
        seed=options.seed,
        gradient_checkpointing=options.gradient_checkpointing,
    )
    return encoder.to_compute(dtype, device)


def _refuse_length(options: PretrainOptions, longest: int) -> None:
    raise ConfigError(f"context_length is {options.context_length}, but {options.model} reads {longest} tokens")


def _width_and_heads(options: PretrainOptions) -> tuple[int, int]:
    width = options.hidden_size or 256
    heads = options.num_heads or max(2, width // 64)
    if width % heads or (options.architecture != "encoder" and (width // heads) % 2):
        raise ConfigError(
            f"hidden_size {width} over {heads} heads gives {width / heads:g} per head; it must be a whole, even number"
        )
    return width, heads


def _new_model(options: PretrainOptions, vocab_size: int, special_ids: dict[str, int]) -> CausalModel:
    checkpointing = options.gradient_checkpointing
    if options.architecture == "lstm":
        config = LSTMConfig(
            vocab_size=vocab_size,
            hidden_size=options.hidden_size or 256,
            num_hidden_layers=options.num_layers or 2,
            max_position_embeddings=max(4096, options.context_length),
            tie_word_embeddings=options.tie_word_embeddings,
            extra=special_ids,
        )
        return LSTM(config, gradient_checkpointing=checkpointing)
    width, heads = _width_and_heads(options)
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=options.intermediate_size or -(-8 * width // 48) * 16,
        num_hidden_layers=options.num_layers or 4,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=options.context_length,
        tie_word_embeddings=options.tie_word_embeddings,
        extra=special_ids,
    )
    return Decoder(decoder, gradient_checkpointing=checkpointing)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
