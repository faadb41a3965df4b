"""A broken link is no proof: its sender may be alive, and may still write."""

import asyncio

import pytest

TARGET = (9, 10, 30, 2)
TOKENS = 14


async def drained(decode):
    """Let everything happen that a drain of our own transport would have brought about."""
    for _ in range(3):
        done = asyncio.Event()
        decode.transport.drain(done.set)
        await done.wait()
        await asyncio.sleep(0)


@pytest.mark.parametrize("is_computed", [False, True])
def test_blocks_stay_unsafe_until_the_living_sender_has_answered(stage, is_computed):
    async def scenario(hub, prefill, decode):
        key = stage.key(1)
        hub.hold()
        prefill.sender.open(key, (5, 6, 7, 1), TOKENS, 0)
        decode.open(key, prefill, TARGET, TOKENS)
        await prefill.log.wait("known", key)
        if is_computed:
            prefill.compute(key, TOKENS)
            assert len(hub.under_way) == 3
        answer, unanswered = prefill.sender._receive_revoke, []
        prefill.sender._receive_revoke = lambda *words: unanswered.append(words)

        await prefill.server.stop(grace=None)
        await decode.log.wait("failed", key)
        await drained(decode)
        assert decode.log.names(key) == ["failed"], "silence proved nothing"

        await prefill.serve(prefill.port)
        await stage.until(lambda: unanswered or "safe" in decode.log.names(key))
        await drained(decode)
        assert decode.log.names(key) == ["failed"], "the same worker, linked again, is not dead"

        for words in unanswered:
            answer(*words)
        await decode.log.wait("safe", key)
        assert not hub.under_way, "a write could still land in blocks that were given away"

    async def play():
        async with stage.up() as (hub, prefill, decode):
            await scenario(hub, prefill, decode)

    asyncio.run(play())
