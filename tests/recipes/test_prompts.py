"""Before the first step: every prompt is encoded, what leaves no room is counted. An error in a step loses nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_folder

from upslope.build import load_policy
from upslope.data.chat import encode_prompt
from upslope.errors import ConfigError, DataError, RunError
from upslope.options import DistillOptions, ExpertOptions, GRPOOptions, PPOOptions, ReinforceOptions
from upslope.recipes.distill import distill
from upslope.recipes.expert import expert
from upslope.recipes.grpo import GRPO, grpo
from upslope.recipes.ppo import ppo
from upslope.recipes.reinforce import reinforce
from upslope.tasks.base import Task, load_task, prompts_of
from upslope.training.optim import MasterAdamW
from upslope.types import SamplingParams

TASK = """
from pathlib import Path

from upslope.tasks.base import Task, select_prompts
from upslope.types import Prompt, Reward


class Long(Task):
    name = "long"

    def __init__(self, late: bool = True):
        # the longest stands behind the first hundred, two more leave no room
        self.lengths = [5] * 300 + ([400, 510, 600] if late else [])

    def prompts(self, split, n, *, seed):
        texts = (f"{i} ".ljust(self.lengths[i % len(self.lengths)], "x") for i in range(100 * len(self.lengths)))
        return select_prompts((Prompt(0, text=text) for text in texts), split, n, name=self.name)

    def rewards(self, prompts, completions):
        if Path(__file__).with_name("broken").exists():
            return [None for _ in completions]
        return [Reward(sum(map(ord, text)) % 7 / 7, correct="a" in text) for text in completions]
