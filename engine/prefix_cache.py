"""Which block holds which tokens: blocks already computed, found again by prefix.

A hash becomes findable only once its block is computed (V13), and stops being so the moment
the pool gives the block away.
"""

from collections.abc import Sequence

from engine.blocks import BlockPool
from pdserve.prefix import chain_hash, chain_root


class HashChain:
    """Block hashes of one sequence that grows; each block is hashed once."""

    def __init__(self, salt: bytes) -> None:
        self.hashes: list[bytes] = []
        self.published_count = 0
        self._parent = chain_root(salt)

    def extend(self, tokens: Sequence[int], block_tokens: int, block_count: int) -> None:
        """Hash the first ``block_count`` blocks of ``tokens``, as far as they are not yet."""
        assert block_count * block_tokens <= len(tokens)
        for block in range(len(self.hashes), block_count):
            start = block * block_tokens
            self._parent = chain_hash(self._parent, tokens[start : start + block_tokens])
            self.hashes.append(self._parent)

    def __repr__(self) -> str:
        return f"<HashChain {len(self.hashes)} blocks, {self.published_count} published>"


class PrefixCache:
    """The index from prefix hash to block; the pool owns the blocks."""

    def __init__(self, pool: BlockPool, block_tokens: int, *, is_enabled: bool = True) -> None:
        assert block_tokens > 0
        self._pool = pool
        self._block_tokens = block_tokens
        self._is_enabled = is_enabled
        self._blocks: dict[bytes, int] = {}
        self._hashes: dict[int, bytes] = {}
        pool.on_evict = self._forget

    def match(self, tokens: Sequence[int], salt: bytes) -> tuple[int, ...]:
        """Find the longest run of full blocks of ``tokens`` that are computed.

        They may be evicted by the next ``take``: share them at once.
        """
        return self.match_chain(HashChain(salt), tokens)

    def match_chain(self, chain: HashChain, tokens: Sequence[int]) -> tuple[int, ...]:
        """Like ``match``, for a sequence whose hashes are kept in ``chain``."""
        if not self._is_enabled:
            return ()
        chain.extend(tokens, self._block_tokens, len(tokens) // self._block_tokens)
        found: list[int] = []
        for block_hash in chain.hashes:
            block = self._blocks.get(block_hash)
            if block is None:
                break
            found.append(block)
        return tuple(found)

    def publish(
        self, tokens: Sequence[int], salt: bytes, blocks: Sequence[int], computed_count: int
    ) -> None:
        """Make the full blocks among the first ``computed_count`` tokens findable.

        ``blocks`` hold ``tokens`` from the start and are held by the caller.  Where another
        block has the same contents already, that one stays the one to find.
        """
        self.publish_chain(HashChain(salt), tokens, blocks, computed_count)

    def publish_chain(
        self,
        chain: HashChain,
        tokens: Sequence[int],
        blocks: Sequence[int],
        computed_count: int,
    ) -> None:
        """Like ``publish``, for what is new since the last time with this ``chain``."""
        full_count = computed_count // self._block_tokens
        if not self._is_enabled or full_count <= chain.published_count:
            return
        chain.extend(tokens, self._block_tokens, full_count)
        for index in range(chain.published_count, full_count):
            block_hash, block = chain.hashes[index], blocks[index]
            if block_hash in self._blocks:
                continue
            assert block not in self._hashes, f"block {block} is published with other contents"
            self._blocks[block_hash] = block
            self._hashes[block] = block_hash
            self._pool.publish(block)
        chain.published_count = full_count

    def flush(self) -> int:
        """Forget everything; say how many blocks that was.  Only while nobody holds a block."""
        assert self._pool.counts.is_baseline, f"flush while blocks are held: {self._pool.counts}"
        count = len(self._hashes)
        self._pool.unpublish(self._hashes)
        self._blocks.clear()
        self._hashes.clear()
        return count

    def check(self) -> None:
        """Assert that both directions agree with each other and with the pool."""
        assert {block: name for name, block in self._blocks.items()} == self._hashes
        self._pool.check_published(self._hashes.keys())

    def _forget(self, block: int) -> None:
        del self._blocks[self._hashes.pop(block)]

    def __len__(self) -> int:
        return len(self._hashes)

    def __repr__(self) -> str:
        return f"<PrefixCache {len(self._hashes)} blocks>"
