"""What a run is made of, as digests: its files, tokenizer, chat template and training rows. A checkpoint holds them.

Files: what the options of FILES and MODELS name, and of a plug-in (a task, a reward, a loss, an advantage) its Python
file, the modules beside it that this file imports, and every parameter that is a path. Up to 256 MiB a file is hashed
whole; of a larger one its size and 64 blocks of a mebibyte, first and last among them, so that gigabytes cost no more.
The rows as they are trained on are hashed in full, whatever gave them: what no file shows (a template's clock, another
split, a task that draws other problems, a change between the blocks) shows there.
"""

import ast
import contextlib
import hashlib
import json
import os
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from upslope.atomic import saving
from upslope.config import PLUGINS
from upslope.data.corpus import corpus_files
from upslope.data.glue import form_of
from upslope.data.pieces import PairTokenizer
from upslope.errors import ModelError, RunError
from upslope.models.files.places import lies_in_run, model_of_run
from upslope.plugins import parse_spec
from upslope.rewards.summands import parse_rewards
from upslope.types import Prompt

FILES = ("data", "eval_data", "test_data", "mix_data", "rewards")
"""Options that name a file of rows, or some (a hub data set shows in the rows)."""
MODELS = {"model": ("scratch",), "teacher": (), "critic": ("shared", "separate")}
"""Options that name a model, and their words that name none. An alias or a hub id is not looked up again."""
ROWS = "the training rows"

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
WHOLE, BLOCK, BLOCKS = 256 << 20, 1 << 20, 64


def of_files(options: Any) -> dict[str, str]:
    """Digests by "FILE (--OPTION)", of every file that the options name and that is there.

    RunError where one cannot be read.
    """
    found: dict[str, str] = {}
    for option, paths in _named(options):
        for path in paths:
            found[f"{path} (--{option.replace('_', '-')})"] = file_digest(path)
    return found


