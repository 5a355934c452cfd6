"""Built-in rewards: hand-computed values, bounds, and no text that upsets them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upslope.errors import ConfigError, DataError
from upslope.rewards import functions
from upslope.rewards.summands import load_reward
from upslope.types import Prompt, Reward

PROMPT = Prompt(0, text="q", answer="Yes")
SPECS = [
    "length:target=5",
    "length:target=5,unit=characters",
    "format:pattern='<a>.*</a>'",
    "json_object:keys=a|b",
    "json_object:keys=a,exact=true",
    "repetition:ngram=2",
    "exact_match:ignore_case=true",
]
ODD = [
    "",
    " ",
    "\x00",
    "\ud800",
    "[" * 3000,
    '{"a":' * 3000,
    "9" * 10_000,
    "NaN",
    "{" * 100,
    "é\u202e\n\t",
    "a " * 5000,
]


def values(spec: str, texts: list[str]) -> list[float]:
    out = load_reward(spec).function([PROMPT] * len(texts), texts)
    return [item.value if isinstance(item, Reward) else item for item in out]


@pytest.mark.parametrize("spec", SPECS)
@given(texts=st.lists(st.text(), max_size=4))
def test_any_text_gets_a_finite_reward(spec: str, texts: list[str]) -> None:
    got = values(spec, [*texts, *ODD])
    assert len(got) == len(texts) + len(ODD)
    assert all(-1.0 <= value <= 1.0 and math.isfinite(value) for value in got)


@pytest.mark.parametrize("spec", SPECS)
@given(texts=st.lists(st.text(), min_size=2, max_size=5), order=st.randoms())
def test_a_reward_does_not_depend_on_its_neighbours(spec: str, texts: list[str], order) -> None:
    alone = [values(spec, [text])[0] for text in texts]
    places = list(range(len(texts)))
    order.shuffle(places)
    together = values(spec, [texts[place] for place in places])
    assert together == [alone[place] for place in places]


def test_length_by_hand() -> None:
    assert values("length:target=4", ["a b c d", "a b", "a b c d e f", "", "x " * 9]) == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert values("length:target=4,unit=characters", ["abcd", "ab"]) == [1.0, 0.5]
    assert functions.length([PROMPT], ["ignored"], target=4, unit="tokens", num_tokens=[3]) == [0.75]
    with pytest.raises(DataError, match="token counts"):
        functions.length([PROMPT], ["x"], target=4, unit="tokens")
    with pytest.raises(ConfigError, match="unit must be"):
        functions.length([PROMPT], ["x"], target=4, unit="lines")
    with pytest.raises(ConfigError, match="at least 1"):
        functions.length([PROMPT], ["x"], target=0)


def test_format_matches_the_whole_reply() -> None:
    assert values("format:pattern='<a>.*</a>'", ["<a>x\ny</a>", " <a></a>\n", "so <a></a>", ""]) == [1, 1, 0, 0]
    with pytest.raises(ConfigError, match="not a regular expression"):
        values("format:pattern='('", ["x"])


@pytest.mark.parametrize(
    ("text", "loose", "exact"),
    [
        ('{"a": 1, "b": [2]}', 1, 1),
        (' {"a": 1, "b": 2, "c": 3}\n', 1, 0),
        ('{"a": 1}', 0, 0),
        ('{"a": 1, "b": NaN}', 0, 0),
        ('{"a": 1, "a": 2, "b": 3}', 0, 0),
        ('{"b": {"x": 1, "x": 2}, "a": 0}', 0, 0),
        ('```json\n{"a": 1, "b": 2}\n```', 0, 0),
        ('["a", "b"]', 0, 0),
        ("{'a': 1, 'b': 2}", 0, 0),
        ('{"a": ' + "9" * 5000 + ', "b": 1e999}', 1, 1),
    ],
)
def test_json_is_strict(text: str, loose: int, exact: int) -> None:
    assert values("json_object:keys=a|b", [text]) == [loose]
    assert values("json_object:keys=a|b,exact=true", [text]) == [exact]


def test_repetition_by_hand() -> None:
    assert values("repetition:ngram=1", ["a b c", "a a a a", "A a", "", "a"]) == [0.0, -0.75, -0.5, 0.0, 0.0]
    assert values("repetition:ngram=2", ["a b a b a b"]) == [pytest.approx(-0.6)]
    with pytest.raises(ConfigError, match="ngram"):
        values("repetition:ngram=0", ["x"])


def test_exact_match_gives_verdicts_and_none_without_an_answer() -> None:
    assert values("exact_match", [" Yes\n", "yes", "Yes."]) == [1, 0, 0]
    assert values("exact_match:ignore_case=true", ["yes"]) == [1]
    assert functions.exact_match([Prompt(0, text="q")], ["x"]) == [None]
