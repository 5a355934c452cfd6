"""GLUE and SuperGLUE tasks: likelihoods against transformers, metrics against scikit-learn and scipy and by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_kit import encoder_folder
from tiny_model import tiny_folder

from upslope.build import load_inference
from upslope.cli import main
from upslope.data.glue import FORMS
from upslope.data.labels import LabelledText
from upslope.errors import ConfigError, DataError, ModelError
from upslope.evaluation import classification as metrics
from upslope.evaluation.benchmarks import PROMPTS, benchmark_figures
from upslope.evaluation.scorer import Scorer

sklearn = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")


def lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Metrics


def test_matthews_by_hand() -> None:
    # tp 3, tn 2, fp 1, fn 2: (3 * 2 - 1 * 2) / sqrt(4 * 5 * 3 * 4)
    truth, said = [1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 1]
    found = metrics.matthews(truth, said)
    assert found.value == pytest.approx(4 / 240**0.5)
    assert found.low < found.value < found.high
    assert metrics.matthews([1, 0], [1, 1]).value == 0.0
    assert metrics.matthews(truth, said) == found


def test_f1a_and_exact_match_by_hand() -> None:
    """Three questions: one wholly right, one with an answer too many, one with none of its two found."""
    groups = ["a", "a", "b", "b", "b", "c", "c"]
    truth = [1, 0, 0, 1, 1, 1, 1]
    said = [1, 0, 1, 1, 1, 0, 0]
    # 3 right among 4 said and 5 true
    assert metrics.grouped_f1(truth, said, groups).value == pytest.approx(2 * 3 / (4 + 5))
    assert metrics.grouped_f1(truth, said, groups).value == pytest.approx(sklearn.f1_score(truth, said))
    assert metrics.grouped_exact(truth, said, groups).value == pytest.approx(1 / 3)
    assert metrics.grouped_f1([0, 0], [0, 0], ["a", "b"]).value == 0.0


def test_cloze_figures_by_hand() -> None:
    truth = [["the Bank of England"], ["Bob", "Robert Smith"], ["Anna"]]
    said = ["Bank of England.", "smith", "Bob"]
    assert metrics.cloze_exact(truth, said).value == pytest.approx(1 / 3)
    assert metrics.cloze_f1(truth, said).value == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_the_other_metrics_are_the_libraries() -> None:
    g = torch.Generator().manual_seed(3)
    truth, said = (torch.randint(0, 2, (60,), generator=g).tolist() for _ in range(2))
    three, guess = (torch.randint(0, 3, (60,), generator=g).tolist() for _ in range(2))
    x, y = (torch.randn(60, generator=g).tolist() for _ in range(2))
    assert metrics.binary_f1(truth, said).value == pytest.approx(sklearn.f1_score(truth, said))
    assert metrics.macro_f1(three, guess, classes=3).value == pytest.approx(
        sklearn.f1_score(three, guess, average="macro")
    )
    assert metrics.macro_f1([0, 0], [0, 0], classes=2).value == 0.5
    assert metrics.pearson(x, y).value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert metrics.spearman(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic)
    tied = [round(v) for v in y]
    assert metrics.spearman(x, tied).value == pytest.approx(stats.spearmanr(x, tied).statistic)
    assert metrics.pearson([1.0, 2.0], [3.0, 3.0]).value == 0.0
    assert metrics.accuracy(truth, said).value == pytest.approx(sklearn.accuracy_score(truth, said))


# A causal model

NLI = [
    {"premise": "A dog runs", "hypothesis": h, "label": y} for h, y in (("It moves.", 0), ("It sleeps", 1), ("So", 2))
]
MULTIRC = [
    {"paragraph": "P.", "question": q, "answer": a, "label": y, "idx": {"paragraph": 0, "question": n, "answer": 0}}
    for n, (q, a, y) in enumerate([("Who?", "Ann", 1), ("Why?", "So", 0), ("When?", "Now", 1)])
]
MULTIRC.append({**MULTIRC[0], "answer": "Bob", "label": 0})
ASKED: dict[str, tuple[list[dict[str, Any]], list[tuple[str, list[str]]]]] = {
    "cola": (
        [{"sentence": s, "label": y} for s, y in (("He go.", 0), ("She goes.", 1), ("We goes.", 0), ("Go!", 1))],
        [
            (f"{s}\nQuestion: Does this sentence make sense?\nAnswer:", [" no", " yes"])
            for s in ("He go.", "She goes.", "We goes.", "Go!")
        ],
    ),
    "mnli": (
        NLI,
        [
            (f"A dog runs\nQuestion: {h} True, False or Neither?\nAnswer:", [" True", " Neither", " False"])
            for h in ("It moves.", "It sleeps.", "So.")
        ],
    ),
    "copa": (
        [
            {"premise": "It fell.", "choice1": "It broke.", "choice2": "I ran", "question": "effect", "label": 0},
            {"premise": "I left. ", "choice1": "Was late", "choice2": "X.", "question": "cause", "label": 1},
        ],
        [("It fell therefore", [" it broke.", " i ran"]), ("I left because", [" was late", " x."])],
    ),
    "multirc": (
        MULTIRC,
        [
            (f"P.\nQuestion: {q}\nAnswer:", [f" {a}\nIs the answer correct? {w}" for w in ("no", "yes")])
            for q, a in (("Who?", "Ann"), ("Why?", "So"), ("When?", "Now"), ("Who?", "Bob"))
        ],
    ),
    "record": (
        [
            {
                "passage": "Ann met Bob.\n@highlight\nThey met",
                "query": "Then @placeholder left",
                "entities": ["Ann", "Bob"],
                "answers": ["Bob"],
            },
            {"passage": "Only text", "query": "@placeholder", "entities": ["Only", "text"] * 2, "answers": ["text"]},
        ],
        [
            ("Ann met Bob.\n\n  - They met.\n", ["  - Then Ann left", "  - Then Bob left"]),
            ("Only text\n\n", ["  - Only", "  - text"]),
        ],
    ),
    "wic": (
        [{"word": "run", "sentence1": "A long run.", "sentence2": "Run!", "start1": 7, "end1": 10, "label": True}] * 2,
        [
            (
                "Sentence 1: A long run.\nSentence 2: Run!\nQuestion: Is the word 'run' used in the same way in "
                "the two sentences above?\nAnswer:",
                [" no", " yes"],
            )
        ]
        * 2,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("m") / "tiny", initializer_range=0.1)


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    policy = load_inference(folder, dtype="float32")
    return Scorer(policy.model, policy.tokenizer)


@pytest.fixture(scope="module")
def likeliest(folder: Path) -> Any:
    """(context, continuations) -> the place of the likeliest, by transformers in float64; bytes are tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def logp(context: str, continuation: str) -> float:
        ids = tokenizer(context + continuation)["input_ids"]
        start = len(tokenizer(context.rstrip())["input_ids"])
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(table[range(start - 1, len(ids) - 1), ids[start:]].sum())

    return lambda context, choices: max(range(len(choices)), key=lambda i: logp(context, choices[i]))


