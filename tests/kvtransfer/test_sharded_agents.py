"""Hand-offs between pools of different shardings: real gRPC, memory or UCX under it."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from kvtransfer import sender_link
from kvtransfer.checksum import checksum, checksums
from kvtransfer.hello import decode_hello, pool_of
from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig
from pdserve.layout import KvLayout
from pdserve.v1 import transfer_service_pb2 as pb

LAYOUT = KvLayout(layer_count=4, block_tokens=4, kv_head_count=4, head_dim=8, dtype="float32")
FEW_HEADS = KvLayout(layer_count=4, block_tokens=4, kv_head_count=2, head_dim=8, dtype="bfloat16")
SOURCE = (5, 6, 7, 1)
TARGET = (9, 10, 30, 2)
TOKENS = 14

PAIRS = {
    "tp 2 to 1": (LAYOUT, {"tp": 2}, {}),
    "tp 1 to 2": (LAYOUT, {}, {"tp": 2}),
    "tp 4 to 2": (LAYOUT, {"tp": 4}, {"tp": 2}),
    "tp 2 to 2": (LAYOUT, {"tp": 2}, {"tp": 2}),
    "pp 2 to 1": (LAYOUT, {"pp": 2}, {}),
    "pp 1 to 2": (LAYOUT, {}, {"pp": 2}),
    "uneven pp": (LAYOUT, {"stages": (3, 1)}, {"stages": (1, 3)}),
    "tp 2 x pp 2 to pp 2": (LAYOUT, {"tp": 2, "pp": 2}, {"pp": 2}),
    "pp 2 to tp 2": (LAYOUT, {"pp": 2}, {"tp": 2}),
    "copies to one": (FEW_HEADS, {"tp": 4}, {}),
    "one to copies": (FEW_HEADS, {}, {"tp": 4}),
    "copies to copies": (FEW_HEADS, {"tp": 4}, {"tp": 4, "pp": 2}),
}


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request, stage):
    layout, source, target = request.param
    return layout, stage.shape(layout=layout, **source), stage.shape(layout=layout, **target)


async def hand_over(stage, prefill, decode, *, held_count=0):
    """Move one prompt, its ranks writing one after the other, last first, in two chunks."""
    key = stage.key(1)
    prefill.sender.open(key, SOURCE, TOKENS, 0)
    decode.open(key, prefill, TARGET, TOKENS, held_count=held_count)
    await prefill.log.wait("known", key)
    for stop in (8, TOKENS):
        for number, shard in reversed(list(enumerate(prefill.pool.memory.shards))):
            for layer in shard.layers:
                prefill.sender.layer_done(key, layer, stop, number)
        prefill.sender.check()
    prefill.sender.complete(key, 7)
    await decode.log.wait("safe", key)
    await prefill.log.wait("ended", key)
    assert decode.log.names(key) == ["landed", "safe"], decode.log.events
    return key


def require_moved(prefill, decode, held_count=0):
    """Nothing but the blocks moved, and these are right in every copy."""
    seen, wanted = decode.pool.read(), np.zeros_like(decode.pool.read())
    wanted[:, TARGET[held_count:]] = prefill.pool.read()[:, SOURCE[held_count:]]
    assert np.array_equal(seen, wanted)
    assert decode.pool.gaps_are_clean
    assert prefill.sender.dropped_counts == decode.receiver.dropped_counts == {}


@pytest.mark.parametrize("held_count", [0, 2])
def test_every_byte_arrives_between_any_two_shardings(stage, pair, held_count):
    layout, source, target = pair

    async def scenario():
        async with stage.up(checksum=True, layout=layout, shards=(source, target)) as (
            _,
            prefill,
            decode,
        ):
            await hand_over(stage, prefill, decode, held_count=held_count)
            require_moved(prefill, decode, held_count)

    asyncio.run(scenario())


@asynccontextmanager
async def over_ucx(stage, tls, layout, source, target):
    config = TransferConfig(backend="ucx", tls=tls)
    prefill = stage.Prefill(make_transport(config), checksum=True, layout=layout, shards=source)
    decode = stage.Decode(make_transport(config), checksum=True, layout=layout, shards=target)
    await prefill.start()
    await decode.start()
    try:
        yield prefill, decode
    finally:
        await decode.close()
        await prefill.close()


def test_every_byte_arrives_over_ucx_between_any_two_shardings(stage, pair):
    layout, source, target = pair

    async def scenario():
        tls = "tcp,cma" if len(source) > len(target) else "tcp"
        async with over_ucx(stage, tls, layout, source, target) as (prefill, decode):
            await hand_over(stage, prefill, decode)
            require_moved(prefill, decode)

    asyncio.run(scenario())


def test_a_shard_that_is_not_written_holds_the_landing_back(stage):
    async def scenario():
        shards = (stage.shape(tp=2, layout=LAYOUT), None)
        async with stage.up(layout=LAYOUT, shards=shards) as (hub, prefill, decode):
            key = stage.key(1)
            prefill.sender.open(key, SOURCE, TOKENS, 0)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            for layer in range(4):
                prefill.sender.layer_done(key, layer, TOKENS, 0)
            prefill.sender.complete(key, 7)
            for layer in range(3):
                prefill.sender.layer_done(key, layer, TOKENS, 1)
            await stage.until(lambda: not hub.under_way)
            assert prefill.sender.session_counts == {"pushing": 1}
            assert decode.log.names(key) == []
            prefill.sender.layer_done(key, 3, TOKENS, 1)
            await decode.log.wait("safe", key)
            await prefill.log.wait("ended", key)
            require_moved(prefill, decode)

    asyncio.run(scenario())


def test_what_is_too_much_for_one_push_goes_in_several(stage, monkeypatch):
    monkeypatch.setattr(sender_link, "PUSH_RUNS_MAX", 16)  # two blocks of split heads

    async def scenario():
        shards = (stage.shape(tp=2, layout=LAYOUT), None)
        async with stage.up(checksum=True, layout=LAYOUT, shards=shards) as (hub, *ends):
            hub.hold()
            prefill, decode = ends
            key = stage.key(1)
            prefill.sender.open(key, SOURCE, TOKENS, TOKENS)
            decode.open(key, prefill, TARGET, TOKENS)
            prefill.sender.complete(key, 7)
            await prefill.log.wait("known", key)
            assert [len(operation.runs) for operation in hub.under_way] == [16] * 8
            hub.release()
            await decode.log.wait("safe", key)
            await prefill.log.wait("ended", key)
            require_moved(prefill, decode)

    asyncio.run(scenario())


def test_a_revoked_hand_off_is_safe_only_once_every_shards_push_is_over(stage):
    async def scenario():
        shards = (stage.shape(tp=2, layout=LAYOUT), stage.shape(pp=2, layout=LAYOUT))
        async with stage.up(layout=LAYOUT, shards=shards) as (hub, prefill, decode):
            hub.hold()
            key, later = stage.key(1), stage.key(2)
            prefill.sender.open(key, SOURCE, TOKENS, 0)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            prefill.compute(key, TOKENS, 7)
            assert len(hub.under_way) == 8, "a push for each layer of each shard"
            decode.receiver.revoke(key, 0)
            await stage.until(lambda: prefill.sender.session_counts == {"retreating": 1})
            hub.release(7)
            prefill.sender.open(later, SOURCE, TOKENS, 0)
            decode.open(later, prefill, (20, 21, 22, 23), TOKENS)
            await prefill.log.wait("known", later)  # a round trip
            assert decode.log.names(key) == []
            hub.release()
            await decode.log.wait("safe", key)
            for each in (key, later):
                prefill.sender.cancel(each)
                await prefill.log.wait("ended", each)

    asyncio.run(scenario())


def test_a_flipped_bit_is_noticed_in_any_copy(stage):
    for number in range(4):
        source = stage.Pool(8, fill=3, layout=FEW_HEADS)
        target = stage.Pool(8, fill=3, layout=FEW_HEADS, shards=stage.shape(tp=4, layout=FEW_HEADS))
        wanted = checksum(source.memory, (1, 2))
        assert set(checksums(target.memory, (1, 2))) == {wanted}
        target.arrays[number][2, 2, 1, 3, 0, 5] ^= 1
        assert set(checksums(target.memory, (1, 2))) != {wanted}


@pytest.mark.parametrize("pushes_before", range(4))
def test_a_flipped_bit_in_one_copy_fails_the_hand_off(stage, pushes_before):
    """One cover would not see all four: it reads another copy in each layer."""

    async def scenario():
        shards = (None, stage.shape(tp=4, layout=FEW_HEADS))
        async with stage.up(checksum=True, layout=FEW_HEADS, shards=shards) as (hub, *ends):
            prefill, decode = ends
            hub.hold()
            key = stage.key(1)
            prefill.sender.open(key, SOURCE, TOKENS, 0)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            prefill.compute(key, TOKENS, 7)
            hub.release(pushes_before)
            hub.corrupts_next = True
            hub.release()
            _, _, _, message = await decode.log.wait("failed", key)
            assert "checksum" in message
            await decode.log.wait("safe", key)

    asyncio.run(scenario())


def test_a_checksum_does_not_depend_on_the_sharding(stage, pair):
    layout, *shapes = pair
    pools = [stage.Pool(8, fill=3, layout=layout, shards=each) for each in (None, *shapes)]
    assert len({checksum(pool.memory, (3, 1, 2)) for pool in pools}) == 1


# What old and new workers say to each other.


def hello_of(stage, pool, **changes):
    keys = [b"key-%d" % number for number in range(len(pool.memory.shards))]
    hello = decode_hello(pool.memory, keys, stage.Memory(stage.Hub()), worker="d0", incarnation=2)
    for name, value in changes.items():
        setattr(hello.shards[1], name, value)
    return hello


def test_a_pool_in_one_piece_is_said_as_it_was_before_there_were_shards(stage):
    pool = stage.Pool(8, fill=0, layout=LAYOUT)
    hello = hello_of(stage, pool)
    assert not hello.shards
    assert hello.memory_key == b"key-0"
    assert hello.memory_base == pool.memory.shards[0].address
    assert hello.memory_bytes == LAYOUT.pool_bytes(8)
    seen = pool_of(hello, LAYOUT)
    assert (seen.memory, seen.keys) == (pool.memory, (b"key-0",))


def test_a_pool_in_shards_is_nothing_a_worker_that_knows_of_none_would_write_to(stage):
    pool = stage.Pool(8, fill=0, layout=LAYOUT, shards=stage.shape(tp=2, layout=LAYOUT))
    hello = hello_of(stage, pool)
    seen = pool_of(pb.DecodeHello.FromString(hello.SerializeToString()), LAYOUT)
    assert (seen.memory, seen.keys) == (pool.memory, (b"key-0", b"key-1"))
    hello.ClearField("shards")
    assert "pool" in pool_of(hello, LAYOUT)


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("layer_first", -1, "layers -1"),
        ("layer_first", (1 << 31) - 1, "layers"),
        ("layer_count", -5, "layers"),
        ("layer_count", (1 << 31) - 1, "layers"),
        ("head_first", 1, "in no shard"),
        ("head_first", -2, "heads -2"),
        ("head_count", 0, "heads"),
        ("head_count", 1, "in no shard"),
        ("memory_base", 0, "address space"),
        ("memory_base", (1 << 64) - 8, "address space"),
        ("memory_bytes", 5, "pool of 5 bytes"),
        ("memory_bytes", -1, "pool of -1 bytes"),
        ("memory_key", b"", "memory key"),
        ("memory_key", b"k" * (1 << 17), "memory key"),
    ],
)
def test_a_shard_that_cannot_be_is_refused_before_anything_is_planned(stage, field, value, word):
    pool = stage.Pool(8, fill=0, layout=LAYOUT, shards=stage.shape(tp=2, layout=LAYOUT))
    refusal = pool_of(hello_of(stage, pool, **{field: value}), LAYOUT)
    assert isinstance(refusal, str)
    assert word in refusal


def test_too_many_shards_are_refused(stage):
    pool = stage.Pool(8, fill=0, layout=LAYOUT, shards=stage.shape(tp=2, layout=LAYOUT))
    hello = hello_of(stage, pool)
    for _ in range(4096):
        hello.shards.add().CopyFrom(hello.shards[0])
    assert "4098 shards" in pool_of(hello, LAYOUT)
