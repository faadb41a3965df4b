"""How the two ends of a link introduce themselves, and what makes them refuse each other."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from kvtransfer import shards
from kvtransfer.host import host_id
from kvtransfer.landed import SESSION_ID_BYTES
from kvtransfer.transport.base import Transport
from pdserve.layout import KvLayout, KvMemory, KvShard
from pdserve.v1 import transfer_service_pb2

HELLO_S = 2.0
"""Longest wait for the other side's hello."""

BLOCK_COUNT_LIMIT = 1 << 24
ADDRESS_BYTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class PeerPool:
    """A decode worker's pool; the addresses of its shards are that worker's."""

    memory: KvMemory
    keys: tuple[bytes, ...]  # one per shard


def decode_hello(
    memory: KvMemory,
    memory_keys: Sequence[bytes],
    transport: Transport,
    *,
    worker: str,
    incarnation: int,
) -> transfer_service_pb2.DecodeHello:
    """Introduce a decode worker, under a session id that is new each time.

    A pool in one piece is said as it was before there were shards, so that workers of either
    age understand each other; one in several pieces is refused by workers that know of none.
    """
    hello = transfer_service_pb2.DecodeHello(
        worker=worker,
        incarnation=incarnation,
        kv_layout_hash=memory.layout.hash,
        transport_version=transport.version,
        transport_address=transport.address,
        block_count=memory.block_count,
        session_id=os.urandom(SESSION_ID_BYTES),
        host_id=host_id(),
        pid=os.getpid(),
    )
    for shard, key in zip(memory.shards, memory_keys, strict=True):
        size_bytes = shards.size_bytes(memory, shard)
        if shards.is_whole(memory):
            hello.memory_key = key
            hello.memory_base = shard.address
            hello.memory_bytes = size_bytes
            continue
        hello.shards.add(
            memory_key=key,
            memory_base=shard.address,
            memory_bytes=size_bytes,
            layer_first=shard.layers.start,
            layer_count=len(shard.layers),
            head_first=shard.heads.start,
            head_count=len(shard.heads),
        )
    return hello


def prefill_hello(
    memory: KvMemory, transport: Transport, *, worker: str, incarnation: int
) -> transfer_service_pb2.PrefillHello:
    """Introduce a prefill worker."""
    return transfer_service_pb2.PrefillHello(
        worker=worker,
        incarnation=incarnation,
        kv_layout_hash=memory.layout.hash,
        transport_version=transport.version,
        transport_address=transport.address,
        host_id=host_id(),
        pid=os.getpid(),
    )


def mismatch(
    hello: transfer_service_pb2.DecodeHello | transfer_service_pb2.PrefillHello,
    memory: KvMemory,
    transport: Transport,
) -> str | None:
    """Say why blocks cannot move between us and whoever said ``hello``; None if they can."""
    if hello.kv_layout_hash != memory.layout.hash:
        return f"KV layout {hello.kv_layout_hash!r}; wanted {memory.layout.hash!r}"
    if hello.transport_version != transport.version:
        return f"transport {hello.transport_version!r}; wanted {transport.version!r}"
    if not 0 < len(hello.transport_address) <= ADDRESS_BYTES_MAX:
        return f"a transport address of {len(hello.transport_address)} bytes"
    return None


def pool_of(hello: transfer_service_pb2.DecodeHello, layout: KvLayout) -> PeerPool | str:
    """Read the pool a decode worker describes, or say what is wrong with it."""
    if not hello.worker:
        return "no worker name"
    if len(hello.session_id) != SESSION_ID_BYTES:
        return f"a session id of {len(hello.session_id)} bytes; wanted {SESSION_ID_BYTES}"
    if not 0 < hello.block_count <= BLOCK_COUNT_LIMIT:
        return f"{hello.block_count} blocks; wanted 1 to {BLOCK_COUNT_LIMIT}"
    said = list(hello.shards) or [_whole(hello, layout)]
    memory = KvMemory(hello.block_count, layout, tuple(map(_shard, said)))
    wrong = shards.fault(memory)
    for number, one in enumerate(said):
        wrong = wrong or _memory_fault(number, one, memory)
    return wrong or PeerPool(memory, tuple(one.memory_key for one in said))


def _whole(
    hello: transfer_service_pb2.DecodeHello, layout: KvLayout
) -> transfer_service_pb2.KvShard:
    """Say of a pool in one piece what is said of a shard."""
    return transfer_service_pb2.KvShard(
        memory_key=hello.memory_key,
        memory_base=hello.memory_base,
        memory_bytes=hello.memory_bytes,
        layer_count=layout.layer_count,
        head_count=layout.kv_head_count,
    )


def _shard(said: transfer_service_pb2.KvShard) -> KvShard:
    return KvShard(
        said.memory_base,
        range(said.layer_first, said.layer_first + said.layer_count),
        range(said.head_first, said.head_first + said.head_count),
    )


def _memory_fault(number: int, said: transfer_service_pb2.KvShard, memory: KvMemory) -> str | None:
    wanted_bytes = shards.size_bytes(memory, memory.shards[number])
    if said.memory_bytes != wanted_bytes:
        return f"shard {number}: a pool of {said.memory_bytes} bytes; wanted {wanted_bytes}"
    if not 0 < len(said.memory_key) <= ADDRESS_BYTES_MAX:
        return f"shard {number}: a memory key of {len(said.memory_key)} bytes"
    return None