@pytest.mark.parametrize("name", ASKED)
def test_the_likeliest_answer_to_the_stated_words(name: str, scorer: Scorer, likeliest: Any, tmp_path: Path) -> None:
    rows, asked = ASKED[name]
    said = [likeliest(*one) for one in asked]
    figures = benchmark_figures(scorer, f"{name}:{lines(tmp_path / 'rows.jsonl', rows)}")
    values = {f.name: f.value for f in figures}
    if name == "record":
        right = [row["entities"][s] in row["answers"] for row, s in zip(rows, said, strict=True)]
        assert values["exact_match"] == sum(right) / len(right)
        assert list(values) == ["f1", "exact_match"]
        return
    truth = [int(row["label"]) for row in rows]
    if name == "multirc":
        assert values["f1a"] == pytest.approx(sklearn.f1_score(truth, said))
        order = [0, 1, 2, 0]
        whole = [all(truth[i] == said[i] for i in range(4) if order[i] == q) for q in range(3)]
        assert values["exact_match"] == pytest.approx(sum(whole) / 3)
        assert {f.n for f in figures} == {3}
        return
    assert values["accuracy"] == sklearn.accuracy_score(truth, said)
    if name == "cola":
        assert values["matthews_correlation"] == pytest.approx(sklearn.matthews_corrcoef(truth, said))
        assert figures[0].name == "matthews_correlation"
    assert figures[0].detail["prompt"] == PROMPTS[name].text
    assert all(f.low <= f.value <= f.high for f in figures)


