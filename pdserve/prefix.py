"""Chained hashes of token blocks: equal hash, equal tokens from the very start.

Router and workers must agree, so the rule lives here.  The salt starts the chain: requests
of two tenants never share a block (V13).
"""

import hashlib
from array import array
from collections.abc import Sequence


def chain_root(salt: bytes) -> bytes:
    """Start a chain: the parent of a sequence's first block."""
    return hashlib.blake2b(salt, digest_size=16, person=b"pdserve-prefix").digest()


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Hash one full block that follows ``parent``: 16 bytes."""
    return hashlib.blake2b(parent + array("i", tokens).tobytes(), digest_size=16).digest()
