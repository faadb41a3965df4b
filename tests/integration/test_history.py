"""What a real cluster writes down is accepted, whatever was done to it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pdserve.history.checker import check
from pdserve.history.events import Event, History
from pdserve.history.files import read_folder
from pdserve.history.timeline import render
from pdserve.request import FinishReason

PROMPT = [number % 700 + 40 for number in range(75)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    return {"history.path": str(tmp_path), "decode.kv_blocks": 24, "decode.growth_tokens": 16}


def events(histories: tuple[History, ...], role: str) -> list[Event]:
    (history,) = [each for each in histories if each.role == role]
    return [entry.event for entry in history.entries]


def require_good(folder: Path, *, is_quiet: bool = True) -> tuple[History, ...]:
    histories = read_folder(folder)
    found = check(histories, is_quiet=is_quiet)
    assert found == (), "\n".join(map(str, found))
    return histories


def flush(pair: Any) -> None:
    """Put everything that happened so far into the files."""
    for history in (pair.history, pair.prefill._history, pair.decode._history):
        history.recorder.flush()


async def test_a_quiet_cluster_that_served_is_accepted_while_it_runs(
    pair: Any, tmp_path: Path
) -> None:
    await asyncio.gather(*(pair.tokens(pair.spec(PROMPT[n:], 24)) for n in range(6)))
    await pair.await_baseline()
    flush(pair)
    histories = require_good(tmp_path)
    assert [history.is_complete for history in histories] == [False] * 3
    assert events(histories, "router").count(Event.TERMINAL) == 6
    # One was preempted at least: its attempts agree, and each had its hand-off.
    assert Event.RESUME in events(histories, "router")
    prefill, decode = events(histories, "prefill"), events(histories, "decode")
    assert 6 < prefill.count(Event.LEASE) == prefill.count(Event.FENCE)
    assert decode.count(Event.LEASE) == decode.count(Event.LANDED) == decode.count(Event.FENCE)


async def test_aborts_in_every_stage_are_accepted(pair: Any, tmp_path: Path) -> None:
    undisturbed = await pair.tokens(pair.spec(PROMPT, 30))
    generations = [pair.core.start(pair.spec(PROMPT[n:], 200)) for n in range(8)]
    for _, generation in zip(range(5), generations, strict=False):
        pair.core.stop(generation.request_id, FinishReason.ABORT, "a test")
        await asyncio.sleep(0.01)
    again = asyncio.create_task(pair.tokens(pair.spec(PROMPT, 30)))
    for generation in generations[5:]:
        generation.abandon()
    assert await again == undisturbed
    await pair.await_baseline()
    flush(pair)
    require_good(tmp_path)


async def test_an_abort_while_a_write_is_held_is_accepted(pair: Any, tmp_path: Path) -> None:
    pair.hub.hold()
    generation = pair.core.start(pair.spec(PROMPT, 40))
    await pair.until("a write is under way", lambda: bool(pair.hub.under_way))
    generation.abandon()
    await pair.until("quarantine", lambda: pair.decode.audit.blocks.quarantined > 0)
    pair.hub.release()
    await pair.await_baseline()
    flush(pair)
    histories = require_good(tmp_path)
    (decode,) = [each for each in histories if each.role == "decode"]
    moves = [each.fields for each in decode.entries if each.event is Event.BLOCK]
    assert any(each["to"] == "quarantined" for each in moves)


async def test_a_pause_and_a_flush_are_accepted(pair: Any, tmp_path: Path) -> None:
    generation = pair.core.start(pair.spec(PROMPT, 300))
    await pair.until("tokens", lambda: pair.core.emitted_count > 3)
    await pair.core.pause()
    await pair.core.flush_cache(5.0)
    await pair.core.resume()
    assert generation.request_id not in pair.core.table.live
    assert len(await pair.tokens(pair.spec(PROMPT, 8))) == 8
    await pair.await_baseline()
    flush(pair)
    router = events(require_good(tmp_path), "router")
    assert router.index(Event.PAUSE) < router.index(Event.UNPAUSE)


async def test_a_link_that_breaks_under_load_is_accepted(pair: Any, tmp_path: Path) -> None:
    prompts = [PROMPT[n:] for n in range(3)]
    alone = [await pair.tokens(pair.spec(prompt, 60)) for prompt in prompts]
    tasks = [asyncio.create_task(pair.tokens(pair.spec(prompt, 60))) for prompt in prompts]
    emitted_count = pair.core.emitted_count
    await pair.until("tokens", lambda: pair.core.emitted_count > emitted_count + 10)
    pair.core.fleet.cut("decode-0")
    assert await asyncio.gather(*tasks) == alone
    await pair.await_baseline()
    flush(pair)
    histories = require_good(tmp_path)
    assert Event.LINK_DOWN in events(histories, "router")
    assert Event.RESUME in events(histories, "router")
    page = render(histories)
    assert "Every rule holds" in page
    assert page.count('class="lane"') == 3


async def test_a_cluster_that_stopped_in_order_says_so(tmp_path: Path) -> None:
    from pdserve.config import load
    from sim.scripted import Script, run_script

    config = load(None, {"router.grpc_port": 0, "history.path": str(tmp_path)})
    async with run_script(Script(config)):
        pass
    histories = require_good(tmp_path)
    assert [history.is_complete for history in histories] == [True] * 3
