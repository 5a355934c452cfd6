"""The command: help at once, one clear line for every mistake, exit codes."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from upslope import cli, options
from upslope.config import load, read_toml
from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.version import __version__

HEAVY = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "peft", "gguf", "huggingface_hub")


def upslope(*arguments: str, root: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "upslope"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "100"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=120)


COUNT_MODULES = f"""
import sys
from upslope.cli import main
code = main(sys.argv[1:])
found = sorted(set({HEAVY!r}) & set(sys.modules))
print(len(sys.modules), ','.join(found), sep=';', file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_is_light(arguments: list[str], root: Path) -> None:
    done = upslope(*arguments, root=root, code=COUNT_MODULES)
    assert done.returncode == 0, done.stderr
    count, _, heavy = done.stderr.strip().rpartition("\n")[2].partition(";")
    assert heavy == "", f"help imports {heavy}"
    assert int(count) < 400
    assert "upslope" in done.stdout


def test_help_is_fast(root: Path) -> None:
    """The best of three in processor time, other tests run beside; a warm start takes about a quarter of a second."""
    seconds = []
    for _ in range(3):
        before = os.times()
        assert upslope("ppo", "--help", root=root).returncode == 0
        after = os.times()
        used = after.children_user - before.children_user, after.children_system - before.children_system
        seconds.append(sum(used))
    assert min(seconds) < 1.0


def test_every_verb_exists() -> None:
    """A verb in the list has its options class and its function; nothing is announced that is not there."""
    for verb in cli.VERBS.values():
        assert hasattr(options, verb.options)
        module, _, function = verb.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_overview_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {verb} ", printed, re.MULTILINE) for verb in cli.VERBS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"upslope {__version__}\n"


def test_verb_help_shows_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["grpo", "--help"]) == 0
    printed = capsys.readouterr().out
    for name in options.GRPOOptions.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in printed


