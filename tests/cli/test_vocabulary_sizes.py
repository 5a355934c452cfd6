"""Models whose embedding has more rows than the tokenizer has tokens, or fewer: no row without a token is sampled."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage_kit import in_folder, inputs, refusal
from encoder_kit import encoder_folder
from safetensors.torch import load_file, save_file
from tiny_model import tiny_config, tiny_folder, tiny_tokenizer
from tiny_seq2seq import trainer_logprobs
from transformers import AutoConfig, AutoModelForCausalLM

from upslope.build import load_inference, load_policy, make_engine
from upslope.cli import main
from upslope.models.files.weights import read_shapes, save_folder
from upslope.models.lstm import LSTM, LSTMConfig
from upslope.options import PPOOptions
from upslope.runs.store import Store
from upslope.types import SamplingParams

TOKENS, ROWS = 258, 266
KINDS = ("decoder", "tied", "lstm", "adapter", "adapter with a bias")
RL = ["--task", "letter.py:Letter", "--max-steps", "2", "--num-prompts", "4", "--num-generations", "4"]
RL += ["--max-completion-length", "8", "--num-train-prompts", "8", "--eval-samples", "0", "--dtype", "float32"]


def padded(path: Path, kind: str = "decoder") -> Path:
    """A model with 8 rows behind its tokenizer's last token, one of which would always be the likeliest."""
    torch.manual_seed(0)
    if kind in ("decoder", "tied"):
        tiny_folder(path, vocab_size=ROWS, tie_word_embeddings=kind == "tied")
    elif kind == "lstm":
        model = LSTM(LSTMConfig(vocab_size=ROWS, hidden_size=32, num_hidden_layers=1, tie_word_embeddings=False))
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        ends = {"eos_token_id": 1}
        save_folder(path, model.config.to_hf(), tensors, tokenizer=tiny_tokenizer(), generation_config=ends)
    else:
        shape = {"vocab_size": ROWS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"intermediate_size": 48, "max_position_embeddings": 128, "eos_token_id": 1}
        config = AutoConfig.for_model("phi" if kind.endswith("bias") else "gpt_neox", **shape)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
    state = load_file(path / "model.safetensors")
    heads = ("lm_head.weight", "embed_out.weight", "model.embed_tokens.weight")
    head = next(name for name in heads if name in state)
    strong = 3 * torch.randn(4, 32)
    state[head][TOKENS:] = torch.cat([strong, -strong])
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder with a task and rows, to work in."""
    patch = in_folder(tmp_path)
    inputs(tmp_path)
    yield tmp_path
    patch.undo()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_token_are_never_sampled_and_sampler_and_trainer_agree(tmp_path: Path, kind: str) -> None:
    policy = load_inference(padded(tmp_path / "m", kind), dtype="float32")
    assert policy.model.spec.vocab_size == TOKENS
    assert len(policy.model.output_weight) == ROWS
    engine = make_engine(policy, sequences=16, longest=40)
    prompts = [[5, 6, 7], [9] * 6]
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_k": 5}, {"temperature": 2.0}, {"beam_width": 3}]
    for way in ways:
        n = 8 if way.get("temperature", 1.0) and "beam_width" not in way else 1
        shown = None if "beam_width" in way else 4
        params = SamplingParams(n=n, max_tokens=16, ignore_eos=True, logprobs=shown, **way)
        groups = engine.generate(prompts, params)
        for prompt, group in zip(prompts, groups, strict=True):
            for completion in group:
                assert max(completion.tokens) < TOKENS
                assert all(token < TOKENS for top in completion.top_logprobs or () for token in top)
                pairs = [(prompt, completion.tokens)]
                scored = trainer_logprobs(policy.model, pairs, temperature=way.get("temperature") or 1.0)[0]
                if policy.model.exact:
                    assert scored == completion.policy_logprobs
                assert scored == pytest.approx(completion.policy_logprobs, abs=1e-4)
    every = engine.generate([[5]], SamplingParams(max_tokens=1, logprobs=TOKENS))[0][0].top_logprobs
    assert every is not None
    assert sum(math.exp(logp) for logp in every[0].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_grpo_never_samples_them_and_saves_every_row(
    work: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    padded(work / "m")
    assert main(["grpo", "--model", "m", *RL, "--dtype", dtype, "--output-dir", "run"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "8 of the 266 rows of its head" in line]
    assert len(said) == 1
    metrics = [
        json.loads(line) for line in (work / "run/metrics.jsonl").read_text().splitlines() if '"eval/' not in line
    ]
    assert [line["rollout/max_logprob_diff"] for line in metrics if "rollout/max_logprob_diff" in line] == [0, 0]
    store = Store(work / "run/run.db", read_only=True)
    rollouts = [store.rollout(each.id) for each in store.rollouts()]
    assert len(rollouts) == 32
    assert max(int(token) for each in rollouts for token in each.arrays["tokens"]) < TOKENS
    saved = work / "run/checkpoints/last/model"
    assert read_shapes(saved) == read_shapes(work / "m")
    before, after = (load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (work / "m", saved))
    assert not torch.equal(before[:TOKENS], after[:TOKENS])
    assert AutoModelForCausalLM.from_pretrained(saved).config.vocab_size == ROWS


def test_the_commands_take_them(work: Path) -> None:
    padded(work / "m")
    assert (
        main(["generate", "--model", "m", "--prompts", "rows.jsonl", "--output", "out.jsonl", "--dtype", "float32"])
        == 0
    )
    replies = [json.loads(line) for line in (work / "out.jsonl").read_text().splitlines()]
    assert len(replies) == 12
    assert main(["sft", "--model", "m", "--data", "rows.jsonl", "--max-steps", "1", "--lora-rank", "2"]) == 0
    for more in (["--critic", "separate"], ["--kl-coef", "0.1"], ["--dry-run"]):
        assert main(["ppo", "--model", "m", *RL, *more]) == 0
    assert main(["export", "m", "--output", "out", "--dtype", "float32", "--verify"]) == 0
    assert read_shapes(work / "out") == read_shapes(work / "m")


def test_a_teacher_may_have_another_number_of_rows(work: Path) -> None:
    """Qwen2.5's sizes share a tokenizer and have 151,936 and 152,064 rows."""
    padded(work / "m")
    tiny_folder(work / "student")
    common = ["--data", "rows.jsonl", "--on-policy-fraction", "0", "--max-steps", "1", "--dtype", "float32"]
    assert main(["distill", "--model", "student", "--teacher", "m", *common]) == 0