def of_learner(learner: Any) -> dict[str, str]:
    """Digests of tokenizer, chat template and training rows; without the first two where the checkpoint has them."""
    tokenizer, rows = learner.trained_on()
    digest, count = hashlib.sha256(), 0
    for row in rows:
        _feed(digest, row)
        count += 1
    found = {ROWS: f"{count:,} {digest.hexdigest()}"}
    if tokenizer is not None:
        found |= {"the tokenizer": _hashed(_tokens_of(tokenizer))}
        found |= {"the chat template": _hashed(tokenizer.chat_template)}
    return found


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What differs, by name; of the rows only where nothing else explains it, and then with their numbers."""
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if names != [ROWS]:
        return [name for name in names if name != ROWS]
    was, are = (digests[ROWS].split()[0] for digests in (before, now))
    return [f"{ROWS} ({'' if was == are else f'{was} -> {are}, '}though no file has changed)"]


def _in_words(names: Sequence[str], checkpoint: Path) -> str:
    """Which things have changed since which checkpoint."""
    return f"{', '.join(names)} {'has' if _is_one(names) else 'have'} changed since {checkpoint} was written"


def prompt_row(prompt: Prompt) -> tuple[Any, ...]:
    """What a row of prompts is to the digest: everything that the model, the task or a reward is given."""
    metadata = json.dumps(_fixed(prompt.metadata), sort_keys=True)
    return prompt.key, prompt.text, [m.as_mapping() for m in prompt.messages], prompt.answer, metadata


def _fixed(value: Any) -> Any:
    """The value with what differs from process to process settled: the order of sets, addresses of objects."""
    if isinstance(value, Mapping):
        return {str(key): _fixed(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_fixed(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return value if isinstance(value, str | int | float | None) else _ADDRESS.sub("", str(value))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, of a large one that of its size and BLOCKS blocks. RunError where it cannot be read."""
    with saving(path, "read"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(b"%d" % size)
        for i in range(BLOCKS):
            file.seek((size - BLOCK) * i // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
        return f"{digest.hexdigest()} ({BLOCKS} blocks)"


def _named(options: Any) -> Iterator[tuple[str, Iterable[Path]]]:
    for option in (*FILES, *MODELS, *PLUGINS):
        value = getattr(options, option, None)
        if not value or value in MODELS.get(option, ()):
            continue
        if option == "reward":
            for spec, _ in parse_rewards(value):
                yield option, _of_spec(spec)
        elif option in PLUGINS:
            yield option, _of_spec(value)
        elif isinstance(value, tuple):
            yield option, corpus_files(value)
        else:
            form = form_of(value)
            yield option, _of_path(value if form is None else form[1])


def _of_spec(text: Any) -> Iterator[Path]:
    if not isinstance(text, str):
        text = getattr(text, "func", text)  # of functools.partial
        module = sys.modules.get(text.__module__)  # of an object its class's, of a function its own
        yield from _python_files(Path(getattr(module, "__file__", None) or ""))
        return
    spec = parse_spec(text)
    if spec.path is not None:
        yield from _python_files(Path(os.path.expanduser(spec.path)))
    for key, value in spec.params.items():
        if not isinstance(value, str):
            continue
        named = key.endswith(("path", "file", "folder", "model")) or value.strip("/.").count("/")
        if named or os.path.isfile(os.path.expanduser(value)):  # "." and "/" as a text are no folder
            yield from _of_path(value)


def _of_path(text: str) -> list[Path]:
    """The file itself; of a folder or run its model's weights and configuration, else the files directly in it."""
    path = Path(os.path.expanduser(text))
    if os.path.isfile(path) and not lies_in_run(path):
        return [path]
    if os.path.isdir(path) or lies_in_run(path):
        with contextlib.suppress(ModelError):  # loading it says what is missing
            path = model_of_run(path, lambda line: None)
    if not os.path.isdir(path):
        return []
    files = sorted(file for file in path.iterdir() if file.is_file())
    weights = [file for file in files if file.suffix == ".safetensors"]
    return [*weights, *(f for f in files if f.name in ("config.json", "adapter_config.json"))] if weights else files


def _python_files(file: Path) -> list[Path]:
    """A user's file and the modules and packages beside it that it imports, also through each other."""
    found: dict[Path, None] = {}
    waiting = [file]
    while waiting:
        path = waiting.pop(0)
        if path in found or not path.is_file():
            continue
        found[path] = None
        for name in _imports(path):
            waiting += [file.parent / f"{name}.py", *sorted((file.parent / name).rglob("*.py"))]
    return list(found)


def _imports(path: Path) -> list[str]:
    try:
        with saving(path, "read"):
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []  # loading it says where it is wrong
    names: dict[str, None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= dict.fromkeys(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names[node.module.partition(".")[0]] = None
    return list(names)


def _tokens_of(tokenizer: Any) -> Any:
    if isinstance(tokenizer, PairTokenizer):
        sides = [_tokens_of(tokenizer.target), _tokens_of(tokenizer.source)]
        return [*sides, tokenizer.decoder_start_token_id, tokenizer.source_offset]
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    # A call leaves its own truncation and padding there; they are not the tokenizer's.
    table = {key: value for key, value in table.items() if key not in ("truncation", "padding")}
    return [table, {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}]


def _hashed(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Adds nested lists, tuples and tables of plain values, each so that no two differ in meaning and not in bytes."""
    if isinstance(value, Mapping):
        value = sorted(value.items())
    if not isinstance(value, list | tuple):
        digest.update(repr(value).encode("utf-8", "surrogatepass") + b"\0")
        return
    try:
        numbers = array("q", value)
    except (TypeError, OverflowError):
        digest.update(b"[%d\0" % len(value))
        for item in value:
            _feed(digest, item)
        return
    digest.update(b"n%d\0" % len(value) + numbers.tobytes())


def accepted(
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    checkpoint: Path,
    options: Any,
    config: Mapping[str, Any],
    marks: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The learner's state of a checkpoint, ready for the rows there are `now`, and lines the user must see.

    A place in an order over n rows stays what it was where n has become another: so many have been taken, and the next
    are those that stand there in the new order. Raises RunError where something has changed and
    `options.allow_changed_data` is not set. config: the run's options so far.
    """
    before = state.get("fingerprint")
    if before is None:
        names = []
        said = [f"{checkpoint}: of an older version, without a fingerprint: whether the data are the same is not known"]
    else:
        names, said = changed(before, marks["fingerprint"]), []
    learner = dict(state["learner"])
    for name, order in learner.items():
        rows = now[name]["n"] if _is_order(order) and _is_order(now.get(name)) else None
        if rows is not None and rows != order["n"]:
            learner[name] = {**order, "n": rows}
            names = names or [f"{ROWS} ({order['n']:,} -> {rows:,})"]
    if names and names[0].startswith(ROWS) and config.get("eval_samples") != options.eval_samples:
        names = [f"{names[0]}, eval_samples {config.get('eval_samples')} -> {options.eval_samples}"]
    if not options.allow_changed_data:
        refuse(names, checkpoint)
    return learner, said + ([f"{_in_words(names, checkpoint)}: going on with what is there now"] if names else [])


def refuse(names: Sequence[str], checkpoint: Path) -> None:
    """RunError, where there are names."""
    if names:
        it = "it" if _is_one(names) else "them"
        raise RunError(f"{_in_words(names, checkpoint)}; restore {it}, or go on with {it} as now: --allow-changed-data")


def _is_one(names: Sequence[str]) -> bool:
    return len(names) == 1 and not names[0].startswith(ROWS)


def _is_order(value: Any) -> bool:
    return isinstance(value, Mapping) and {"n", "seed", "position"} <= value.keys()
