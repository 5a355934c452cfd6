"""What expert iteration trains on: which samples are kept, where each row came from, and its file in the run folder."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.atomic import write_atomic
from upslope.data.examples import examples_of
from upslope.data.messages import message_of
from upslope.data.records import read_records
from upslope.errors import DataError, RunError
from upslope.loop.kept import NO_DATA, DataAccount, Split, too_long
from upslope.options import ExpertOptions
from upslope.runs.folder import Run
from upslope.types import Example, Prompt, Reward, Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class Candidate:
    """A judged sample that may be kept; `value` is its reward after penalties."""

    prompt: Prompt
    rollout: Rollout
    value: float


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence and its origin: a sample (round, prompt key, sample, reward) or a corpus row (where)."""

    example: Example
    origin: dict[str, Any]


def select(candidates: Sequence[Candidate], options: ExpertOptions) -> list[Candidate]:
    """The candidates that are imitated, in the order given.

    In turn: cut-off replies leave (truncated = mask), what is below the threshold leaves, equal replies to a prompt
    count once, then the best of each prompt or of the round stay, at most max_per_prompt of a prompt. Ties go to the
    candidate that comes first.

    Raises DataError: keep = threshold needs verdicts and there are none.
    """
    o = options
    left = [i for i, c in enumerate(candidates) if not (o.truncated == "mask" and c.rollout.finish_reason == "length")]
    if o.threshold is not None:
        left = [i for i in left if candidates[i].value >= o.threshold]
    elif o.keep == "threshold":
        if not any(c.rollout.reward.correct is not None for c in candidates):
            raise DataError(
                "keep = threshold: the rewards carry no verdict of right and wrong; give threshold = NUMBER"
            )
        left = [i for i in left if candidates[i].rollout.reward.correct]
    if o.dedupe:
        left = _first_of_equals(candidates, left)
    left.sort(key=lambda i: (-candidates[i].value, i))
    if o.keep == "top":
        left = left[: math.ceil(o.keep_share * len(left) - 1e-9)]
    most = 1 if o.keep == "best" else o.max_per_prompt
    taken: Counter[int] = Counter()
    chosen = []
    for i in left:
        key = candidates[i].prompt.key
        taken[key] += 1
        if taken[key] <= most:
            chosen.append(i)
    return [candidates[i] for i in sorted(chosen)]


def _first_of_equals(candidates: Sequence[Candidate], left: Iterable[int]) -> list[int]:
    """Of equal replies to one prompt the best, and of those the first."""
    best: dict[tuple[int, str], int] = {}
    for i in left:
        same = (candidates[i].prompt.key, " ".join(candidates[i].rollout.text.split()))
        if same not in best or candidates[i].value > candidates[best[same]].value:
            best[same] = i
    return sorted(best.values())


def row_of(candidate: Candidate, round_: int, **further: Any) -> Row:
    """The training row of a kept sample: its own tokens, trained on where the policy sampled them."""
    r = candidate.rollout
    example = Example([*r.prompt_tokens, *r.tokens], [False] * len(r.prompt_tokens) + list(r.mask))
    origin = {
        "source": "sample",
        "round": round_,
        "prompt_key": candidate.prompt.key,
        "sample": r.sample,
        "reward": candidate.value,
        "correct": r.reward.correct,
        "completion": r.text,
        **further,
    }
    return Row(example, origin)


def write_rows(path: Path, rows: Sequence[Row]) -> str:
    """Write a round's rows, one JSON object per line; returns the file's sha256."""
    lines = [
        json.dumps({**row.origin, "tokens": row.example.tokens, "mask": [int(m) for m in row.example.mask]})
        for row in rows
    ]
    content = "".join(line + "\n" for line in lines).encode()
    write_atomic(path, content)
    return hashlib.sha256(content).hexdigest()