SHORT = [
    ["sft", "--data", "rows.jsonl", "--model", "short"],
    ["sft", "--data", "rows.jsonl", "--model", "short", "--dry-run"],
    ["grpo", "--model", "short", *RL],
    ["ppo", "--model", "start", "--reward", "fluency:path=short", *RL],
    ["generate", "--prompt", "hello", "--model", "short"],
    ["serve", "short", "--port", "0"],
    ["eval", "short", "--perplexity", "text.txt"],
    ["export", "short", "--output", "out", "--verify"],
    ["export", "short", "--output", "out.gguf", "--format", "gguf"],
    ["classify", "--model", "bert", "--data", "labels.csv", "--eval-data", "labels.csv", "--max-length", "32"],
    ["export", "bert", "--output", "out"],
]


@pytest.mark.parametrize("command", SHORT)
def test_too_few_rows_are_one_line_everywhere(
    work: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    tiny_folder(work / "start")
    tiny_folder(work / "short")
    encoder_folder(work / "bert")
    for name in ("short", "bert"):
        tokenizer = json.loads((work / name / "tokenizer.json").read_text())
        ids = [*tokenizer["model"]["vocab"].values(), *(each["id"] for each in tokenizer["added_tokens"])]
        new = {"id": 1 + max(ids), "content": "<new>", "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"].append({**new, **flags})
        (work / name / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refusal(capsys, 4, *command)
    assert "the tokenizer has ids up to " in line
    assert "tokens; take the tokenizer that belongs to the model" in line
    assert not (work / "out").exists()


def test_a_policy_whose_rows_are_its_tokens_is_as_it_was(tmp_path: Path) -> None:
    """No view, no copy: the head is the parameter itself."""
    tiny_folder(tmp_path / "m")
    policy = load_policy(PPOOptions(model=str(tmp_path / "m"), task="x", dtype="float32"))
    assert policy.model.head_weight is policy.model.output_weight
    assert policy.model.spec.vocab_size == tiny_config().vocab_size
