"""How many blocks a request gets on a decode worker, and when it has no chance to."""

from decode.sequence import Sequence
from engine.blocks import BlockPool, Hold
from engine.output_limit import output_count_max
from engine.prefix_cache import PrefixCache
from pdserve.ends import EndKind
from pdserve.request import Request


class Room:
    """Takes blocks for sequences; who holds them, and as what, the scheduler knows."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        *,
        block_tokens: int,
        growth_tokens: int,
        context_tokens_max: int,
    ) -> None:
        self.pool = pool
        self.cache = cache
        self.block_tokens = block_tokens
        self._growth_tokens = growth_tokens
        self._context_tokens_max = context_tokens_max

    def refusal(self, request: Request) -> tuple[EndKind, str] | None:
        """Say why a request can never be computed here, or None.

        Whoever passes can finish, if everybody else gives way.
        """
        if request.known_count >= self._context_tokens_max:
            message = (
                f"{request.known_count} tokens; the context ends at {self._context_tokens_max}"
            )
            return EndKind.FAILED, message
        outputs = output_count_max(request, self._context_tokens_max)
        block_count = self.blocks_for(len(request.prompt) + outputs - 1)
        if block_count > self.pool.block_count:
            message = f"never fits: may need {block_count} blocks of {self.pool.block_count}"
            return EndKind.DECLINED, message
        return None

    def lease(self, sequence: Sequence) -> bool:
        """Lease blocks for the tokens known and some growth, computed ones as far as possible."""
        token_count = min(
            len(sequence.tokens) + self._growth_tokens,
            sequence.position_stop,
        )
        found = self.cache.match_chain(sequence.chain, sequence.tokens)
        # Before taking, which could evict them.
        self.pool.share(found, Hold.LEASED)
        rest = self.pool.take(
            self.blocks_for(token_count) - len(found),
            Hold.LEASED,
            after=found[-1] if found else None,
        )
        if rest is None:
            self.pool.release(found, Hold.LEASED)
            return False
        sequence.blocks = found + rest
        sequence.held_count = len(found)
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Take a block for the next token's KV, if one is needed; say whether there is one."""
        if not self.is_short(sequence):
            return True
        taken = self.pool.take(1, Hold.USED, after=sequence.blocks[-1])
        if taken is None:
            return False
        sequence.blocks += taken
        return True

    def lend(self, sequence: Sequence, stop: int) -> None:
        """Take blocks for positions before ``stop``, as many as there are; until ``take_back``."""
        missing_count = self.blocks_for(stop) - len(sequence.blocks)
        count = min(missing_count, self.pool.available_count)
        if count <= 0:
            return
        taken = self.pool.take(count, Hold.USED, after=sequence.blocks[-1])
        assert taken is not None, f"{count} blocks are there, and are not"
        sequence.blocks += taken
        sequence.lent_count = count

    def take_back(self, sequence: Sequence) -> None:
        """Release what was lent, but for what the next token's KV needs; no step is in flight.

        So nobody ever gives way to somebody else's guesses.
        """
        kept_count = max(
            len(sequence.blocks) - sequence.lent_count, self.blocks_for(sequence.position + 1)
        )
        surplus = sequence.blocks[kept_count:] if sequence.lent_count else ()
        sequence.lent_count = 0
        if surplus:
            self.pool.release(surplus, Hold.USED)
            sequence.blocks = sequence.blocks[:kept_count]
            sequence.covering = ()  # another block may come to the same place

    def is_short(self, sequence: Sequence) -> bool:
        """Whether a sequence has no block for its next token's KV."""
        return sequence.position >= len(sequence.blocks) * self.block_tokens

    def publish(self, sequence: Sequence, computed_count: int) -> None:
        """Let others find the blocks among the first ``computed_count`` tokens (V13)."""
        self.cache.publish_chain(sequence.chain, sequence.tokens, sequence.blocks, computed_count)

    def blocks_for(self, token_count: int) -> int:
        """Blocks that ``token_count`` tokens need."""
        return -(-token_count // self.block_tokens)

    def __repr__(self) -> str:
        return f"<Room in {self.pool!r}>"
