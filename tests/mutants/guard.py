"""What a guard is, and short names for the tests that watch over them."""

from dataclasses import dataclass

PREFILL = ("tests/prefill/test_scheduler.py", "tests/prefill/test_once.py")
DECODE = ("tests/decode/test_scheduler.py", "tests/decode/test_once.py")
SENDER = ("tests/kvtransfer/test_sender_session.py",)
RECEIVER = ("tests/kvtransfer/test_receiver_session.py",)
PROOF = ("tests/kvtransfer/test_proof_of_death.py",)
LINK = ("tests/kvtransfer/test_sender_link.py",)
BUFFER = ("tests/kvtransfer/test_buffer.py",)
SHARDS = ("tests/kvtransfer/test_shards.py",)
JOURNEY = ("tests/router/core/test_journey.py",)
CACHE = ("tests/engine/test_prefix_cache.py",)
STATUS = ("tests/pdserve/test_status.py",)


def agents(name: str) -> tuple[str, ...]:
    """Name one test of the transfer agents; all of them would take too long."""
    return (f"tests/kvtransfer/test_agents.py::{name}",)


def operations(name: str) -> tuple[str, ...]:
    """Name one test of the operators' calls."""
    return (f"tests/router/core/test_operations.py::{name}",)


def scripted(name: str) -> tuple[str, ...]:
    """Name one test that stops a worker in an exact window."""
    return (f"tests/scripted/test_idle_gate.py::{name}",)


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard; ``why`` is what happens to users without it."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]
