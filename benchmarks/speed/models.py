"""Models that the comparison needs besides the policy: a reward network with a random head, and a tiny policy.

python -m benchmarks.speed.models reward SOURCE TARGET
python -m benchmarks.speed.models tiny TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.speed import work
from upslope.models.decoder.network import Decoder, DecoderConfig
from upslope.models.files.config_json import SCORE
from upslope.models.files.loading import RewardSettings, load_model, save_reward_folder
from upslope.models.files.weights import save_folder


def reward(source: Path, target: Path) -> None:
    """The source's trunk in float32 with a scalar head drawn with seed 0."""
    model = load_model(source, dtype=torch.float32)
    width = model.spec.hidden_size
    head = torch.randn(1, width, generator=torch.Generator().manual_seed(0)) / width**0.5
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    save_reward_folder(
        model, {**tensors, SCORE: head}, target, RewardSettings(), source_folder=source, pad_token_id=None
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of the prompts."""
    words = sorted({word for text in work.prompts(4096) for word in text.split()})
    vocabulary = {word: place for place, word in enumerate(["<unk>", "<eos>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def tiny(target: Path) -> None:
    """A random decoder of two layers whose tokens are the words of the prompts: it tests the plumbing."""
    tokenizer = word_tokenizer()
    torch.manual_seed(0)
    shape = DecoderConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    tensors = {name: p.detach() for name, p in Decoder(shape).named_parameters()}
    save_folder(target, shape.to_hf(), tensors, tokenizer=tokenizer, generation_config={"eos_token_id": 1})


if __name__ == "__main__":
    {"reward": reward, "tiny": tiny}[sys.argv[1]](*map(Path, sys.argv[2:]))
