"""Clients that leave at any stage, read slowly or never, babble, or ask twice."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence

from tests.chaos.cluster import CheckFailed, Setup
from tests.chaos.framework import Trial, scenario
from tests.chaos.load import LONG, MEDIUM, PROMPTS, SHORT, Answer, Ask, End
from tests.chaos.sockets import raw, read_slowly, request_bytes

FEW = Setup(
    "1P+1D, 4 slots",
    1,
    1,
    settings=(
        ("prefill.token_budget", 32),
        ("prefill.sequences_max", 4),
        ("decode.sequences_max", 4),
        ("router.client_stall_s", 2),
    ),
)
"""Few slots and small steps, so that requests can be caught in every stage."""

SLOTS = 4
HEADER_S = 10.0  # the router's patience with headers
FREE_S = 0.5  # from hanging up to the router holding nothing of it


async def leave(trial: Trial, answers: Sequence[Answer]) -> None:
    """Let these callers hang up at once and see that the router drops their requests."""
    live = {row["request_id"] for row in await trial.cluster.requests()}
    leaving = [answer for answer in answers if answer.end is End.RUNNING]
    began_s = trial.fault()
    for answer in leaving:
        trial.client.hang_up(answer)
    wanted = len(live) - len(leaving)

    async def are_gone() -> bool:
        left = {row["request_id"] for row in await trial.cluster.requests()} & live
        return len(left) <= wanted

    await trial.cluster.await_true(f"{len(leaving)} requests are dropped", are_gone, 5)
    trial.bound("hang-up to no request", time.monotonic() - began_s, FREE_S)


async def queued(trial: Trial) -> int:
    """Leave while waiting for a place."""
    blockers = await trial.begin(LONG[:SLOTS])
    answers = trial.client.start_all(MEDIUM * 5)

    async def are_waiting() -> bool:
        states = [row["state"] for row in await trial.cluster.requests()]
        return states.count("queued") >= len(answers) - SLOTS

    await trial.cluster.await_true("callers wait in the queue", are_waiting)
    await leave(trial, answers)
    trial.require("the queue's callers left it", all(one.end is End.LEFT for one in answers))
    await leave(trial, blockers)
    return len(answers)


async def prefilling(trial: Trial) -> int:
    """Leave while the prompt is computed."""
    for _ in range(10):
        answers = trial.client.start_all(PROMPTS[:SLOTS])
        await trial.cluster.busy("prefill", "running")
        await leave(trial, answers)
    return 10 * SLOTS


async def transferring(trial: Trial) -> int:
    """Leave while KV is on its way to a decode worker that does not take it."""
    for _ in range(10):
        await trial.stop("decode-0")  # it names no destination; too short to be given up
        try:
            answers = trial.client.start_all(SHORT)
            await trial.cluster.busy("prefill", "handing_off")
            await leave(trial, answers)
        finally:
            trial.wake("decode-0")
        await trial.cluster.await_true("decode-0 answers", lambda: is_heard(trial))
    return 10 * SLOTS


async def is_heard(trial: Trial) -> bool:
    """Whether the decode worker was heard of just now."""
    return bool((await trial.cluster.workers())["decode-0"]["heard_s_ago"] < 0.3)


async def decoding(trial: Trial) -> int:
    """Leave after a random number of tokens."""
    rng = random.Random(17)
    answers = []
    for ask in LONG * 6:
        stop_at = rng.randint(1, 60)
        answers.append(trial.client.start(ask, leave=_after(stop_at)))
    await trial.client.wait(answers)
    return len(answers)


async def last_token(trial: Trial) -> int:
    """Leave after the last token, before the stream's end was read."""
    answers = [
        trial.client.start(ask, leave=lambda answer: answer.terminal_count > 0)
        for ask in SHORT * 10
    ]
    await trial.client.wait(answers)
    return len(answers)


def _after(count: int) -> Callable[[Answer], bool]:
    return lambda answer: len(answer.token_ids) >= count


