"""Rotation, head norms and the write to the cache against float64."""

import pytest
import torch

from engine.device.kernels import qkv_rope_write
from engine.device.rope import RopeTable
from engine.device.spec import RopeSpec

EPSILON = 1e-6
BOUND = {torch.float32: 4e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
BLOCK_TOKENS = 6
BLOCK_COUNT = 5


def tables(dim: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The engine's own tables: their second halves are cosines and sines as they are."""
    whole = RopeTable(RopeSpec("default", 10_000.0), dim, 64)
    cosine, sine = whole.at(torch.arange(64), 63)
    return cosine[:, 0, dim // 2 :].to(device), sine[:, 0, dim // 2 :].to(device)


def turned(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn pairs (i, i + dim / 2) of [token, head, dim] as complex numbers."""
    half = heads.shape[-1] // 2
    exponents = torch.arange(half, dtype=torch.float64, device=heads.device) / half
    angles = positions.double()[:, None, None] * 10_000.0**-exponents
    low, high = heads.double().split(half, -1)
    result = torch.complex(low, high) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([result.real, result.imag], -1)


def normed(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = heads.double()
    factor = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + EPSILON)
    return exact * factor * weight.double()


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (7, 1, 24)])
@pytest.mark.parametrize("has_norms", [False, True])
def test_heads_are_turned_and_stored(
    heads: int, kv_heads: int, dim: int, has_norms: bool, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(dim)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    qkv = random(4, (heads + 2 * kv_heads) * dim)
    pool = random(BLOCK_COUNT, 2, BLOCK_TOKENS, kv_heads, dim)
    before = pool.clone()
    positions = torch.tensor([0, 5, 63, 0], device=device)
    slots = torch.tensor([3, 4 * BLOCK_TOKENS + 5, 2 * BLOCK_TOKENS, -1], device=device)
    norms = (random(dim), random(dim)) if has_norms else None
    seen = qkv_rope_write(
        qkv, positions, *tables(dim, device), slots, pool,
        head_count=heads, head_norms=norms, epsilon=EPSILON,
    )  # fmt: skip

    queries, keys, values = qkv.view(4, -1, dim).split([heads, kv_heads, kv_heads], 1)
    wanted_queries, wanted_keys = queries.double(), keys.double()
    if norms is not None:
        wanted_queries, wanted_keys = normed(queries, norms[0]), normed(keys, norms[1])
    bound = BOUND[dtype]
    torch.testing.assert_close(
        seen.double(), turned(wanted_queries, positions), rtol=bound, atol=bound
    )
    block, offset = slots[:3] // BLOCK_TOKENS, slots[:3] % BLOCK_TOKENS
    torch.testing.assert_close(
        pool[block, 0, offset].double(), turned(wanted_keys, positions)[:3], rtol=bound, atol=bound
    )
    assert torch.equal(pool[block, 1, offset], values[:3])
    # Nothing but the three slots was written: not for padding, not beside them.
    pool[block, :, offset] = before[block, :, offset]
    assert torch.equal(pool, before)


def test_a_token_has_the_same_bits_in_any_batch(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(5, 4 * 16, generator=generator).to(device)
    norms = (torch.randn(16, generator=generator).to(device),) * 2
    positions = torch.tensor([9, 1, 60, 33, 2], device=device)
    slots = torch.arange(5, device=device) * 5

    def run(rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        pool = torch.zeros(BLOCK_COUNT, 2, BLOCK_TOKENS, 1, 16, device=device)
        queries = qkv_rope_write(
            qkv[rows], positions[rows], *tables(16, device), slots[rows], pool,
            head_count=2, head_norms=norms, epsilon=EPSILON,
        )  # fmt: skip
        places = slots[rows]
        return queries, pool[places // BLOCK_TOKENS, :, places % BLOCK_TOKENS]

    whole = run(slice(0, 5))
    for row in range(5):
        alone = run(slice(row, row + 1))
        assert torch.equal(alone[0][0], whole[0][row])
        assert torch.equal(alone[1][0], whole[1][row])
