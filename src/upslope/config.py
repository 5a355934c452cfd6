"""One frozen dataclass of options from TOML files and a command line, with errors that name file, line and key.

A file is flat: `key = value`, keys in snake_case or kebab-case. Later sources win. In a file, as on the command
line, the string "none" means no value for an option that may have none, and an option may have a second spelling.
Free of torch.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast

from upslope.atomic import check_plain
from upslope.errors import ConfigError

NONE = "none"
LAUNCH = {"output_dir": None, "resume": False, "allow_changed_data": False, "dry_run": False, "json": False}
"""What one launch is told, with its defaults: a run's config.toml does not hold it, and where an old one does it is
not read."""
OBJECT = "python:"
"""How the name of a plug-in begins that is an object of a Python program: MODULE:NAME follows."""
PLUGINS = ("task", "reward", "loss", "advantage")
"""Options that name a user's own code, and in Python may be it."""


class Options(Protocol):
    """What this module asks of an options class: to be a dataclass. `validate()` is called when it is there."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


T = TypeVar("T", bound=Options)
V = TypeVar("V")


def option(default: V, low: float | None = None, high: float = math.inf, *, also: str = "", needs: str = "") -> V:
    """A field's default, and what is said of it where it stands; a subclass that gives another default keeps the rest.

    low, high: the bounds of a number; without `low` none, from -inf to inf whatever is finite. also: another spelling.
    needs: the option without which it would do nothing ("data"), or the values of one ("loss=dpo,ipo"): there it must
    be left at its default.
    """
    said = {"bounds": None if low is None else (low, high), "also": also, "needs": needs}
    return cast(V, dataclasses.field(default=default, metadata={key: value for key, value in said.items() if value}))


def metadata_of(options: type[Options], name: str) -> dict[str, Any]:
    """What `option` was told of a field in the class and in those that it is made from; the nearest wins."""
    fields = [vars(base).get("__dataclass_fields__", {}).get(name) for base in reversed(options.__mro__)]
    return {key: value for field in fields if field for key, value in field.metadata.items()}


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it was given: "run.toml:3" or "--learning-rate"."""

    value: Any
    where: str


