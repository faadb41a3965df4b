"""A counter-based generator: the random number of (seed, position), in any order, anywhere.

Philox4x32-10 of Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011); the
tests hold it to that paper's published answers.
"""

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_FACTORS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Encrypt ``counters`` [4, count], 32-bit words, under two 32-bit key words."""
    a, b, c, d = counters
    for turn in range(_ROUNDS):
        first, second = (np.uint64((word + turn * step) & 0xFFFFFFFF)
                         for word, step in zip(key, _STEPS, strict=True))  # fmt: skip
        left, right = a * _FACTORS[0], c * _FACTORS[1]
        a, b, c, d = (
            (right >> _SHIFT) ^ b ^ first,
            right & _LOW,
            (left >> _SHIFT) ^ d ^ second,
            left & _LOW,
        )
    return np.stack([a, b, c, d])


def uniforms(seed: int, start: int, count: int) -> NDArray[np.float64]:
    """Give the numbers in [0, 1), multiples of 2**-53, of positions ``start`` and following."""
    positions = np.arange(start, start + count, dtype=np.uint64)
    counters = np.zeros((4, count), dtype=np.uint64)
    counters[0], counters[1] = positions & _LOW, positions >> _SHIFT
    words = philox(counters, (seed & 0xFFFFFFFF, seed >> 32))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    numbers: NDArray[np.float64] = (high * 67108864.0 + low) / 9007199254740992.0
    return numbers
