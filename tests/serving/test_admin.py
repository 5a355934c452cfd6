"""Health, models, metrics, and new weights under load."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from damage_kit import flip
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from tiny_model import tiny_folder

from upslope.options import ServeOptions
from upslope.serving.server import create_app
from upslope.training.checkpoint import save
from upslope.types import SamplingParams
from upslope.version import __version__

from .conftest import NAME, make_service

PATH = "/v1/completions"


@pytest.fixture
def admin(model_folder: Path) -> Any:
    """A client with the key, of a server with two models."""
    services = {name: make_service(model_folder, name) for name in (NAME, "second")}
    app = create_app(services, ServeOptions(api_key="secret"))
    with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer secret"}) as client:
        yield client


def figures(client: TestClient) -> dict[tuple[str, str], float]:
    """(name, its label's value) -> value of every sample."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            found[sample.name, "/".join(v for k, v in sorted(sample.labels.items()))] = sample.value
    return found


def test_models(admin: TestClient) -> None:
    listed = admin.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [NAME, "second"]
    assert admin.get(f"/v1/models/{NAME}").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 512
    assert admin.get("/version").json() == {"version": __version__}
    assert admin.post(PATH, json={"prompt": "a", "model": "second"}).json()["model"] == "second"
    assert admin.post(PATH, json={"prompt": "a"}).json()["model"] == NAME


def test_metrics(admin: TestClient) -> None:
    ask = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
    for _ in range(2):
        admin.post(PATH, json=ask)
    admin.post(PATH, json={**ask, "n": 0})
    admin.get("/no/such/route/at/all")
    admin.post(PATH, json={**ask, "model": "second", "max_tokens": 1000})
    found = figures(admin)
    assert found["upslope_requests_total", f"{NAME}/{PATH}/200"] == 2
    assert found["upslope_requests_total", f"second/{PATH}/400"] == 1
    assert found["upslope_requests_total", f"/{PATH}/400"] == 1, "it was refused before it was about a model"
    assert found["upslope_requests_total", "/other/404"] == 1
    assert found["upslope_prompt_tokens_total", NAME] == 6
    assert found["upslope_generated_tokens_total", NAME] == 8
    assert found["upslope_requests_running", NAME] == found["upslope_requests_waiting", NAME] == 0
    assert found["upslope_time_to_first_token_seconds_count", NAME] == 2
    assert found["upslope_time_per_output_token_seconds_count", NAME] == 2
    assert found["upslope_weight_version", "second"] == 0
    assert found["upslope_generated_tokens_total", "second"] == 0


def test_every_figure_names_its_model(admin: TestClient) -> None:
    admin.post(PATH, json={"prompt": "abc", "max_tokens": 4, "ignore_eos": True})
    families = list(text_string_to_metric_families(admin.get("/metrics").text))
    assert len(families) > 8
    for family in families:
        assert all("model" in sample.labels for sample in family.samples), family.name


def test_a_vote_on_two_models_counts_for_neither(model_folder: Path, tmp_path: Path) -> None:
    services = {name: make_service(model_folder, name) for name in (NAME, "second")}
    app = create_app(services, ServeOptions(feedback=str(tmp_path / "feedback")))
    sides = {side: {"model": name, "reply": side} for side, name in zip("ab", services, strict=True)}
    vote = {"id": "v", "messages": [{"role": "user", "content": "?"}], "winner": "a", **sides}
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.post("/feedback/vote", json=vote).status_code == 200
        assert figures(client)["upslope_requests_total", "//feedback/vote/200"] == 1


def test_registries_do_not_meet(model_folder: Path) -> None:
    for _ in range(2):
        create_app({NAME: make_service(model_folder)}, ServeOptions())


def test_weights_are_replaced_under_load(admin: TestClient, tmp_path: Path) -> None:
    """Requests run on all sides of the swap: each is answered, whole, and says which weights it is from."""
    other = tiny_folder(tmp_path / "other", seed=1)
    params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
    texts = {}
    for version, folder in enumerate((admin.app.state.services[NAME].source, other)):
        fresh = make_service(Path(folder))
        texts[version] = fresh.engine.generate([fresh.tokens_of("abc")], params)[0][0].text
    ask = {"prompt": "abc", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        before = [pool.submit(admin.post, PATH, json=ask) for _ in range(16)]
        swapped = admin.post("/admin/weights", json={"model": NAME, "source": str(other)})
        after = [pool.submit(admin.post, PATH, json=ask) for _ in range(8)]
    assert swapped.status_code == 200, swapped.text
    assert {key: swapped.json()[key] for key in ("model", "source", "version")} == {
        "model": NAME,
        "source": str(other),
        "version": 1,
    }
    for answer in [request.result() for request in before]:
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 24
    for answer in [request.result() for request in after]:
        assert answer.headers["X-Weight-Version"] == "1"
        assert answer.json()["system_fingerprint"] == f"{NAME}@1"
        assert answer.json()["choices"][0]["text"] == texts[1]
    assert texts[0] != texts[1]
    assert figures(admin)["upslope_weight_version", NAME] == 1
    assert admin.get("/v1/models/second").headers["X-Weight-Version"] == "0"
    assert admin.get(f"/v1/models/{NAME}").json()["root"] == str(other)


def test_of_several_models_one_is_named(admin: TestClient, tmp_path: Path) -> None:
    """Without a name, or under a wrong one, nothing changes; the other model's weights are its own."""
    source = str(tiny_folder(tmp_path / "other", seed=1))
    for given, status, says in (
        ({}, 400, f"several models are served here: say which one of {NAME}, second"),
        ({"model": None}, 400, f"say which one of {NAME}, second"),
        ({"model": "third"}, 404, f"no model 'third' is served here, only {NAME}, second"),
    ):
        refused = admin.post("/admin/weights", json={"source": source, **given})
        assert refused.status_code == status, refused.text
        assert says in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == "model"
    swapped = admin.post("/admin/weights", json={"source": source, "model": "second"})
    assert swapped.json()["model"] == "second"
    found = figures(admin)
    assert (found["upslope_weight_version", NAME], found["upslope_weight_version", "second"]) == (0, 1)


def test_the_only_model_need_not_be_named(model_folder: Path, tmp_path: Path) -> None:
    app = create_app({NAME: make_service(model_folder)}, ServeOptions(api_key="secret"))
    source = str(tiny_folder(tmp_path / "other", seed=1))
    with TestClient(app, base_url="http://127.0.0.1", headers={"Authorization": "Bearer secret"}) as client:
        answers = [client.post("/admin/weights", json={"source": source, **given}) for given in ({}, {"model": NAME})]
    assert [(answer.json()["model"], answer.json()["version"]) for answer in answers] == [(NAME, 1), (NAME, 2)]


@pytest.mark.parametrize("source", ["", "/no/such/folder", "../x", "\x00"])
def test_weights_that_cannot_be_had(admin: TestClient, source: str) -> None:
    answer = admin.post("/admin/weights", json={"model": NAME, "source": source})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "source"
    assert figures(admin)["upslope_weight_version", NAME] == 0


def test_corrupt_weights_are_refused(admin: TestClient, tmp_path: Path) -> None:
    broken = tiny_folder(tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = admin.post("/admin/weights", json={"model": NAME, "source": str(broken)})
    assert found.status_code == 400
    assert found.json()["error"]["message"].startswith("the weights stay as they are: ")
    assert admin.post(PATH, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'"x"', b'{"model_type": []}', b"\xff" * 50])
def test_a_broken_folder_is_refused_and_the_old_weights_go_on(
    admin: TestClient, tmp_path: Path, name: str, content: bytes
) -> None:
    broken = tiny_folder(tmp_path / "broken")
    (broken / name).write_bytes(content)
    found = admin.post("/admin/weights", json={"model": NAME, "source": str(broken)})
    if name != "tokenizer_config.json" or not content.startswith(b"{"):
        assert found.status_code == 400, found.text
        assert "\n" not in found.json()["error"]["message"]
    assert admin.post(PATH, json={"prompt": "a"}).status_code == 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(admin: TestClient, tmp_path: Path, value: float) -> None:
    """The old weights stay: the same question has the same answer."""
    ask = {"prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    before = admin.post(PATH, json=ask).json()["choices"][0]["text"]
    broken = tiny_folder(tmp_path / "broken", seed=1)
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][3] = value
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    found = admin.post("/admin/weights", json={"model": NAME, "source": str(broken)})
    assert found.status_code == 400
    assert "model.norm.weight holds NaN or infinity" in found.json()["error"]["message"]
    after = admin.post(PATH, json=ask)
    assert after.status_code == 200
    assert after.json()["choices"][0]["text"] == before
    assert figures(admin)["upslope_weight_version", NAME] == 0


def test_a_damaged_checkpoint_is_refused(admin: TestClient, tmp_path: Path) -> None:
    """Its weights have a manifest, one level up."""
    whole = tiny_folder(tmp_path / "whole", seed=1)

    def write(path: Path) -> None:
        shutil.copytree(whole, path, dirs_exist_ok=True)

    step = save(tmp_path / "checkpoints", 1, tensors={}, state={}, write_model=write)
    assert admin.post("/admin/weights", json={"model": NAME, "source": str(step)}).json()["version"] == 1
    flip(step / "model/model.safetensors")
    found = admin.post("/admin/weights", json={"model": NAME, "source": str(step)})
    assert found.status_code == 400
    assert "model/model.safetensors is damaged" in found.json()["error"]["message"]
    assert figures(admin)["upslope_weight_version", NAME] == 1


def test_weights_need_a_configured_key(client: TestClient) -> None:
    answer = client.post("/admin/weights", json={"source": "x"})
    assert answer.status_code == 403
    assert "start it with --api-key or UPSLOPE_API_KEY" in answer.json()["error"]["message"]
