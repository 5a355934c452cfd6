"""An export compared with the model it came from, by the program it is for: transformers, or llama.cpp.

The model it came from stands here with the weights that were written (cast, or in blocks of 8 bits) and computes in
float32, so what is left is how the other program computes, and every mistake of the export: a wrong name, a wrong
order of rows, a wrong tokenizer. The bounds lie several times above what correct exports of small models showed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from upslope.build import Policy
from upslope.commands.llama_cpp import LlamaCpp
from upslope.data.chat import load_tokenizer
from upslope.data.pieces import PairTokenizer
from upslope.errors import ModelError, RunError
from upslope.models.attention.context import PackedContext
from upslope.models.files.config_json import architecture, quiet
from upslope.models.files.folders import read_config
from upslope.models.files.gguf import read_ends
from upslope.models.files.gguf_writer import GGUFType, as_stored
from upslope.models.files.loading import load_model
from upslope.models.lstm import MODEL_TYPE as LSTM_TYPE
from upslope.models.seq2seq.layers import is_seq2seq

PROMPTS = (
    "The capital of France is Paris, and 12345 + 678 = 13023.",
    "def f(x):\n\treturn [x ** 2 for _ in range(3)]  # it's\r\n\n",
    "Zoë naïvely paid 20 € in Łódź;\u3000我想在apple工作1314151天。 हिन्दी 🚀😶\u200d🌫️  ",
)
MESSAGES = (
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "And in words?"},
)
_LONGEST, _GENERATED, _TOP = 48, 16, 20

# (largest, mean) difference of log-probs in nats. In narrow types both programs round activations too, which says
# nothing about the weights: those are what the float32 comparison and llama.cpp's bounds are sharp enough for.
_BOUNDS: dict[str, tuple[float, float]] = {
    "transformers, float32": (2e-3, 2e-4),
    "transformers, bfloat16": (3.0, 0.3),
    "transformers, float16": (0.5, 0.05),
    "llama.cpp, float32": (5e-3, 1e-3),
    "llama.cpp, float16": (0.15, 0.02),
    "llama.cpp, bfloat16": (1.0, 0.15),
    "llama.cpp, q8_0": (3.0, 0.5),
}


@dataclass(frozen=True, slots=True)
class Gap:
    """Differences over n values, and what else was compared.

    Values: log-probs of the likeliest tokens at each position of some texts; of a network of another kind, its outputs.
    """

    name: str
    largest: float
    mean: float
    n: int
    largest_allowed: float
    mean_allowed: float
    also: str = ""

    def in_words(self) -> str:
        """One line."""
        words = f"{self.name}: largest difference {self.largest:.2g} (allowed {self.largest_allowed:g})"
        words += f", mean {self.mean:.2g} (allowed {self.mean_allowed:g}), {self.n:,} values"
        return f"{words}; {self.also}" if self.also else words

    def check(self) -> Gap:
        """Itself. RunError where a bound is passed (or the difference is no number)."""
        if self.largest <= self.largest_allowed and self.mean <= self.mean_allowed:
            return self
        raise RunError(f"the export differs from the model, so nothing was written: {self.in_words()}")


def is_classifier(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a network with a head of its own (a reward model), which ends no turn."""
    return architecture(config).endswith("Classification")


