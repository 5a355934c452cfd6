"""The command `upslope VERB [--config FILE] [--key value ...]`. Imports nothing heavy: help answers at once.

A verb is an options dataclass and the function that takes it. Every failure that upslope foresees ends in one line on
stderr and the exit code of its error class; 2 for a wrong command line, 130 for Ctrl-C.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import itertools
import json
import os
import pkgutil
import re
import shlex
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from upslope.config import Setting, build, coerce, hints_of, meant, names_of, read_toml
from upslope.errors import ConfigError, RunError, UpslopeError, one_line
from upslope.loop.look import look
from upslope.version import __version__


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb: its options class in `upslope.options`, "module:function" called with them, one line of help.

    `words` names the option that takes the words right after the verb, as in `upslope compare a.toml b.toml`.
    """

    options: str
    target: str
    summary: str
    words: str = ""


TRAINING = "upslope.commands.train:run"

VERBS: dict[str, Verb] = {
    "demo": Verb("DemoOptions", "upslope.studies.demo:run", "the whole way on one task: base, then sft, then ppo"),
    "pretrain": Verb("PretrainOptions", TRAINING, "a tokenizer and a model from text files"),
    "sft": Verb("SFTOptions", TRAINING, "supervised fine-tuning on conversations or text"),
    "reinforce": Verb("ReinforceOptions", TRAINING, "policy gradient, one step per batch"),
    "ppo": Verb("PPOOptions", TRAINING, "proximal policy optimisation with a critic"),
    "grpo": Verb("GRPOOptions", TRAINING, "group-relative policy optimisation, no critic"),
    "reward": Verb("RewardOptions", TRAINING, "a reward model, from comparisons or labelled steps"),
    "dpo": Verb("DPOOptions", TRAINING, "preferences without a reward model: dpo ipo kto orpo simpo"),
    "expert": Verb("ExpertOptions", TRAINING, "sample, keep the best, imitate them, again"),
    "distill": Verb("DistillOptions", TRAINING, "learn a teacher's distributions, on own samples"),
    "compare": Verb(
        "CompareOptions",
        "upslope.studies.compare:run",
        "recipes on an equal budget, with seeds, in one report",
        "configs",
    ),
    "seq2seq": Verb("Seq2SeqOptions", TRAINING, "an encoder-decoder on pairs of texts"),
    "classify": Verb("ClassifyOptions", TRAINING, "an encoder that labels texts"),
    "tag": Verb("TagOptions", TRAINING, "an encoder that tags words, entities say"),
    "eval": Verb("EvalOptions", "upslope.commands.evaluate:run", "measure models: figures with intervals", "models"),
    "generate": Verb("GenerateOptions", "upslope.commands.generate:run", "complete prompts", "model"),
    "chat": Verb("ChatOptions", "upslope.commands.chat:run", "talk to a model in the terminal", "model"),
    "serve": Verb("ServeOptions", "upslope.commands.serve:run", "an OpenAI-compatible server and a chat page", "model"),
    "export": Verb("ExportOptions", "upslope.commands.export:run", "write a model for use elsewhere", "model"),
    "fetch": Verb("FetchOptions", "upslope.commands.fetch:run", "bring a model into the cache, for work offline"),
    "doctor": Verb("DoctorOptions", "upslope.commands.doctor:run", "what this machine has and what runs on it"),
    "explain": Verb(
        "ExplainOptions", "upslope.commands.runs:explain", "the batch arithmetic of a recipe, in words", "verb"
    ),
    "runs": Verb("RunsOptions", "upslope.commands.runs:run", "list the run folders and what came out", "folder"),
}

