"""The servers that are compared: how each is started, in its own process and environment, and what it is asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.environments import peer_python
from benchmarks.harness import ROOT
from benchmarks.serving.client import HOST
from benchmarks.speed.runner import PEERS

READY_S = 600.0
"""Loading and compiling may take so long."""
END_S = 30.0
"""How long a server may take to end by itself."""


class Failed(RuntimeError):
    """A server did not install, start or answer; the message holds the end of what it wrote."""


@dataclass(frozen=True)
class Kind:
    """A server that can be started.

    requirements: of its own environment; none means this one. looks: candidates of its options, each with the words
    and environment variables it adds ({cores}: the numbers of the cores to compute on). fields: what its requests say
    besides prompt, max_tokens and stream, so that it decodes greedily, goes on after the end of sequence, and tells
    how many tokens it made.
    """

    fields: Mapping[str, Any]
    looks: tuple[Mapping[str, Any], ...] = ({},)
    requirements: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What it is, with versions."""
        return " ".join(self.requirements)


OPENAI = {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
CONTINUOUS = ["--continuous-batching"]
FITTED = ["--cb-block-size", "128", "--cb-num-blocks", "160", "--cb-max-batch-tokens", "2048"]
"""A cache for 64 sequences of up to 192 tokens, and room in a batch for all their prompts; else by free memory."""
ALL_CORES = {"VLLM_CPU_OMP_THREADS_BIND": "{cores}"}
KINDS = {
    "ours": Kind(fields=OPENAI),
    "transformers": Kind(
        requirements=("torch==2.13.0", "transformers[serving]==5.23.0"),
        # a generation config is what it takes per request; -1 is no token's number
        fields={"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1, "pad_token_id": 0})},
        looks=(
            {},
            {"words": CONTINUOUS},
            {"words": [*CONTINUOUS, *FITTED]},
        ),
    ),
    "vllm": Kind(
        requirements=tuple(PEERS["vllm"]["requirements"]),
        remove=PEERS["vllm"]["remove"],
        fields=OPENAI,
        looks=(
            {"environment": ALL_CORES},
            {"environment": ALL_CORES, "words": ["--enforce-eager"]},
            {},
        ),
        environment={"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"},
    ),
}


def command(name: str, model: Path, port: int, words: Sequence[str]) -> list[str]:
    """The command line of a server, in bfloat16 on loopback. Makes its environment where that is missing.

    Raises Failed where it cannot be installed.
    """
    kind, where = KINDS[name], ["--dtype", "bfloat16", "--host", HOST, "--port", str(port)]
    if name == "ours":
        return [sys.executable, "-m", "upslope", "serve", str(model), *where, *words]
    try:
        folder = peer_python(name, list(kind.requirements), remove=kind.remove).parent
    except subprocess.CalledProcessError as error:
        raise Failed(f"{kind.label} cannot be installed: {error}") from error
    if name == "transformers":
        return [str(folder / "transformers"), "serve", str(model), "--device", "cpu", *where, *words]
    # what `vllm serve` runs; that command itself asks for a package named vllm, which vllm-cpu is not
    serve = [str(folder / "python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    quiet = ["--max-model-len", "512", "--no-enable-log-requests", "--disable-uvicorn-access-log"]
    return [*serve, *where, *quiet, *words]


class Server:
    """A running server; leaving the `with` block ends its process and those it started. `port` is on loopback."""

    def __init__(self, name: str, model: Path, options: Mapping[str, Any], threads: int) -> None:
        self.name, self.port = name, _free_port()
        self._words = command(name, model, self.port, options.get("words", ()))
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        self._environment = {
            **{key: value for key, value in os.environ.items() if key != "UPSLOPE_API_KEY"},
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **KINDS[name].environment,
            **{key: value.format(cores=cores) for key, value in options.get("environment", {}).items()},
        }

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="upslope-serve-")
        self._log = Path(self._folder.name) / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._words,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: whatever it left behind
        self._process.wait()
        self._folder.cleanup()

    def failed(self, why: str) -> Failed:
        """An error that ends with what the server wrote last."""
        written = self._log.read_text(errors="replace").strip()[-2000:]
        return Failed(f"{self.name}: {why}: {written}")

    def _wait(self) -> None:
        """Until /health answers 200."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise self.failed(f"ended with exit code {self._process.returncode} before it was ready")
            try:
                with urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=10) as answer:
                    if answer.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise self.failed(f"not ready after {READY_S:.0f} s")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        return one.getsockname()[1]
