"""What benchmarks/same_bits.py runs: tiny models and data, one case per way through the recipes, and what was renamed.

A case is one or more command lines in today's spelling. OUT is the case's own folder. What BY_VERB says stands in every
command that does not say otherwise; a `--resume` gets nothing added.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

WORDS: tuple[tuple[str, str, str], ...] = (
    # (verb, today's words, a later revision's words), used where `upslope VERB --help` lacks the last of today's words:
    # ("ppo", "--num-epochs", "--passes"), ("grpo", "--advantage dr_grpo", "--advantage centred")
)
NAMES: tuple[tuple[str, str], ...] = (
    # (pattern, replacement) for what is compared, called "FILE: NAME"; applied to both revisions; "": not compared.
    (r"token_arrays (\d+) trainer_logprobs", r"token_arrays \1 old_logprobs"),
    (r"^.*run\.db: (meta schema_version|token_columns) .*$", ""),
)

SHARED = (
    "--output-dir OUT/run --dtype float32 --learning-rate 2e-3 --max-steps 3 --eval-every 2 --save-every 1 "
    "--keep-last 9 --micro-batch-tokens 128"
)
LM = f"{SHARED} --model data/llama"
RL = (
    f"{LM} --task pairs:path=data/pairs.jsonl,unit=characters --num-train-prompts 12 --num-prompts 3 "
    "--num-generations 4 --max-completion-length 8 --eval-samples 4"
)
ENCODER = f"{SHARED} --model data/bert --batch-size 4 --max-length 24"
BY_VERB = {
    "pretrain": f"{SHARED} --data data/texts.jsonl --cache-dir OUT/cache --hidden-size 32 --num-layers 2 "
    "--context-length 24 --batch-size 4",
    "sft": f"{LM} --batch-size 4",
    "seq2seq": f"{SHARED} --data data/pairs.jsonl --batch-size 4 --max-completion-length 8",
    "reward": f"{LM} --data data/preferences.jsonl --batch-size 4",
    "dpo": f"{LM} --data data/preferences.jsonl --batch-size 4",
    "reinforce": RL,
    "ppo": f"{RL} --num-minibatches 2",
    "grpo": RL,
    "expert": f"{RL} --train-steps 2 --num-rounds 2 --batch-size 4 --threshold 0.02",
    "distill": f"{LM} --teacher data/teacher --num-prompts 4 --max-completion-length 8",
    "classify": f"{ENCODER} --data data/opinions.csv --test-data data/opinions.csv",
    "tag": f"{ENCODER} --data data/sentences.conll",
    "generate": "--dtype float32 --output OUT/replies.jsonl --max-tokens 12",
    "eval": "--dtype float32 --output OUT/figures.json --max-completion-length 8",
}

SFT = "sft --data data/pairs.jsonl"
SEQ2SEQ = "seq2seq --hidden-size 32 --num-layers 2 --num-heads 2"
KEY_DOOR = "--task key_door:steps=2,corridor=0,noise=1.0 --num-generations 8 --num-train-prompts 8"
LORA = "--lora-rank 4"
SAMPLED = "--objective policy_gradient_sampled"


def stopped(command: str) -> tuple[str, str]:
    """The run ended in the middle, and taken up."""
    verb = command.split()[0]
    return f"{command} --max-steps 2", f"{verb} --resume --output-dir OUT/run --max-steps 4"


CASES: dict[str, str | tuple[str, ...]] = {
    "pretrain": "pretrain --tokenizer bpe --vocab-size 300 --lr-scheduler-type constant --weight-decay 0.1 "
    "--num-heads 4 --intermediate-size 40 --eval-stride 7",
    "pretrain-char-untied": "pretrain --tokenizer char --no-tie-word-embeddings --label-smoothing 0.1 --warmup-steps 2",
    "pretrain-word-lstm": "pretrain --tokenizer word --architecture lstm",
    "pretrain-masked": "pretrain --tokenizer word --architecture encoder --mask-probability 0.3",
    "pretrain-on": "pretrain --model data/llama --hidden-size none --num-layers none --num-epochs 0.3 --lora-rank 4",
    "pretrain-resumed": stopped("pretrain --tokenizer char"),
    "sft": SFT,
    "sft-messages": "sft --data data/chats.jsonl --lr-scheduler-type cosine --weight-decay 0.1 --num-epochs 0.5 "
    "--max-length 100 --warmup-steps 1",
    "sft-task": "sft --task pairs:path=data/pairs.jsonl --num-examples 20 --eval-samples 4 --max-completion-length 8",
    "sft-qwen-lora-dropout": f"{SFT} --model data/qwen {LORA} --lora-dropout 0.2 --lora-target-modules all-linear",
    "sft-bfloat16": f"{SFT} --dtype bfloat16 --gradient-checkpointing",
    "sft-early": f"{SFT} --eval-every 1 --patience 1 --learning-rate 0 --seed 3",
    "sft-dft": f"{SFT} --loss dft",
    "sft-label-smoothing": f"{SFT} --label-smoothing 0.2 --max-grad-norm 0.1",
    "sft-resumed": stopped(f"{SFT} {LORA} --lora-dropout 0.2"),
    "seq2seq": f"{SEQ2SEQ} --tokenizer word --beam-width 2 --num-epochs 0.3 --weight-decay 0.1",
    "seq2seq-resumed": stopped(SEQ2SEQ),
    "seq2seq-separate": f"{SEQ2SEQ} --no-shared-vocabulary --label-smoothing 0.1 --dropout 0",
    "seq2seq-minimum-risk": (
        f"{SEQ2SEQ} --norm pre --vocab-size 300 --output-dir OUT/start",
        "seq2seq --model OUT/start/checkpoints/last/model --objective minimum_risk "
        "--reward edit_similarity:unit=characters --num-samples 4 --alpha 0.5 --no-include-reference",
    ),
    "reward": "reward --centering 0.01 --margin 0.2",
    "reward-process-lora": f"reward --kind process --data data/steps.jsonl --aggregate prod {LORA} --lora-alpha 3",
    "reward-resumed": stopped("reward"),
    "dpo": "dpo --label-smoothing 0.1 --sft-coef 0.5",
    "dpo-lora-dropout": f"dpo {LORA} --lora-dropout 0.2 --beta 0.3",
    "dpo-bfloat16": "dpo --dtype bfloat16",
    "dpo-resumed": stopped("dpo"),
    "ipo": "dpo --loss ipo",
    "kto": "dpo --loss kto --data data/labelled.jsonl --desirable-weight 1.2 --undesirable-weight 0.7",
    "orpo": "dpo --loss orpo",
    "simpo": "dpo --loss simpo --margin 1.0",
    "reinforce-none": "reinforce --baseline none --normalizer constant --temperature 0.7",
    "reinforce-moving": f"reinforce --baseline-decay 0.5 --gamma 0.9 {KEY_DOOR}",
    "reinforce-resumed": stopped("reinforce --overlong-buffer 3"),
    "reinforce-learned": f"reinforce --baseline learned --lam 0.9 --truncated bootstrap {KEY_DOOR}",
    "reinforce-learned-separate": "reinforce --baseline learned --critic separate --critic-learning-rate 1e-2",
    "reinforce-greedy": "reinforce --baseline greedy --kl-coef 0.1 --missing-eos-penalty 0.2",
    "reinforce-plus-plus": "reinforce --baseline reinforce++ --kl-coef 0.1 --kl-target 0.5 --kl-horizon 100",
    "reinforce-top-k": "reinforce --top-k 20 --rollout-correction token --entropy-coef 0.01",
    "reinforce-lag-sequence": "reinforce --rollout-lag 1 --rollout-correction sequence --rollout-correction-cap 1.5",
    "reinforce-lora-bfloat16": f"reinforce {LORA} --dtype bfloat16",
    "ppo": "ppo",
    "ppo-separate-critic": "ppo --critic separate --critic-learning-rate 1e-2 --gamma 0.9 --lam 0.8",
    "ppo-kl-reward-adaptive": "ppo --kl-coef 0.2 --kl-target 0.5 --kl-horizon 100",
    "ppo-kl-loss": "ppo --kl-coef 0.2 --kl-placement loss --rollout-kl-coef 0.1 --entropy-coef 0.01 "
    "--weight-decay 0.1 --warmup-steps 2",
    "ppo-clips": "ppo --num-epochs 4 --learning-rate 3e-2 --epsilon 0.1 --epsilon-high 0.3 --dual-clip 1.5 "
    "--value-clip 0.1 --vf-coef 0.5 --no-whiten-advantages",
    "ppo-target-kl": "ppo --num-epochs 4 --learning-rate 3e-2 --target-kl 0.01",
    "ppo-value-pretraining": "ppo --value-pretraining-steps 1 --critic separate",
    "ppo-vtrace-lag": "ppo --advantage vtrace --rollout-lag 1 --rho-clip 0.9 --c-clip 0.8",
    "ppo-bootstrap": "ppo --truncated bootstrap --missing-eos-penalty 0.5 --temperature 0.8",
    "ppo-mask": "ppo --truncated mask --overlong-buffer 4",
    "ppo-lora": f"ppo {LORA} --kl-coef 0.1 --micro-batch-tokens 2048",
    "ppo-lora-separate": f"ppo {LORA} --critic separate --lora-alpha 3 --lora-target-modules q_proj v_proj",
    "ppo-bfloat16": "ppo --dtype bfloat16 --kl-coef 0.1",
    "ppo-process-rewards": f"ppo {KEY_DOOR}",
    "ppo-top-p": "ppo --top-p 0.9 --min-p 0.01 --rollout-correction geometric",
    "ppo-no-activations": "ppo --activations-gb 0 --gradient-checkpointing",
    "ppo-qwen": "ppo --model data/qwen",
    "ppo-lstm": (
        "pretrain --tokenizer char --architecture lstm --output-dir OUT/start",
        "ppo --model OUT/start/checkpoints/last/model --critic separate",
    ),
    "ppo-reward-model": (
        "reward --output-dir OUT/start",
        "ppo --reward reward_model:path=OUT/start/checkpoints/last/model@0.5 --reward task "
        "--critic OUT/start/checkpoints/last/model",
    ),
    "ppo-resumed": stopped("ppo --kl-coef 0.1 --kl-target 0.5 --kl-horizon 100 --critic separate"),
    "ppo-lag-resumed": stopped("ppo --rollout-lag 1"),
    "grpo": "grpo --epsilon-high 0.28 --num-iterations 2",
    "grpo-dr-grpo": "grpo --advantage dr_grpo --normalizer constant",
    "grpo-rloo": "grpo --advantage rloo --normalizer sequence --num-minibatches 2",
    "grpo-reinforce-plus-plus": "grpo --advantage reinforce++ --beta 0.1",
    "grpo-gspo": "grpo --loss gspo --epsilon 3e-2 --epsilon-high 4e-2 --num-minibatches 2 --activations-gb 0",
    "grpo-cispo": "grpo --loss cispo --epsilon-high 0.3 --num-iterations 2",
    "grpo-sapo": "grpo --loss sapo --num-iterations 2 --tau-positive 0.8 --tau-negative 1.5",
    "grpo-sapo-token": "grpo --loss sapo --normalizer token --num-minibatches 3",
    "grpo-dynamic": "grpo --dynamic-sampling --truncated mask --overlong-buffer 4 --num-generations 6",
    "grpo-lag": "grpo --rollout-lag 2 --max-steps 4",
    "grpo-lag-uncorrected": "grpo --rollout-lag 1 --rollout-correction none --eval-temperature 0.5 --seed 3",
    "grpo-lora": f"grpo {LORA} --beta 0.1 --entropy-coef 0.01",
    "grpo-bfloat16": "grpo --dtype bfloat16 --num-iterations 2",
    "grpo-filters": "grpo --top-k 50 --top-p 0.95 --min-p 0.01 --rollout-correction sequence "
    "--rollout-correction-cap 1.2 --missing-eos-penalty 0.2",
    "grpo-rewards": "grpo --reward data/rewards.py:vowels --reward length:target=5,unit=characters@0.5 "
    "--reward-workers 1",
    "grpo-resumed": stopped("grpo --rollout-lag 1 --beta 0.1"),
    "expert": "expert",
    "expert-best-restart": "expert --keep best --restart --no-dedupe --max-per-prompt 2 --temperature 0.8",
    "expert-top-mixed": "expert --keep top --keep-share 0.5 --mix-data data/pairs.jsonl --mix-ratio 0.5 "
    f"--normalizer sample --top-k 50 {LORA} --lora-dropout 0.1",
    "expert-from-run": ("grpo --output-dir OUT/start", "expert --from-run OUT/start --truncated terminate"),
    "expert-resumed": ("expert --max-steps 1 --num-rounds none", "expert --resume --output-dir OUT/run --max-steps 4"),
    "distill": "distill --data data/pairs.jsonl --num-generations 2 --eval-samples 4",
    "distill-forward": "distill --data data/pairs.jsonl --divergence forward --on-policy-fraction 0.5",
    "distill-jsd": "distill --task pairs:path=data/pairs.jsonl --divergence jsd --jsd-weight 0.3 --temperature 0.8 "
    "--num-train-prompts 12 --eval-samples 4",
    "distill-off-policy": f"distill --data data/pairs.jsonl --on-policy-fraction 0 {LORA} --lora-dropout 0.2",
    "distill-resumed": stopped("distill --data data/pairs.jsonl"),
    "classify": "classify --label-smoothing 0.1 --head-lr-factor 2",
    "classify-roberta-pair": "classify --model data/roberta --pair-column second --num-epochs 0.5",
    "classify-policy-gradient": "classify --objective policy_gradient --rewards data/label_rewards.json",
    "classify-sampled": f"classify {SAMPLED} --num-samples 3 --gradient-checkpointing --weight-decay 0",
    "classify-sampled-mean": f"classify {SAMPLED} --baseline mean --dtype bfloat16",
    "classify-sampled-none": f"classify {SAMPLED} --baseline none --num-samples 1",
    "classify-lora": f"classify {LORA} --lora-dropout 0.2 --eval-share 0.3 --eval-samples 5",
    "classify-numbers": "classify --objective squared_error --data data/numbers.csv --test-data none",
    "classify-resumed": stopped(f"classify {SAMPLED}"),
    "tag": "tag --label-smoothing 0.1 --test-data data/sentences.conll",
    "tag-policy-gradient": "tag --objective policy_gradient",
    "tag-sampled-iob1": f"tag {SAMPLED} --baseline mean --head-lr-factor 2 {LORA} --tag-scheme iob1 "
    "--data data/iob1.conll",
    "tag-resumed": stopped("tag"),
    "generate": "generate data/llama --prompts data/pairs.jsonl --num-return-sequences 2 --logprobs 2 --top-p 0.9 "
    "--repetition-penalty 1.2 --stop ab",
    "generate-beams": "generate data/qwen --prompts data/pairs.jsonl --num-beams 3 --num-return-sequences 2 "
    "--length-penalty 0.5",
    "eval": "eval data/llama data/teacher --perplexity data/texts.jsonl --data data/pairs.jsonl --metrics chrf cer "
    "--task pairs:path=data/pairs.jsonl,unit=characters --num-generations 2 --limit 4 --context 64 --stride 32",
    "eval-reward-model": (
        "reward --output-dir OUT/start",
        "eval OUT/start/checkpoints/last/model --preferences data/preferences.jsonl",
    ),
}

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_data(folder: Path) -> None:
    """Write every model and file that a case names into `folder`, the same bytes each time."""
    write_rows(folder)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    byte, pieces = byte_tokenizer(), word_tokenizer()
    for name, family, seed in (("llama", "Llama", 0), ("teacher", "Llama", 1), ("qwen", "Qwen3", 2)):
        decoder(folder / name, family, seed, byte)
    encoder(folder / "bert", "Bert", 3, pieces)
    encoder(folder / "roberta", "Roberta", 4, pieces)


def write_rows(folder: Path) -> None:
    """Data for every verb, and a reward function."""
    draw = random.Random(0)

    def word(letters: str = "abcdefgh") -> str:
        return "".join(draw.choices(letters, k=draw.randint(2, 6)))

    def text(count: int) -> str:
        return " ".join(word() for _ in range(count))

    def lines(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def table(name: str, rows: list[tuple[Any, ...]]) -> None:
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)

    asked = [f"say {text(draw.randint(1, 3))}" for _ in range(40)]
    lines("texts.jsonl", [{"text": "\n".join(text(6) for _ in range(3))} for _ in range(40)])
    lines("pairs.jsonl", [{"prompt": p, "completion": p[4:][::-1]} for p in asked])
    turns = [[("user", p), ("assistant", word()), ("user", word()), ("assistant", word())] for p in asked]
    lines("chats.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turn]} for turn in turns])
    lines("preferences.jsonl", [{"prompt": p, "chosen": word("abc"), "rejected": word("fgh")} for p in asked])
    lines("labelled.jsonl", [{"prompt": p, "completion": word(), "label": i % 3 > 0} for i, p in enumerate(asked)])
    labels = [[draw.randint(0, 1) for _ in range(draw.randint(1, 4))] for _ in asked]
    steps = [[word("abc" if good else "fgh") for good in row] for row in labels]
    lines("steps.jsonl", [{"prompt": p, "steps": s, "labels": c} for p, s, c in zip(asked, steps, labels, strict=True)])
    said = [(f"the film was {x} {word()}", f"we saw {word()}", x) for x in draw.choices(["good", "bad", "in"], k=40)]
    table("opinions.csv", [("text", "second", "label"), *said])
    table("numbers.csv", [("text", "label"), *((t, f"{draw.random():.3f}") for t, _, _ in said)])
    rows = [[(word(), draw.choice(["O", "O", "I-PER", "I-LOC"])) for _ in range(draw.randint(2, 9))] for _ in range(40)]
    began = [[(w, t if t == "O" else f"B{t[1:]}") for w, t in row] for row in rows]
    for name, sentences in (("iob1.conll", rows), ("sentences.conll", began)):
        (folder / name).write_text("\n\n".join("\n".join(f"{w} {t}" for w, t in r) for r in sentences) + "\n")
    (folder / "label_rewards.json").write_text(json.dumps({"good": {"good": 1, "bad": -1}, "bad": {"in": 0.5}}))
    (folder / "rewards.py").write_text(
        "def vowels(prompts, completions):\n    return [sum(x in 'aeiou' for x in c) / 8 for c in completions]\n"
    )


def byte_tokenizer() -> Any:
    """One token per byte, and the two ChatML marks, of which 1 ends a turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<|im_start|>", "<|im_end|>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    marks = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHATML, **marks)