def verify_folder(written: Path, source: Path, policy: Policy | None, dtype: str) -> list[Gap]:
    """Load a written folder with transformers, its weights in float32 and as they are, and compare.

    policy: the model it came from, whose weights are rounded in place; None for an encoder, which transformers runs.
    Tokens of texts, the rendering of a chat and the ends of a turn are compared too. RunError for any difference beyond
    rounding.
    """
    _same_tokenizer(load_tokenizer(source) if policy is None else policy.tokenizer, load_tokenizer(written))
    config = read_config(written)
    if policy is not None:
        _round(policy.model, lambda p: p.to(getattr(torch, dtype)))
        if not is_classifier(config):
            _same_ends(policy, written)
    if policy is None or is_seq2seq(config) or is_classifier(config):
        return [_same_network(written, source, dtype)]
    tokens = _token_lists(policy, room=_GENERATED)
    ours = [_logprobs(policy.model, ids) for ids in tokens]
    if config.get("model_type") == LSTM_TYPE:
        theirs = [_logprobs(load_model(written), ids) for ids in tokens]
        return [_gap("upslope itself, which alone has this network, float32", ours, theirs, (0.0, 0.0))]
    likely = [x.topk(min(_TOP, x.shape[-1])) for x in ours]
    gaps = []
    for kind in dict.fromkeys(("float32", dtype)):
        network = _transformers(written, getattr(torch, kind))
        with torch.no_grad():
            theirs = [network(torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in tokens]
        for token in policy.eos_token_ids if not gaps else ():
            if not _stops(network, tokens[0], token):
                raise RunError(f"transformers does not stop at token {token}, which ends a turn of this model")
        name = f"transformers, {kind}"
        shown = name if kind == dtype else f"{name} from {dtype}"
        found = [x.gather(1, top.indices) for x, top in zip(theirs, likely, strict=True)]
        gaps.append(_gap(shown, [top.values for top in likely], found, _BOUNDS[name]))
    return gaps


def verify_gguf(written: Path, policy: Policy, kind: GGUFType) -> list[Gap]:
    """Load a GGUF file in llama.cpp; compare tokens, chat rendering, ends, log-probs and greedy tokens.

    The policy's weights are set to what the file holds. RunError for any difference beyond rounding.
    """
    _round(policy.model, lambda p: as_stored(p, kind))
    context = min(_LONGEST + _GENERATED, policy.model.spec.max_positions)
    with LlamaCpp(written, context=context, threads=torch.get_num_threads()) as program:
        _same_tokens(policy, program)
        chat = _same_chat(policy, program)
        by_name = _llama_cpp_ends(policy, program, written)
        differences, agreed, total = [], 0, 0
        for ids in _token_lists(policy, room=_GENERATED + 1):  # llama.cpp refuses a prompt that fills its context
            found = list(program.predictions(ids, top=_TOP, then=_GENERATED))
            for ours_V, (_, top) in zip(_logprobs(policy.model, found[-1][0]), found, strict=True):
                differences.append((ours_V[[t for t, _ in top]] - torch.tensor([x for _, x in top])).abs())
                agreed += int(ours_V.argmax()) == top[0][0]
            total += len(found)
    name, template = f"llama.cpp, {kind}", "chat template, " if chat else ""
    also = f"the same greedy token at {agreed} of {total} positions; tokens of {len(PROMPTS)} texts, {template}"
    also += f"{len(policy.eos_token_ids)} end tokens the same{by_name}"
    return [_checked(name, differences, _BOUNDS[name], also)]


@torch.no_grad()
def _round(model: Any, rounded: Any) -> None:
    for parameter in model.parameters():
        parameter.copy_(rounded(parameter.detach()))


@torch.no_grad()
def _logprobs(model: Any, tokens: Sequence[int]) -> Tensor:
    """Log-probs [T, V] after each token, float32."""
    hidden = model(torch.tensor(tokens, device=model.device), PackedContext([len(tokens)], device=model.device))
    return model.logits(hidden).float().log_softmax(-1).cpu()


def _token_lists(policy: Policy, *, room: int) -> list[list[int]]:
    """The prompts, and the chat where there is a template, cut so that the model holds `room` tokens more."""
    tokenizer, longest = policy.tokenizer, min(_LONGEST, policy.model.spec.max_positions - room)
    if longest < 1:
        raise ModelError(f"the model holds {policy.model.spec.max_positions} tokens, too few to compare anything")
    texts = [tokenizer(text).input_ids for text in PROMPTS]
    if tokenizer.chat_template:
        texts.append(tokenizer(_chat(tokenizer), add_special_tokens=False).input_ids)
    return [ids[:longest] for ids in texts]


def _chat(tokenizer: Any) -> str:
    return tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)


def _same_tokenizer(ours: Any, theirs: Any) -> None:
    for text in PROMPTS:
        if _ids(ours, text) != _ids(theirs, text):
            raise RunError(f"the written tokenizer splits {text!r} differently, so nothing was written")
    if (getattr(ours, "chat_template", None) or None) != (getattr(theirs, "chat_template", None) or None):
        raise RunError("the written chat template differs, so nothing was written")
    if getattr(ours, "chat_template", None) and _chat(ours) != _chat(theirs):
        raise RunError("the written chat template renders a chat differently, so nothing was written")


def _ids(tokenizer: Any, text: str) -> list[int]:
    if isinstance(tokenizer, PairTokenizer):
        return [*tokenizer.source_ids(text), *tokenizer.target_ids(text)]
    return tokenizer(text).input_ids


def _same_tokens(policy: Policy, program: LlamaCpp) -> None:
    for text in PROMPTS:
        ours, theirs = policy.tokenizer(text).input_ids, program.tokenize(text)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            raise RunError(
                f"llama.cpp splits {text!r} differently from token {at} on ({ours[at : at + 4]} here, "
                f"{theirs[at : at + 4]} there), so nothing was written; is --pre-tokenizer right?"
            )