def test_a_score_is_the_expected_number(folder: Path, scorer: Scorer, tmp_path: Path) -> None:
    rows = [
        {"sentence1": f"{i} a", "sentence2": "b" * (i + 1), "score": s} for i, s in enumerate((0.5, 4.0, 2.2, 5.0, 1.0))
    ]
    figures = benchmark_figures(scorer, f"stsb:{lines(tmp_path / 'rows.jsonl', rows)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    digits = tokenizer("012345")["input_ids"]
    said = []
    for row in rows:
        text = PROMPTS["stsb"].text.format(**row) + " "
        with torch.no_grad():
            weights = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].softmax(-1)[digits]
        said.append(float((weights * torch.arange(6)).sum() / weights.sum()))
    truth = [row["score"] for row in rows]
    assert [f.name for f in figures] == ["pearson", "spearman"]
    assert figures[0].value == pytest.approx(stats.pearsonr(truth, said).statistic, abs=1e-4)
    assert figures[1].value == pytest.approx(stats.spearmanr(truth, said).statistic)


def test_a_limit_takes_whole_questions_and_follows_the_seed(scorer: Scorer, tmp_path: Path) -> None:
    rows = [{**row, "idx": {"paragraph": i, "question": 0}} for i in range(6) for row in (MULTIRC[0], MULTIRC[3])]
    path = lines(tmp_path / "rows.jsonl", rows)
    assert {f.n for f in benchmark_figures(scorer, f"multirc:{path}", limit=2)} == {2}
    cola = lines(tmp_path / "cola.jsonl", [{"sentence": f"s {i}", "label": i % 2} for i in range(40)])

    class Recorder:
        labels = ("acceptable", "unacceptable")

        def logits(self, rows: Sequence[LabelledText]) -> list[list[float]]:
            self.seen = [row.text for row in rows]
            return [[0.0, 1.0] for _ in rows]

    seen = []
    for seed in (0, 0, 1):
        recorder = Recorder()
        assert benchmark_figures(recorder, f"cola:{cola}", limit=9, seed=seed)[0].n == 9
        seen.append(recorder.seen)
    assert seen[0] == seen[1] != seen[2]
    with pytest.raises(ConfigError, match="limit is 0; it must be at least 1"):
        benchmark_figures(scorer, f"cola:{cola}", limit=0)


def test_torn_rows_are_in_the_figure(scorer: Scorer, tmp_path: Path) -> None:
    path = tmp_path / "dev.tsv"
    path.write_text("question1\tquestion2\tis_duplicate\na\tb\t1\ntorn\nc\td\t0\n")
    figures = benchmark_figures(scorer, f"qqp:{path}")
    assert [f.name for f in figures] == ["f1", "accuracy"]
    assert figures[0].detail["broken_rows"] == 1
    assert figures[0].n == 2


# A classifier


class Canned:
    def __init__(self, labels: Sequence[str], said: Sequence[int]) -> None:
        self.labels, self.said = tuple(labels), said

    def logits(self, rows: Sequence[LabelledText]) -> list[list[float]]:
        return [[float(i == s) for i in range(len(self.labels))] for s, _ in zip(self.said, rows, strict=True)]


@pytest.mark.parametrize(
    "labels",
    [
        ("contradiction", "entailment", "neutral"),
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        ("2", "1", "0"),
        ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"),
    ],
)
def test_labels_meet_by_name_or_number(labels: Sequence[str], tmp_path: Path) -> None:
    names = {"entailment": 0, "neutral": 1, "contradiction": 2}
    meaning = [names.get(x.lower(), int(x[-1]) if x[-1].isdigit() else -1) for x in labels]
    path = lines(tmp_path / "rows.jsonl", NLI)
    right = [meaning.index(row["label"]) for row in NLI]
    assert benchmark_figures(Canned(labels, right), f"mnli:{path}")[0].value == 1.0
    assert benchmark_figures(Canned(labels, [right[0]] * 3), f"mnli:{path}")[0].value == pytest.approx(1 / 3)


