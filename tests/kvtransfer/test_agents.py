"""Sender and receiver together: real gRPC between them, a hub of memory under them."""

import asyncio

import pytest

from kvtransfer import landed
from kvtransfer.landed import LandedMessage

SOURCE = (5, 6, 7, 1)
TARGET = (9, 10, 30, 2)
TOKENS = 14


def run(stage, scenario, **options):
    """Play a scenario between two fresh agents; nothing may be left at its end."""

    async def play():
        async with stage.up(**options) as (hub, prefill, decode):
            await scenario(hub, prefill, decode)

    asyncio.run(play())


async def begin(stage, prefill, decode, *, computed=True, number=1, first_token=77):
    """Open both halves of a hand-off and let the sender know its destination."""
    key = stage.key(number)
    prefill.sender.open(key, SOURCE, TOKENS, 0)
    decode.open(key, prefill, TARGET, TOKENS)
    await prefill.log.wait("known", key)
    if computed:
        prefill.compute(key, TOKENS, first_token)
    return key


async def is_landed(prefill, decode, key):
    await decode.log.wait("safe", key)
    await prefill.log.wait("ended", key)
    return (
        decode.log.names(key) == ["landed", "safe"]
        and prefill.log.names(key) == ["known", "ended"]
        and decode.pool.pieces(TARGET) == prefill.pool.pieces(SOURCE)
    )


@pytest.mark.parametrize("checksum", [False, True])
def test_every_byte_arrives_when_the_destination_comes_first(stage, checksum):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        await stage.until(lambda: prefill.sender.session_counts == {"early": 1})
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        assert prefill.log.events == [], "told inside the call"
        prefill.compute(key, 8, None)
        prefill.compute(key, TOKENS, 77)
        assert await decode.log.wait("landed", key) == ("landed", key, 0, 77)
        assert await is_landed(prefill, decode, key)
        assert prefill.sender.session_counts == decode.receiver.session_counts == {}

    run(stage, scenario, checksum=checksum)


