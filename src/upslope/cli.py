"""The command `upslope VERB [--config FILE] [--key value ...]`. Imports nothing heavy: help answers at once.

A verb is an options dataclass and the function that takes it. Every failure that upslope foresees ends in one line on
stderr and the exit code of its error class; 2 for a wrong command line, 130 for Ctrl-C.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_origin

from upslope.config import Setting, build, from_text, hints_of, meant, read_toml
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
        "ExplainOptions", "upslope.commands.explain:run", "the batch arithmetic of a recipe, in words", "verb"
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
        print(overview())
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
    module, _, function = verb.target.partition(":")
    run: Callable[[Any], int | None] = getattr(importlib.import_module(module), function)
    return run(options) or 0


def overview() -> str:
    """The text of `upslope --help`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        f"upslope {__version__}: post-training of language models, from theory to practice\n\n{USAGE}\n\n{verbs}\n\n"
        "`upslope VERB --help` shows a verb's options."
    )


def parse(name: str, options_class: type[Any], arguments: Sequence[str]) -> Any:
    """The options of verb `name` from its arguments, or None when help was asked for (and printed)."""
    words, files, flags, lists = _scan(name, options_class, arguments)
    settings: dict[str, Setting] = {}
    for file in [*_file_of_resumed_run(name, words), *files]:
        settings.update(read_toml(options_class, file))
    if {"-h", "--help"} & set(words):
        _tyro(name, options_class, ["--help"], _defaults(options_class, settings))
        return None
    given = _tyro(name, options_class, words, _defaults(options_class, settings))
    values = {key: tuple(lists[key]) if key in lists else getattr(given, key) for key in flags}
    settings |= {key: Setting(value, f"--{_kebab(key)}") for key, value in values.items()}
    return build(options_class, settings)


def _file_of_resumed_run(name: str, words: Sequence[str]) -> list[str]:
    """With --resume --output-dir X, the configuration of the run in X: what is not said again stays as it was."""
    folders = [word.partition("=")[2] for word in words if word.startswith("--output-dir=")]
    folders += [after for word, after in itertools.pairwise(words) if word == "--output-dir"]
    if "--resume" not in words or not folders:
        return []
    folder = folders[-1]
    path = os.path.join(folder, "config.toml")
    if not os.path.isfile(path):
        raise ConfigError(
            f"--resume: {folder} is not a run folder (it has no config.toml); a run that was killed while it was made "
            "starts again without --resume"
        )
    verb = _verb_of_run(folder)
    if verb in VERBS and verb != name:
        again = shlex.join(["upslope", verb, "--resume", "--output-dir", folder])
        raise ConfigError(f"--resume: {folder} is a run of {verb}, not of {name}; continue it with: {again}")
    return [path]