def word_tokenizer() -> Any:
    """WordPiece with a few whole words; other words fall into letters."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz"
    names = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    pieces = [*names.values(), *letters, *(f"##{x}" for x in letters), "the", "film", "was", "good", "bad", "saw"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=marks
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def decoder(folder: Path, family: str, seed: int, tokenizer: Any) -> None:
    """Random weights whose first replies are the letters a to h and the end of the turn, mostly."""
    import torch
    import transformers

    torch.manual_seed(seed)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    config = getattr(transformers, f"{family}Config")(
        **shape, initializer_range=0.2, tie_word_embeddings=False, eos_token_id=1, bos_token_id=None, pad_token_id=1
    )
    network = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():  # the first feature is the same everywhere: the head's weights for it are a bias
        for name, weight in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[0] = 0
        network.get_input_embeddings().weight[:, 0] = 2.0
        network.lm_head.weight[[1, *tokenizer.convert_tokens_to_ids(list("abcdefgh"))], 0] = 7.0
    save(network, folder, tokenizer)


def encoder(folder: Path, family: str, seed: int, tokenizer: Any) -> None:
    """Random weights with a head on masked words."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    save(getattr(transformers, f"{family}ForMaskedLM")(config), folder, tokenizer)


def save(network: Any, folder: Path, tokenizer: Any) -> None:
    """As a Hugging Face folder in float32."""
    network.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