"""
VERBS: dict[str, tuple[Any, Callable[..., dict[str, Any]]]] = {
    "reinforce": (ReinforceOptions, reinforce),
    "ppo": (PPOOptions, ppo),
    "grpo": (GRPOOptions, grpo),
    "expert": (ExpertOptions, expert),
    "distill": (DistillOptions, distill),
}


@pytest.fixture
def task(tmp_path: Path) -> str:
    (tmp_path / "long.py").write_text(TASK)
    return f"{tmp_path / 'long.py'}:Long"


def options(verb: str, tiny: Path, task: str, folder: Path, **changes: Any) -> Any:
    common: dict[str, Any] = {"model": str(tiny), "task": task, "output_dir": str(folder), "num_train_prompts": 330}
    common |= {"num_prompts": 2, "num_generations": 2, "max_completion_length": 6, "max_steps": 1, "eval_samples": 90}
    common |= {"eval_every": 0, "learning_rate": 3e-3, "dtype": "float32"}
    common |= {"expert": {"train_steps": 1, "keep": "best"}, "distill": {"teacher": str(tiny)}}.get(verb, {})
    return VERBS[verb][0](**{**common, **changes})


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("verb", VERBS)
def test_prompts_without_room_for_the_reply_are_left_out_and_counted(
    verb: str, tiny: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = VERBS[verb][1](options(verb, tiny, task, tmp_path / "run"))
    lost = summary["data"]["dropped"]["train"]["too long for the context"]
    assert lost + summary["data"]["rows"]["train"] == 330
    assert lost > 0
    said = capsys.readouterr().err
    limit = r"too long for the context \(506 tokens beside max_completion_length 6; the longest, prompt \d+, has 600"
    assert re.search(rf"kept {330 - lost} of 330 rows of task long: {lost} {limit}", said)
    assert summary["data"]["dropped"]["eval"]["too long for the context"] > 0


@pytest.mark.parametrize("verb", ["grpo", "distill"])
def test_no_prompt_with_room_ends_the_run_before_its_folder_is_made(
    verb: str, tiny: Path, task: str, tmp_path: Path
) -> None:
    with pytest.raises(
        DataError, match=r"task long: none of its 330 rows is left: 330 too long .*; the longest, prompt"
    ):
        VERBS[verb][1](options(verb, tiny, task, tmp_path / "run", max_completion_length=508))
    with pytest.raises(
        ConfigError, match=r"max_completion_length 512 leaves no room for a prompt .* 512 tokens: lower"
    ):
        VERBS[verb][1](options(verb, tiny, task, tmp_path / "run", max_completion_length=512))
    assert not (tmp_path / "run").exists()


def test_the_cache_holds_the_longest_prompt_of_all(task: str, tmp_path: Path) -> None:
    """5,000 tokens stand behind 300 short prompts: more than two contexts of 2,048, the cache at its least."""
    roomy = tiny_folder(tmp_path / "roomy", max_position_embeddings=8192)
    (tmp_path / "long.py").write_text(TASK.replace("[400, 510, 600]", "[5000] * 3").replace("100 * ", "2 * "))
    o = options("grpo", roomy, task, tmp_path / "run", num_train_prompts=470, eval_samples=0)
    with closing(GRPO(o, load_policy(o))) as learner:
        lengths = [len(prompt.text or "") for prompt in learner.sampler.prompts]
        assert lengths.index(5000) >= 100
        long = encode_prompt(learner.policy.tokenizer, learner.sampler.prompts[lengths.index(5000)])
        (answers,) = learner.engine.generate([long], SamplingParams(max_tokens=6, n=2))
        assert len(answers) == 2


@pytest.mark.parametrize(("verb", "changes"), [("grpo", {}), ("ppo", {"rollout_lag": 1}), ("reinforce", {})])
def test_a_foreseen_error_inside_a_step_saves_the_state_before_it(
    verb: str, changes: dict[str, Any], tiny: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mended, the run goes on to the bits of one that never met the error."""
    more = {"baseline": "moving"} if verb == "reinforce" else {}
    given = {"max_steps": 4, "eval_samples": 0, "num_train_prompts": 20, **changes, **more}
    recipe = VERBS[verb][1]
    whole = recipe(options(verb, tiny, f"{task}:late=false", tmp_path / "whole", **given))

    folder, broken = tmp_path / "run", tmp_path / "broken"
    o = options(verb, tiny, f"{task}:late=false", folder, **given)
    with pytest.MonkeyPatch.context() as patch:
        module = __import__(f"upslope.recipes.{verb}", fromlist=["x"])
        cls = getattr(module, {"grpo": "GRPO", "ppo": "PPO", "reinforce": "Reinforce"}[verb])
        step = cls.step

        def breaking(self: Any, number: int) -> Any:
            if number == 2:
                broken.touch()
            return step(self, number)

        patch.setattr(cls, "step", breaking)
        with pytest.raises(DataError, match="no reward could be computed"):
            recipe(o)
    broken.unlink()
    said = capsys.readouterr().err
    assert f"step 2 is saved; once the error below is mended: upslope {verb} --resume --output-dir {folder}" in said
    assert [p.name for p in sorted((folder / "checkpoints").glob("step-*"))] == ["step-00000002"]
    again = recipe(options(verb, tiny, f"{task}:late=false", folder, resume=True, **given))
    one, two = (load_file(Path(summary["model"]) / "model.safetensors") for summary in (whole, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert [line["reward"] for line in lines(tmp_path / "whole")] == [line["reward"] for line in lines(folder)]
    assert again["steps"] == 4


def test_where_the_weights_have_moved_the_step_is_not_saved_and_says_so(
    tiny: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PPO's second pass over a batch meets a gradient that is not finite: half a step has been made."""
    step = MasterAdamW.step

    def poisoned(self: MasterAdamW, *arguments: Any, **named: Any) -> float:
        if self.updates == 5:
            raise RunError("the gradient is not finite")
        return step(self, *arguments, **named)

    monkeypatch.setattr(MasterAdamW, "step", poisoned)
    o = options("ppo", tiny, task, tmp_path / "run", max_steps=4, save_every=1, num_epochs=2)
    with pytest.raises(RunError, match="not finite"):
        ppo(o)
    said = capsys.readouterr().err
    assert "step 2 is saved (the weights had moved before the error); once" in said
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*"))[-1] == "step-00000002"


def test_an_error_in_the_first_step_saves_nothing(
    tiny: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(DataError, match="no reward could be computed"):
        grpo(options("grpo", tiny, task, tmp_path / "run", eval_samples=0))
    assert "upslope: no step had been saved yet\n" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


BODIES = {
    "pass": "Own.prompts is not written: give it prompts(self, split, n, *, seed)",
    "def prompts(self, split, n, *, seed): return []": "Own.prompts('train', 3) gave no prompt: it must give 3",
    "def prompts(self, split, n, *, seed): yield from ()": "Own.prompts('train', 3) gave no prompt",
    "def prompts(self, split, n, *, seed): return ['a']": "as chat_prompt makes them; number 1 is a str",
    "def prompts(self, split, n, *, seed): pass": "must give a list of upslope.Prompt objects; it gave a None",
    "def prompts(self, split, n): return []": "got an unexpected keyword argument 'seed'",
    "def prompts(self, split, n, *, seed): return [{}['a']]": "Own.prompts, line 5: KeyError: 'a'",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_task_that_gives_no_prompts_is_named_with_its_file(body: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(f"from upslope.tasks.base import Task\n\n\nclass Own(Task):\n    {body}\n")
    with pytest.raises(DataError) as caught:
        prompts_of(load_task(f"{path}:Own"), "train", 3, seed=0)
    said = str(caught.value)
    assert said.startswith(f"{path}: Own.prompts")
    assert BODIES[body] in said
    assert "\n" not in said


def test_an_endless_stream_of_prompts_is_taken_as_far_as_it_is_wanted() -> None:
    from itertools import count

    from upslope.types import Prompt

    class Endless(Task):
        def prompts(self, split: Any, n: int, *, seed: int) -> Any:
            return (Prompt(key, text=str(key)) for key in count())

    assert [prompt.key for prompt in prompts_of(Endless(), "train", 3, seed=0)] == [0, 1, 2]