@scenario(
    "client-leaves",
    ids="C1c",
    what="200 disconnects: queued, in prefill, in transfer, decoding, after the last token",
    setup=FEW,
    limit_s=120,
)
async def leaves(trial: Trial) -> None:
    counts = {}
    for stage in (queued, prefilling, transferring, decoding, last_token):
        counts[stage.__name__] = await stage(trial)
        await trial.cluster.await_baseline()
    left = sum(answer.end is End.LEFT for answer in trial.client.answers)
    trial.prove(f"{left} callers left: {counts}", left >= 200)


@scenario(
    "zombies-sequential", ids="D9", what="3 x as many aborts as slots, one after another", setup=FEW
)
async def zombies_one_by_one(trial: Trial) -> None:
    trial.allow(End.ABORTED)
    for number in range(3 * SLOTS):
        answers = await trial.begin(LONG[number % 8 : number % 8 + 1])
        await abort_all(trial, [answers[0].request_id])
        await trial.client.wait(answers)
    await prove_aborted(trial, 3 * SLOTS)


@scenario(
    "zombies-concurrent", ids="D9 A6", what="3 x as many aborts as slots, all at once", setup=FEW
)
async def zombies_at_once(trial: Trial) -> None:
    trial.allow(End.ABORTED)
    answers = trial.client.start_all((LONG * 2)[: 3 * SLOTS])
    await trial.cluster.busy("decode", "running")
    rows = await trial.cluster.requests()
    calls = [abort_all(trial, [row["request_id"]]) for row in rows]
    await asyncio.gather(*calls)
    await trial.client.wait(answers)
    await prove_aborted(trial, 3 * SLOTS)


async def abort_all(trial: Trial, request_ids: list[str]) -> None:
    """Abort by REST."""
    trial.fault()
    body = {"request_ids": request_ids}
    answer = await trial.cluster.admin("POST", "/v1/abort_requests", json=body)
    trial.require(f"abort answered {answer.status_code}", answer.status_code == 200)


async def prove_aborted(trial: Trial, wanted: int) -> None:
    """Count the aborted; then the slots must all serve again."""
    count = sum(answer.end is End.ABORTED for answer in trial.client.answers)
    trial.prove(f"{count} streams ended with finish_reason abort", count == wanted)
    again = trial.client.start_all(MEDIUM)
    await trial.client.wait(again)
    trial.require("all slots serve", all(answer.end is End.FINISHED for answer in again))


@scenario(
    "client-half-closes",
    ids="C2c",
    what="shutdown(WR) in mid-stream counts as leaving: its request is dropped, others go on",
    setup=FEW,
)
async def half_closes(trial: Trial) -> None:
    others = await trial.begin(MEDIUM[:2])
    async with raw(trial.cluster.url) as (reader, writer):
        writer.write(request_bytes(LONG[0], trial.client.model, "half"))
        await reader.readuntil(b"data: ")
        live = len(await trial.cluster.requests())
        writer.write_eof()
        trial.fault()

        async def is_dropped() -> bool:
            return len(await trial.cluster.requests()) < live

        await trial.cluster.await_true("its request is dropped", is_dropped, 5)
        trial.prove("its half-closed request ended before its last token", True)
    await trial.client.wait(others)


@scenario(
    "client-never-reads",
    ids="C3c",
    what="8 clients that never read: cut after client_stall_s",
    setup=FEW,
)
async def never_reads(trial: Trial) -> None:
    mark = len(trial.cluster.log_text("router"))
    long_asks = [Ask(ask.index, ask.prompt_tokens, 1900) for ask in LONG]
    steady = trial.steady(SHORT, 2)
    async with contextlib.AsyncExitStack() as stack:
        for ask in long_asks:
            reader, writer = await stack.enter_async_context(raw(trial.cluster.url, 4096))
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request_bytes(ask, trial.client.model, f"starve-{ask.index}"))
        began_s = trial.fault()

        def cut_count() -> int:
            return trial.cluster.log_text("router")[mark:].count("cut off, it read nothing")

        with contextlib.suppress(CheckFailed):
            await trial.cluster.await_true("all are cut off", lambda: cut_count() >= 8, 45)
        trial.prove(f"{cut_count()} connections were cut off by the router", cut_count() == 8)
    answers = await steady.stop()
    took_s = trial.watch.now_s() - began_s
    trial.note(f"the last was cut after {took_s:.1f} s, while {len(answers)} others were served")


