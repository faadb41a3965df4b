"""A sender's end is learnt from its data plane, also where its stream broke first."""

from __future__ import annotations

import asyncio
from typing import Any

TARGET = (9, 10, 30, 2)
TOKENS = 14


def test_a_death_after_the_stream_broke_makes_the_blocks_safe(stage: Any) -> None:
    async def play() -> None:
        async with stage.up() as (hub, prefill, decode):
            key = stage.key(1)
            hub.hold()
            prefill.sender.open(key, (5, 6, 7, 1), TOKENS, 0)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            await prefill.server.stop(grace=None)
            await decode.log.wait("failed", key)
            assert decode.log.names(key) == ["failed"], "a broken stream proved nothing"

            hub.kill(prefill.transport)  # for good: nobody will ever answer at its address
            await decode.log.wait("safe", key)

    asyncio.run(play())


def test_an_endpoint_watches_no_longer_than_it_has_to(stage: Any) -> None:
    async def play() -> None:
        async with stage.up() as (_, prefill, decode):
            key = stage.key(1)
            prefill.sender.open(key, (5, 6, 7, 1), TOKENS, 0)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            await prefill.server.stop(grace=None)
            await decode.log.wait("failed", key)
            watching = list(decode.transport._endpoints)
            assert [endpoint.is_open for endpoint in watching] == [True]

            await prefill.serve(prefill.port)
            await decode.log.wait("safe", key)
            assert not watching[0].is_open

    asyncio.run(play())
