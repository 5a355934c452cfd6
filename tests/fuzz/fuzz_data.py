"""Families of damaged data: what the recipes, the tasks and eval read."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fuzz_kit import HOSTILE, Family, damaged, damaged_json
from tiny_model import tiny_tokenizer

from upslope.commands.generate_rows import ask_file
from upslope.config import load as load_config
from upslope.data.corpus import corpus_files, texts_of
from upslope.data.examples import examples_of, judged_of, pairs_of, solutions_of
from upslope.data.glue import labelled, read_items
from upslope.data.labels import labels_of, read_conll, read_labelled, read_rewards
from upslope.data.records import read_records
from upslope.errors import DataError
from upslope.evaluation.perplexity import read_documents
from upslope.evaluation.rescore import read_nbest
from upslope.evaluation.samples import read_hypotheses, read_samples
from upslope.options import GRPOOptions, PPOOptions, SFTOptions
from upslope.plugins import parse_spec
from upslope.rewards.summands import parse_rewards
from upslope.tasks.pairs import read_pairs

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    {"role": "assistant", "content": "Hello", "weight": 1},
]
TOOLED = [*CHAT, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2", "tool_call_id": "c1"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"The film was good {i}", "label": "up" if i % 2 else "down", "n": i} for i in range(6)],
    "messages": [{"messages": CHAT}, {"messages": TOOLED, "tools": [TOOL]}, {"messages": CHAT, "source": "x"}],
    "completion": [{"prompt": f"Say {i}", "completion": "aaa", "answer": i} for i in range(5)],
    "preference": [{"prompt": f"Say {i}", "chosen": "aaa", "rejected": "b", "margin": 0.5} for i in range(5)],
    "chats": [{"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": "b"} for _ in range(3)],
    "labelled": [{"prompt": f"Say {i}", "completion": "aaa", "label": bool(i % 2)} for i in range(5)],
    "steps": [{"prompt": f"Add {i}", "steps": ["one", "two"], "labels": [1, 0.5]} for i in range(4)],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}] * 2,
    "alpaca": [{"instruction": "Say", "input": "it", "output": "done", "history": [["a", "b"]], "system": "s"}] * 2,
    "nbest": [
        {"source": "a", "reference": "b", "hypotheses": [{"text": "b", "score": -1.0}, {"text": "c", "score": 0}]}
    ],
    "samples": [{"prompt": "a", "references": ["b", "c"]}, {"prompt": "x", "references": ["y"]}],
    "pairs": [{"prompt": "ein Haus", "completion": "a house"}, {"prompt": "zwei", "completion": "two"}],
    "boolq": [{"question": "is it", "passage": "it is", "idx": i, "label": i % 2 == 0} for i in range(3)],
    "copa": [{"premise": "a", "choice1": "b", "choice2": "c", "question": "cause", "label": 0, "idx": 0}] * 2,
    "multirc": [
        {
            "idx": 0,
            "passage": {
                "text": "It is.",
                "questions": [{"question": "Is it?", "answers": [{"text": "Yes", "idx": 0, "label": 1}], "idx": 0}],
            },
        }
    ],
    "record": [
        {
            "source": "x",
            "passage": {"text": "Tom saw Ann.\n@highlight\nMet", "entities": [{"start": 0, "end": 2}]},
            "idx": 0,
            "qas": [{"query": "@placeholder saw", "answers": [{"start": 0, "end": 2, "text": "Tom"}], "idx": 0}],
        }
    ],
    "wsc": [
        {
            "text": "Mark told Pete lies about himself",
            "target": {"span1_text": "Mark", "span1_index": 0, "span2_text": "himself", "span2_index": 5},
            "idx": 0,
            "label": True,
        }
    ],
    "wic": [
        {
            "word": "place",
            "sentence1": "a place",
            "sentence2": "the place",
            "start1": 2,
            "end1": 7,
            "start2": 4,
            "end2": 9,
            "label": False,
            "idx": 0,
        }
    ],
}
GLUE = ("boolq", "copa", "multirc", "record", "wsc", "wic")
TABLES = {
    "cola": b"gj04\t1\t\tThe sailors rode the breeze.\ngj04\t0\t*\tThe weights made the rope.\n",
    "sst2": b"sentence\tlabel\nit is good\t1\nit is bad\t0\n",
    "mrpc": b"Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta b\ta c\n0\t3\t4\td e\tf g\n",
    "stsb": b"index\tgenre\tsentence1\tsentence2\tscore\n0\tx\ta b\ta c\t3.5\n1\tx\td\te\t0\n",
    "qqp": b"id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhat?\tWho?\t0\n",
}
CONLL = b"-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\nGerman JJ B-MISC\ncall NN I-MISC\n\nPeter NNP B-PER\n"


def texts_from(name: str) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS[name]).encode()


def csv_from(name: str) -> bytes:
    keys = list(ROWS[name][0])
    cells = [[str(row.get(key, "")).replace('"', "'") for key in keys] for row in ROWS[name]]
    return "\n".join([",".join(keys), *(",".join(f'"{cell}"' for cell in row) for row in cells)]).encode()


def parquet_from(rows: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def rows_damaged(rng: random.Random, content: bytes) -> bytes:
    """JSONL with damaged rows, and now and then the whole file damaged."""
    if rng.random() < 0.25:
        return damaged(rng, content, [content])
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = damaged_json(rng, lines[at]).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n" * rng.randrange(2)


def _table_damaged(rng: random.Random, name: str) -> bytes:
    """A Parquet file whose values or whose bytes are damaged."""
    rows = json.loads(json.dumps(ROWS[name]))
    for key in list(rows[0]):
        if rng.random() < 0.4:
            value = rng.choice([v for v in HOSTILE if isinstance(v, int | float | str | None) and v != 10**400])
            for row in rows:
                row[key] = value
    try:
        content = parquet_from(rows)
    except (pa.ArrowException, UnicodeEncodeError):  # what no column can hold
        content = parquet_from(ROWS["completion"])
    return damaged(rng, content) if rng.random() < 0.6 else content


def _file(rng: random.Random, folder: Path, name: str) -> Path:
    """One damaged file of rows of a kind, in one of the formats."""
    form = rng.choice(("jsonl", "jsonl", "jsonl", "csv", "json", "txt", "parquet", "jsonl.gz"))
    path = folder / f"rows.{form}"
    if form == "csv":
        content = damaged(rng, csv_from(name))
    elif form == "json":
        content = damaged_json(rng, json.dumps(ROWS[name]).encode())
    elif form == "parquet":
        content = _table_damaged(rng, name)
    else:
        content = rows_damaged(rng, texts_from(name))
    if form.endswith("gz"):
        content = gzip.compress(content) if rng.random() < 0.5 else damaged(rng, gzip.compress(texts_from(name)))
    path.write_bytes(content)
    return path


def read_rows(tokenizer: Any, rng: random.Random, folder: Path) -> None:
    """Records and the examples made of them, supervised and of preferences."""
    kinds = ("text", "messages", "completion", "preference", "chats", "labelled", "steps", "sharegpt", "alpaca")
    records = read_records(_file(rng, folder, rng.choice(kinds)))
    made: Callable[..., Any] = {
        "preference": pairs_of,
        "labelled": judged_of,
        "prompt": solutions_of,
    }.get(records[0].kind, examples_of)
    made(records, tokenizer, max_length=64)


READERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda path: labels_of(read_labelled(path), "x"),
    "nbest": lambda path: read_nbest(str(path)),
    "samples": lambda path: read_samples(str(path)),
    "pairs": lambda path: read_pairs(str(path)),
    "completion": lambda path: ask_file(str(path), templated=False, system=None),
    "messages": lambda path: ask_file(str(path), templated=True, system="Be kind."),
}


def read_other_rows(_: Any, rng: random.Random, folder: Path) -> None:
    """Labels, n-best lists, samples, comparisons, pairs, prompts."""
    name = rng.choice(list(READERS))
    READERS[name](_file(rng, folder, name))


def read_texts(_: Any, rng: random.Random, folder: Path) -> None:
    """Columns, corpora and documents."""
    way = rng.randrange(5)
    if way == 0:
        (folder / "a.conll").write_bytes(damaged(rng, CONLL, [CONLL]))
        scheme = rng.choice(("iob2", "iob1", "none"))
        labels_of(read_conll(folder / "a.conll", token_column=rng.choice((0, 1, 7)), scheme=scheme), "x")
    elif way == 1:
        (folder / "a.json").write_bytes(damaged_json(rng, b'{"up": {"down": -1, "up": 2.5}, "down": {"up": 0}}'))
        read_rewards(folder / "a.json", ["down", "up"])
    elif way == 2:
        content = rows_damaged(rng, texts_from("text"))
        (folder / rng.choice(("a.txt", "a.jsonl"))).write_bytes(content)
        for _text in texts_of(corpus_files([str(folder)])):
            pass
    elif way == 3:
        name = rng.choice(("a.txt", "a.tokens", "a.jsonl"))
        (folder / name).write_bytes(rows_damaged(rng, texts_from("text") + b"\n = Title = \n\n words here \n"))
        read_documents(str(folder / name))
    else:
        (folder / "a.txt").write_bytes(damaged(rng, b"one\ntwo\n\nthree\n"))
        read_hypotheses(str(folder / "a.txt"), [])


def read_glue(_: Any, rng: random.Random, folder: Path) -> None:
    """GLUE's and SuperGLUE's files."""
    if rng.random() < 0.4:
        name = rng.choice(list(TABLES))
        path = folder / "dev.tsv"
        path.write_bytes(damaged(rng, TABLES[name], list(TABLES.values())))
    else:
        name = rng.choice(GLUE)
        path = _file(rng, folder, name)
    items = read_items(f"{name}:{path}")
    if items.form.text:
        labelled(items)


TOML = b"""model = "m"
data = ["a.jsonl"]
learning_rate = 1e-5
batch_size = 4
max_steps = 3
seed = 0
lora_rank = 0
"""


def read_config(_: Any, rng: random.Random, folder: Path) -> None:
    """Configurations and the specs inside them."""
    if rng.random() < 0.3:
        text = rng.choice(("chain_sum:min_terms=2,max_terms=2", 'gsm8k:path="a b",n=[1,2]', "my.py:Name*0.5", "bleu*2"))
        text = damaged(rng, text.encode(), [b'{"a": [1', b"x" * 500]).decode("utf-8", "replace")
        parse_spec(text)
        parse_rewards([text])
        return
    kind = rng.choice((SFTOptions, PPOOptions, GRPOOptions))
    content = TOML if kind is SFTOptions else TOML.replace(b"data = ", b'task = "chain_sum"\nreward = ')
    if rng.random() < 0.5:
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        key = lines[at].split(b"=")[0]
        values = ("-1", "0", "1e999", "nan", "inf", '""', "true", "[]", "[1]", "{}", "1979-05-27", '"\\u0000"')
        lines[at] = key + b"= " + rng.choice((*values, "9" * 5000, "[" * 2000, "{a=" * 500)).encode()
        content = b"\n".join(lines)
    else:
        content = damaged(rng, content, [TOML])
    (folder / "run.toml").write_bytes(content)
    load_config(kind, folder / "run.toml")


def _tokenizer(_: Path) -> Any:
    return tiny_tokenizer()


def _nothing(_: Path) -> None:
    return None


FAMILIES = (
    Family("records", "data", _tokenizer, read_rows, share=3.0),
    Family("rows", "data", _nothing, read_other_rows, share=2.0),
    Family("texts", "data", _nothing, read_texts, share=2.0),
    Family("glue", "data", _nothing, read_glue, share=2.0),
    Family("configs", "data", _nothing, read_config, share=1.5),
)
__all__ = ["CHAT", "FAMILIES", "TOOL", "DataError"]
