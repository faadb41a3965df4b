"""How the two ends of a link introduce themselves, and what makes them refuse each other."""

import os

from kvtransfer.host import host_id
from kvtransfer.landed import SESSION_ID_BYTES
from kvtransfer.transport.base import Transport
from pdserve.layout import KvMemory
from pdserve.v1 import transfer_service_pb2

HELLO_S = 2.0
"""Longest wait for the other side's hello."""

BLOCK_COUNT_LIMIT = 1 << 24
ADDRESS_BYTES_MAX = 1 << 16


def decode_hello(
    memory: KvMemory, memory_key: bytes, transport: Transport, *, worker: str, incarnation: int
) -> transfer_service_pb2.DecodeHello:
    """Introduce a decode worker, under a session id that is new each time."""
    return transfer_service_pb2.DecodeHello(
        worker=worker,
        incarnation=incarnation,
        kv_layout_hash=memory.layout.hash,
        transport_version=transport.version,
        transport_address=transport.address,
        memory_key=memory_key,
        memory_base=memory.address,
        memory_bytes=memory.size_bytes,
        block_count=memory.block_count,
        session_id=os.urandom(SESSION_ID_BYTES),
        host_id=host_id(),
        pid=os.getpid(),
    )


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


def fault(hello: transfer_service_pb2.DecodeHello, memory: KvMemory) -> str | None:
    """Say what is wrong with the pool a decode worker describes; None if nothing is."""
    if not hello.worker:
        return "no worker name"
    if len(hello.session_id) != SESSION_ID_BYTES:
        return f"a session id of {len(hello.session_id)} bytes; wanted {SESSION_ID_BYTES}"
    if not 0 < hello.block_count <= BLOCK_COUNT_LIMIT:
        return f"{hello.block_count} blocks; wanted 1 to {BLOCK_COUNT_LIMIT}"
    wanted_bytes = memory.layout.pool_bytes(hello.block_count)
    if hello.memory_bytes != wanted_bytes:
        return f"a pool of {hello.memory_bytes} bytes; wanted {wanted_bytes}"
    if hello.memory_base == 0 or hello.memory_base + wanted_bytes >= 1 << 64:
        return "a pool outside of the address space"
    if not 0 < len(hello.memory_key) <= ADDRESS_BYTES_MAX:
        return f"a memory key of {len(hello.memory_key)} bytes"
    return None