def test_every_byte_arrives_when_the_destination_comes_last(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.compute(key, TOKENS, 77)
        assert prefill.sender.pending_signal_count == 3
        decode.open(key, prefill, TARGET, TOKENS)
        assert await is_landed(prefill, decode, key)
        assert prefill.sender.pending_signal_count == 0

    run(stage, scenario)


def test_blocks_the_decode_worker_holds_are_not_written(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        before = decode.pool.pieces(TARGET[:2])
        prefill.sender.open(key, SOURCE, TOKENS, 8)
        decode.open(key, prefill, TARGET, TOKENS, held_count=2)
        prefill.compute(key, TOKENS, 77)
        await decode.log.wait("safe", key)
        assert decode.pool.pieces(TARGET[:2]) == before
        assert decode.pool.pieces(TARGET[2:]) == prefill.pool.pieces(SOURCE[2:])

    run(stage, scenario, checksum=True)


def test_a_revoked_hand_off_is_safe_only_once_its_last_push_is_over(stage):
    async def scenario(hub, prefill, decode):
        hub.hold()
        key = await begin(stage, prefill, decode)
        decode.receiver.revoke(key, 0)
        await stage.until(lambda: prefill.sender.session_counts == {"retreating": 1})
        hub.release(2)  # of three layers
        later = await begin(stage, prefill, decode, computed=False, number=2)  # a round trip
        assert decode.log.names(key) == []
        hub.release()
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["safe"]
        prefill.sender.cancel(key)
        prefill.sender.cancel(later)
        await prefill.log.wait("ended", key)

    run(stage, scenario)


def test_a_cancelled_hand_off_ends_only_once_its_last_push_is_over(stage):
    async def scenario(hub, prefill, decode):
        hub.hold()
        key = await begin(stage, prefill, decode)
        prefill.sender.cancel(key)
        await begin(stage, prefill, decode, computed=False, number=2)
        assert prefill.log.names(key) == ["known"]
        hub.release()
        assert await prefill.log.wait("ended", key) == ("ended", key, "cancelled")
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["failed", "safe"]

    run(stage, scenario)


def test_what_a_dead_sender_left_on_the_way_lands_before_its_blocks_are_safe(stage):
    async def scenario(hub, prefill, decode):
        hub.hold()
        key = await begin(stage, prefill, decode)
        assert len(hub.under_way) == 3
        hub.kill(prefill.transport)
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["failed", "safe"]
        assert not hub.under_way, "a write could still land in blocks that were given away"

    run(stage, scenario)


def test_a_silent_sender_is_waited_for_until_it_answers(stage):
    async def scenario(_, prefill, decode):
        key = await begin(stage, prefill, decode, computed=False)
        await prefill.server.stop(grace=None)
        await decode.log.wait("failed", key)
        await stage.until(lambda: prefill.log.names(key) == ["known", "ended"])
        assert decode.log.names(key) == ["failed"]
        await prefill.serve(prefill.port)
        await decode.log.wait("safe", key)

    run(stage, scenario)


def test_another_incarnation_at_the_address_proves_the_last_one_dead(stage):
    async def scenario(hub, prefill, decode):
        key = await begin(stage, prefill, decode, computed=False)
        await prefill.server.stop(grace=None)
        await decode.log.wait("failed", key)
        successor = stage.Prefill(stage.Memory(hub), incarnation=99)
        asked = []
        successor.sender._receive_revoke = lambda *words: asked.append(words)
        await successor.start(prefill.port)
        await decode.log.wait("safe", key)
        assert asked == [], "its word is worth nothing: it knows nothing of the last one's writes"
        assert decode.log.names(key) == ["failed", "safe"]
        await successor.close()

    run(stage, scenario)


def test_nobody_at_the_address_fails_the_request_and_leaves_its_blocks_safe(stage):
    async def scenario(_, prefill, decode):
        await prefill.server.stop(grace=None)
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["failed", "safe"]

    run(stage, scenario)


def test_a_prefill_worker_of_another_incarnation_is_not_asked(stage):
    async def scenario(_, prefill, decode):
        prefill.incarnation = 12
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["failed", "safe"]
        assert prefill.sender.session_counts == {}

    run(stage, scenario)


def test_workers_of_different_layouts_refuse_each_other(stage):
    async def scenario(hub, prefill, _):
        other = stage.Layout(
            layer_count=3, block_tokens=4, kv_head_count=1, head_dim=8, dtype="float32"
        )
        decode = stage.Decode(stage.Memory(hub), name="d1", layout=other)
        await decode.start()
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        _, _, _, message = await decode.log.wait("failed", key)
        assert "KV layout" in message
        await decode.log.wait("safe", key)
        await decode.close()

    run(stage, scenario)


def test_a_destination_after_the_end_is_refused_at_once(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.sender.cancel(key)
        await prefill.log.wait("ended", key)
        decode.open(key, prefill, TARGET, TOKENS)
        assert await decode.log.wait("failed", key) == ("failed", key, 0, "the hand-off is over")
        await decode.log.wait("safe", key)
        assert prefill.sender.session_counts == {}
        assert prefill.sender.dropped_counts["late_destination"] == 1

    run(stage, scenario)


def test_a_destination_that_nobody_opens_expires_and_says_so(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        _, _, _, message = await decode.log.wait("failed", key)
        assert "no such request" in message
        await decode.log.wait("safe", key)
        assert prefill.sender.session_counts == {}

    run(stage, scenario, tombstone_s=0.02)


def test_the_buffer_of_early_destinations_is_bounded(stage):
    async def scenario(_, prefill, decode):
        first, second = stage.key(1), stage.key(2)
        decode.open(first, prefill, TARGET, TOKENS)
        decode.open(second, prefill, (20, 21, 22, 23), TOKENS)
        _, _, _, message = await decode.log.wait("failed", second)
        assert "too many" in message
        assert decode.log.names(first) == []
        assert prefill.sender.session_counts == {"early": 1}

    run(stage, scenario, destinations_max=1)


def test_a_revoke_takes_an_early_destination_back(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        decode.open(key, prefill, TARGET, TOKENS)
        await stage.until(lambda: prefill.sender.session_counts == {"early": 1})
        decode.receiver.revoke(key, 0)
        await decode.log.wait("safe", key)
        assert prefill.sender.session_counts == {}

    run(stage, scenario)


def test_a_flipped_bit_is_noticed(stage):
    async def scenario(hub, prefill, decode):
        hub.corrupts_next = True
        key = await begin(stage, prefill, decode)
        _, _, _, message = await decode.log.wait("failed", key)
        assert "checksum" in message
        await decode.log.wait("safe", key)
        assert decode.log.names(key) == ["failed", "safe"]
        assert decode.receiver.dropped_counts["checksum_mismatch"] == 1

    run(stage, scenario, checksum=True)


def test_messages_of_the_data_plane_are_believed_only_with_the_session_id(stage):
    async def scenario(_, prefill, decode):
        key = await begin(stage, prefill, decode, computed=False)
        forged = landed.pack(LandedMessage(b"x" * 16, key, 0, 5, None))
        strange = landed.pack(LandedMessage(b"x" * 16, stage.key(9), 0, 5, None))
        for message in (forged, strange, forged[:-1], b"", b"y" * len(forged)):
            decode.transport.receive(message)
        dropped = decode.receiver.dropped_counts
        await stage.until(lambda: sum(decode.receiver.dropped_counts.values()) == 5)
        dropped = decode.receiver.dropped_counts
        assert dropped == {"bad_session_id": 1, "late_landed": 1, "malformed_landed": 3}
        assert decode.log.names(key) == []
        prefill.compute(key, TOKENS, 77)
        assert await is_landed(prefill, decode, key)

    run(stage, scenario)


def test_a_hand_off_that_takes_too_long_ends(stage):
    async def scenario(_, prefill, decode):
        key = stage.key(1)
        prefill.sender.open(key, SOURCE, TOKENS, 0)
        prefill.compute(key, TOKENS, 77)
        _, _, error = await prefill.log.wait("ended", key)
        assert "not handed over" in error
        decode.open(key, prefill, TARGET, TOKENS)
        await decode.log.wait("safe", key)

    run(stage, scenario, handoff_s=0.05)


def test_a_decode_worker_that_leaves_ends_its_hand_offs_with_an_error(stage):
    async def scenario(_, prefill, decode):
        key = await begin(stage, prefill, decode, computed=False)
        await decode.receiver.close()
        _, _, error = await prefill.log.wait("ended", key)
        assert error is not None

    run(stage, scenario)


def test_a_moved_decode_leg_gets_what_was_computed(stage):
    async def scenario(hub, prefill, decode):
        key = await begin(stage, prefill, decode, computed=False)
        prefill.compute(key, 8, None)
        decode.receiver.revoke(key, 0)
        await decode.log.wait("safe", key)
        other = stage.Decode(stage.Memory(hub), name="d1")
        await other.start()
        other.open(key, prefill, TARGET, TOKENS, epoch=1)
        prefill.compute(key, TOKENS, 77)
        assert await other.log.wait("landed", key) == ("landed", key, 1, 77)
        await prefill.log.wait("ended", key)
        assert other.pool.pieces(TARGET) == prefill.pool.pieces(SOURCE)
        assert prefill.log.names(key) == ["known", "ended"]
        await other.close()

    run(stage, scenario)


def test_late_calls_of_the_worker_are_counted_not_obeyed(stage):
    async def scenario(_, prefill, decode):
        key = await begin(stage, prefill, decode)
        assert await is_landed(prefill, decode, key)
        prefill.compute(key, TOKENS, 1)
        prefill.sender.cancel(key)
        decode.receiver.revoke(key, 0)
        dropped = prefill.sender.dropped_counts
        assert dropped["late_signalled"] == 3
        assert dropped["late_completed"] == dropped["late_cancelled"] == 1
        assert decode.receiver.dropped_counts == {"late_revoked": 1}

    run(stage, scenario)
