"""What a sender makes of decode workers that do not behave: a hand-written one talks to it."""

import asyncio
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from kvtransfer.hello import decode_hello
from kvtransfer.shards import size_bytes
from pdserve import wire
from pdserve.edge.rpc import CHANNEL_OPTIONS
from pdserve.v1 import transfer_service_pb2 as pb, transfer_service_pb2_grpc

SOURCE = (5, 6, 7, 1)
TOKENS = 14


class RawDecode:
    """A decode worker that says whatever the test wants it to say."""

    def __init__(self, call, pool, keys, transport):
        self.call = call
        self.pool = pool
        self.keys = keys
        self.transport = transport

    async def hello(self, **changes):
        own = decode_hello(self.pool.memory, self.keys, self.transport, worker="d0", incarnation=2)
        for name, value in changes.items():
            setattr(own, name, value)
        await self.call.write(pb.DecodeMessage(hello=own))
        return (await self.call.read()).hello

    async def destination(self, key, blocks, *, epoch=0, held=0):
        message = pb.Destination(
            key=wire.key_to_wire(key), epoch=epoch, blocks=blocks, held_token_count=held
        )
        await self.call.write(pb.DecodeMessage(destination=message))

    async def revoke(self, key, epoch=0):
        message = pb.Revoke(key=wire.key_to_wire(key), epoch=epoch)
        await self.call.write(pb.DecodeMessage(revoke=message))


@asynccontextmanager
async def dialled(stage, hub, prefill):
    transport = stage.Memory(hub)
    loop = asyncio.get_running_loop()
    transport.start([].append, loop.call_soon_threadsafe)
    pool = stage.Pool(48, fill=0)
    keys = [
        transport.map(shard.address, size_bytes(pool.memory, shard)) for shard in pool.memory.shards
    ]
    async with grpc.aio.insecure_channel(prefill.address, options=CHANNEL_OPTIONS) as channel:
        call = transfer_service_pb2_grpc.TransferServiceStub(channel).Link()
        yield RawDecode(call, pool, keys, transport)
        call.cancel()
    transport.close()


def run(stage, scenario, **options):
    async def play():
        async with (
            stage.up(**options) as (hub, prefill, _),
            dialled(stage, hub, prefill) as raw,
        ):
            await scenario(hub, prefill, raw)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("kv_layout_hash", "other", "KV layout"),
        ("transport_version", "ucx 1.0", "transport 'ucx 1.0'"),
        ("session_id", b"short", "session id"),
        ("worker", "", "worker name"),
        ("block_count", 1 << 30, "blocks"),
        ("memory_bytes", 5, "pool of 5 bytes"),
        ("memory_base", (1 << 64) - 8, "address space"),
        ("memory_key", b"", "memory key"),
        ("transport_address", b"", "transport address"),
    ],
)
def test_a_hello_that_does_not_fit_ends_the_link_with_the_reason(stage, field, value, word):
    async def scenario(_, prefill, raw):
        await raw.hello(**{field: value})
        with pytest.raises(grpc.aio.AioRpcError, match=word) as refusal:
            await raw.call.read()
        assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert prefill.sender.dropped_counts["bad_hello"] == 1

    run(stage, scenario)


def test_a_link_begins_with_a_hello(stage):
    async def scenario(_, prefill, raw):
        del prefill
        await raw.revoke(stage.key(1))
        with pytest.raises(grpc.aio.AioRpcError, match="wanted a hello first"):
            await raw.call.read()

    run(stage, scenario)


