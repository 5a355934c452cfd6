"""A template that closes turns with a token that is not EOS: what is learnt also ends what is sampled."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from ends_kit import END, EOS, folder_ending

from upslope.build import load_inference
from upslope.cli import main
from upslope.engine import Engine
from upslope.options import GRPOOptions, SFTOptions
from upslope.recipes.grpo import grpo
from upslope.recipes.sft import sft

ROWS = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ba"}]}] * 8
TASK = """
from upslope.tasks.base import Task, chat_prompt, select_prompts
from upslope.types import Reward


class Greeting(Task):
    name = "greeting"

    def prompts(self, split, n, *, seed):
        return select_prompts((chat_prompt("hi" + " " * (i % 2)) for i in range(400)), split, n, name=self.name)

    def rewards(self, prompts, completions):
        return [Reward(float(text == "ba")) for text in completions]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an SFT on one conversation."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = SFTOptions(
        model=str(folder_ending(folder / "m")),
        data=str(folder / "rows.jsonl"),
        eval_data=str(folder / "rows.jsonl"),
        output_dir=str(folder / "run"),
        batch_size=8,
        max_steps=40,
        learning_rate=1e-2,
        eval_every=0,
        eval_samples=0,
        dtype="float32",
    )
    options.validate()
    return Path(sft(options)["model"])


def _ends(folder: Path) -> list[int]:
    return load_inference(folder).tokenizer.convert_tokens_to_ids([EOS, END])


def test_the_checkpoint_says_both_ends(trained: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert json.loads((trained / "generation_config.json").read_text())["eos_token_id"] == _ends(trained)
    assert AutoModelForCausalLM.from_pretrained(trained).generation_config.eos_token_id == _ends(trained)


def test_generate_stops_where_training_taught_it(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--prompt", "hi", "--max-tokens", "12", "--temperature", "0", "--json"]
    assert main(["generate", str(trained), *asked]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["completion"], row["finish_reason"]) == ("ba", "stop")


def test_the_server_stops_there(trained: Path) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    from upslope.options import ServeOptions
    from upslope.serving.server import create_app
    from upslope.serving.service import Service

    policy = load_inference(trained, dtype="float32")
    engine = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=64)
    service = Service("m", engine, policy.tokenizer)
    with testclient.TestClient(create_app({"m": service}, ServeOptions()), base_url="http://127.0.0.1") as client:
        body = {"messages": ROWS[0]["messages"][:1], "max_tokens": 12, "temperature": 0}
        choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("ba", "stop")


def test_weights_with_other_ends_are_not_taken(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    import shutil

    from upslope.errors import ModelError
    from upslope.serving.service import Service

    policy = load_inference(trained, dtype="float32")
    engine = Engine(policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, num_blocks=64)
    service = Service("m", engine, policy.tokenizer, load=lambda where: load_inference(where, dtype="float32"))
    shutil.copytree(trained, tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    service.start()
    try:
        assert asyncio.run(service.swap(str(trained))) == 1
        with pytest.raises(ModelError, match=r"its turns end at tokens \[.*9.*\], the served model's at"):
            asyncio.run(service.swap(str(tmp_path / "other")))
    finally:
        service.end()


def test_no_rollout_is_cut(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "greeting.py").write_text(TASK)
    options: dict[str, Any] = {
        "model": str(trained),
        "task": f"{tmp_path / 'greeting.py'}:Greeting",
        "output_dir": str(tmp_path / "run"),
        "num_train_prompts": 1,
        "num_prompts": 1,
        "num_generations": 8,
        "max_completion_length": 12,
        "missing_eos_penalty": 1.0,
        "max_steps": 1,
        "eval_samples": 0,
        "eval_every": 0,
        "temperature": 0.5,
        "dtype": "float32",
    }
    grpo(GRPOOptions(**options))
    (row,) = (json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if '"eval/' not in x)
    assert row["completions/clipped_ratio"] == 0.0
    assert row["completions/mean_length"] == 3.0  # "b", "a", and the end