def load(options: type[T], *paths: str | Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Read the files in order, then the overrides (names to values); return the checked options.

    Errors: ConfigError naming file, line and key for an unreadable file, bad TOML, an unknown key (with the nearest
    known one), a wrong type or a value that `validate()` refuses.
    """
    settings: dict[str, Setting] = {}
    for path in paths:
        settings |= read_toml(options, path)
    settings |= _settings(options, "option", overrides or {}, lambda key: f"--{key.replace('_', '-')}")
    return build(options, settings)


def read_toml(options: type[Options], path: str | Path) -> dict[str, Setting]:
    """The settings of one file, each value checked against the type of its field."""
    text = _read_text(Path(path))
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{path}: not valid TOML: values are nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError, or a number too long to convert
        place = re.search(r"\(at line (\d+), column \d+\)", str(error))
        line = int(place[1]) if place else text.count("\n") + 1
        reason = re.sub(r"\s*\(at (line \d+, column \d+|end of document)\)", "", str(error))
        raise ConfigError(f"{path}:{line}: not valid TOML: {reason}") from None
    settings = _settings(options, "key", table, lambda key: f"{path}:{_line_of(text, key)}")
    of_a_launch = LAUNCH if (Path(path).parent / "env.json").is_file() else {}
    return {name: setting for name, setting in settings.items() if name not in of_a_launch}


def _settings(
    options: type[Options], noun: str, table: Mapping[str, Any], where_of: Callable[[str], str]
) -> dict[str, Setting]:
    hints, names = hints_of(options), names_of(options)
    settings: dict[str, Setting] = {}
    for key, value in table.items():
        where, spelled = where_of(key), key.replace("-", "_")
        name = names.get(spelled, "")
        if not name:
            section = f"unknown section [{key}]: options are written flat"
            what = section if isinstance(value, dict) else f"unknown {noun} {key!r}"
            raise ConfigError(f"{where}: {what}{suggestion(meant(spelled, names), names)}")
        if name in settings:
            raise ConfigError(f"{where}: {key!r} is given twice, also at {settings[name].where}")
        settings[name] = Setting(coerce(name, value, hints[name], where), where)
    return settings


def build(options: type[T], settings: Mapping[str, Setting]) -> T:
    """Make the options from settings whose values have the right types, and run the class's own `validate()`."""
    without = [field.name for field in dataclasses.fields(options) if field.default is dataclasses.MISSING]
    if missing := [name for name in without if name not in settings]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise ConfigError(f"missing: {flags}; give it on the command line or in the file of --config")
    try:
        made = options(**{name: setting.value for name, setting in settings.items()})
        getattr(made, "validate", lambda: None)()
    except ConfigError as error:
        words = re.findall(r"[a-z][a-z0-9_]*", str(error).replace("-", "_"))
        place = next(filter(None, (settings[word].where for word in words if word in settings)), "")
        raise ConfigError(f"{place}: {error}" if place else str(error)) from None
    return made


def check(options: Options) -> None:
    """What `load` checks of a file, of options made in Python. Errors: ConfigError."""
    for name, hint in hints_of(type(options)).items():
        coerce(name, in_text(name, getattr(options, name)), hint, type(options).__name__)
    getattr(options, "validate", lambda: None)()


def in_text(name: str, value: Any) -> Any:
    """The value of an option as a file has it: python:MODULE:NAME for a plug-in that is an object."""
    if name in PLUGINS and isinstance(value, list | tuple):
        pairs = [item if isinstance(item, tuple) else (item, None) for item in value]
        return tuple(in_text("task", x) if w is None else f"{in_text('task', x)}@{w:g}" for x, w in pairs)
    if name not in PLUGINS or value is None or isinstance(value, str):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{OBJECT}{named.__module__}:{named.__qualname__}"


def dump(options: Options) -> str:
    """TOML text that `load` reads back to an equal object; every key is written, None as "none".

    Errors: ConfigError for what TOML or this format cannot hold (a lone surrogate; the text "none" where None is
    allowed).
    """
    hints = hints_of(type(options))
    lines = []
    for field in dataclasses.fields(options):
        value = in_text(field.name, getattr(options, field.name))
        if value is None:
            value = NONE
        elif isinstance(value, str) and value.lower() == NONE and type(None) in typing.get_args(hints[field.name]):
            raise ConfigError(f"{field.name}: the text {value!r} cannot be told from no value")
        lines.append(f"{field.name} = {_toml_value(field.name, value)}\n")
        if f'"{OBJECT}' in lines[-1]:
            lines[-1] = f"# An object of the Python program: this file alone cannot repeat the run.\n{lines[-1]}"
    return "".join(lines)


def hints_of(options: type[Options]) -> dict[str, Any]:
    """Field names to their types, `Annotated` stripped, in field order."""
    hints = typing.get_type_hints(options)
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def names_of(options: type[Options]) -> dict[str, str]:
    """Every name that a file and the command line may call an option by, and the field that it means."""
    fields = [field.name for field in dataclasses.fields(options)]
    return {name: name for name in fields} | {metadata_of(options, name).get("also", name): name for name in fields}


ELSEWHERE = {
    **{"lr": "learning_rate", "steps": "max_steps", "model_name": "model", "model_name_or_path": "model"},
    **dict.fromkeys(("bs", "train_batch_size", "per_device_train_batch_size"), "batch_size num_prompts"),
    **dict.fromkeys(("epochs", "num_train_epochs"), "num_epochs max_steps"),
    **dict.fromkeys(("dataset", "dataset_name"), "data task"),
    **dict.fromkeys(("out", "output"), "output_dir"),
}
"""What other tools call an option, and what it may be called here: the first that the verb has."""


def meant(name: str, known: Mapping[str, Any]) -> str:
    """The option of this project that another tool calls `name`, where the verb has it; else the name."""
    names = {*known} - ({"num_epochs"} if "num_prompts" in known else set())  # there it passes over a step's rollouts
    return next((here for here in ELSEWHERE.get(name, "").split() if here in names), name)


def suggestion(name: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' with the nearest known name as it is written in a file, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def coerce(name: str, value: Any, hint: Any, where: str, *, word: bool = False) -> Any:
    """`value` as the type `hint` asks for, or ConfigError. An integer serves as a float; nothing else is converted.

    With `word` the value is a word of the command line: text of a number, of true or false, of one element of a list.
    """
    try:
        return _coerce(value, hint, word)
    except _MismatchError as error:
        raise ConfigError(f"{where}: {name} must be {describe(hint)}, got {error.got}{error.hint}") from None


class _MismatchError(Exception):
    def __init__(self, value: Any, hint: str = "") -> None:
        text = repr(value)
        self.got = text if len(text) <= 60 else text[:57] + "..."
        self.hint = hint


def _coerce(value: Any, hint: Any, word: bool) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if type(None) in arguments and (value is None or (isinstance(value, str) and value.lower() == NONE)):
            return None
        hints = ""
        for argument in arguments:
            try:
                if argument is not type(None):
                    return _coerce(value, argument, word)
            except _MismatchError as error:
                hints = hints or error.hint
        raise _MismatchError(value, hints)
    if origin is Literal:
        if value in arguments and type(value) in {type(choice) for choice in arguments}:
            return value
        raise _MismatchError(value, suggestion(value, map(str, arguments)) if isinstance(value, str) else "")
    if origin is tuple:
        if word:
            return _coerce(value, arguments[0], word)
        if not isinstance(value, (list, tuple)):
            raise _MismatchError(value, "; also a single one in brackets, as in [f]" if isinstance(value, str) else "")
        return tuple(_coerce(item, arguments[0], word) for item in value)
    if hint in (int, float) and (word or (hint is float and type(value) is int)):
        try:
            return hint(value)
        except (ValueError, OverflowError):
            raise _MismatchError(value) from None
    if hint is bool and word:
        value = {"true": True, "false": False}.get(value.lower(), value)
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise _MismatchError(value)


NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "none"}


def describe(hint: Any) -> str:
    """The type in words: "a number or none"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    return f"a list, each {describe(arguments[0])}" if origin is tuple else NAMES[hint]


def _read_text(path: Path) -> str:
    try:
        check_plain(path, 1 << 20, "a configuration is a short TOML file")
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config wants the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except ValueError as error:  # a path with a zero byte
        raise ConfigError(f"{str(path)!r}: not a path: {error}") from None


def _line_of(text: str, key: str) -> int:
    """The line on which top-level `key` is set: it names the key, and what stands before it is TOML without it."""
    part = rf"""(?:{re.escape(key)}|"{re.escape(key)}"|'{re.escape(key)}')"""
    pattern = re.compile(rf"\s*(?:{part}\s*[=.]|\[+\s*{part}\s*[\].])")
    lines = text.split("\n")
    for index, line in enumerate(lines):
        with contextlib.suppress(ValueError):
            if pattern.match(line) and key not in tomllib.loads("\n".join(lines[:index])):
                return index + 1
    return 1  # a key written with escapes: the file is right, the line unknown


def _toml_value(name: str, value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(name, item) for item in value) + "]"
    if not isinstance(value, str | Path):
        raise ConfigError(f"{name}: a {type(value).__name__} cannot be written to TOML")
    text = str(value)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ConfigError(f"{name}: {text!r} is not text (a lone surrogate)")
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # what JSON escapes TOML escapes alike
