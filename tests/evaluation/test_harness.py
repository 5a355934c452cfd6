"""lm-evaluation-harness in process: our scorer and engine against its own transformers model, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import lm_eval
import lm_eval.tasks
from harness_kit import CHOICES, OPEN, TEXTS, answers, lively_folder, write_tasks

from upslope.build import load_inference
from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.evaluation.harness import UpslopeLM, run_harness

NAMES = ["small_choice", "small_texts", "small_open"]


@pytest.fixture(scope="module", autouse=True)
def offline() -> Any:
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_folder(tmp_path_factory.mktemp("m") / "tiny")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("t") / "tasks")


def evaluated(model: Any, tasks: Path, **more: Any) -> Mapping[str, Any]:
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(model, tasks=NAMES, task_manager=manager, bootstrap_iters=0, **more)
    assert results is not None
    return results


def assert_same(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], *, tolerance: float = 1e-4, whole: float | None = None
) -> None:
    """Accuracies and texts exactly, log-likelihoods within the tolerance (nats); `whole`: those of whole texts."""
    for mine, other in zip(answers(ours, "small_choice"), answers(theirs, "small_choice"), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=tolerance)
        assert mine[1] == other[1]
    assert answers(ours, "small_texts") == pytest.approx(answers(theirs, "small_texts"), abs=whole or tolerance)
    assert answers(ours, "small_open") == answers(theirs, "small_open")
    for task, metrics in (("small_choice", ("acc", "acc_norm")), ("small_open", ("exact_match",))):
        for metric in metrics:
            assert ours["results"][task][f"{metric},none"] == theirs["results"][task][f"{metric},none"]


def test_in_process_and_through_transformers_agree(folder: Path, tasks: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    ours = evaluated("upslope", tasks, model_args={"policy": policy})
    theirs = evaluated("hf", tasks, model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"})
    assert_same(ours, theirs)
    assert len(answers(ours, "small_choice")) == sum(len(row["choices"]) for row in CHOICES)
    texts = answers(ours, "small_open")
    assert all(len(set(text)) > 2 for text in texts)
    assert len(set(texts)) == len(OPEN)


def test_chat_templates_and_few_shots_agree_too(folder: Path, tasks: Path) -> None:
    shared = {"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 1, "fewshot_random_seed": 3}
    ours = evaluated(UpslopeLM(load_inference(folder, dtype="float32")), tasks, **shared)
    theirs = evaluated(
        "hf", tasks, model_args={"pretrained": str(folder), "dtype": "float32", "device": "cpu"}, **shared
    )
    assert_same(ours, theirs)
    shown = ours["samples"]["small_open"][0]["arguments"][0][0]
    assert shown.count("<|im_start|>user") == 2


@pytest.mark.slow
def test_the_bundled_model_agrees(smollm2_folder: Path, tasks: Path) -> None:
    ours = evaluated(UpslopeLM(load_inference(smollm2_folder, dtype="float32")), tasks)
    where = {"pretrained": str(smollm2_folder), "dtype": "float32", "device": "cpu"}
    # the harness adds up the log-probs of a whole text in float32
    assert_same(ours, evaluated("hf", tasks, model_args=where), whole=1e-3)


def test_figures_with_intervals(folder: Path, tasks: Path) -> None:
    figures = {
        f"{f.dataset}/{f.name}": f
        for f in run_harness(load_inference(folder, dtype="float32"), NAMES, include_path=tasks)
    }
    accuracy = figures["small_choice/acc"]
    assert (accuracy.n, accuracy.better) == (len(CHOICES), "higher")
    assert 0 <= accuracy.low < accuracy.value < accuracy.high <= 1
    perplexity = figures["small_texts/byte_perplexity"]
    assert (perplexity.n, perplexity.better) == (len(TEXTS), "lower")
    assert perplexity.low <= perplexity.value <= perplexity.high
    assert perplexity.low < perplexity.high
    assert figures["small_open/exact_match"].detail["filter"] == "none"
    assert len(figures) == 6
    one = run_harness(load_inference(folder, dtype="float32"), [str(tasks / "small_choice.yaml")], limit=2)
    assert [f.n for f in one] == [2, 2]


def test_a_group_of_tasks(folder: Path, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "twin.yaml").write_text(
        (tasks / "small_choice.yaml").read_text().replace("task: small_choice", "task: twin")
    )
    (tasks / "group.yaml").write_text(
        "group: pair\ntask: [small_choice, twin]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    policy = load_inference(folder, dtype="float32")
    figures = run_harness(policy, ["pair"], include_path=tasks)
    parts = [f for f in figures if f.name == "acc" and f.dataset != "pair"]
    (total,) = [f for f in figures if f.dataset == "pair"]
    assert (total.name, total.n, total.detail["tasks"]) == ("acc", 2 * len(CHOICES), 2)
    assert total.value == pytest.approx(parts[0].value)
    half = (parts[0].high - parts[0].low) / 2
    assert total.high - total.value == pytest.approx(half / 2**0.5)


def request(context: str, **asked: Any) -> Any:
    return SimpleNamespace(args=(context, asked))


def test_generation_options(folder: Path) -> None:
    lm = UpslopeLM(load_inference(folder, dtype="float32"), max_gen_toks=9, seed=5)
    greedy, again, stopped = lm.generate_until(
        [
            request("Q:", until=[]),
            request("Q:", until=[], do_sample=False, temperature=0.7),
            request("Q:", until=["", "zz"]),
        ]
    )
    assert greedy == again == stopped
    assert lm.generate_until([request("Q:", until=greedy[3:5])]) == [greedy[: greedy.index(greedy[3:5])]]
    sampled = [request("Q:", until=["<|im_start|>"], do_sample=True, temperature=1.0, top_p=0.99)] * 4
    first, second = lm.generate_until(sampled), lm.generate_until(sampled)
    assert first == second
    assert len(set(first)) == 4
    assert lm.generate_until([request("", max_gen_toks=3)])[0]
    assert lm.generate_until([request("x" * 9999, max_tokens=3)])[0]
    with pytest.raises(ConfigError, match="generation_kwargs name 'typical_p', which we do not have"):
        lm.generate_until([request("Q:", typical_p=0.5)])
    with pytest.raises(ConfigError, match="a task asks for 128 generated tokens, the model has 128 positions"):
        lm.generate_until([request("Q:", max_gen_toks=128)])
    with pytest.raises(ConfigError, match="max_length is 129; it must be from 1 to the model's 128 positions"):
        UpslopeLM(load_inference(folder), max_length=129)
    with pytest.raises(ConfigError, match="has no option 'pretrained'"):
        UpslopeLM(load_inference(folder), pretrained="x")


def test_an_empty_context_and_one_that_is_too_long(folder: Path) -> None:
    lm = UpslopeLM(load_inference(folder, dtype="float32"))
    empty, long, cut = lm.loglikelihood(
        [SimpleNamespace(args=args) for args in (("", "text"), ("y" + "x" * 9999, " z"), ("x" * 127, " z"))]
    )
    prefix = lm.prefix_token_id
    assert prefix == 1
    assert lm.scorer.loglikelihood([([prefix], lm.tok_encode("text"))])[0] == empty
    assert long == cut


def test_what_cannot_be_run_is_one_line(folder: Path, tasks: Path, tmp_path: Path) -> None:
    policy = load_inference(folder, dtype="float32")
    with pytest.raises(ConfigError, match=r"include_path .*none: no such folder"):
        run_harness(policy, ["small_choice"], include_path=tmp_path / "none")
    with pytest.raises(ConfigError, match="no task of lm-evaluation-harness is named"):
        run_harness(policy, [])
    broken = write_tasks(tmp_path / "broken")
    (broken / "small_open.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"small_open cannot be loaded: .*offline, name local data_files") as caught:
        run_harness(policy, ["small_open"], include_path=broken)
    assert "\n" not in str(caught.value)
    wrong = write_tasks(tmp_path / "wrong")
    text = (wrong / "small_open.yaml").read_text()
    (wrong / "small_open.yaml").write_text(text.replace("max_gen_toks: 12", "typical_p: 0.3"))
    with pytest.raises(ConfigError, match="typical_p"):
        run_harness(policy, ["small_open"], include_path=wrong)
    (wrong / "small_open.yaml").write_text(text.replace("{{question}}", "{{question | no_such_filter}}"))
    with pytest.raises((RunError, DataError), match="no_such_filter") as refused:
        run_harness(policy, ["small_open"], include_path=wrong)
    assert "\n" not in str(refused.value)
    bare = lively_folder(tmp_path / "bare")
    plain = load_inference(bare, dtype="float32")
    plain.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="the chat template cannot write the conversation"):
        run_harness(plain, ["small_open"], include_path=tasks, apply_chat_template=True)


@pytest.mark.slow
def test_the_harnesss_own_tasks_are_found_by_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no task 'arc_eazy'; did you mean 'arc_easy'\?"):
        run_harness(load_inference(folder), ["arc_eazy"])