def _same_chat(policy: Policy, program: LlamaCpp) -> bool:
    """False where there is no template to compare."""
    if not policy.tokenizer.chat_template:
        return False
    ours, theirs = _chat(policy.tokenizer), program.render(MESSAGES)
    bos = policy.tokenizer.bos_token or ""
    if theirs not in (ours, ours.removeprefix(bos)):  # llama.cpp leaves a BOS to its tokenizer
        raise RunError(f"llama.cpp renders a chat as {theirs!r} instead of {ours!r}, so nothing was written")
    return True


def _same_ends(policy: Policy, written: Path) -> None:
    """Refuse a folder that transformers reads as ending a turn at other tokens."""
    from transformers import GenerationConfig

    said = GenerationConfig.from_pretrained(written).eos_token_id
    theirs = set() if said is None else {said} if isinstance(said, int) else set(said)
    if theirs != set(policy.eos_token_ids):
        raise RunError(
            f"transformers would stop at tokens {sorted(theirs)}, but a turn of this model ends at "
            f"{sorted(policy.eos_token_ids)}, so nothing was written"
        )


def _stops(network: Any, prompt: Sequence[int], token: int) -> bool:
    """Whether transformers' generation stops after `token`, which is forced."""

    def force(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor(token), 0.0)

    ids = torch.tensor([list(prompt)])
    made = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False, pad_token_id=0,
        logits_processor=[force],
    )  # fmt: skip
    return made.shape[1] == len(prompt) + 1


def _llama_cpp_ends(policy: Policy, program: LlamaCpp, written: Path) -> str:
    """Refuse a file whose ends are not the model's; words about what llama.cpp takes for an end by its name alone."""
    ours, theirs = set(policy.eos_token_ids), program.ends()
    for token in sorted(ours):
        if token not in theirs or not program.ends_with(token):
            raise RunError(f"llama.cpp does not stop at token {token}, which ends a turn of this model")
    if wrong := sorted(set(read_ends(written)) - ours):
        raise RunError(f"llama.cpp would stop at token {wrong[0]}, which ends no turn of this model")
    names = [policy.tokenizer.convert_ids_to_tokens(token) for token in sorted(theirs - ours)]
    return f"; llama.cpp also stops at {', '.join(names)}, which it knows by name" if names else ""


def _transformers(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' network of a folder, of the class that its config.json names; no weight may be missing."""
    import transformers

    name = architecture(read_config(folder))
    if (kind := getattr(transformers, name, None)) is None:
        raise ModelError(f"{folder}: transformers has no {name}, so there is nothing to compare with")
    with quiet():
        network, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, use_safetensors=True)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(key):
            raise RunError(f"transformers finds {key.replace('_', ' ')}: {sorted(map(str, report[key]))[0]}")
    return network.eval()


@torch.no_grad()
def _same_network(written: Path, source: Path, dtype: str) -> Gap:
    """Both folders in transformers, the source's weights rounded: the outputs must be the same bits."""
    ours, theirs = _transformers(source, torch.float32), _transformers(written, torch.float32)
    _round(ours, lambda p: p.to(getattr(torch, dtype)))
    for parameter in [*ours.parameters(), *theirs.parameters()]:
        parameter.data = parameter.data.clone()  # out of the files: a row's product can depend on where its weight lies
    config, generator = ours.config, torch.Generator().manual_seed(0)
    batch = {"input_ids": torch.randint(config.vocab_size, (1, 24), generator=generator)}
    if config.is_encoder_decoder:
        targets = getattr(config, "decoder_vocab_size", None) or config.vocab_size
        batch["decoder_input_ids"] = torch.randint(targets, (1, 8), generator=generator)
    if config.pad_token_id is not None:  # padding in the middle of a text would mean something else to each class
        batch = {key: x.where(x != config.pad_token_id, x.max()) for key, x in batch.items()}
    name = f"transformers, float32 from {dtype}"
    return _gap(name, [ours(**batch)[0]], [theirs(**batch)[0]], (0.0, 0.0))  # logits, or a trunk's hidden states


def _gap(name: str, ours: list[Tensor], theirs: list[Tensor], allowed: tuple[float, float]) -> Gap:
    differences = [(a - b).abs().flatten() for a, b in zip(ours, theirs, strict=True)]
    return _checked(name, differences, allowed, "tokens and chat template the same")


def _checked(name: str, differences: list[Tensor], allowed: tuple[float, float], also: str) -> Gap:
    gap = torch.cat(differences).double()
    return Gap(name, float(gap.max()), float(gap.mean()), len(gap), *allowed, also=also).check()
