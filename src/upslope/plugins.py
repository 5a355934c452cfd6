"""What a user's own code is plugged in by: a name of a table, `file.py:name` or an object, with checked parameters.

    length:target=20                a name of a table, with parameters
    my_rewards.py:brief:wanted=3    a name in a Python file of the user's

`load` gives a function (a reward, a loss, an advantage), `find` what a name stands for (a task's class, a factory).
Free of torch.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import symtable
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from upslope.config import OBJECT, suggestion
from upslope.errors import ConfigError

Value = int | float | bool | str
TIMED_OUT = "timed out"
"""What an error says of a user's code that was ended by the clock."""

_FILE = re.compile(r"(?P<path>.+\.py):(?P<attribute>[^:]*)(?::(?P<params>.*))?", re.DOTALL)
_PARAM = re.compile(
    r"""\s*(?P<key>[A-Za-z_][A-Za-z0-9_]*)\s*=\s*
    (?:(?P<double>"(?:[^"\\]|\\.)*")|'(?P<single>[^']*)'|(?P<open>["'])|(?P<bare>[^,]*))\s*(?P<rest>.*)""",
    re.DOTALL | re.VERBOSE,
)
_INT = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r"[A-Za-z0-9_./+*~@%|:-]+(?: [A-Za-z0-9_./+*~@%|:-]+)*")


@dataclass(frozen=True, slots=True)
class Spec:
    """A parsed name: a built-in `name`, or `attribute` of the Python file `path`, with parameters."""

    name: str
    params: dict[str, Value] = field(default_factory=dict)
    path: str | None = None

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.path}:{self.name}" if self.path else self.name


def parse_spec(text: str, kind: str = "task or reward") -> Spec:
    """Read a name with its parameters. Values are int, float, bool (true, false) or text; quotes keep them text.

    Raises ConfigError that shows the part it could not read.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"a {kind} needs a name, such as 'gsm8k:path=train.jsonl' or 'my_task.py:MyTask'")
    text = text.strip()
    in_file = _FILE.fullmatch(text)
    if in_file:
        attribute = in_file["attribute"].strip()
        if not attribute.isidentifier():
            raise ConfigError(f"'{text}': what follows the file must be a name in it, as in 'my_task.py:MyTask'")
        return Spec(attribute, _parse_params(in_file["params"] or "", text), in_file["path"])
    if text.endswith(".py"):
        raise ConfigError(f"'{text}': say which name in the file is meant, as in '{text}:MyTask'")
    name, _, params = text.partition(":")
    return Spec(name.strip(), _parse_params(params, text))


def format_spec(spec: Spec) -> str:
    """The text that `parse_spec` reads back as an equal Spec."""
    params = ",".join(f"{key}={_format_value(value, key)}" for key, value in spec.params.items())
    return f"{spec.label}:{params}" if params else spec.label


def parse_value(text: str) -> Value:
    """int, float, bool or text, whichever the text looks like (never nan or inf)."""
    stripped = text.strip()
    if _INT.fullmatch(stripped):
        return int(stripped)
    if _FLOAT.fullmatch(stripped):
        return float(stripped)
    return {"true": True, "false": False}.get(stripped.lower(), stripped)


def _parse_params(text: str, whole: str) -> dict[str, Value]:
    params: dict[str, Value] = {}
    while text:
        found = _PARAM.fullmatch(text)
        if found is None:
            raise ConfigError(f"'{whole}': cannot read '{text}'; parameters are key=value, split by commas")
        key, double, single, rest = found.group("key", "double", "single", "rest")
        if key in params:
            raise ConfigError(f"'{whole}': parameter '{key}' is given twice")
        if found["open"]:
            raise ConfigError(f"'{whole}': the quote before '{rest}' is never closed")
        if rest and not rest.startswith(","):
            raise ConfigError(f"'{whole}': unexpected '{rest}' after the value of '{key}'")
        try:
            params[key] = json.loads(double, strict=False) if double else single
        except ValueError as error:
            raise ConfigError(
                f"'{whole}': bad escape in {double} ({error}); use single quotes for text as is"
            ) from None
        if params[key] is None:
            params[key] = parse_value(found["bare"])
        text = rest[1:]
    return params


def _format_value(value: Value, key: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if value != value or value in (float("inf"), float("-inf")):
            raise ConfigError(f"parameter '{key}' must be finite, got {value}")
        return repr(value)
    if not isinstance(value, str):
        raise ConfigError(f"parameter '{key}' must be a number, a bool or text, got {type(value).__name__}")
    return value if _PLAIN.fullmatch(value) and isinstance(parse_value(value), str) else json.dumps(value)


_KINDS: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


def check_params(
    function: Callable[..., Any], params: Mapping[str, Any], label: str, *, skip: int = 0, filled: Iterable[str] = ()
) -> None:
    """Refuse parameters that `function` does not take or whose simple annotation they do not fit.

    skip: how many leading parameters the caller fills itself; filled: others it fills, by name. A function with
    **keywords judges those that it does not name itself.
    """
    known = list(inspect.signature(function).parameters.values())[skip:]
    is_open = any(p.kind is p.VAR_KEYWORD for p in known)
    takes = [p for p in known if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {p.name: p for p in takes if p.name not in tuple(filled)}
    for key, value in params.items():
        if key not in names and is_open:
            continue
        if key not in names:
            listed = ", ".join(names) or "none"
            raise ConfigError(f"'{label}' has no parameter '{key}'{suggestion(key, names)} (it takes: {listed})")
        annotation = names[key].annotation
        kind = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        allowed = _KINDS.get(kind)
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise ConfigError(f"'{label}': parameter '{key}' must be {kind}, got {value!r}")
    missing = [name for name, p in names.items() if p.default is p.empty and name not in params]
    if missing:
        raise ConfigError(f"'{label}' needs the parameter '{missing[0]}', as in '{label}:{missing[0]}=...'")


@dataclass(frozen=True, slots=True)
class Plugin:
    """A function ready to call. plain: the one it was before its parameters were bound, with its marks (attributes).

    own: it is of a user's file, which may hang or run anything.
    """

    name: str
    function: Callable[..., Any]
    plain: Callable[..., Any]
    own: bool = False


def load(
    spec: str | Callable[..., Any],
    table: Mapping[str, str],
    *,
    kind: str,
    takes: Sequence[str],
    filled: Iterable[str] = (),
    known: Iterable[str] = (),
) -> Plugin:
    """The function that `spec` names, or is.

    table: "module:function" of every built-in name. kind: what messages call it, such as "reward". takes: the names
    of the leading arguments that the caller gives; filled: others that it gives by name. known: names that mean
    something elsewhere, for the suggestion. Marks on a function (its attributes) are on the bound one, too.

    Raises ConfigError: unknown name or parameter, a file that does not load, something that does not take `takes`.
    """
    if not isinstance(spec, str) and callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)
        _check_leading(spec, name, takes)
        return Plugin(name, spec, spec)
    parsed = parse_spec(spec, kind)
    function = find(parsed, table, kind=kind, known=known)
    if parsed.path is not None:
        if not callable(function) or inspect.isclass(function):
            raise ConfigError(f"'{parsed.label}' is not a function of ({', '.join(takes)})")
        _check_leading(function, parsed.label, takes)
    check_params(function, parsed.params, parsed.label, skip=len(takes), filled=filled)
    bound = functools.partial(function, **parsed.params) if parsed.params else function
    return Plugin(parsed.name, bound, function, own=parsed.path is not None)


def find(parsed: Spec, table: Mapping[str, str], *, kind: str, known: Iterable[str] = ()) -> Any:
    """What a name stands for, its parameters aside: "module:attribute" of `table`, or the one in the user's file.

    Raises ConfigError: see `load`.
    """
    if parsed.path is not None:
        module = load_file(parsed.path)
        if not hasattr(module, parsed.name):
            raise _nothing_called(parsed, [name for name in vars(module) if not name.startswith("_")])
        return getattr(module, parsed.name)
    if parsed.name in table:
        return pkgutil.resolve_name(table[parsed.name])
    check_name(parsed, (*table, *known), kind=kind)
    raise ConfigError(f"'{parsed.name}' is no {kind} here")


def check_name(spec: str | Spec | Callable[..., Any], known: Iterable[str], *, kind: str) -> None:
    """ConfigError for a name that is none of those `known`; a user's file and an object are left to `load`."""
    if isinstance(spec, str) and spec.startswith(OBJECT):
        return
    parsed = parse_spec(spec, kind) if isinstance(spec, str) else spec
    known = tuple(known)
    if not isinstance(parsed, Spec) or parsed.path is not None or parsed.name in known:
        return
    raise ConfigError(
        f"no {kind} is called '{parsed.name}'{suggestion(parsed.name, known)} "
        f"(built in: {', '.join(known)}; your own: my_{kind}.py:function)"
    )


