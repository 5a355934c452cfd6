"""`upslope eval` as a whole, in this process, on tiny models: every kind of figure, the table, the JSON, the errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_kit import tiny_encoder, tokenizer_for
from tiny_model import tiny_folder

from upslope.build import load_inference, make_engine
from upslope.cli import main
from upslope.commands.evaluate_inputs import progress
from upslope.data.labels import read_labelled
from upslope.evaluation.scorer import Scorer
from upslope.models.encoder.items import load_classifier
from upslope.types import SamplingParams

TASK = "chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=2"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("models")
    return str(tiny_folder(root / "a", seed=0)), str(tiny_folder(root / "b", seed=1))


def rows(path: Path, *found: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The parsed JSON of `upslope eval ... --json`."""
    assert main(["eval", *arguments, "--json", "--dtype", "float32"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def fails(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    assert main(["eval", *arguments]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("upslope: error: ")
    return captured.err


def figures(report: dict[str, Any], system: int = 0) -> dict[str, dict[str, Any]]:
    return {f["name"]: f for f in report["systems"][system]["figures"]}


def test_perplexity_of_two_models(models, tmp_path: Path, capsys) -> None:
    path = rows(tmp_path / "t.jsonl", *({"text": f"document {i} " * (i + 1)} for i in range(6)))
    report = run(capsys, *models, "--perplexity", path, "--context", "64", "--stride", "32", "--limit", "5")
    assert [s["system"] for s in report["systems"]] == list(models)
    for place, folder in enumerate(models):
        policy = load_inference(folder, dtype="float32")
        scorer = Scorer(policy.model, policy.tokenizer)
        texts = [f"document {i} " * (i + 1) for i in range(5)]
        ids = [scorer.tokenizer.encode(text) for text in texts]
        logps = [x for one in ids for x in scorer.rolling([one], stride=32, context=64)[0]]
        found = figures(report, place)
        assert found["token_perplexity"]["value"] == pytest.approx(math.exp(-sum(logps) / len(logps)), rel=1e-9)
        assert found["token_perplexity"]["n"] == 5
        assert found["token_perplexity"]["low"] < found["token_perplexity"]["high"]
    differences = {d["name"]: d for d in report["systems"][1]["differences"]}
    assert differences["bits_per_byte"]["value"] == pytest.approx(
        figures(report, 1)["bits_per_byte"]["value"] - figures(report, 0)["bits_per_byte"]["value"]
    )
    assert differences["bits_per_byte"]["minus"] == models[0]
    assert "paired bootstrap" in differences["bits_per_byte"]["detail"]["interval"]
    assert report["systems"][0]["differences"] == []


def test_answers_are_generated_written_and_judged_again(models, tmp_path: Path, capsys) -> None:
    data = rows(
        tmp_path / "d.jsonl",
        {"prompt": "abc", "completion": "x y"},
        {"prompt": [{"role": "user", "content": "hi"}], "references": ["one", "two"]},
    )
    common = ("--data", data, "--metrics", "bleu", "token_f1", "rougeL")
    out = tmp_path / "new" / "a.jsonl"
    report = run(capsys, models[0], *common, "--max-completion-length", "9", "--samples", str(out))
    policy = load_inference(models[0], dtype="float32")
    engine = make_engine(policy, sequences=1, longest=64)
    greedy = engine.generate([policy.tokenizer.encode("abc")], SamplingParams(max_tokens=9, temperature=0.0))
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written[0]["completion"] == greedy[0][0].text
    assert written[1]["references"] == ["one", "two"]
    again = run(capsys, "--hypotheses", str(out), *common)
    for figure in report["systems"][0]["figures"]:  # of finished answers nobody knows which were cut
        assert (figure["detail"].pop("cut"), figure["detail"].pop("completions")) == (2, 2)
    assert again["systems"][0]["figures"] == report["systems"][0]["figures"]
    assert figures(report)["bleu"]["detail"]["signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a")
    both = run(capsys, *models, *common, "--max-completion-length", "9", "--samples", str(tmp_path / "two"))
    assert len(both["systems"][1]["differences"]) == 3
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["1-a.jsonl", "2-b.jsonl"]


def test_a_task_gives_accuracy_and_pass_at_k(models, capsys) -> None:
    pytest.importorskip("reasoning_gym")
    one = run(capsys, models[0], "--task", TASK, "--limit", "6", "--max-completion-length", "4")
    assert figures(one)["accuracy"]["n"] == 6
    assert figures(one)["accuracy"]["detail"]["interval"] == "Wilson"
    several = ("--task", TASK, "--limit", "5", "--max-completion-length", "3", "--num-generations", "4")
    found = run(capsys, models[0], *several)
    assert [f for f in figures(found) if f.startswith("pass")] == ["pass@1", "pass@2", "pass@4"]
    assert run(capsys, models[0], *several) == found  # sampling is seeded


def test_rescoring(models, tmp_path: Path, capsys) -> None:
    def said(score: float) -> dict[str, Any]:
        return {"text": "the cat", "score": score}

    lists = rows(
        tmp_path / "n.jsonl",
        *(
            {
                "id": i,
                "reference": "the cat",
                "hypotheses": [{"text": "the cat", "score": -i}, {"text": "a", "score": -1}],
            }
            for i in range(6)
        ),
    )
    report = run(capsys, models[0], "--rescore", lists, "--score-weight", "tuned", "--length-normalized")
    found = figures(report)
    assert list(found) == [f"{m}/{s}" for m in ("wer", "bleu") for s in ("before", "after", "oracle", "change")]
    assert found["wer/after"]["n"] == found["wer/after"]["detail"]["tuned_on"] == 3
    assert run(capsys, models[0], "--rescore", lists, "--score-weight", "2.5")["options"]["score_weight"] == 2.5


def test_plain_lines_and_the_file(models, tmp_path: Path, capsys) -> None:
    (tmp_path / "r.txt").write_text("the cat sat\non the mat\n")
    for name, text in (("good", "the cat sat\non the mat\n"), ("bad", "the cat\non mats\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    good, bad, references = (str(tmp_path / f"{name}.txt") for name in ("good", "bad", "r"))
    output = tmp_path / "deep" / "figures.json"
    arguments = ["--hypotheses", good, bad, "--data", references, "--metrics", "wer", "bleu", "--output", str(output)]
    assert main(["eval", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{good}  {references}  wer 0.0000 [0.0000, 0.0000] n=2"
    assert lines[2].startswith(f"{bad}  {references}  wer 0.5000 [")
    assert f"difference to {good} +0.5000 [+" in lines[2]
    assert lines[-1].startswith("bleu: nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    stored = json.loads(output.read_text())
    assert stored["systems"][1]["figures"][0]["value"] == 0.5


def test_a_terminal_gets_a_table(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    import io

    from upslope.evaluation.measurement import mean_of
    from upslope.evaluation.table import compared, write

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    ours, theirs = (mean_of("x", values, dataset="d") for values in ([1.0, 2.0], [2.0, 2.5]))
    results = compared(["a[b]", "c"], [[ours], [theirs]])
    write(results, stream)
    shown = stream.getvalue()
    assert "a[b]" in shown  # no markup
    assert "1.5000 [1.0000, 2.0000]" in shown
    assert "+0.7500 [+0.5000, +1.0000]" in shown
    assert "signed: difference to a[b], paired 95% interval" in shown


def test_a_judge_compares_answers_with_references(tmp_path: Path, capsys, monkeypatch) -> None:
    """The judge likes the longer of two answers; one of ours is longer than its reference, one is not."""
    from tests.evaluation.test_win_rate import reply, served

    def longer(body: dict[str, Any], _: int):
        a, b = body["messages"][1]["content"].split("Answer A:\n")[1].split("\n\nAnswer B:\n")
        return reply("[[A]]" if len(a) > len(b) else "[[B]]")

    data = rows(
        tmp_path / "d.jsonl",
        {"prompt": [{"role": "user", "content": "hi"}], "completion": "short"},
        {"prompt": "why?", "completion": "a long and winding answer"},
    )
    answers = rows(tmp_path / "h.jsonl", {"completion": "not so short"}, {"completion": "so"})
    monkeypatch.setenv("UPSLOPE_JUDGE_API_KEY", "secret")
    with served(longer) as (url, asked):
        report = run(capsys, "--hypotheses", answers, "--data", data, "--judge", f"org/j@{url}")
    found = figures(report)["win_rate"]
    assert (found["value"], found["n"], found["detail"]["wins"]) == (0.5, 2, 1)
    assert {(one["key"], one["model"]) for one in asked} == {("Bearer secret", "org/j")}
    assert "Request:\nuser: hi\n" in "".join(one["messages"][1]["content"] for one in asked)
    (tmp_path / "r.txt").write_text("a\nb\n")
    references = ("--hypotheses", answers, "--data", str(tmp_path / "r.txt"))
    found = fails(capsys, 2, *references, "--judge", "j@http://127.0.0.1:1/v1")
    assert "r.txt:1: a judge needs to see what was asked" in found


def test_a_benchmark_of_a_language_model(models, tmp_path: Path, capsys) -> None:
    from upslope.evaluation.benchmarks import benchmark_figures

    data = rows(tmp_path / "s.jsonl", *({"sentence": f"a film {i}", "label": i % 2} for i in range(6)))
    report = run(capsys, models[0], "--benchmark", f"sst2:{data}", "--limit", "5")
    policy = load_inference(models[0], dtype="float32")
    (expected,) = benchmark_figures(Scorer(policy.model, policy.tokenizer), f"sst2:{data}", limit=5)
    assert report["systems"][0]["figures"] == [expected.as_json()]


def test_a_reward_model_is_measured_on_preferences(tmp_path: Path, capsys) -> None:
    import torch

    from upslope.models.files.loading import RewardSettings, load_model, save_reward_folder

    source = tiny_folder(tmp_path / "m")
    model = load_model(source)
    tensors = {name: p.detach() for name, p in model.named_parameters() if name != "lm_head.weight"}
    tensors["score.weight"] = torch.ones(1, 32)
    folder = save_reward_folder(
        model, tensors, tmp_path / "rm", RewardSettings(), source_folder=source, pad_token_id=None
    )
    path = rows(
        tmp_path / "p.jsonl", *({"prompt": "q", "chosen": f"yes {i}", "rejected": f"no, {i}"} for i in range(9))
    )
    swapped = rows(
        tmp_path / "s.jsonl", *({"prompt": "q", "rejected": f"yes {i}", "chosen": f"no, {i}"} for i in range(9))
    )
    report = run(capsys, str(folder), "--preferences", path, swapped, "--limit", "8")
    one, other = report["systems"][0]["figures"]
    assert one["n"] == 8
    assert one["value"] + other["value"] == 1
    assert "is a reward model: --perplexity cannot be asked of it" in fails(
        capsys, 2, str(folder), "--perplexity", path
    )


@pytest.mark.slow
def test_a_task_of_the_harness(models, tmp_path: Path, capsys) -> None:
    pytest.importorskip("lm_eval")
    from harness_kit import CHOICES, write_tasks

    folder = write_tasks(tmp_path / "tasks")
    report = run(capsys, models[0], "--harness", str(folder / "small_choice.yaml"))
    assert {f["n"] for f in report["systems"][0]["figures"]} == {len(CHOICES)}


def test_an_encoder_decoder_translates_and_rescores(tmp_path: Path, capsys) -> None:
    from tiny_model import tiny_tokenizer
    from tiny_seq2seq import tiny

    from upslope.models.files.loading import save_model

    folder = str(save_model(tiny(vocab_size=258), tmp_path / "s2s", tokenizer=tiny_tokenizer()))
    data = rows(tmp_path / "d.jsonl", {"prompt": "ein haus", "completion": "a house"})
    listed = {"source": "ein haus", "reference": "a house", "hypotheses": ["a house", "a horse", ""]}
    lists = rows(tmp_path / "n.jsonl", listed)
    arguments = ("--data", data, "--metrics", "chrf", "--max-completion-length", "8")
    report = run(capsys, folder, *arguments, "--rescore", lists, "--samples", str(tmp_path / "out.jsonl"))
    policy = load_inference(folder, dtype="float32")
    prompt = policy.tokenizer.source_ids("ein haus")
    engine = make_engine(policy, sequences=1, longest=64)
    (greedy,) = engine.generate([prompt], SamplingParams(max_tokens=8, temperature=0.0))[0]
    assert json.loads((tmp_path / "out.jsonl").read_text())["completion"] == greedy.text
    totals = Scorer(policy.model, policy.tokenizer).loglikelihood(
        [(prompt, policy.tokenizer.target_ids(text)) for text in listed["hypotheses"]]
    )
    best = max(range(3), key=lambda i: totals[i][0])
    assert figures(report)["wer/after"]["value"] == (0.0, 0.5, 1.0)[best]
    text = rows(tmp_path / "t.jsonl", {"text": "x"})
    assert "no perplexity of plain text" in fails(capsys, 4, folder, "--perplexity", text)
    bare = rows(tmp_path / "b.jsonl", {"reference": "a", "hypotheses": ["a"]})
    assert "b.jsonl:1: hypotheses[0]: an encoder-decoder needs the 'source'" in fails(
        capsys, 3, folder, "--rescore", bare
    )


def test_a_classifier_is_measured_on_labels(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "c"
    encoder = tiny_encoder("classify", labels=["bad", "good"])
    encoder.save(folder, tokenizer=tokenizer_for("bert"))
    data = rows(tmp_path / "d.jsonl", {"text": "good film", "label": "good"}, {"text": "bad film", "label": "bad"})
    report = run(capsys, str(folder), "--data", data, "--metrics", "accuracy", "macro_f1")
    classifier = load_classifier(str(folder), dtype="float32")
    said = [classifier.labels[z.index(max(z))] for z in classifier.logits(read_labelled(data))]
    expected = sum(s == t for s, t in zip(said, ["good", "bad"], strict=True)) / 2
    assert figures(report)["accuracy"]["value"] == expected
    assert figures(run(capsys, str(folder), "--data", data)) == figures(report)
    assert "gives labels: bleu is about texts" in fails(capsys, 2, str(folder), "--data", data, "--metrics", "bleu")
    assert "is a classifier: --perplexity cannot be asked of it" in fails(capsys, 2, str(folder), "--perplexity", data)


def test_answers_that_do_not_end_are_counted_by_their_tokens(capsys) -> None:
    with progress("answers", "completion") as shown:
        for _ in range(3):
            shown(0, 2)
    assert "answers: 0/2 completions" in (said := capsys.readouterr().err)
    assert "decoding_steps=3" in said


def test_a_tagger_is_measured_on_entities(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "t"
    tiny_encoder("tag", labels=["O", "B-PER", "I-PER"]).save(folder, tokenizer=tokenizer_for("bert"))
    (tmp_path / "d.conll").write_text("good B-PER\nfilm I-PER\nthe O\n\nsaw O\nwe B-PER\n")
    report = run(capsys, str(folder), "--data", str(tmp_path / "d.conll"), "--metrics", "entity_f1")
    assert 0 <= figures(report)["entity_f1"]["value"] <= 1
    assert figures(report)["entity_f1"]["n"] == 2
    assert figures(run(capsys, str(folder), "--data", str(tmp_path / "d.conll"))) == figures(report)


def test_a_head_on_numbers_is_measured_by_its_correlations(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "n"
    tiny_encoder("classify", labels=["score"]).save(folder, tokenizer=tokenizer_for("bert"))
    texts = ["good film", "the film", "we saw the good film", "bad"]
    given = [{"text": text, "label": i} for i, text in enumerate(texts)]
    data = rows(tmp_path / "d.jsonl", *given)
    found = figures(run(capsys, str(folder), "--data", data))
    said = [z[0] for z in load_classifier(str(folder), dtype="float32").logits(read_labelled(data))]
    assert set(found) == {"pearson", "spearman"}
    assert found["pearson"]["value"] == pytest.approx(np.corrcoef([0, 1, 2, 3], said)[0, 1])
    assert "gives numbers" in fails(capsys, 2, str(folder), "--data", data, "--metrics", "accuracy")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to measure: name a model"),
        (("MODEL",), "say what to measure"),
        (
            ("MODEL", "--metrics", "bleu", "--task", TASK),
            "metrics goes with data: give data, too",
        ),
        (("MODEL", "--hypotheses", "h.txt", "--data", "d"), "models and hypotheses are both given"),
        (("--hypotheses", "h.txt", "--perplexity", "t.txt"), "perplexity needs a model"),
        (("MODEL", "--data", "d", "--metrics", "blue"), "no metric is called 'blue'; did you mean 'bleu'?"),
        (("MODEL", "--data", "d", "--judge", "http://x/v1"), "it must be MODEL@URL"),
        (("MODEL", "--task", TASK, "--num-generations", "2", "--temperature", "0"), "would repeat one answer"),
        (("MODEL", "--perplexity", "t", "--context", "4", "--stride", "5"), "stride is 5 but a window reads only 4"),
        (("MODEL", "--task", TASK, "--stride", "5"), "stride goes with perplexity"),
        (("MODEL", "--task", TASK, "--score-weight", "1"), "score_weight goes with rescore"),
        (("MODEL", "--rescore", "n", "--score-weight", "-1"), "score_weight is -1.0"),
        (("MODEL", "--limit", "0", "--perplexity", "t"), "limit is 0; it must be at least 1"),
    ],
)
def test_options_that_do_not_go_together(models, capsys, arguments: tuple[str, ...], message: str) -> None:
    given = [models[0] if word == "MODEL" else word for word in arguments]
    assert message in fails(capsys, 2, *given)


def test_answers_of_a_language_model_need_a_judge(models, tmp_path: Path, capsys) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "data needs to be judged" in fails(capsys, 2, models[0], "--data", str(tmp_path / "d.jsonl"))


def test_mistakes_in_files_are_found_before_a_model_is_loaded(models, tmp_path: Path, capsys, monkeypatch) -> None:
    import upslope.commands.evaluate as command

    monkeypatch.setattr(command, "load_inference", lambda *_, **__: pytest.fail("loaded"))
    bad = rows(tmp_path / "bad.jsonl", {"text": 3})
    assert "bad.jsonl:1: 'text' must be a text" in fails(capsys, 3, models[0], "--perplexity", bad)
    assert "bad.jsonl:1: " in fails(capsys, 3, models[0], "--rescore", bad)
    assert "bad.jsonl:1: " in fails(capsys, 3, models[0], "--data", bad, "--metrics", "bleu")
    assert "no task is called" in fails(capsys, 2, models[0], "--task", "gsm9k")


def test_a_language_model_is_no_reward_model(models, capsys) -> None:
    found = fails(capsys, 2, models[0], "--preferences", "p")
    assert "is a language model: --preferences cannot be asked of it" in found


def test_an_error_names_the_model_where_there_are_several(models, tmp_path: Path, capsys) -> None:
    text = rows(tmp_path / "t.jsonl", {"text": "abc"})
    found = fails(capsys, 2, *models, "--perplexity", text, "--context", "10000")
    assert f"{models[0]}: stride 10000 and context 10000" in found
    assert fails(capsys, 4, str(tmp_path / "nowhere"), "--perplexity", text)
