"""The generator gives the published answers, and numbers that depend on seed and position only."""

import numpy as np
import pytest

from engine.device.philox import philox, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_it_gives_the_known_answers_of_the_paper(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = philox(np.array(counter, dtype=np.uint64)[:, None], key)
    assert tuple(words[:, 0].tolist()) == answer


def test_a_position_has_the_same_number_however_it_is_asked_for() -> None:
    whole = uniforms(2**64 - 3, 0, 500)
    assert uniforms(2**64 - 3, 123, 1)[0] == whole[123]
    assert (uniforms(2**64 - 3, 450, 50) == whole[450:]).all()


def test_seeds_and_positions_beyond_32_bits_count() -> None:
    assert uniforms(1, 0, 1)[0] != uniforms(1 + (1 << 32), 0, 1)[0]
    assert uniforms(1, 5, 1)[0] != uniforms(1, 5 + (1 << 32), 1)[0]


def test_the_numbers_are_even_over_the_unit_interval() -> None:
    numbers = uniforms(7, 0, 20_000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=50, range=(0, 1))
    chi_square = ((counts - 400) ** 2 / 400).sum()
    assert chi_square < 86  # 49 degrees of freedom: one in a thousand exceeds 85.4