USAGE = "usage: upslope VERB [--config FILE.toml] [--key value ...]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (a printed failure is a code, never a traceback)."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except UpslopeError as error:
        return _fail(_as_typed(str(error), *(sys.argv[1:2] if argv is None else argv[:1])), error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `upslope runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk or a folder without rights, met where no room foresaw it
        named = f"{error.filename}: " if error.filename else ""
        return _fail(f"{named}{error.strerror or error}", RunError.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _as_typed(message: str, verb: str = "") -> str:
    """A message with the verb's options as the command line has them, where it does not say where one was set."""
    if verb not in VERBS or re.match(r"--|.*\.toml:\d", message):
        return message
    names = hints_of(getattr(importlib.import_module("upslope.options"), VERBS[verb].options))
    option = rf"(?<![\w'/.=-])({'|'.join(name for name in names if '_' in name) or '(?!)'})(?![\w'/.-])( = )?"
    return re.sub(option, lambda found: f"--{_kebab(found[1])}{' ' if found[2] else ''}", message)


def _fail(message: str, code: int) -> int:
    print(f"upslope: error: {one_line(message, 2000)}", file=sys.stderr)
    return code


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in {"-h", "--help", "help"}:
        width = max(map(len, VERBS))
        verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
        title = f"upslope {__version__}: post-training of language models, from theory to practice"
        print(f"{title}\n\n{USAGE}\n\n{verbs}\n\n`upslope VERB --help` shows a verb's options.")
        return 0
    if argv[0] in {"-V", "--version", "version"}:
        print(f"upslope {__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    if name not in VERBS:
        kind = "option" if name.startswith("-") else "verb"
        raise ConfigError(f"unknown {kind} {name!r}{_or_all(name, VERBS)}")
    verb = VERBS[name]
    options_class = getattr(importlib.import_module("upslope.options"), verb.options)
    if verb.words and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{_kebab(verb.words)}", *arguments]
    options = parse(name, options_class, arguments)
    if options is None:
        return 0
    look(options)
    return pkgutil.resolve_name(verb.target)(options) or 0


def parse(name: str, options_class: type[Any], arguments: Sequence[str]) -> Any:
    """The options of verb `name` from its arguments, or None when help was asked for (and printed)."""
    given, files, helping = _read(name, options_class, arguments)
    settings: dict[str, Setting] = {}
    for file in [*_file_of_resumed_run(name, given), *files]:
        settings.update(read_toml(options_class, file))
    settings |= given
    if helping:
        print(help_of(name, options_class, settings))
        return None
    return build(options_class, settings)


def _file_of_resumed_run(name: str, given: Mapping[str, Setting]) -> list[str]:
    """With --resume --output-dir X, the configuration of the run in X: what is not said again stays as it was."""
    unsaid = Setting(None, "")
    folder = given.get("output_dir", unsaid).value
    if folder is None or not given.get("resume", unsaid).value:
        return []
    path = os.path.join(folder, "config.toml")
    if not os.path.isfile(path):
        raise ConfigError(
            f"--resume: {folder} is not a run folder (it has no config.toml); a run that was killed while it was made "
            "starts again without --resume"
        )
    written: Any = None
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "env.json"), encoding="utf-8") as file:
        written = json.load(file)
    verb = str(written.get("verb", "")) if isinstance(written, dict) else ""
    if verb in VERBS and verb != name:
        again = shlex.join(["upslope", verb, "--resume", "--output-dir", folder])
        raise ConfigError(f"--resume: {folder} is a run of {verb}, not of {name}; continue it with: {again}")
    return [path]


def _read(name: str, options_class: type[Any], words: Iterable[str]) -> tuple[dict[str, Setting], list[str], bool]:
    """What the words set, by field; the files of --config; whether help is asked for.

    A list may be given in parts (--reward a --reward=b c), and what follows an option is its value unless it begins
    with two dashes or is -c or -h: a negative number, say.
    """
    hints, names = hints_of(options_class), names_of(options_class)
    given: dict[str, Setting] = {}
    files: list[str] = []
    helping = False
    queue = list(words)

    def at_value() -> bool:
        return bool(queue) and not (queue[0].startswith("--") or queue[0] in {"-c", "-h"})

    while queue:
        if at_value():
            raise ConfigError(f"Unrecognized options: {queue[0]}; see upslope {name} --help")
        flag, equals, value = queue.pop(0).partition("=")
        key = {"-c": "config", "-h": "help"}.get(flag, flag[2:].replace("-", "_"))
        if key == "help":
            helping = True
            continue
        if flag == "-c" or (key == "config" and "config" not in names):
            if not equals and not queue:
                raise ConfigError(f"{flag} wants the path of a TOML file")
            files.append(value if equals else queue.pop(0))
            continue
        positive = key.removeprefix("no_")
        off = key not in names and positive in names and _is_switch(hints[names[positive]])
        key = positive if off else key
        if key not in names:
            known = [f"--{_kebab(other)}" for other in [*names, "config", "help"]]
            nearest = f"--{_kebab(meant(key, names))}"
            raise ConfigError(f"unknown option {flag!r} for upslope {name}{_or_all(nearest, known, all_of='')}")
        if off and equals:
            raise ConfigError(f"{flag} is a switch: it takes no value, got {value!r}")
        field, where = names[key], f"--{_kebab(key)}"
        hint, before = hints[field], given.get(field)
        if before is not None and before.where != where:
            raise ConfigError(f"{where}: {flag!r} is given twice, also at {before.where}")
        parts = ["false"] if off else [value] if equals else []
        several = get_origin(hint) is tuple
        while at_value() and (several or not parts):
            parts.append(queue.pop(0))
        if several:
            made = tuple(coerce(field, part, hint, where, word=True) for part in parts)
            given[field] = Setting(before.value + made if before else made, where)
            continue
        if _is_switch(hint):
            parts = parts or ["true"]
            if parts[0].lower() not in {"true", "false", *(["none"] if hint is not bool else [])}:
                wrong = ": expected true or false, got" if equals else " is a switch: it takes no value"
                raise ConfigError(f"{where}{wrong} {parts[0]!r}")
        if not parts:
            raise ConfigError(f"Missing value for argument {flag!r}; see upslope {name} --help")
        given[field] = Setting(coerce(field, parts[0], hint, where, word=True), where)
    return given, files, helping


def _is_switch(hint: Any) -> bool:
    return bool in (hint, *get_args(hint))


def help_of(name: str, options_class: type[Any], settings: Mapping[str, Setting]) -> str:
    """The text of `upslope VERB --help`: what one sets first, then the rest, each under the heading of its class.

    An option's class is the first that has it, and that class's docstring the heading; its text is that of the last
    class that says something of it. `settings` are shown as the defaults.
    """
    texts: dict[str, str] = {}
    heading_of: dict[str, str] = {}
    for base in reversed(options_class.__mro__[:-1]):
        heading = f"Options of {name}" if base is options_class else str(base.__doc__).split("\n")[0].rstrip(".")
        body: Any = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        for node, after in itertools.pairwise([*body.body, None]):
            if isinstance(node, ast.AnnAssign):
                heading_of.setdefault(ast.unparse(node.target), heading)
                if isinstance(after, ast.Expr):
                    texts[ast.unparse(node.target)] = " ".join(ast.literal_eval(after.value).split())
    first = options_class.FIRST.split()
    headings = dict.fromkeys(["What one sets first", *reversed(heading_of.values())])
    heading_of |= dict.fromkeys(first, "What one sets first")
    parts = [USAGE.replace("VERB", name), inspect.cleandoc(options_class.__doc__ or "")]
    if "config" not in texts:
        parts.append("Options come from --config FILE.toml (may be repeated) and from these flags, which win.")
    for heading in headings:
        fields = [field for field in dict.fromkeys([*first, *texts]) if heading_of[field] == heading]
        entries = [_help_of_option(options_class, field, texts[field], settings) for field in fields]
        parts += ["\n".join([f"{heading}:", *entries])] if entries else []
    return "\n\n".join(parts)


def _help_of_option(options_class: type[Any], field: str, text: str, settings: Mapping[str, Setting]) -> str:
    """`  --flag, --other-spelling TYPE  what it is (default: value)`, wrapped."""
    hint, known = hints_of(options_class)[field], names_of(options_class)
    flags = [f"--{_kebab(spelling)}" for spelling in known if known[spelling] == field]
    flags += [f"--no-{_kebab(field)}"] if _is_switch(hint) else []
    value = settings[field].value if field in settings else options_class.__dataclass_fields__[field].default
    if value not in (None, (), "") or "default" not in text:
        shown = " ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else str(value).lower()
        text += f" (default: {shown or 'none'})"
    left = f"  {', '.join(flags)}" + ("" if _is_switch(hint) else f" {_kind(hint)}")
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    indent = " " * 28
    right = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return f"{left:<28}{right.lstrip()}" if len(left) < 28 else f"{left}\n{right}"


def _kind(hint: Any) -> str:
    """What an option takes, in a word: INT, {a,b}, FLOAT|none, TEXT ..."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return "|".join(_kind(argument) for argument in arguments)
    if origin is Literal:
        return "{" + ",".join(arguments) + "}"
    if origin is tuple:
        return f"{_kind(arguments[0])} ..."
    return {int: "INT", float: "FLOAT", type(None): "none"}.get(hint, "TEXT")


def _or_all(word: str, known: Iterable[str], *, all_of: str = "verbs") -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; {all_of}: {' '.join(names)}" if all_of else "; see --help"


def _kebab(key: str) -> str:
    return key.replace("_", "-")
