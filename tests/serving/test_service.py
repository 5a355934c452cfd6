"""One engine on a thread of its own: what comes out, who is told, and that nobody is left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_folder

from upslope.errors import ConfigError, DataError, ModelError, RunError
from upslope.serving.engine_thread import Served, Stopped, merged
from upslope.serving.service import QueueFull, Service
from upslope.types import SamplingParams

from .conftest import Gate, make_service

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
ENDLESS = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run it in a loop of its own; a test that waits for ever fails after a minute."""
    asyncio.run(asyncio.wait_for(coroutine, 60))


def prompt(text: str, service: Service) -> list[int]:
    return service.tokens_of(text)


async def idle(service: Service) -> None:
    """Every cancellation sent before this call has been carried out, and nothing is left of any request."""

    def look() -> tuple[bool, int, int]:
        engine = service.engine
        return engine.busy, len(engine.scheduler.everyone), engine.pool.num_blocks - engine.pool.free

    assert await service.call(look) == (False, 0, 0)


def test_requests_together_give_what_each_gives_alone(service: Service, model_folder: Path) -> None:
    alone = make_service(model_folder).engine
    prompts = [prompt(text, service) for text in ("a", "some text", "x" * 100, "1 + 1 =")]

    async def main() -> None:
        async with Gate(service):
            streams = asyncio.ensure_future(service.submit_all([service.submit(p, GREEDY) for p in prompts]))
        found = [await stream.completions() for stream in await streams]
        assert found == alone.generate(prompts, GREEDY)

    run(main())


@pytest.mark.parametrize("stream", [True, False])
def test_events(service: Service, stream: bool) -> None:
    """Streamed: one event per token, whose pieces add up. Else: the completions alone."""

    async def main() -> None:
        params = SamplingParams(max_tokens=10, n=2, seed=3, ignore_eos=True)
        events = [event async for event in await service.submit(prompt("abc", service), params, stream=stream)]
        assert len(events) == (20 if stream else 2)
        for sample in (0, 1):
            own = [event for event in events if event.sample == sample]
            assert own[-1].completion is not None
            assert "".join(event.text for event in own) == own[-1].completion.text
            if stream:
                assert [event.token for event in own] == own[-1].completion.tokens

    run(main())


@pytest.mark.parametrize("way", ["cancel", "leave", "task", "unread"])
def test_a_request_that_nobody_wants_frees_its_slot(service: Service, way: str) -> None:
    async def main() -> None:
        stream = await service.submit(prompt("abc", service), ENDLESS, stream=True)
        if way == "cancel":
            await anext(stream)
            stream.cancel()
            assert [event async for event in stream] == []
        elif way == "leave":
            async with stream:
                async for _ in stream:
                    break
        elif way == "task":
            task = asyncio.ensure_future(stream.completions())
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:
            stream.cancel()
        await idle(service)

    run(main())


def test_a_request_whose_sender_is_gone_before_it_begins(service: Service) -> None:
    async def main() -> None:
        async with Gate(service):
            task = asyncio.ensure_future(service.submit(prompt("abc", service), ENDLESS))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await idle(service)

    run(main())


def test_a_loop_that_was_closed_frees_its_slots(service: Service) -> None:
    asyncio.run(_submit_and_forget(service))

    async def main() -> None:
        await (await service.submit(prompt("abc", service), GREEDY)).completions()
        while await service.call(lambda: service.engine.busy):  # the other request ends at its next token
            pass
        await idle(service)

    run(main())


async def _submit_and_forget(service: Service) -> None:
    await service.submit(prompt("abc", service), ENDLESS, stream=True)


def test_the_queue_is_bounded(model_folder: Path) -> None:
    """One runs, one waits; the third is refused at once and the first two are served."""
    service = make_service(model_folder, max_batch=1, max_queue=1)
    service.start()

    async def main() -> None:
        async with Gate(service):
            tasks = [asyncio.ensure_future(service.submit(prompt("abc", service), GREEDY)) for _ in range(3)]
            await asyncio.sleep(0)
        first, second, third = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(third, QueueFull)
        assert "1 requests wait" in str(third)
        for stream in (first, second):
            assert len(await stream.completions()) == 1
        await idle(service)
        await service.stop()

    run(main())