@scenario("client-reads-slowly", ids="C4c", what="60 readers at 50 events/s beside steady load")
async def reads_slowly(trial: Trial) -> None:
    asks = (MEDIUM * 8)[:60]
    answers = [Answer(ask, asked_s=time.monotonic()) for ask in asks]
    trial.client.answers.extend(answers)
    steady = trial.steady(MEDIUM, 4)
    trial.fault()

    async def one(answer: Answer, number: int) -> None:
        async with raw(trial.cluster.url, 4096) as (reader, writer):
            writer.write(request_bytes(answer.ask, trial.client.model, f"slow-{number}"))
            await read_slowly(answer, reader, 0.02)

    await asyncio.gather(*(one(answer, number) for number, answer in enumerate(answers)))
    others = await steady.stop()
    slowest = max(answer.times_s[-1] - answer.asked_s for answer in answers)
    trial.prove(f"reading took {slowest:.1f} s", slowest > 4)
    stalls = sorted(answer.stall_s() for answer in others)
    trial.note(f"{len(others)} others meanwhile, longest wait for a token {stalls[-1]:.2f} s")


@scenario(
    "client-slowloris", ids="C5c", what="20 connections whose headers never end: 408 after 10 s"
)
async def slowloris(trial: Trial) -> None:
    steady = trial.steady(MEDIUM + SHORT, 4)
    trial.fault()

    async def one() -> bytes:
        async with raw(trial.cluster.url) as (reader, writer):
            for byte in b"POST /v1/completions HTTP/1.1\r\nhost: chaos\r\nx-slow: ":
                writer.write(bytes([byte]))
            said = b""
            while not said:
                writer.write(b"a")
                try:
                    async with asyncio.timeout(0.5):
                        said = await reader.read(64)
                except TimeoutError:
                    continue
            return said

    began_s = time.monotonic()
    async with asyncio.timeout(HEADER_S + 10):
        answers = await asyncio.gather(*(one() for _ in range(20)))
    took_s = time.monotonic() - began_s
    refused = sum(b" 408 " in answer for answer in answers)
    trial.prove(f"{refused} of 20 got 408", refused == 20)
    trial.bound("the slow are turned away", took_s, HEADER_S + 2)
    others = await steady.stop()
    trial.note(f"{len(others)} others were served meanwhile")


@scenario("client-babbles", ids="C7c", what="200 connections with random bytes or cut-off requests")
async def babbles(trial: Trial) -> None:
    rng = random.Random(42)
    whole = request_bytes(MEDIUM[0], trial.client.model, "babble")
    steady = trial.steady(MEDIUM + SHORT, 4)
    trial.fault()
    answered = 0
    for number in range(200):
        sent = (
            rng.randbytes(rng.randint(1, 400))
            if number % 2
            else whole[: rng.randint(1, len(whole) - 1)]
        )
        async with raw(trial.cluster.url) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            try:
                said = await reader.read(1024)
            except ConnectionError:
                said = b""
            answered += said.startswith(b"HTTP/1.1 4")
            trial.require(f"no success for garbage: {said[:60]!r}", b" 200 " not in said[:40])
    trial.prove(f"{answered} of 200 got a 4xx, the others a closed connection", answered > 0)
    await steady.stop()


@scenario(
    "client-asks-twice",
    ids="C6c",
    what="the same Idempotency-Key on 4 connections at once, 8 times",
)
async def asks_twice(trial: Trial) -> None:
    trial.fault()
    stamp = trial.cluster.pid("router")
    groups = []
    for ask in MEDIUM:
        headers = {"idempotency-key": f"twice-{stamp}-{ask.index}"}
        options = {"headers": headers, "salt": "twice"}
        groups.append([trial.client.start(ask, **options) for _ in range(4)])
    await trial.client.wait([answer for group in groups for answer in group])
    single = sum(len({answer.request_id for answer in group}) == 1 for group in groups)
    trial.prove(
        f"{single} of {len(groups)} keys had one execution for 4 calls", single == len(groups)
    )
