"""The chat page in a real browser: what a reader can do, what a hostile model cannot, and that everybody can use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from axe_playwright_python.sync_playwright import Axe

from upslope.data.records import read_records
from upslope.options import ServeOptions
from upslope.serving.errors import ApiError
from upslope.serving.server import create_app

from .chat_kit import FakeChat, Said, said
from .conftest import make_service

Page = Any
Open = Callable[..., Page]


@pytest.fixture
def chat(tmp_path: Path) -> FakeChat:
    return FakeChat(tmp_path / "feedback")


@pytest.fixture
def opened(browser: Any, serve: Callable[..., Any]) -> Iterator[Open]:
    """Opens an application in a new browser profile; anything the page complains of fails the test."""
    contexts, complaints = [], []

    def start(app: Any, *, ready: bool = True, allowed: str = "\0", **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-GB", "viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" and allowed not in m.text else None)
        page.on("dialog", lambda dialog: (complaints.append(f"a dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(serve(app).url)
        if ready:
            page.wait_for_selector(".welcome")
            wait_for_models(page)
        return page

    yield start
    for context in contexts:
        context.close()
    assert complaints == []


def wait_for_models(page: Page) -> None:
    """The page shows itself before it knows them, and sends nothing until then."""
    page.wait_for_selector("#s-model option", state="attached")


def send(page: Page, text: str, *, wait: str = "[data-do=regenerate]") -> None:
    wait_for_models(page)
    page.fill("#message", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(wait)


def last_reply(page: Page) -> str:
    return page.locator(".reply").last.inner_text()


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- conversations


def test_a_reply_streams_in_with_its_figures_and_survives_a_reload(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.versions["uphill-135m"] = 7
    chat.replies = [said("Up we **go**.")]
    send(page, "Where to?")
    assert last_reply(page) == "Up we go."
    assert page.locator(".reply strong").inner_text() == "go"
    meta = page.locator(".meta").inner_text()
    assert "weights 7" in meta
    assert "2 tokens" in meta
    assert "weights 7" in page.locator("h1").inner_text()
    body = chat.asked[0]
    assert body["messages"] == [{"role": "user", "content": "Where to?"}]
    assert body["model"] == "uphill-135m"
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["top_logprobs"]) == (0.7, 0.95, 512, 5)
    assert f"seed {body['seed']}" in meta
    page.reload()
    assert last_reply(page) == "Up we go."
    assert page.locator(".asked").inner_text() == "Where to?"


def test_regenerate_edit_and_branch(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [said("one"), said("two"), said("after two"), said("edited"), said("more")]
    send(page, "first")
    page.click("[data-do=regenerate]")
    page.wait_for_selector("text=2/2")
    assert last_reply(page) == "two"
    send(page, "second", wait="text=after two")
    assert [m["content"] for m in chat.asked[2]["messages"]] == ["first", "two", "second"]
    page.locator("[data-do=left]").click()
    assert page.locator(".reply").all_inner_texts() == ["one"]
    page.locator("[data-do=right]").click()
    assert page.locator(".reply").all_inner_texts() == ["two", "after two"]
    page.locator(".user").first.hover()
    page.locator(".user [data-do=edit]").first.click()
    page.fill(".editor textarea", "first, again")
    page.click(".editor .primary")
    page.wait_for_selector("text=edited")
    assert [m["content"] for m in chat.asked[3]["messages"]] == ["first, again"]
    page.locator(".user [data-do=left]").click()
    assert page.locator(".reply").all_inner_texts() == ["two", "after two"]
    page.reload()
    assert page.locator(".reply").all_inner_texts() == ["two", "after two"]


def test_stop_keeps_what_was_said_and_frees_the_server(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [Said(["so", " far", " never"], holds=2), said("next")]
    send(page, "go", wait="text=so far")
    assert page.locator("#send").is_hidden()
    assert page.locator("article[aria-busy=true]").count() == 1
    page.click("#stop")
    page.wait_for_selector("text=stopped")
    assert last_reply(page) == "so far"
    page.wait_for_selector("#message:focus")
    send(page, "on", wait="text=next")
    assert [m["content"] for m in chat.asked[1]["messages"]] == ["go", "so far", "on"]
    assert chat.broken_off.wait(20)


def test_a_reader_who_listens_hears_the_reply_once(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    page.evaluate("""() => { window.heard = []; new MutationObserver(() =>
        window.heard.push(document.getElementById("status").textContent)
    ).observe(document.getElementById("status"), {childList: true, subtree: true}); }""")
    chat.replies = [said("a reply of many tokens, of which none is read out by itself")]
    send(page, "go")
    heard = page.evaluate("window.heard")
    assert heard[0] == "The model is replying."
    assert heard[-1].startswith("Reply: a reply of many tokens")
    assert len(heard) == 2
    assert page.locator("#thread [aria-live], #thread [role=log]").count() == 0


@pytest.mark.parametrize(
    ("failing", "shown"),
    [
        (Said([], error=ApiError(429, "256 requests wait already", headers={"Retry-After": "3"})), "Try again in 3 s."),
        (Said(["half"], error=ApiError(500, "the engine has failed")), "the engine has failed"),
    ],
)
def test_a_failure_is_told_and_can_be_tried_again(opened: Open, chat: FakeChat, failing: Said, shown: str) -> None:
    page = opened(chat.app, allowed="429")
    chat.replies = [failing, said("well")]
    send(page, "go")
    assert shown in page.locator("#thread .problem").inner_text()
    page.click("[data-do=regenerate]")
    page.wait_for_selector("text=well")
    assert page.locator("#thread .problem").count() == 0


def test_a_connection_that_breaks_is_told(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    half = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=half, content_type="text/event-stream"))
    send(page, "go", wait="#thread .problem")
    assert last_reply(page) == "half"
    assert "the connection ended before the reply did" in page.locator("#thread .problem").inner_text()


def test_a_conversation_deleted_in_mid_reply_stays_deleted(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [Said(["so", " far"], holds=1)]
    send(page, "go", wait="text=so")
    page.click('[aria-label="Delete “go”"]')
    page.wait_for_selector("#send:not([hidden])")
    page.reload()
    page.wait_for_selector(".welcome")
    assert page.locator("#list li").count() == 0


def test_a_reply_goes_on_while_another_conversation_is_open(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [Said(["so", " far", " so good"], holds=1)]
    send(page, "go", wait="text=so")
    page.click("#new")
    page.wait_for_selector(".welcome")
    page.fill("#message", "a draft")
    page.keyboard.press("Enter")
    chat.go_on()
    page.wait_for_selector("#send:not([hidden])")
    assert page.input_value("#message") == "a draft"
    assert len(chat.asked) == 1
    page.click("#list >> text=go")
    assert last_reply(page) == "so far so good"


def test_another_tab_shows_up_in_the_list_once(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [said("one"), said("two"), said("three")]
    send(page, "the first")
    other = page.context.new_page()
    other.goto(page.url)
    other.click("#new")
    send(other, "the second")
    page.wait_for_selector("#list >> text=the second")
    send(page, "more", wait="text=three")
    page.click("#list >> text=the second")
    assert page.locator("#list bdi").all_inner_texts() == ["the first", "the second"]


def test_settings_are_sent_kept_and_checked(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [said("a"), said("b")]
    page.click("#open-settings")
    page.fill("#s-system", "Be brief.")
    page.fill("#s-temperature", "0.25")
    assert page.locator("[data-for=temperature]").input_value() == "0.25"
    page.fill("#s-top_k", "20")
    page.fill("#s-min_p", "0.1")
    page.fill("#s-max_tokens", "")
    page.fill("#s-seed", "41")
    page.uncheck("[name=logprobs]")
    send(page, "go")
    page.click("[data-do=regenerate]")
    page.wait_for_selector("text=2/2")
    first, second = chat.asked
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: first[name] for name in ("temperature", "top_k", "min_p", "seed")} == {
        "temperature": 0.25, "top_k": 20, "min_p": 0.1, "seed": 41,
    }  # fmt: skip
    assert "max_tokens" not in first
    assert "logprobs" not in first
    assert second["seed"] == 42
    page.fill("#s-top_p", "1.5")
    assert page.get_attribute("#s-top_p", "aria-invalid") == "true"
    page.fill("#message", "no")
    page.press("#message", "Enter")
    assert page.evaluate("document.activeElement.id") == "s-top_p"
    assert len(chat.asked) == 2
    page.reload()
    page.click("#open-settings")
    assert page.input_value("#s-temperature") == "0.25"
    assert page.input_value("#s-top_p") == "0.95"
    page.click("#defaults")
    assert page.input_value("#s-temperature") == "0.7"


def test_conversations_are_listed_deleted_brought_back_and_exported(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [said("one"), said("two")]
    send(page, "the first")
    page.click("#new")
    page.wait_for_selector(".welcome")
    send(page, "the second")
    assert page.locator("#list bdi").all_inner_texts() == ["the second", "the first"]
    page.click('[aria-label="Delete “the second”"]')
    page.wait_for_selector(".welcome")
    assert page.locator("#list bdi").all_inner_texts() == ["the first"]
    page.click("#toast button")
    assert last_reply(page) == "two"
    with page.expect_download() as download:
        page.click("#export")
    content = json.loads(Path(download.value.path()).read_text())
    assert [m["content"] for m in content["messages"]] == ["the second", "two"]
    assert len(content["tree"]["nodes"]) == 3
    page.reload()
    page.click("#list >> text=the first")
    assert last_reply(page) == "one"


def test_a_damaged_or_full_storage_loses_no_reply(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [said("old reply"), said("new reply")]
    send(page, "the first")
    page.evaluate("""() => {
        localStorage.setItem("upslope.chat.x", "{");
        localStorage.setItem("upslope.chat.y", '{"id": "y", "nodes": {"root": {"children": ["z"], "shown": 0}}}');
        localStorage.setItem("upslope.settings", '{"temperature": "hot", "top_k": -1}');
    }""")
    page.reload()
    assert page.locator("#list bdi").all_inner_texts() == ["the first"]
    page.evaluate("""() => { for (let size = 1 << 22; size; size >>= 1) for (let i = 0; ; i++)
        try { localStorage.setItem(`filler${size}.${i}`, "x".repeat(size)); } catch { break; } }""")
    page.click("#new")
    send(page, "the second")
    assert last_reply(page) == "new reply"
    assert "will not survive" in page.locator("#toast").inner_text()


# --- probabilities


def test_every_token_tells_its_probability_to_eye_pointer_and_keyboard(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    tokens = ["The", " cat", " sat", "\n", "你".encode()[:2], "你".encode()[2:], "."]
    others = {1: [(" dog", 0.6), (" cat", 0.3), (" <b>x</b>", 0.05)], 2: [(" ran", 0.5), (" hid", 0.25)]}
    chat.replies = [Said(tokens, [0.95, 0.3, 0.04, 0.6, 0.1, 0.999, 0.92], others)]
    send(page, "go")
    page.click("#probabilities")
    spans = page.locator(".token")
    assert [s.strip() for s in spans.all_text_contents()] == ["The", "cat", "sat", "↵", "·", "你", "."]
    levels = spans.evaluate_all("all => all.map((s) => s.className.match(/level-(.)/)[1])")
    assert levels == ["0", "2", "4", "1", "3", "0", "0"]
    lines = spans.evaluate_all("all => all.map((s) => getComputedStyle(s).textDecorationStyle)")
    assert lines[1:5] == ["dashed", "double", "dotted", "solid"]
    assert spans.nth(1).get_attribute("aria-label") == "“␣cat”, 30%"
    perplexity = 1 / (0.95 * 0.3 * 0.04 * 0.6 * 0.1 * 0.999 * 0.92) ** (1 / 7)
    assert f"perplexity {perplexity:.2f}" in page.locator(".figures").inner_text()
    card = page.locator("#alternatives")
    spans.nth(1).hover()
    assert card.locator("li").all_inner_texts()[0].split() == ["␣dog", "60%"]
    assert "rank 2" in card.inner_text()
    assert "␣<b>x</b>" in card.inner_text()
    assert card.locator("b").count() == 0
    page.mouse.move(2, 790)
    assert card.is_hidden()
    spans.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "not among the 2 likeliest" in card.inner_text()
    assert card.locator(".chosen").inner_text().split() == ["␣sat", "4.0%"]
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "alternatives"
    page.keyboard.press("Escape")
    assert card.is_hidden()
    page.keyboard.press("End")
    assert page.locator(".token[tabindex='0']").all_inner_texts() == ["."]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.do") == "regenerate"
    page.reload()
    assert page.locator(".token").count() == 7


# --- feedback


def test_thumbs_and_edits_become_rows(opened: Open, chat: FakeChat, tmp_path: Path) -> None:
    page, folder = opened(chat.app), tmp_path / "feedback"
    chat.replies = [said("five")]
    send(page, "2 + 2?")
    page.click("[data-do=up]")
    page.wait_for_selector("[data-do=up][aria-pressed=true]")
    assert (rows(folder, "labels")[0]["label"], len(rows(folder, "sft"))) == (True, 1)
    page.click("[data-do=down]")
    page.wait_for_selector("[data-do=down][aria-pressed=true]")
    assert ([row["label"] for row in rows(folder, "labels")], rows(folder, "sft")) == ([False], [])
    page.click("[data-do=down]")
    page.wait_for_selector("[data-do=down][aria-pressed=false]")
    assert rows(folder, "labels") == []
    page.click(".assistant [data-do=edit]")
    page.fill(".editor textarea", "four")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("text=edited by you")
    [record] = read_records(folder / "preferences.jsonl")
    assert (record.chosen[0].content, record.rejected[0].content) == ("four", "five")  # pyright: ignore
    assert rows(folder, "preferences")[0]["weight_version"] == 0
    assert page.locator("[data-do=up]").count() == 0
    page.click("#open-settings")
    page.wait_for_selector("#saved li")
    assert "1 in" in page.locator("#saved").inner_text()


def test_feedback_that_cannot_be_saved_is_not_shown_as_saved(opened: Open, chat: FakeChat, tmp_path: Path) -> None:
    page = opened(chat.app, allowed="500")
    (tmp_path / "feedback").write_text("in the way")
    chat.replies = [said("five")]
    send(page, "2 + 2?")
    page.click("[data-do=up]")
    page.wait_for_selector("#toast:not([hidden])")
    assert "cannot be saved" in page.locator("#toast").inner_text()
    assert page.get_attribute("[data-do=up]", "aria-pressed") == "false"


def test_blind_comparison_names_the_models_after_the_vote_only(opened: Open, tmp_path: Path) -> None:
    chat = FakeChat(tmp_path / "feedback", ("alpha-model", "beta-model"))
    chat.replies = [said("first reply"), said("second reply"), said("third"), said("fourth")]
    page = opened(chat.app)
    page.click("[data-mode=blind]")
    send(page, "compare", wait=".ballot")
    assert not {"alpha", "beta"} & set(page.locator("body").inner_text().replace("-", " ").split())
    assert page.locator("#send").is_disabled()
    winner = page.locator(".side").nth(1).locator(".reply").inner_text()
    page.reload()
    page.wait_for_selector(".ballot")
    page.click("[data-do=second]")
    page.wait_for_selector(".preferred")
    folder = tmp_path / "feedback"
    [pair], [vote] = rows(folder, "preferences"), rows(folder, "votes")
    assert pair["chosen"][0]["content"] == winner
    assert {side["model"] for side in (vote["a"], vote["b"])} == {"alpha-model", "beta-model"}
    by_model = {body["model"]: text for body, text in zip(chat.asked, ("first reply", "second reply"), strict=True)}
    assert by_model[vote["winner"]] == winner
    assert page.locator(".side .who").all_inner_texts() == [vote["a"]["model"], vote["b"]["model"]]
    assert page.locator(".score").inner_text() in ("alpha-model 0 : 1 beta-model", "alpha-model 1 : 0 beta-model")
    send(page, "again", wait=".ballot")
    assert [m["content"] for m in chat.asked[2]["messages"]] == ["compare", winner, "again"]
    page.click("[data-do=skip]")
    page.wait_for_selector(".ballot", state="detached")
    assert len(rows(folder, "votes")) == 1
    orders = page.evaluate("""async () => {
        const { shuffled } = await import("/static/duel.js");
        return Array.from({length: 64}, () => shuffled(["a", "b"])[0]);
    }""")
    assert set(orders) == {"a", "b"}


# --- hostile text

HOSTILE = [
    "<script>window.harm = 1</script>",
    "<img src=x onerror='window.harm = 1'>",
    "[click](javascript:window.harm=1) ![x](https://elsewhere.example/pixel.png) <https://elsewhere.example>",
    '"><svg onload=window.harm=1></title></textarea></script><iframe srcdoc="<script>parent.harm=1</script>">',
    "{{constructor.constructor('window.harm=1')()}} ${window.harm=1} <%= 1 %> __proto__",
    "```html\n<script>window.harm = 1</script>\n```\n# <b onmouseover='harm=1'>\n- <a href='javascript:harm=1'>x</a>",
    "\u202egnp.exe \u2066\u2067 data:[DONE]\n\ndata: [DONE]\n\nevent: x",
]


def test_no_text_of_a_model_or_a_reader_becomes_more_than_text(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    allowed = "article, h2, bdi, div, p, span, strong, em, code, pre, ul, ol, li, blockquote, hr, button, svg, use"
    known = {"class", "dir", "tabindex", "start", "role", "aria-label", "aria-describedby", "data-index"}
    for i, text in enumerate(HOSTILE):
        chat.replies = [Said([text], [0.5], {0: [(text, 0.5), ("<img src=y onerror=harm=1>", 0.2)]})]
        send(page, text, wait=f".turn:nth-of-type({2 * i + 2}) [data-do=regenerate]")
    for _ in range(2):
        strange = page.evaluate(
            """(allowed) => [...document.querySelectorAll("#thread *")]
                .filter((e) => !e.matches(allowed)).map((e) => e.outerHTML)""",
            allowed,
        )
        assert strange == []
        attributes = page.evaluate(
            "[...document.querySelectorAll('.reply *, .reply > *, .asked')].flatMap((e) => e.getAttributeNames())"
        )
        assert set(attributes) <= known
        page.click("#probabilities")
    assert page.locator(".asked").all_text_contents()[:-1] == HOSTILE[:-1]
    page.click("#probabilities")
    for token in page.locator(".token").all():
        token.focus()
        assert page.locator("#alternatives img, #alternatives script, #alternatives svg").count() == 0
    page.keyboard.press("Escape")
    page.click("#probabilities")
    for i, text in enumerate(HOSTILE):
        page.locator(".assistant [data-do=edit]").nth(i).click()
        assert page.input_value(".editor textarea") == text
        page.keyboard.press("Escape")
    page.reload()
    page.wait_for_selector(".reply")
    assert page.locator(".asked").all_text_contents()[:-1] == HOSTILE[:-1]
    assert page.evaluate("window.harm") is None
    assert not [url for url in requested if "elsewhere" in url or "pixel" in url or url.endswith(("/x", "/y"))]


def test_direction_overrides_are_shown_and_turn_nothing(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    chat.replies = [Said(["safe \u202egnp.exe", " end"])]
    send(page, "go")
    assert page.locator(".control").all_inner_texts() == ["U+202E"]
    assert "\u202e" not in page.locator(".reply").inner_text()
    page.click("#probabilities")
    assert "\u202e" not in page.locator(".reply").inner_text()


def test_a_very_long_line_stays_in_its_column(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app, viewport={"width": 400, "height": 800})
    chat.replies = [Said(["x" * 100_000])]
    send(page, "y" * 3000)
    assert len(last_reply(page)) == 100_000
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.click("#probabilities")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_stops_what_would_get_into_the_page(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app, allowed="")
    harm = page.evaluate("""async () => {
        document.body.append(Object.assign(document.createElement("script"), {textContent: "window.harm = 1"}));
        const html = "<img src=x onerror='window.harm = 2'><style>h1{display:none}</style>";
        document.body.insertAdjacentHTML("beforeend", html);
        const elsewhere = await fetch("http://localhost:9/").then(() => "sent", (error) => error.message);
        setTimeout("window.harm = 3");
        await new Promise((done) => setTimeout(done, 50));
        return [window.harm, elsewhere, getComputedStyle(document.querySelector("h1")).display];
    }""")
    assert harm == [None, "Failed to fetch", "flex"]


# --- parts, by themselves

CUTS = """async () => {
    const { events } = await import("/static/api.js");
    const text = 'data: {"a":"你"}\\r\\n\\r\\n: comment\\ndata:b\\ndata: c\\n\\ndata: [DONE]\\n\\n';
    const bytes = new TextEncoder().encode(text);
    const seen = new Set();
    for (let cut = 0; cut <= bytes.length; cut++) {
        const body = new ReadableStream({ start(controller) {
            controller.enqueue(bytes.slice(0, cut)); controller.enqueue(bytes.slice(cut)); controller.close();
        } });
        const found = [];
        for await (const data of events(body)) found.push(data);
        seen.add(JSON.stringify(found));
    }
    return [...seen].map((text) => JSON.parse(text));
}"""

MARKDOWN = """# Title
A *b* **c _d_** `e*` 2 * 3 * 4 snake_case_name \\*f\\*
next line