def _verb_of_run(folder: str) -> str:
    """What a run folder says that it is of; empty where it does not."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "env.json"), encoding="utf-8") as file:
        said = json.load(file)
        return str(said.get("verb", "")) if isinstance(said, dict) else ""
    return ""


def _scan(
    name: str, options_class: type[Any], arguments: Sequence[str]
) -> tuple[list[str], list[str], list[str], dict[str, list[Any]]]:
    """Split off --config, check every flag's name, and spell values as tyro wants them.

    Returns the words for tyro, the files of --config, the names of the options that were set, and the values of lists.
    These tyro does not see: of a list given in parts (--reward a --reward b) it would take the last part.
    """
    hints = hints_of(options_class)
    words: list[str] = []
    files: list[str] = []
    flags: list[str] = []
    lists: dict[str, list[Any]] = {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word in {"-h", "--help"}:
            words.append("--help")
            continue
        if not word.startswith("--") and word != "-c":
            if flags and flags[-1] in lists:
                lists[flags[-1]].append(from_text(flags[-1], word, hints[flags[-1]], f"--{_kebab(flags[-1])}"))
            else:
                words.append(_checked(flags[-1], word, hints) if flags else word)
            continue
        flag, equals, value = word.partition("=")
        key = flag.lstrip("-").replace("-", "_")
        if flag == "-c" or (key == "config" and "config" not in hints):
            if not equals and not queue:
                raise ConfigError(f"{flag} wants the path of a TOML file")
            files.append(value if equals else queue.pop(0))
            continue
        negated = key.removeprefix("no_")
        if key not in hints and hints.get(negated) is bool:
            flags.append(negated)
            words.append(f"--no-{_kebab(negated)}")
            continue
        if key not in hints:
            known = [f"--{_kebab(other)}" for other in [*hints, "config", "help"]]
            nearest = f"--{_kebab(meant(key, hints))}"
            raise ConfigError(f"unknown option {flag!r} for upslope {name}{_or_all(nearest, known, all_of='')}")
        flags.append(key)
        if get_origin(hints[key]) is tuple:
            own = lists.setdefault(key, [])
            if equals:
                own.append(from_text(key, value, hints[key], f"--{_kebab(key)}"))
            continue
        if hints[key] is bool and (equals or (queue and queue[0].lower() in {"true", "false"})):
            words.append(_boolean(key, value if equals else queue.pop(0)))
            continue
        words.append(f"--{_kebab(key)}" + (f"={_checked(key, value, hints)}" if equals else ""))
    return words, files, flags, lists


def _checked(key: str, word: str, hints: dict[str, Any]) -> str:
    """The word as tyro wants it, once it is known to fit the option's type."""
    if hints[key] is bool:
        raise ConfigError(f"--{_kebab(key)} is a switch: it takes no value {word!r}")
    return "None" if from_text(key, word, hints[key], f"--{_kebab(key)}") is None else word


def _boolean(key: str, value: str) -> str:
    if value.lower() not in {"true", "false"}:
        raise ConfigError(f"--{_kebab(key)}: expected true or false, got {value!r}")
    return f"--{'' if value.lower() == 'true' else 'no-'}{_kebab(key)}"


def _defaults(options_class: type[Any], settings: dict[str, Setting]) -> dict[str, Any]:
    """What tyro shows and returns for options that the command line leaves alone."""
    import tyro

    values: dict[str, Any] = {}
    for field in fields(options_class):
        if field.name in settings:
            values[field.name] = settings[field.name].value
        elif field.default is not MISSING:
            values[field.name] = field.default
        elif field.default_factory is not MISSING:
            values[field.name] = field.default_factory()
        else:
            values[field.name] = tyro.MISSING
    return values


def _tyro(name: str, options_class: type[Any], words: list[str], defaults: dict[str, Any]) -> Any:
    import tyro

    instance = object.__new__(options_class)  # not __init__: a class may check itself there, before the flags are in
    for key, value in defaults.items():
        object.__setattr__(instance, key, value)
    about = [options_class.__doc__ or ""]
    if "config" not in defaults:
        about.append("Options come from --config FILE.toml (may be repeated) and from these flags, which win.")
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                options_class, prog=f"upslope {name}", args=words, default=instance, description="\n\n".join(about)
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        raise ConfigError(_one_line(name, box.getvalue())) from None


def _one_line(name: str, box: str) -> str:
    """The first section of tyro's error box as one line, with the way to the help."""
    text: list[str] = []
    for line in box.splitlines()[1:]:
        inner = line.strip().strip("│╭╰╮╯").strip()
        if re.fullmatch("[─ ]*", inner):
            if text:
                break
            continue
        text.append(inner)
    message = " ".join(text).rstrip(".")
    return f"{message}; see upslope {name} --help"


def _or_all(word: str, known: Iterable[str], *, all_of: str = "verbs") -> str:
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; {all_of}: {' '.join(names)}" if all_of else "; see --help"


def _kebab(key: str) -> str:
    return key.replace("_", "-")