@pytest.mark.parametrize(
    ("tokens", "params", "error", "says"),
    [
        ([], GREEDY, DataError, "empty"),
        ([999], GREEDY, DataError, "token 999"),
        ([5] * 600, GREEDY, DataError, "context holds 512"),
        ([5], SamplingParams(top_p=0.0), ConfigError, "top_p"),
    ],
)
def test_what_the_engine_refuses(service: Service, tokens: list[int], params: Any, error: type, says: str) -> None:
    async def main() -> None:
        with pytest.raises(error, match=says):
            await service.submit(tokens, params)
        with pytest.raises(error, match=says):
            await service.submit_all([service.submit([5], ENDLESS), service.submit(tokens, params)])
        await idle(service)

    run(main())


def test_an_error_ends_its_own_request_and_no_other(service: Service) -> None:
    def broken(prompt: list[int], generated: list[int]) -> None:
        if len(generated) == 3:
            raise KeyError("no such state")

    async def main() -> None:
        async with Gate(service):
            wanted = [
                service.submit(prompt("abc", service), GREEDY, token_mask=mask, stream=True) for mask in (broken, None)
            ]
            streams = asyncio.ensure_future(service.submit_all(wanted))
        bad, good = await streams
        with pytest.raises(DataError, match="no such state"):
            await bad.completions()
        assert len(await good.completions()) == 1
        await idle(service)

    run(main())


def test_beams_that_the_mask_leaves_fewer_of(service: Service) -> None:
    async def main() -> None:
        params = SamplingParams(max_tokens=3, n=2, beam_width=2)
        stream = await service.submit([5, 6], params, token_mask=lambda prompt, generated: [7])
        assert [completion.tokens for completion in await stream.completions()] == [[7, 7, 7]]

    run(main())


def test_merged_streams(service: Service) -> None:
    async def main() -> None:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        streams = [await service.submit(prompt(text, service), params, stream=True) for text in "ab"]
        places = [place async for place, _ in merged(streams)]
        assert sorted(places) == [0] * 5 + [1] * 5
        streams = [await service.submit(prompt(text, service), ENDLESS, stream=True) for text in "ab"]
        arriving = merged(streams)
        await anext(arriving)
        await arriving.aclose()
        await idle(service)

    run(main())


def test_one_stream_is_merged_with_nothing(service: Service) -> None:
    async def main() -> None:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        alone = [(place, e.token) async for place, e in merged([await service.submit([5, 6], params, stream=True)])]
        assert len(alone) == 5
        beside = [await service.submit([5, 6], params, stream=True), await service.submit([7], params, stream=True)]
        assert [(place, e.token) async for place, e in merged(beside) if place == 0] == alone
        arriving = merged([await service.submit([5, 6], ENDLESS, stream=True)])
        await anext(arriving)
        await arriving.aclose()
        await idle(service)

    run(main())


