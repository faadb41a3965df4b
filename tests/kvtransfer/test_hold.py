"""A sender whose worker is held: no time passes for its hand-offs."""

import asyncio

SOURCE = (5, 6, 7, 1)
TARGET = (9, 10, 30, 2)
TOKENS = 14


def run(stage, scenario, **options):
    async def play():
        async with stage.up(**options) as (hub, prefill, decode):
            await scenario(hub, prefill, decode)

    asyncio.run(play())


async def pass_time(stage, seconds):
    clock = asyncio.get_running_loop().time
    until_s = clock() + seconds
    await stage.until(lambda: clock() > until_s)


def test_a_hand_off_does_not_expire_while_held_and_does_afterwards(stage):
    async def scenario(_, prefill, decode):  # noqa: ARG001 - the stage's signature
        key, later = stage.key(1), stage.key(2)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.compute(key, TOKENS, 77)
        prefill.sender.set_held(True)
        prefill.sender.open(later, (8, 9, 10, 11), TOKENS, 0)
        prefill.compute(later, TOKENS, 78)  # its step was in flight at the hold
        prefill.sender.set_held(True)
        await pass_time(stage, 0.3)
        assert prefill.log.names(key) == prefill.log.names(later) == []
        prefill.sender.set_held(False)
        for each in (key, later):
            _, _, error = await prefill.log.wait("ended", each)
            assert "not handed over" in error

    run(stage, scenario, handoff_s=0.1)


def test_a_hand_off_that_was_held_can_still_be_completed(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.compute(key, TOKENS, 77)
        prefill.sender.set_held(True)
        await pass_time(stage, 0.6)
        prefill.sender.set_held(False)
        decode.open(key, prefill, TARGET, TOKENS)
        assert await decode.log.wait("landed", key) == ("landed", key, 0, 77)
        await decode.log.wait("safe", key)
        await prefill.log.wait("ended", key)

    run(stage, scenario, handoff_s=0.5)


def test_an_early_destination_is_kept_while_held(stage):
    async def scenario(_, prefill, decode):
        key, later = stage.key(1), stage.key(2)
        decode.open(key, prefill, TARGET, TOKENS)
        await stage.until(lambda: prefill.sender.session_counts == {"early": 1})
        prefill.sender.set_held(True)
        decode.open(later, prefill, (20, 21, 22, 23), TOKENS)
        await stage.until(lambda: prefill.sender.session_counts == {"early": 2})
        await pass_time(stage, 0.4)
        assert prefill.sender.session_counts == {"early": 2}
        prefill.sender.set_held(False)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.compute(key, TOKENS, 77)
        await decode.log.wait("landed", key)
        _, _, _, message = await decode.log.wait("failed", later)
        assert "no such request" in message
        await decode.log.wait("safe", later)

    run(stage, scenario, tombstone_s=0.2)