def test_classifiers_that_do_not_fit(tmp_path: Path) -> None:
    path = lines(tmp_path / "rows.jsonl", NLI)
    with pytest.raises(
        ModelError, match="labels are yes, no; mnli has entailment, neutral, contradiction: train it on"
    ):
        benchmark_figures(Canned(["yes", "no"], [0, 0, 0]), f"mnli:{path}")
    scores = lines(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1.0}])
    with pytest.raises(ModelError, match="stsb asks for a number; this classifier has 2 labels"):
        benchmark_figures(Canned(["yes", "no"], [0]), f"stsb:{scores}")
    copa = lines(tmp_path / "c.jsonl", ASKED["copa"][0])
    with pytest.raises(ConfigError, match="copa: a label per text cannot choose among texts"):
        benchmark_figures(Canned(["choice1", "choice2"], [0, 0]), f"copa:{copa}")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folder(tmp_path_factory.mktemp("bert") / "m")


def train(bert: Path, data: str, out: Path, **more: Any) -> dict[str, Any]:
    from upslope.options import ClassifyOptions
    from upslope.recipes.classify import classify

    settings = {
        "dtype": "float32",
        "batch_size": 8,
        "max_length": 32,
        "learning_rate": 1e-3,
        "eval_every": 0,
        "max_steps": 12,
    }
    return classify(ClassifyOptions(model=str(bert), data=data, output_dir=str(out), **{**settings, **more}))