def test_call_runs_between_steps_on_the_engines_thread(service: Service) -> None:
    async def main() -> None:
        assert await service.call(lambda: threading.current_thread().name) == "engine of tiny_0"
        with pytest.raises(ZeroDivisionError):
            await service.call(lambda: 1 // 0)
        assert service.healthy

    run(main())


def test_a_crash_of_the_engine_reaches_everybody(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash() -> list[Any]:
        raise MemoryError("no more blocks")

    async def main() -> None:
        async with Gate(service):
            running = asyncio.ensure_future(service.submit(prompt("abc", service), ENDLESS))
            await asyncio.sleep(0)
            monkeypatch.setattr(service.engine, "step", crash)
        with pytest.raises(RunError, match="has failed"):
            await (await running).completions()
        late: list[Callable[[], Awaitable[Any]]] = [
            lambda: service.submit([5], GREEDY),
            lambda: service.call(lambda: None),
        ]
        for ask in late:
            with pytest.raises(RunError, match="no more blocks"):
                await ask()
        assert not service.healthy
        await service.stop()

    run(main())


def test_stopping_lets_running_requests_finish(service: Service) -> None:
    async def main() -> None:
        async with Gate(service):
            running = asyncio.ensure_future(service.submit(prompt("abc", service), GREEDY))
            await asyncio.sleep(0)
            stopping = asyncio.ensure_future(service.stop(drain_seconds=50))
            await asyncio.sleep(0)
            with pytest.raises(Stopped):
                await service.submit([5], GREEDY)
        assert len((await (await running).completions())[0].tokens) == 12
        await stopping
        assert not service.healthy

    run(main())


def test_a_crash_while_stopping_ends_the_waiting(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before the time for draining is over."""

    async def main() -> None:
        async with Gate(service):
            running = asyncio.ensure_future(service.submit(prompt("abc", service), ENDLESS))
            stopping = asyncio.ensure_future(service.stop(drain_seconds=10_000))
            await asyncio.sleep(0)
            monkeypatch.setattr(service.engine, "step", lambda: 1 // 0)
        with pytest.raises(RunError, match="has failed"):
            await (await running).completions()
        await stopping

    run(main())


def test_stopping_at_once_tells_those_who_wait(service: Service) -> None:
    async def main() -> None:
        stream = await service.submit(prompt("abc", service), ENDLESS)
        await service.stop()
        with pytest.raises(Stopped):
            await stream.completions()
        with pytest.raises(Stopped):
            await service.call(lambda: None)

    run(main())


def test_what_a_request_took_is_observed(service: Service) -> None:
    seen: list[Served] = []
    service.observe = seen.append

    async def main() -> None:
        params = SamplingParams(max_tokens=6, n=2, ignore_eos=True)
        await (await service.submit([5, 6, 7], params)).completions()

    run(main())
    assert [(s.prompt_tokens, s.generated_tokens) for s in seen] == [(3, 12)]
    assert seen[0].first_token_seconds > 0
    assert seen[0].token_seconds is not None
    assert seen[0].token_seconds > 0


def test_new_weights_under_a_running_request(service: Service, tmp_path: Path) -> None:
    """The request goes on under the new weights and says so; later ones give what a fresh engine over them gives."""
    other = tiny_folder(tmp_path / "other", seed=1)
    fresh = make_service(other).engine

    async def main() -> None:
        stream = await service.submit(prompt("abc", service), ENDLESS, stream=True)
        await anext(stream)
        assert await service.swap(str(other)) == 1
        (before,) = await stream.completions()
        assert (before.version, before.mixed_versions, len(before.tokens)) == (0, True, 400)
        (after,) = await (await service.submit(prompt("abc", service), GREEDY)).completions()
        assert after.version == service.version == 1
        (wanted,) = fresh.generate([prompt("abc", service)], GREEDY)[0]
        assert (after.tokens, after.policy_logprobs) == (wanted.tokens, wanted.policy_logprobs)
        assert service.source == str(other)

    run(main())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "unexpected"),
        ({"intermediate_size": 64}, "misshapen"),
        ({"rope": {"rope_type": "default", "rope_theta": 5e5}}, "config.json differs.*rope"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(
    service: Service, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    other = tiny_folder(tmp_path / "other", **changes)
    before = {name: p.clone() for name, p in service.engine.model.named_parameters()}

    async def main() -> None:
        with pytest.raises(ModelError, match=says):
            await service.swap(str(other))
        with pytest.raises(ModelError):
            await service.swap(str(tmp_path / "nothing"))

    run(main())
    assert service.version == 0
    assert all(torch.equal(p, before[name]) for name, p in service.engine.model.named_parameters())


def test_another_vocabulary_does_not_fit(service: Service, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a":', '"!!":', 1), encoding="utf-8")

    async def main() -> None:
        with pytest.raises(ModelError, match="another vocabulary"):
            await service.swap(str(other))

    run(main())


def test_a_service_without_a_loader_keeps_its_weights(model_folder: Path) -> None:
    bare = make_service(model_folder)
    service = Service("bare", bare.engine, bare.tokenizer)
    service.start()

    async def main() -> None:
        with pytest.raises(ModelError, match="cannot be replaced"):
            await service.swap("anything")
        await service.stop()

    run(main())