def test_help_begins_with_what_one_sets_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "--help"]) == 0
    first, *others = re.findall(r"^(\S.*):\n((?:  .*\n?)+)", capsys.readouterr().out, re.MULTILINE)
    wanted = "task model reward learning-rate num-prompts num-generations max-completion-length max-steps output-dir"
    assert first[0] == "What one sets first"
    assert re.findall(r"^  --([a-z-]+)", first[1], re.MULTILINE) == [*wanted.split(), "kl-coef"]
    headings = [heading for heading, _ in others]
    assert {"Options of ppo", "Returns and critic", "KL to the reference model", "Sampling", "Launch"} <= set(headings)
    assert len(headings) == len(set(headings))
    assert "  --critic-learning-rate FLOAT|none\n" in dict(others)["Returns and critic"]


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_names_every_option_once(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = getattr(options, cli.VERBS[verb].options)
    assert cli.main([verb, "--help"]) == 0
    printed = capsys.readouterr().out
    shown = re.findall(r"^  --([a-z-]+)", printed, re.MULTILINE)
    assert sorted(shown) == sorted(name.replace("_", "-") for name in kind.__dataclass_fields__)
    assert "left out:" not in printed.lower()


def test_help_shows_other_spellings_and_the_files_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.toml").write_text("kl_coef = 0.25\nreward = ['a', 'b']\n")
    assert cli.main(["grpo", "-c", f"{tmp_path}/a.toml", "--json", "-h"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--beta, --kl-coef FLOAT Weight of the KL divergence to the reference model in the loss" in printed
    assert "no reference is loaded. (default: 0.25)" in printed
    assert "(default: a b)" in printed
    assert "--json, --no-json Print what comes out as one JSON object on standard output. (default: true)" in printed
    assert "(default: none)" in printed.partition("--patience INT|none")[2]
    assert "--lora-alpha FLOAT|none Scale of the adapters; default: twice the rank. --lora" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dmo"], "unknown verb 'dmo'; did you mean 'demo'?"),
        (["zzzz"], "unknown verb 'zzzz'; verbs: demo"),
        (["--zzzz"], "unknown option '--zzzz'"),
        (
            ["ppo", "--learning-rat", "1"],
            "unknown option '--learning-rat' for upslope ppo; did you mean '--learning-rate'?",
        ),
        (["ppo", "--zzzz=1"], "unknown option '--zzzz' for upslope ppo; see --help"),
        (["ppo", "--learning-rate", "fast"], "--learning-rate: learning_rate must be a number, got 'fast'"),
        (["ppo", "--learning-rate=fast"], "--learning-rate: learning_rate must be a number, got 'fast'"),
        (["ppo", "--learning-rate", "-1"], "--learning-rate: learning_rate is -1.0"),
        (["ppo", "--max-steps", "1.5"], "--max-steps: max_steps must be an integer, got '1.5'"),
        (["ppo", "--max-steps"], "Missing value for argument '--max-steps'"),
        (["ppo", "--patience", "x"], "--patience: patience must be an integer or none, got 'x'"),
        (["ppo", "--dtype", "flot32"], "did you mean 'float32'?"),
        (["ppo", "--json", "maybe"], "--json is a switch: it takes no value 'maybe'"),
        (["ppo", "--json=maybe"], "--json: expected true or false, got 'maybe'"),
        (["ppo", "foo"], "Unrecognized options: foo"),
        (["ppo", "--config"], "--config wants the path of a TOML file"),
        (["ppo", "-c", "no-such-file.toml"], "no-such-file.toml: no such file"),
        (["sft"], "give exactly one of --data and --task"),
        (["grpo", "--beta", "1", "--kl-coef=2"], "--kl-coef: '--kl-coef' is given twice, also at --beta"),
        (["grpo", "--kl-coef", "-1"], "--kl-coef: beta is -1.0; it must be at least 0"),
        (["grpo", "--kl-coeff", "1"], "did you mean '--kl-coef'?"),
        (["expert", "--threshold", "nan"], "--threshold: threshold is nan; it must be finite"),
        (["sft", "--data", "x", "--max-steps", "1" + "0" * 400, "--target"], "Missing value for argument '--target'"),
        (["ppo", "--top-k", "3"], "name the correction"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("upslope: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err


def parse(*arguments: str) -> options.PPOOptions:
    return cli.parse("ppo", options.PPOOptions, arguments)


def test_flags_win_over_files(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("learning_rate = 1\nnum-prompts = 5\nreward = ['a', 'b']\n")
    (tmp_path / "b.toml").write_text("num_prompts = 6\nvalue_clip = 0.5\n")
    made = parse("-c", f"{tmp_path}/a.toml", "--learning-rate", "2e-6", f"--config={tmp_path}/b.toml")
    expected = options.PPOOptions(learning_rate=2e-6, num_prompts=6, value_clip=0.5, reward=("a", "b"))
    assert made == expected
    assert parse("--value-clip", "none", "-c", f"{tmp_path}/b.toml").value_clip is None


def test_a_flag_repairs_a_bad_value_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text("seed = 1\nlearning_rate = -1\n")
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))}:2: learning_rate is -1.0"):
        parse("--config", str(path))
    assert parse("--config", str(path), "--learning-rate", "1").learning_rate == 1.0


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--num_prompts", "3"], "num_prompts", 3),
        (["--num-prompts=3"], "num_prompts", 3),
        (["--json"], "json", True),
        (["--no-json"], "json", False),
        (["--no-whiten-advantages"], "whiten_advantages", False),
        (["--whiten-advantages", "false"], "whiten_advantages", False),
        (["--whiten_advantages=true"], "whiten_advantages", True),
        (["--reward", "a", "b:n=1@0.5"], "reward", ("a", "b:n=1@0.5")),
        (["--reward"], "reward", ()),
        (
            ["--reward", "task", "--reward", "length:target=4@2", "--seed", "3", "--reward=x.py:f", "y"],
            "reward",
            ("task", "length:target=4@2", "x.py:f", "y"),
        ),
        (["--reward=--odd", "--reward", "b"], "reward", ("--odd", "b")),
        (["--patience", "None"], "patience", None),
        (["--epsilon-high", "none"], "epsilon_high", None),
        (["--target", "-0.5"], "target", -0.5),
        (["--target=-5e-1"], "target", -0.5),
        (["--output-dir", "runs/a b"], "output_dir", "runs/a b"),
        (["--output-dir=--odd"], "output_dir", "--odd"),
        (["--target", "-5e-1"], "target", -0.5),
        (["--output-dir", "-odd"], "output_dir", "-odd"),
    ],
)
def test_spellings(arguments: list[str], name: str, value: object) -> None:
    assert getattr(parse(*arguments), name) == value


SPELLINGS = [
    ("grpo", "kl_coef", "beta", 0.5),
    ("grpo", "num_epochs", "num_iterations", 3),
    ("sft", "num_train_prompts", "num_examples", 7),
    ("seq2seq", "num_train_prompts", "num_examples", 7),
    ("seq2seq", "num_generations", "num_samples", 5),
    ("seq2seq", "num_beams", "beam_width", 2),
    ("pretrain", "stride", "eval_stride", 8),
    ("generate", "max_completion_length", "max_tokens", 9),
    ("chat", "max_completion_length", "max_tokens", 9),
    ("generate", "num_generations", "num_return_sequences", 2),
    ("generate", "beam_width", "num_beams", 2),
    ("eval", "context_length", "context", 32),
    ("eval", "eval_stride", "stride", 16),
    ("eval", "eval_samples", "limit", 4),
    ("eval", "model", "models", ("a",)),
    ("export", "output_dir", "output", "x"),
]


@pytest.mark.parametrize(("verb", "other", "name", "value"), SPELLINGS)
def test_an_option_has_the_spelling_of_the_other_verbs(
    verb: str, other: str, name: str, value: object, tmp_path: Path
) -> None:
    kind = getattr(options, cli.VERBS[verb].options)
    words = list(value) if isinstance(value, tuple) else [str(value)]
    given = {key: cli._read(verb, kind, [f"--{key.replace('_', '-')}", *words])[0] for key in (other, name)}
    assert given[other][name].value == given[name][name].value == value
    path = tmp_path / "a.toml"
    path.write_text(f"{other} = {list(value) if isinstance(value, tuple) else value!r}\n")
    assert read_toml(kind, path)[name].value == value
    path.write_text(f"{other} = {list(value) if isinstance(value, tuple) else value!r}\n" * 2)
    path.write_text(path.read_text().replace(other, name, 1))
    with pytest.raises(ConfigError, match=f"a.toml:2: '{other}' is given twice, also at .*a.toml:1"):
        read_toml(kind, path)


def test_python_takes_either_spelling() -> None:
    kind: Any = options.GRPOOptions
    assert kind(kl_coef=0.5, num_epochs=2) == kind(beta=0.5, num_iterations=2)
    assert replace(kind(kl_coef=0.5), beta=1.0).beta == 1.0
    with pytest.raises(ConfigError, match="kl_coef is given twice, also as beta"):
        kind(kl_coef=0.5, beta=0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'kl_coeff'"):
        kind(kl_coeff=0.5)


def test_a_later_source_wins_by_either_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("beta = 1\n")
    made = cli.parse("grpo", options.GRPOOptions, ["-c", f"{tmp_path}/a.toml", "--kl-coef", "2"])
    assert made == options.GRPOOptions(beta=2.0)
    with pytest.raises(ConfigError, match="--kl-coef: 'kl_coef' is given twice, also at --beta"):
        load(options.GRPOOptions, overrides={"beta": 1, "kl_coef": 2})
    assert load(options.GRPOOptions, tmp_path / "a.toml", overrides={"kl_coef": 2}) == made


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--whiten-advantages", True),
        ("--no-whiten-advantages", False),
        ("--whiten-advantages true", True),
        ("--whiten-advantages=none", None),
    ],
)
def test_a_switch_that_may_have_no_value(words: str, value: bool | None) -> None:
    made = cli.parse("reinforce", options.ReinforceOptions, words.split())
    assert made == options.ReinforceOptions(whiten_advantages=value)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ConfigError("bad option"), 2, "bad option"),
        (DataError("rows.jsonl:3: no 'prompt'"), 3, "rows.jsonl:3: no 'prompt'"),
        (ModelError("m: missing\nlm_head.weight"), 4, "m: missing lm_head.weight"),
        (RunError("disk full"), 5, "disk full"),
        (OSError(28, "No space left on device", "/runs/x"), 5, "/runs/x: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error

    module = importlib.import_module("upslope.commands.doctor")
    monkeypatch.setattr(module, "run", fail)
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == f"upslope: error: {message}\n"


def test_unforeseen_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("upslope.commands.doctor")
    monkeypatch.setattr(module, "run", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_a_closed_pipe_is_quiet(root: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "upslope", "--help"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment, timeout=60)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == ""


def test_doctor_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) in {0, 1}
    report = json.loads(capsys.readouterr().out)
    statuses = [check["status"] for check in report["checks"]]
    assert [report["passed"], report["warned"], report["failed"]] == [
        statuses.count(kind) for kind in ("ok", "warn", "fail")
    ]
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")
    assert report["machine"]["matmul_gflops"]["float32"] > 0
    assert {"python", "memory", "threads", "dtype", "smollm2-135m"} <= {check["name"] for check in report["checks"]}


def test_doctor_prints_fixes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from upslope import extras

    monkeypatch.setattr(extras, "installed", lambda module: module != "reasoning_gym")
    cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert "without reasoning_gym" in printed
    assert "pip install 'upslope[tasks]'" in printed


def test_doctor_fails_without_memory_or_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from upslope.commands import doctor

    monkeypatch.setattr(doctor, "_cgroup_memory", lambda: 1.0)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    monkeypatch.chdir(tmp_path)
    report = doctor.examine()
    failed = {check["name"] for check in report["checks"] if check["status"] == "fail"}
    assert {"memory", "working folder", "model cache"} <= failed
    assert all(check["fix"] for check in report["checks"] if check["status"] == "fail")


@pytest.mark.parametrize(("triton", "status"), [(True, "ok"), (False, "warn")])
def test_doctor_says_what_attends_on_a_gpu(triton: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from upslope.commands import doctor

    if not doctor.torch.cuda.is_available():
        assert not doctor._gpu_attention()
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "fused_attention", lambda: triton)
    assert [check.status for check in doctor._gpu_attention()] == [status]


def test_doctor_says_why_the_kernels_are_not_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upslope import kernels
    from upslope.commands import doctor

    monkeypatch.setattr(kernels, "problem", lambda: "no C++ compiler (c++, g++, clang++) on the PATH")
    cli.main(["doctor"])
    out = capsys.readouterr().out
    assert "warn kernels           not used: no C++ compiler (c++, g++, clang++) on the PATH" in out
    assert "-> install a C++ compiler" in out

    monkeypatch.setattr(kernels, "problem", lambda: "written for AVX-512, which this processor does not have")
    assert (doctor._kernels().status, doctor._kernels().fix) == ("ok", "")
    monkeypatch.setattr(kernels, "problem", lambda: "switched off by UPSLOPE_KERNELS")
    assert (doctor._kernels().status, doctor._kernels().fix) == ("warn", "unset it")