@pytest.mark.parametrize("is_early", [False, True])
@pytest.mark.parametrize(
    ("blocks", "held", "word"),
    [
        ((9, 10, 11, 48), 0, "wanted 0 to 47"),
        ((9, 10, 11, -1), 0, "wanted 0 to 47"),
        ((9, 10, 11), 0, "3 blocks"),
        ((9, 10, 11, 12, 13), 0, "5 blocks"),
        ((9, 10, 11, 11), 0, "twice"),
        ((9, 10, 11, 12), 3, "whole blocks"),
        ((9, 10, 11, 12), 16, "4 held"),
        ((9, 10, 11, 12), -4, "whole blocks"),
    ],
)
def test_an_impossible_destination_fails_its_request_and_no_other(
    stage, blocks, held, word, is_early
):
    async def scenario(_, prefill, raw):
        bad, good = stage.key(1), stage.key(2)
        await raw.hello()
        if not is_early:
            prefill.sender.open(bad, SOURCE, TOKENS, TOKENS)
        await raw.destination(bad, blocks, held=held)
        if is_early:
            await stage.until(
                lambda: prefill.sender.session_counts or prefill.sender.dropped_counts
            )
            prefill.sender.open(bad, SOURCE, TOKENS, TOKENS)
        failed = (await raw.call.read()).failed
        assert wire.key_from_wire(failed.key) == bad
        assert word in failed.message
        if not is_early:
            _, _, error = await prefill.log.wait("ended", bad)
            assert word in error
        prefill.sender.cancel(bad)
        await prefill.log.wait("ended", bad)
        assert bytes(raw.pool.bytes).count(0) == len(raw.pool.bytes), "something was written"
        prefill.sender.open(good, SOURCE, TOKENS, 0)
        await raw.destination(good, (20, 21, 22, 23))
        prefill.compute(good, TOKENS)
        assert await prefill.log.wait("ended", good) == ("ended", good, None)
        assert raw.pool.pieces((20, 21, 22, 23)) == prefill.pool.pieces(SOURCE)

    run(stage, scenario)


def test_a_revoke_of_an_unknown_key_is_acknowledged(stage):
    async def scenario(_, prefill, raw):
        del prefill
        await raw.hello()
        await raw.revoke(stage.key(3), 5)
        ack = (await raw.call.read()).revoke_ack
        assert wire.key_from_wire(ack.key) == stage.key(3)
        assert ack.epoch == 5

    run(stage, scenario)


def test_a_malformed_message_is_counted_and_ends_nothing(stage):
    async def scenario(_, prefill, raw):
        await raw.hello()
        await raw.call.write(pb.DecodeMessage(revoke=pb.Revoke(epoch=1)))
        await raw.call.write(pb.DecodeMessage())
        await raw.revoke(stage.key(3))
        assert (await raw.call.read()).WhichOneof("body") == "revoke_ack"
        dropped = prefill.sender.dropped_counts
        assert dropped == {"malformed_message": 1, "unknown_message": 1}

    run(stage, scenario)


def test_nothing_that_an_old_link_still_says_starts_a_write_once_the_worker_is_back(stage):
    async def scenario(hub, prefill, old):
        key = stage.key(1)
        await old.hello()
        prefill.sender.open(key, SOURCE, TOKENS, TOKENS)
        async with dialled(stage, hub, prefill) as new:
            await new.hello()
            await new.revoke(key)
            assert (await new.call.read()).WhichOneof("body") == "revoke_ack"
            with_old = list(prefill.sender._links.values())
            assert len(with_old) == 1, "the old link is still believed"
            with suppress(grpc.RpcError, asyncio.InvalidStateError):  # over for both sides
                await old.destination(key, (9, 10, 11, 12), epoch=1)
            await new.revoke(key)
            await new.call.read()
            assert prefill.log.names(key) == []
            assert bytes(old.pool.bytes).count(0) == len(old.pool.bytes)

    run(stage, scenario)


def test_a_link_that_ends_takes_its_endpoint_and_early_destinations_along(stage):
    async def scenario(_, prefill, raw):
        await raw.hello()
        await raw.destination(stage.key(1), (9, 10, 11, 12))
        await stage.until(lambda: prefill.sender.session_counts == {"early": 1})
        raw.call.cancel()
        await stage.until(lambda: prefill.sender.session_counts == {})
        assert not any(endpoint.is_open for endpoint in prefill.transport._endpoints)
        prefill.sender.open(stage.key(1), SOURCE, TOKENS, TOKENS)

    run(stage, scenario)
