"""Three small local tasks of lm-evaluation-harness: multiple choice, perplexity of whole texts, generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tiny_model import tiny_folder

CHOICES = [
    {"question": "The sky on a clear day is", "choices": ["blue", "made of cheese", "seven"], "gold": 0},
    {"question": "Two and two make", "choices": ["five", "four", "a"], "gold": 1},
    {"question": "Snow is", "choices": ["white and cold", "hot"], "gold": 0},
    {"question": "A cat says", "choices": ["moo", "woof", "meow", "tweet"], "gold": 2},
    {"question": "", "choices": ["An empty question", "has an empty context"], "gold": 1},
    {"question": "Überall 日本 ends with a space ", "choices": ["ja", "nein"], "gold": 1},
]
TEXTS = [
    {"text": "one short text"},
    {"text": "Übung macht den Meister. 日本語も。 " * 3},
    {"text": "A text longer than the context of the model is cut into windows. " * 5},
]
OPEN = [
    {"question": "Say a word:", "answer": "word"},
    {"question": "A longer question asks for more words, does it not?", "answer": "yes"},
    {"question": "x", "answer": "y"},
]

_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: {kind}
{body}metadata:
  version: 1.0
"""
_BODIES = {
    "small_choice": (
        "multiple_choice",
        CHOICES,
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    ),
    "small_texts": (
        "loglikelihood_rolling",
        TEXTS,
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n  - metric: bits_per_byte\n",
    ),
    "small_open": (
        "generate_until",
        OPEN,
        'doc_to_text: "Q: {{question}}\\nA:"\ndoc_to_target: "{{answer}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 12}\n'
        "metric_list:\n  - metric: exact_match\n",
    ),
}


CONTEXT = 128
"""Positions of the model; the longest text has more than twice as many tokens."""


def lively_folder(path: Path) -> Path:
    """A tiny model whose weights are large enough that greedy decoding does not repeat one letter."""
    return tiny_folder(path, initializer_range=0.2, max_position_embeddings=CONTEXT)


def write_tasks(folder: Path) -> Path:
    """A folder of task files, their data beside them."""
    folder.mkdir(parents=True)
    for task, (kind, rows, body) in _BODIES.items():
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        text = _YAML.format(task=task, kind=kind, body=body, data=data, cache=folder / "cache")
        (folder / f"{task}.yaml").write_text(text, encoding="utf-8")
    return folder


def answers(results: Mapping[str, Any], task: str) -> list[Any]:
    """What the model said to every request of a task, in the order of documents and requests."""
    rows = sorted(results["samples"][task], key=lambda s: s["doc_id"])
    return [response[0] for row in rows for response in row["resps"]]
