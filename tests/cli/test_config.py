"""Configuration: files and overrides to one frozen dataclass, and every way a file can be wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import string
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upslope import config, options
from upslope.errors import ConfigError

ALL_OPTIONS = sorted(
    (item for item in vars(options).values() if dataclasses.is_dataclass(item) and isinstance(item, type)),
    key=lambda item: item.__name__,
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Every kind of field that an options class may have."""

    learning_rate: float = 1e-5
    max_steps: int = 10
    patience: int | None = None
    clip: float | None = 0.2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    packing: bool = True
    stop: tuple[str, ...] = ()
    name: str | None = None

    def validate(self) -> None:
        if self.learning_rate < 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be at least 0")


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Every value that the type allows, the awkward ones included."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*(values_of(argument) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=4).map(tuple)
    if hint is type(None):
        return st.none()
    if hint is str:
        return st.text().filter(lambda text: text.lower() != "none")
    if hint is float:
        return st.floats(allow_nan=False)
    if hint is int:
        return st.integers()
    assert hint is bool, hint
    return st.booleans()


def instances(cls: type[Any]) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: values_of(hint) for name, hint in config.hints_of(cls).items()})


@pytest.mark.parametrize("cls", [Sample, *ALL_OPTIONS], ids=lambda cls: cls.__name__)
@settings(max_examples=40)
@given(data=st.data())
def test_dump_reads_back_equal(cls: type[Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = data.draw(instances(cls))
    path = write(tmp_path_factory.mktemp("dump"), config.dump(made))
    values = {name: setting.value for name, setting in config.read_toml(cls, path).items()}
    again = cls(**values)
    assert again == made
    assert [type(value) for value in dataclasses.astuple(again)] == [type(v) for v in dataclasses.astuple(made)]


_ROWS = (
    "SFTOptions",
    "DPOOptions",
    "RewardOptions",
    "Seq2SeqOptions",
    "ClassifyOptions",
    "TagOptions",
    "EncoderOptions",
)
NEEDED: dict[str, dict[str, Any]] = {
    **{name: {"data": "rows.jsonl"} for name in _ROWS},
    "PretrainOptions": {"data": ("texts.txt",)},
    "DistillOptions": {"teacher": "folder", "task": "gsm8k"},
    "CompareOptions": {"configs": ("sft_a.toml", "ppo_b.toml"), "max_seconds": 60.0},
    "EvalOptions": {"models": ("runs/a",), "perplexity": ("wiki.txt",)},
    "ExportOptions": {"model": "runs/a", "output": "folder"},
}
"""What a class cannot do without."""


@pytest.mark.parametrize("cls", ALL_OPTIONS, ids=lambda cls: cls.__name__)
def test_defaults_survive_dump_and_load(cls: type[Any], tmp_path: Path) -> None:
    extra = NEEDED.get(cls.__name__, {})
    assert config.load(cls, write(tmp_path, config.dump(cls(**extra)))) == cls(**extra)


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first = write(tmp_path / "a", "learning_rate = 1\nmax-steps = 3\nstop = ['x']\n")
    second = write(tmp_path, "learning-rate = 2.5\n")
    made = config.load(Sample, first, second, overrides={"max_steps": 7})
    assert made == Sample(learning_rate=2.5, max_steps=7, stop=("x",))
    assert isinstance(config.load(Sample, first).learning_rate, float)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a = 1", 1, "unknown key 'a'"),
        ("\n# learning_rat = 1\nlearning_rat = 1\n", 3, "unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ('name = """\nlearning_rat = 3\n"""\nlearning_rat = 3\n', 4, "did you mean 'learning_rate'?"),
        ('"learning-rat" = 1', 1, "did you mean 'learning_rate'?"),
        ("max_steps = 3\n\n[optimizer]\nlr = 3", 3, "unknown section [optimizer]: options are written flat"),
        ("optimizer.lr = 3", 1, "options are written flat"),
        ("max_steps = 1\nlearning_rate = 'fast'", 2, "learning_rate must be a number, got 'fast'"),
        ("max_steps = 1.0", 1, "max_steps must be an integer, got 1.0"),
        ("max_steps = true", 1, "max_steps must be an integer, got True"),
        ("learning_rate = true", 1, "learning_rate must be a number, got True"),
        ("packing = 1", 1, "packing must be true or false, got 1"),
        ("dtype = 'flot32'", 1, "one of auto, float32, bfloat16, got 'flot32'; did you mean 'float32'?"),
        ("stop = 'x'", 1, "stop must be a list, each a string, got 'x'"),
        ("stop = ['x', 3]", 1, "stop must be a list, each a string, got 3"),
        ("patience = 'never'", 1, "patience must be an integer or none, got 'never'"),
        ("name = { a = 'x' }", 1, "name must be a string or none, got {'a': 'x'}"),
        ("max_steps = 3\nlearning_rate = -1", 2, "learning_rate is -1.0; it must be at least 0"),
        ("max_steps = 3\nlearning_rate = = 1", 2, "not valid TOML"),
        ("max_steps = 3\nmax_steps = 4", 2, "not valid TOML: Cannot overwrite a value"),
        ("max_steps = 3\nmax-steps = 4", 2, "'max-steps' is given twice"),
        (f"learning_rate = {'9' * 400}", 1, "learning_rate must be a number"),
        (f"learning_rate = {'9' * 5000}", 1, "not valid TOML"),
        (b"max_steps = 1\nname = '\xff'", 2, "not UTF-8"),
        ("stop = " + "[" * 5000, 1, "not valid TOML"),
    ],
)
def test_bad_file_names_file_line_and_key(text: str | bytes, line: int, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        config.load(Sample, path)
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    assert message.startswith((f"{path}:{line}: ", f"{path}: not valid TOML: values are nested"))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        config.load(Sample, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(Sample, tmp_path)


def test_pipes_devices_and_what_is_no_configuration_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/null")):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: a pipe or device, not a plain file"):
            config.load(Sample, path)
    (tmp_path / "large.toml").touch()
    os.truncate(tmp_path / "large.toml", 40 << 30)
    with pytest.raises(ConfigError, match=r"cannot be read: 42,949,672,960 bytes, at most 1,048,576; a configuration"):
        config.load(Sample, tmp_path / "large.toml")


def test_override_errors_name_the_option() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'learning_rat'; did you mean 'learning_rate'\?"):
        config.load(Sample, overrides={"learning_rat": 1})
    with pytest.raises(ConfigError, match="--max-steps: max_steps must be an integer, got 'x'"):
        config.load(Sample, overrides={"max_steps": "x"})
    with pytest.raises(ConfigError, match=r"--learning-rate: learning_rate is -2\.0"):
        config.load(Sample, overrides={"learning-rate": -2})


def test_a_range_error_blames_the_source_that_won(tmp_path: Path) -> None:
    path = write(tmp_path, "learning_rate = -1")
    with pytest.raises(ConfigError, match=r"^--learning-rate: "):
        config.load(Sample, path, overrides={"learning_rate": -3})
    assert config.load(Sample, path, overrides={"learning_rate": 1}).learning_rate == 1.0


def test_none_is_written_and_read(tmp_path: Path) -> None:
    path = write(tmp_path, "clip = 'none'\npatience = 'None'")
    assert config.load(Sample, path) == Sample(clip=None)
    with pytest.raises(ConfigError, match="cannot be told from no value"):
        config.dump(Sample(name="none"))
    with pytest.raises(ConfigError, match="lone surrogate"):
        config.dump(Sample(name="\ud800"))


def test_infinity_is_a_number(tmp_path: Path) -> None:
    assert math.isinf(config.load(Sample, write(tmp_path, "learning_rate = inf")).learning_rate)


@dataclass(frozen=True, kw_only=True)
class Required:
    """A field without a default."""

    data: str


def test_missing_required_option() -> None:
    with pytest.raises(ConfigError, match="missing: --data"):
        config.load(Required)


TOML_PIECES = st.sampled_from([*"=[]{}\"'.#\n,-_ ", "learning_rate", "= 3\n", '"""', "[[", "max-steps", "0x", "1e400"])
RUBBISH = st.one_of(
    st.binary(max_size=60),
    st.lists(st.one_of(TOML_PIECES, st.text(string.printable, max_size=3)), max_size=30).map(
        lambda pieces: "".join(pieces).encode()
    ),
)


@settings(max_examples=400)
@given(rubbish=RUBBISH)
def test_rubbish_is_one_line_or_valid(rubbish: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), rubbish)
    with contextlib.suppress(ConfigError):
        assert isinstance(config.load(Sample, path), Sample)
        return
    with pytest.raises(ConfigError) as caught:
        config.load(Sample, path)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(path))


@given(lead=st.lists(st.sampled_from(["", "# max_stepz = 1", "name = '''", "max_stepz = 2'''", "stop = [", "]"])))
def test_reported_line_is_the_statement(lead: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever stands before it: if the prefix is TOML, the unknown key after it is found on its own line."""
    prefix = "".join(f"{line}\n" for line in lead)
    path = write(tmp_path_factory.getbasetemp(), prefix)
    try:
        config.read_toml(Sample, path)
    except ConfigError:
        return
    path = write(tmp_path_factory.getbasetemp(), prefix + "max_stepz = 3\n")
    with pytest.raises(ConfigError, match=rf":{len(lead) + 1}: unknown key 'max_stepz'"):
        config.read_toml(Sample, path)
