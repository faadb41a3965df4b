import asyncio
from typing import Any

PROMPT = [number % 700 + 40 for number in range(75)]


async def test_tokens_come_in_order_and_everything_is_back(pair: Any) -> None:
    seen = await pair.tokens(pair.spec(PROMPT, 40))
    assert len(seen) == 40
    await pair.await_baseline()
    assert await pair.tokens(pair.spec(PROMPT, 40)) == seen
    await pair.await_baseline()


async def test_a_request_of_one_token_needs_no_transfer(pair: Any) -> None:
    first = await pair.tokens(pair.spec(PROMPT, 1))
    assert first == (await pair.tokens(pair.spec(PROMPT, 2)))[:1]
    await pair.await_baseline()


async def test_batch_mates_change_nothing(pair: Any) -> None:
    prompts = [PROMPT[start:] for start in range(12)]
    alone = [await pair.tokens(pair.spec(prompt, 24)) for prompt in prompts]
    together = await asyncio.gather(*(pair.tokens(pair.spec(prompt, 24)) for prompt in prompts))
    assert together == alone
    await pair.await_baseline()


async def test_a_seed_gives_the_same_tokens_in_any_company(pair: Any) -> None:
    spec = pair.spec(PROMPT, 24, temperature=1.0, seed=99, top_p=0.9)
    alone = await pair.tokens(spec)
    others = [pair.tokens(pair.spec(PROMPT[n:], 24, temperature=1.0, seed=n)) for n in range(1, 6)]
    together = await asyncio.gather(pair.tokens(spec), *others)
    assert together[0] == alone
    await pair.await_baseline()


async def test_an_abort_during_a_held_write_quarantines_until_the_write_is_over(pair: Any) -> None:
    pair.hub.hold()
    generation = pair.core.start(pair.spec(PROMPT, 40))
    await pair.until("a write is under way", lambda: bool(pair.hub.under_way))
    generation.abandon()
    decode = pair.decode.worker
    await pair.until("quarantine", lambda: decode.audit().blocks.quarantined > 0)
    # Another request is reserved meanwhile; it must not be given those blocks.
    other = asyncio.create_task(pair.tokens(pair.spec(PROMPT[::-1], 30)))
    await pair.until("a lease beside it", lambda: decode.audit().blocks.leased > 0)
    assert decode.audit().blocks.quarantined > 0
    pair.hub.release()
    seen = await other
    await pair.await_baseline()
    assert await pair.tokens(pair.spec(PROMPT[::-1], 30)) == seen
    await pair.await_baseline()
