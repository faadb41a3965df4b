"""What is known of each sampling slot, on the host and on the device.

``SamplingTable`` is the one mirror of sampling parameters: a column per slot, written on the
host and on the device by the same call, so that a decision the host takes for a batch's slots is
a decision about what the kernels will read.  A request that comes back in another slot is bound
again, and its parameters with it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device import kernels
from engine.device.cuda.streams import Device, Stream
from engine.device.slots import Slot
from engine.step import Binding, Chunk

_GREEDY, _TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _SEED = range(6)
_ROW_COUNT = 6
_SEED_SIGN = 1 << 63
_SEED_RANGE = 1 << 64


class SamplingTable:
    """Sampling parameters of ``slot_count`` slots, and of one more that belongs to nobody.

    One int64 table [parameter, slot]; floating point ones are the bits of a float64.
    """

    def __init__(self, device: Device, slot_count: int, turn_count: int) -> None:
        """Every slot is greedy at first; ``turn_count`` writes may be on their way at once."""
        shape = (_ROW_COUNT, slot_count + 1)
        self._host = np.zeros(shape, np.int64)
        self._host[_GREEDY] = 1
        self._host[_TEMPERATURE : _TEMPERATURE + 1].view(np.float64)[:] = 1
        self._host[_TOP_P : _TOP_P + 1].view(np.float64)[:] = 1
        size_bytes = self._host.nbytes
        self._turns = [
            device.host_bytes(size_bytes).view(torch.int64).view(shape) for _ in range(turn_count)
        ]
        self.table = torch.from_numpy(self._host.copy()).to(device.place)

    def write(
        self, slots: Sequence[Slot], places: Sequence[int], stream: Stream, turn: int
    ) -> None:
        """Give ``places`` the parameters of ``slots``, here and, in the stream's order, there."""
        for slot, place in zip(slots, places, strict=True):
            params = slot.params
            seed = params.seed - _SEED_RANGE if params.seed >= _SEED_SIGN else params.seed
            floats = np.array([params.temperature, params.top_p, params.min_p]).view(np.int64)
            self._host[:, place] = (
                slot.is_greedy, floats[0], params.top_k, floats[1], floats[2], seed
            )  # fmt: skip
        shown = self._turns[turn]
        shown.numpy()[:] = self._host
        stream.run(lambda: self.table.copy_(shown, non_blocking=True))

    @property
    def address(self) -> int:
        """Where kernels read."""
        return self.table.data_ptr()

    def is_all_greedy(self, places: Sequence[int]) -> bool:
        """Whether no slot of these draws lots: its next token is decided on the device."""
        return bool(self._host[_GREEDY, list(places)].all())

    def choose(self, logits: Tensor, places: Tensor, draws: Tensor) -> kernels.Sampled:
        """Sample on the device.

        logits: [row, vocab_size]; places: [row] int64 slots; draws: [row] int64, the position of
        the token to be drawn, which with the seed names its random number.
        """
        rows = self.table.index_select(1, places)
        return kernels.sample(
            logits,
            is_greedy=rows[_GREEDY] != 0,
            temperature=rows[_TEMPERATURE].view(torch.float64),
            top_k=rows[_TOP_K].to(torch.int32),
            top_p=rows[_TOP_P].view(torch.float64),
            min_p=rows[_MIN_P].view(torch.float64),
            uniform=kernels.uniforms(rows[_SEED], draws),
        )


class Lane:
    """One bound request, as the thread that launches steps knows it.

    ``slot`` is what samples on the host; it belongs to the thread that completes steps.
    """

    def __init__(
        self, binding: Binding, vocab_size: int, table: NDArray[np.int32], block_count: int
    ) -> None:
        """``table`` is the slot's row of block ids, this lane's to write as long as it is bound."""
        request = binding.request
        self.slot = Slot(binding, vocab_size)
        self.key = request.key
        self.is_fresh = True  # no chunk has run yet
        params = request.sampling
        self._is_always_host = (
            self.slot.fault is not None
            or params.logprob_count is not None
            or bool(params.logit_bias)
            or params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        has_stops = any(0 <= token < vocab_size for token in request.stop_tokens)
        self._host_until = len(request.prompt) + request.output_tokens_min if has_stops else 0
        # Until a step has sampled for it, the device does not hold its last token.
        self._first_token: int | None = self.slot.last_token
        self._blocks: tuple[int, ...] = ()
        self._table = table
        self._block_count = block_count

    def __repr__(self) -> str:
        return f"<Lane {self.key!r}>"

    def samples_on_host(self, stop: int) -> bool:
        """Whether the token at ``stop`` is chosen from edited logits, or more is told than it."""
        return self._is_always_host or stop < self._host_until

    def take_tokens(self, chunk: Chunk) -> tuple[int, ...]:
        """Give a chunk's tokens, or nothing where the device holds the one there is."""
        tokens = chunk.tokens
        if not tokens and self._first_token is not None:
            tokens = (self._first_token,)
        assert len(tokens or (0,)) == chunk.token_count, f"{len(tokens)} tokens for {chunk}"
        if chunk.samples:
            self._first_token = None
        if self.slot.fault is not None:
            return (0,) * chunk.token_count
        return tokens

    def place_blocks(self, blocks: tuple[int, ...]) -> NDArray[np.int32]:
        """Give the row of block ids, rewritten where it has changed: a sequence mostly grows."""
        known = self._blocks
        if blocks is not known and blocks != known:
            at = len(known) if blocks[: len(known)] == known else 0
            new = blocks[at:]
            assert len(blocks) <= len(self._table), f"{len(blocks)} blocks of {self!r}"
            assert min(new, default=0) >= 0, f"no such block: {new} of {self!r}"
            assert max(new, default=0) < self._block_count, f"no such block: {new} of {self!r}"
            self._table[at : len(blocks)] = new
            self._blocks = blocks
        return self._table
