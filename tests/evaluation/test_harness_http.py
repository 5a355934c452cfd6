"""lm-evaluation-harness over HTTP: its own API clients against our server agree with its transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import lm_eval
import lm_eval.tasks
from harness_kit import CONTEXT, answers, lively_folder, write_tasks
from serving.conftest import Live, make_service
from test_harness import assert_same, evaluated, offline

from upslope.build import load_inference
from upslope.evaluation.harness import UpslopeLM, remote_model, run_harness
from upslope.options import ServeOptions
from upslope.serving.server import create_app

__all__ = ["offline"]

KEY = "a key of the test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_folder(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("t") / "tasks")


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = ServeOptions(feedback=str(tmp_path_factory.mktemp("feedback")), api_key=KEY)
    with Live(create_app({"tiny": make_service(folder)}, settings)) as live:
        yield f"{live.url}/v1"


def test_completions_in_process_and_transformers_agree(url: str, folder: Path, tasks: Path) -> None:
    read = CONTEXT - 2  # what such a client makes of the context
    where = {"pretrained": str(folder), "dtype": "float32", "device": "cpu", "max_length": read}
    theirs = evaluated("hf", tasks, model_args=where)
    ours = evaluated(UpslopeLM(load_inference(folder, dtype="float32"), max_length=read), tasks)
    for num_concurrent in (1, 8):
        remote = remote_model(url, folder, max_length=CONTEXT, api_key=KEY, num_concurrent=num_concurrent)
        over_http = evaluated(remote, tasks)
        assert_same(over_http, theirs)
        assert_same(over_http, ours, tolerance=1e-5)


def test_chat_completions_generate_the_same_texts(url: str, folder: Path, tasks: Path) -> None:
    def texts(model: object) -> list[str]:
        manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
        results = lm_eval.simple_evaluate(
            model, tasks=["small_open"], task_manager=manager, apply_chat_template=True, bootstrap_iters=0
        )
        return answers(results, "small_open")

    remote = remote_model(url, folder, max_length=CONTEXT, chat=True, api_key=KEY)
    assert texts(remote) == texts(UpslopeLM(load_inference(folder, dtype="float32")))


def test_figures_over_http(url: str, folder: Path, tasks: Path) -> None:
    remote = remote_model(url, folder, max_length=CONTEXT, api_key=KEY)
    over_http = run_harness(remote, ["small_choice"], include_path=tasks)
    assert over_http == run_harness(load_inference(folder, dtype="float32"), ["small_choice"], include_path=tasks)