def test_classify_takes_the_same_files_and_its_folder_is_measured(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from upslope.models.encoder.items import load_classifier

    texts = [f"the film was {word} {x}" for x in "abcdefgh" for word in ("good", "bad")]
    for name in ("train", "dev"):
        rows = "".join(f"{text}\t{int('good' in text)}\n" for text in texts)
        (tmp_path / f"{name}.tsv").write_text(f"sentence\tlabel\n{rows}")
    summary = train(bert, f"sst2:{tmp_path}", tmp_path / "run", eval_data=f"sst2:{tmp_path}")
    classifier = load_classifier(summary["best_model"], dtype="float32")
    assert set(classifier.labels) == {"negative", "positive"}
    (figure,) = benchmark_figures(classifier, f"sst2:{tmp_path / 'dev.tsv'}")
    assert (figure.name, figure.n) == ("accuracy", 16)
    assert figure.value == summary["dev"]["accuracy"]["value"]
    plain = AutoModelForSequenceClassification.from_pretrained(summary["best_model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(summary["best_model"])
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    said = [plain.config.id2label[int(i)] == "positive" for i in plain(**batch).logits.argmax(-1)]
    assert figure.value == sum(s == ("good" in t) for s, t in zip(said, texts, strict=True)) / 16


def test_classify_takes_pairs_as_two_segments_and_refuses_columns(bert: Path, tmp_path: Path) -> None:
    from upslope.options import ClassifyOptions
    from upslope.recipes.classify import make_learner

    rows = [
        {"premise": f"we saw {x}", "hypothesis": "the film", "label": y}
        for x, y in zip("abcdef", [0, 1] * 3, strict=True)
    ]
    path = lines(tmp_path / "train.jsonl", rows)
    folder = tmp_path / "bert"
    shutil.copytree(bert, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = ["input_ids", "token_type_ids", "attention_mask"]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_input_names": names}))
    shared: dict[str, Any] = {"model": str(folder), "dtype": "float32", "max_length": 32, "max_steps": 1}
    learner = make_learner(ClassifyOptions(data=f"rte:{path}", eval_data=f"rte:{path}", **shared))
    data = learner.data
    assert set(learner.encoder.labels) == {"entailment", "not_entailment"}
    types = data.train[0].types
    assert types is not None
    assert sorted(set(types)) == [0, 1]
    assert sum(types) == len(learner.tokenizer("the film", add_special_tokens=False)["input_ids"]) + 1
    with pytest.raises(ConfigError, match=r"pair_column: the columns of rte:.* are named by its task; leave it out"):
        make_learner(ClassifyOptions(data=f"rte:{path}", eval_data=f"rte:{path}", pair_column="x", **shared))
    copa = lines(tmp_path / "c.jsonl", ASKED["copa"][0])
    with pytest.raises(ConfigError, match="copa: a label per text cannot choose"):
        make_learner(ClassifyOptions(data=f"copa:{copa}", **shared))


def test_every_task_has_words_for_each_of_its_labels() -> None:
    assert set(PROMPTS) == set(FORMS)
    for name, form in FORMS.items():
        answers = PROMPTS[name].answers
        assert len(answers) == (6 if form.graded else len(form.labels)) or PROMPTS[name].choices is not None


def similar() -> list[tuple[str, str, float]]:
    """The score follows from one word of the second sentence."""
    fillers = ["the film", "we saw", "in the visit", "and the", "was in", "we", "the", "film and"]
    return [(f, f"{f} was {w}", s) for f in fillers for w, s in (("good", 4.5), ("bad", 0.5), ("film", 2.5))]


def test_classify_learns_a_score(bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from upslope.models.encoder.items import load_classifier

    rows = similar()
    for name in ("train", "dev"):
        body = "".join(f"{a}\t{b}\t{s}\n" for a, b, s in rows)
        (tmp_path / f"{name}.tsv").write_text(f"sentence1\tsentence2\tscore\n{body}")
    more = {"objective": "squared_error", "max_steps": 30, "learning_rate": 3e-3, "head_lr_factor": 10.0}
    summary = train(bert, f"stsb:{tmp_path}", tmp_path / "run", eval_data=f"stsb:{tmp_path}", **more)
    assert summary["dev"]["pearson"]["value"] > 0.9
    assert "pearson 0.9" in (Path(summary["folder"]) / "report.txt").read_text()
    classifier = load_classifier(summary["best_model"], dtype="float32")
    pearson, spearman = benchmark_figures(classifier, f"stsb:{tmp_path}")
    assert pearson.value == pytest.approx(summary["dev"]["pearson"]["value"])
    plain = AutoModelForSequenceClassification.from_pretrained(summary["best_model"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(summary["best_model"])
    batch = tokenizer([a for a, _, _ in rows], [b for _, b, _ in rows], padding=True, return_tensors="pt")
    said = plain(**batch).logits
    assert said.shape == (len(rows), 1)
    assert pearson.value == pytest.approx(
        stats.pearsonr([s for _, _, s in rows], said[:, 0].tolist()).statistic, abs=1e-4
    )
    assert spearman.name == "spearman"


def test_a_score_of_ones_own_table(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from upslope.models.encoder.items import item_logits, padded_batch
    from upslope.options import ClassifyOptions
    from upslope.recipes.classify import make_learner

    path = tmp_path / "own.csv"
    path.write_text("text,label\n" + "".join(f"{b},{s}\n" for _, b, s in similar()))
    shared: dict[str, Any] = {"model": str(bert), "dtype": "float32", "max_length": 32, "max_steps": 1}
    learner = make_learner(ClassifyOptions(data=str(path), objective="squared_error", **shared))
    data = learner.data
    assert len(data.train) + len(data.dev) == 24
    assert 1 <= len(data.dev) <= 3
    batch = padded_batch(data.train, learner.encoder, *learner.pads)
    z = item_logits(learner.encoder, batch)[:, 0].detach()
    targets = torch.tensor([x.targets[0] for x in data.train])
    said = learner.update(0, [batch], partial(learner.loss, 0))
    assert said["loss"] == pytest.approx(float(((z - targets) ** 2).mean()), rel=1e-5)
    assert "accuracy" not in said
    command = ["classify", "--data", str(path), "--objective", "squared_error", "--dry-run"]
    assert main([*command, *(x for k, v in shared.items() for x in (f"--{k.replace('_', '-')}", str(v)))]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "labels of these items: " in shown
    assert "It lowers the squared error of the number given to every text." in shown
    path.write_text("text,label\na,1.5\nb,nan\n")
    with pytest.raises(DataError, match=r"own.csv:3: label is 'nan'; squared_error needs a finite number in every row"):
        make_learner(ClassifyOptions(data=str(path), objective="squared_error", **shared))
    sst2 = lines(tmp_path / "s.jsonl", [{"sentence": "a", "label": 1}])
    with pytest.raises(ConfigError, match=r"objective is squared_error, but the labels of sst2:.* are names"):
        make_learner(ClassifyOptions(data=f"sst2:{sst2}", objective="squared_error", **shared))
    stsb = lines(tmp_path / "t.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}])
    with pytest.raises(ConfigError, match="are numbers: set objective = squared_error"):
        make_learner(ClassifyOptions(data=f"stsb:{stsb}", **shared))
    with pytest.raises(ConfigError, match=r"rewards belongs to objective = cross_entropy or .*, not squared_error"):
        ClassifyOptions(data="x.csv", objective="squared_error", rewards="r.json").validate()