def check_file(parsed: Spec) -> None:
    """ConfigError where a user's file cannot be read or has no such name. It is not run."""
    assert parsed.path is not None
    try:
        source = Path(parsed.path).expanduser().read_bytes()
        names = symtable.symtable(source, parsed.path, "exec").get_identifiers()
    except (OSError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"{parsed.path}:{line}: {type(error).__name__}: {first_line(error)}") from error
    if parsed.name not in names and b"import *" not in source and "__getattr__" not in names:
        raise _nothing_called(parsed, names)


def load_file(path: str) -> ModuleType:
    """Run a user's Python file as a module (once per process) and let it import its neighbours.

    Raises ConfigError that names the file and the line where it failed.
    """
    file = Path(path).expanduser().resolve()
    name = f"upslope_user_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise ConfigError(f"{path}: no such file ({file})")
    module_spec = importlib.util.spec_from_file_location(name, file)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        with ending_forks():
            module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ConfigError(f"{path}:{line_in(error, file)}: {type(error).__name__}: {first_line(error)}") from error
    return module


@contextmanager
def ending_forks() -> Iterator[None]:
    """Around a call of a user's code: a forked child that returns or raises ends here, as a program of its own would.

    Without it the child would be a second trainer, or a second reward worker that answers too.
    """
    process, code = os.getpid(), 0
    try:
        yield
    except BaseException as error:
        if os.getpid() == process:
            raise
        quiet = isinstance(error, SystemExit) and isinstance(error.code, int | None)
        code = (error.code or 0) & 0xFF if quiet else 1
        if not quiet:
            traceback.print_exception(error)
    finally:
        if os.getpid() != process:
            os._exit(code)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip().splitlines() or ["(no message)"])[0][:300]


def line_in(error: BaseException, file: Path) -> int:
    """The line of the file at which an error happened; 1 where it was elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return (lines[-1] if lines else None) or 1


def _nothing_called(parsed: Spec, names: Iterable[str]) -> ConfigError:
    return ConfigError(f"{parsed.path} has nothing called '{parsed.name}'{suggestion(parsed.name, names)}")


def _check_leading(function: Callable[..., Any], label: str, takes: Sequence[str]) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < len(takes) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(f"'{label}' must take ({', '.join(takes)}) as its first {len(takes)} arguments")