1. one
2. two
   - deep **x**
   - deep
3. three

> quoted
---
```py
a = "<b>"

# not a title
```
unclosed **bold and `code"""

RENDERED = """async (text) => {
    const { Rendering } = await import("/static/markdown.js");
    const whole = document.createElement("div"), grown = document.createElement("div");
    new Rendering(whole).update(text);
    const rendering = new Rendering(grown);
    for (let i = 0; i <= text.length; i++) rendering.update(text.slice(0, i));
    const outline = (e) => e.tagName.toLowerCase() + [...e.children].map((c) => `(${outline(c)})`).join("");
    return { same: whole.isEqualNode(grown), outline: [...whole.children].map(outline), text: whole.textContent };
}"""

REPEATED = (
    "*", "**a ", "`", "``` ", "``\n", "_a", "*a_b`c", "> ", "- ", "- a\n ", "1. ", "[", "\\", "#", " ", "\u202ex",
)  # fmt: skip

SLOW = """async (texts) => {
    const { Rendering } = await import("/static/markdown.js");
    return texts.map((text) => {
        const start = performance.now();
        new Rendering(document.createElement("div")).update(text);
        return performance.now() - start;
    });
}"""


def test_the_parts_by_themselves(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    assert page.evaluate(CUTS) == [['{"a":"你"}', "b\nc", "[DONE]"]]
    found = page.evaluate(RENDERED, MARKDOWN)
    assert found["same"]
    assert found["outline"] == [
        "p", "p(em)(strong(em))(code)", "ol(li)(li(ul(li(strong))(li)))(li)", "blockquote(p)", "hr", "pre(span)(code)",
        "p",
    ]  # fmt: skip
    for part in ("2 * 3 * 4 snake_case_name *f*\nnext", 'a = "<b>"\n\n# not a title', "unclosed **bold and `code"):
        assert part in found["text"]
    hostile = [(unit * (100_000 // len(unit) + 1))[:100_000] for unit in REPEATED]
    hostile += ["".join("`" * i + " " for i in range(440)), "".join(" " * (i % 40) + "- x\n" for i in range(3000))]
    times = page.evaluate(SLOW, hostile)
    assert max(times) < 3000, dict(zip((text[:8] for text in hostile), times, strict=True))


# --- keys, languages, access


def test_the_key_is_asked_for_and_kept_in_the_tab(opened: Open, tmp_path: Path) -> None:
    chat = FakeChat(tmp_path / "feedback", key="s3cret")
    page = opened(chat.app, ready=False, allowed="401")
    page.wait_for_selector("#key[open]")
    page.fill("#key-input", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-wrong:not([hidden])")
    page.fill("#key-input", "s3cret")
    page.keyboard.press("Enter")
    page.wait_for_selector(".welcome")
    chat.replies = [said("in")]
    send(page, "go")
    page.reload()
    page.wait_for_selector("h1:has-text('uphill')")
    assert page.locator("#key[open]").count() == 0
    assert "s3cret" not in page.evaluate("JSON.stringify(localStorage)")
    assert page.evaluate("sessionStorage.getItem('upslope.key')") == "s3cret"
    page.evaluate("sessionStorage.clear()")
    page.reload()
    page.wait_for_selector("#key[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#thread .problem")


def test_chinese_where_the_browser_prefers_it_and_on_request(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app, locale="zh-CN")
    assert page.get_attribute("html", "lang") == "zh-Hans"
    assert page.get_attribute("#message", "placeholder") == "消息"
    assert page.locator(".title").inner_text() == "和 uphill-135m 说点什么"
    page.click("[data-language=en]")
    assert page.get_attribute("#send", "aria-label") == "Send"
    page.reload()
    assert page.get_attribute("html", "lang") == "en"


def test_enter_that_ends_an_input_method_sends_nothing(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app)
    page.fill("#message", "你")
    page.evaluate("""() => document.getElementById("message").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))""")
    page.press("#message", "Shift+Enter")
    assert page.input_value("#message") == "你\n"
    assert chat.asked == []


def test_the_keyboard_is_enough(opened: Open, chat: FakeChat) -> None:
    page = opened(chat.app, viewport={"width": 400, "height": 800})
    chat.replies = [said("fine")]
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    order = []
    for _ in range(3):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    assert order == ["open-conversations", "probabilities", "open-settings"]
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.closest('#settings') !== null")
    assert page.evaluate("document.querySelector('main').inert")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-settings"
    assert not page.evaluate("document.querySelector('main').inert")
    page.focus("#message")
    page.keyboard.type("go")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-do=up]")
    page.focus("[data-do=up]")
    page.keyboard.press("Space")
    page.wait_for_selector("[data-do=up][aria-pressed=true]")
    assert page.evaluate("document.activeElement.dataset.do") == "up"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.do") == "edit"


@pytest.mark.parametrize("width", [1280, 360])
def test_axe_finds_nothing_serious_in_either_theme(opened: Open, tmp_path: Path, width: int) -> None:
    chat = FakeChat(tmp_path / "feedback", ("alpha-model", "beta-model"))
    page = opened(chat.app, viewport={"width": width, "height": 800}, reduced_motion="reduce")
    tokens = ["# T\n", "- a `b`\n", "> c\n", "```py\n", "x = 1\n", "```\n", "\u202eend"]
    chat.replies = [Said(tokens, [0.99, 0.7, 0.3, 0.1, 0.01, 0.5, 0.2]), said("one"), said("two")]
    page.evaluate(Axe().axe_script)

    def check(state: str) -> None:
        for theme in ("dark", "light"):
            page.emulate_media(color_scheme=theme)
            rules = {"runOnly": ["color-contrast"]} if theme == "dark" else {}
            found = page.evaluate("(rules) => axe.run({resultTypes: ['violations'], ...rules})", rules)["violations"]
            serious = [
                (v["id"], [n["html"] for n in v["nodes"]]) for v in found if v["impact"] in ("serious", "critical")
            ]
            assert serious == [], (state, theme)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

    check("welcome")
    send(page, "go")
    page.click("[data-do=down]")
    page.wait_for_selector("[data-do=down][aria-pressed=true]")
    check("a reply")
    page.click("#probabilities")
    page.locator(".token").nth(2).focus()
    check("tokens")
    page.click("#probabilities")
    page.click(".assistant [data-do=edit]")
    check("editing")
    page.keyboard.press("Escape")
    page.click("#open-settings")
    page.fill("#s-top_p", "7")
    page.wait_for_selector("#saved li")
    check("settings")
    page.click("#defaults")
    page.click("#settings [data-close]")
    if width < 960:
        page.click("#open-conversations")
    check("conversations")
    if width < 960:
        page.keyboard.press("Escape")
    page.click("[data-mode=blind]")
    send(page, "compare", wait=".ballot")
    check("a vote")
    page.click("[data-do=tie]")
    page.wait_for_selector(".score")
    check("after the vote")


# --- the real server


def test_with_a_real_model_behind_the_real_server_and_its_key(opened: Open, model_folder: Path, tmp_path: Path) -> None:
    """The server's answer to a page without a key makes the browser itself ask; the page then needs not."""
    settings = ServeOptions(feedback=str(tmp_path / "feedback"), api_key="s3cret")
    app = create_app({"tiny": make_service(model_folder, "tiny")}, settings)
    page = opened(app, allowed="401", http_credentials={"username": "any", "password": "s3cret"})
    assert page.locator("#key[open]").count() == 0
    page.click("#open-settings")
    page.fill("#s-max_tokens", "12")
    page.fill("#s-seed", "3")
    send(page, "Hello")
    assert "weights 0" in page.locator(".meta").inner_text()
    page.click("#probabilities")
    assert 1 <= page.locator(".token").count() <= 12
    page.locator(".token").first.focus()
    shown = [text.split()[-1] for text in page.locator("#alternatives li").all_inner_texts()]
    assert len(shown) in (5, 6)
    assert all(text.endswith("%") for text in shown)
    page.keyboard.press("Escape")
    page.click("[data-do=up]")
    page.wait_for_selector("[data-do=up][aria-pressed=true]")
    assert read_records(tmp_path / "feedback" / "labels.jsonl")[0].label is True
