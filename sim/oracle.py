"""A model anybody can recompute: what every token and every byte of KV must be.

The KV of a position depends on the tenant and on every token up to it; the next token depends
on all the KV before it.  So a block that changed hands too early, was matched before it was
computed or by a stranger, or is read in the wrong order, is wrong where it is read, and a
token computed from it is wrong as well.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from zlib import crc32

from engine.output_limit import finish_after
from pdserve.request import FinishReason, Key, Request, SamplingParams

WORD = "Q"
WORD_BYTES = 8
POISON = 0
"""A token the model never chooses: the output of a computation that failed."""

_MASK = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_LAYERS = (0xD6E8FEB86659FD93, 0xA0761D6478BD642F, 0xE7037ED1A0B428DB, 0x8EBC6AF09C88C6E3)
LAYERS_MAX = len(_LAYERS)


class SimViolation(Exception):
    """Something the cluster promised did not hold."""


class KvChain:
    """The KV of a sequence that grows: one word for each token and layer."""

    def __init__(self, layer_count: int, salt: bytes) -> None:
        self.words = tuple(array(WORD) for _ in range(layer_count))
        self._value = (crc32(salt) * _ODD + 1) & _MASK

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the KV of the tokens that follow."""
        value = self._value
        for token in tokens:
            value ^= token + 1
            value = (value * _ODD + (value >> 29) + 1) & _MASK
            for words, factor in zip(self.words, _LAYERS, strict=False):
                words.append(((value ^ (value >> 32)) * factor) & _MASK)
        self._value = value

    def __len__(self) -> int:
        return len(self.words[0])


@dataclass(slots=True)
class Oracle:
    """The model of one cluster, and a memory of whose KV is whose, for messages."""

    layer_count: int
    vocab_size: int
    context_tokens_max: int
    chains: dict[Key, KvChain] = field(default_factory=dict[Key, KvChain])

    def __post_init__(self) -> None:
        if not 0 < self.layer_count <= LAYERS_MAX:
            raise ValueError(f"layer_count is {self.layer_count}; wanted 1 to {LAYERS_MAX}")

    def chain(self, key: Key, salt: bytes) -> KvChain:
        """Begin the KV of a sequence."""
        chain = self.chains[key] = KvChain(self.layer_count, salt)
        return chain

    def next_token(self, kv_sum: int, position: int, sampling: SamplingParams) -> int:
        """Choose the token at ``position`` from the sum of all KV words before it."""
        seed = 0 if sampling.temperature == 0 else sampling.seed + 1
        value = ((kv_sum & _MASK) ^ (seed * _LAYERS[1]) ^ position) & _MASK
        value = (value * _ODD) & _MASK
        return 1 + (value >> 33) % (self.vocab_size - 1)

    def reference(self, request: Request) -> tuple[tuple[int, ...], FinishReason]:
        """Compute all output of ``request``, as an undisturbed run produces it."""
        chain = KvChain(self.layer_count, request.cache_salt)
        chain.extend(request.known_tokens)
        kv_sum = sum(map(sum, chain.words))
        output = list(request.emitted)
        while True:
            token = self.next_token(kv_sum, len(chain), request.sampling)
            output.append(token)
            finish = finish_after(request, token, len(output), self.context_tokens_max)
            if finish is not None:
                return tuple(output), finish
            chain.extend((token,))
            kv_sum += sum(words[-1] for words in chain.words)

    def whose(self, word: int) -> str:
        """Say which sequence a word of KV belongs to."""
        if not word:
            return "nothing: it was never written"
        for key, chain in self.chains.items():
            for layer, words in enumerate(chain.words):
                if word in words:
                    return f"layer {layer}, position {words.index(word)} of {key!r}"
        return "no sequence at all"