def read_rows(path: Path, sha256: str) -> list[Row]:
    """The rows that `write_rows` wrote. RunError: the file is gone or is not what the checkpoint was made with."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}); the checkpoint goes on with its rows") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(f"{path}: has changed since the checkpoint was written; put the file back, or start a new run")
    rows = []
    for line in content.splitlines():
        origin = json.loads(line)
        tokens, mask = origin.pop("tokens"), [bool(m) for m in origin.pop("mask")]
        rows.append(Row(Example(tokens, mask), origin))
    return rows


def load_mix(options: ExpertOptions, tokenizer: Any) -> tuple[list[Row], DataAccount]:
    """The corpus that is mixed in (`mix_data`), and what became of its rows."""
    if options.mix_data is None:
        return [], NO_DATA
    records = read_records(options.mix_data, columns=options.columns)
    found = examples_of(records, tokenizer, max_length=options.max_length)
    rows = [
        Row(example, {"source": "corpus", "where": records[i].where})
        for example, i in zip(found.examples, found.kept, strict=True)
    ]
    lost = too_long([length for _, length in found.too_long], options.max_length)
    return rows, DataAccount({"mix": Split(options.mix_data, len(rows), *lost)})


def groups_of_run(folder: str, *, vocabulary: int, tokenizer: Any) -> tuple[list[RolloutGroup], list[dict[str, Any]]]:
    """The judged training rollouts of a run, one group per (step, prompt), and each rollout's step and id.

    Raises DataError: none, or tokens that this tokenizer does not decode to the stored text.
    """
    groups: dict[tuple[int, int], RolloutGroup] = {}
    places: dict[tuple[int, int], list[dict[str, Any]]] = {}
    with Run.open(folder, read_only=True) as run:
        for row in run.store.rollouts(split="train", limit=-1):
            if row.reward is None:
                continue
            arrays = run.store.rollout(row.id).arrays
            if absent := sorted(
                {"prompt_tokens", "tokens", "mask", "sampling_logprobs", "policy_logprobs"} - set(arrays)
            ):
                raise DataError(f"{folder}, rollout {row.id}: has no {absent[0]}; the run's run.db is damaged")
            rollout = _rollout(row, arrays)
            _check_tokens(f"{folder}, rollout {row.id}", rollout, vocabulary, tokenizer)
            key = (row.step, row.prompt_key)
            if key not in groups:
                messages = tuple(message_of(m, "messages", f"{folder}, rollout {row.id}") for m in row.messages)
                text = None if messages else row.prompt
                groups[key] = RolloutGroup(Prompt(row.prompt_key, messages, text, row.answer), [])
                places[key] = []
            groups[key].rollouts.append(rollout)
            places[key].append({"run": folder, "step": row.step, "rollout": row.id})
    if not groups:
        raise DataError(f"{folder}: no judged training rollouts in it; from_run takes the folder of a run that sampled")
    return list(groups.values()), [place for some in places.values() for place in some]


def _rollout(row: Any, arrays: dict[str, list[Any]]) -> Rollout:
    return Rollout(
        prompt_tokens=arrays["prompt_tokens"],
        tokens=arrays["tokens"],
        mask=[bool(m) for m in arrays["mask"]],
        sampling_logprobs=arrays["sampling_logprobs"],
        policy_logprobs=arrays["policy_logprobs"],
        finish_reason=row.finish_reason,
        text=row.completion,
        sample=row.sample,
        version=row.version,
        reward=Reward(row.reward, dict(row.parts), row.correct, None),
    )


def _check_tokens(where: str, rollout: Rollout, vocabulary: int, tokenizer: Any) -> None:
    ids = [*rollout.prompt_tokens, *rollout.tokens]
    decoded = tokenizer.decode(rollout.tokens, skip_special_tokens=True) if max(ids) < vocabulary else None
    if decoded is None or not decoded.startswith(rollout.text.rstrip("\ufffd")):
        raise DataError(
            f"{where}: its tokens are not this model's (they decode to {decoded!r:.60}, the text is "
            f"{rollout.text!r:.60}); from_run needs the same tokenizer"
        )
