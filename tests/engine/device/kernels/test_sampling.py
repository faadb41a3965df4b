"""Tokens that the device decides are the host's; what it cannot be sure of it leaves alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.device import sampler
from engine.device.kernels import Sampled, sample, sample_scratch_size
from engine.device.slots import Slot
from engine.step import Binding, SampledToken
from pdserve.request import Key, Request, SamplingParams

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 63},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.001},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 12, "min_p": 0.1, "top_p": 0.7},
]


def make_slot(seed: int, vocab_size: int, **sampling: Any) -> Slot:
    params = SamplingParams(seed=seed, **sampling)
    request = Request(Key(f"{seed:032x}", 0), (1, 2, 3), 1000, sampling=params)
    return Slot(Binding(0, request, ()), vocab_size)


def make_logits(row_count: int, vocab_size: int, spread: float) -> np.ndarray[Any, Any]:
    """Rounded, so that there are many ties."""
    generator = np.random.default_rng(vocab_size)
    values = generator.standard_normal((row_count, vocab_size)) * spread
    return np.round(values, 1).astype(np.float32)


def draw(
    logits: np.ndarray[Any, Any],
    slots: Sequence[Slot],
    device: torch.device,
    uniform: Sequence[float] | None = None,
) -> Sampled:
    params = [slot.params for slot in slots]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=device)

    size = sample_scratch_size(*logits.shape)
    return sample(
        torch.from_numpy(logits).to(device),
        is_greedy=torch.tensor([slot.is_greedy for slot in slots], device=device),
        temperature=column([each.temperature for each in params]),
        top_k=torch.tensor([each.top_k or 0 for each in params], device=device).int(),
        top_p=column([each.top_p for each in params]),
        min_p=column([each.min_p for each in params]),
        uniform=column(uniform or [slot.uniform for slot in slots]),
        scratch=torch.full((size,), -1, dtype=torch.int64, device=device),
    )


def on_host(logits: np.ndarray[Any, Any], slots: Sequence[Slot]) -> list[int]:
    outcomes = sampler.sample(logits.copy(), slots)
    return [outcome.token for outcome in outcomes if isinstance(outcome, SampledToken)]


# The least that must be decided: a kernel that leaves everything to the host would be right too.
@pytest.mark.parametrize(
    ("vocab_size", "spread", "decided_min"), [(50, 1.0, 14), (300, 3.0, 13), (4500, 6.0, 14)]
)
def test_a_decided_token_is_the_hosts(
    vocab_size: int, spread: float, decided_min: int, device: torch.device
) -> None:
    slots = [make_slot(seed, vocab_size, **filters) for seed, filters in enumerate(FILTERS)]
    logits = make_logits(len(slots), vocab_size, spread)
    seen = draw(logits, slots, device)
    is_decided = seen.is_decided.tolist()
    wanted = on_host(logits, slots)
    for row, token in enumerate(seen.tokens.tolist()):
        assert not is_decided[row] or token == wanted[row], FILTERS[row]
    assert sum(is_decided) >= decided_min, is_decided


def test_a_flat_distribution_is_left_to_the_host(device: torch.device) -> None:
    kinds: list[dict[str, Any]] = [
        {}, {"top_k": 65}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 64}, {"top_k": 63},
    ]  # fmt: skip
    slots = [make_slot(seed, 300, **kind) for seed, kind in enumerate(kinds)]
    logits = make_logits(len(slots), 300, 0.01)
    seen = draw(logits, slots, device, uniform=[0.7031] * len(slots))
    # 64 kept ones fill the candidates: more might follow.
    assert seen.is_decided.tolist() == [False, False, False, False, False, True]


def test_a_draw_near_a_border_is_left_to_the_host(device: torch.device) -> None:
    logits = np.full((6, 300), -30.0, np.float32)
    logits[:, :2] = 0.0
    kinds: list[dict[str, Any]] = [
        {"top_k": 2}, {"top_k": 2}, {"top_k": 2, "top_p": 0.5}, {"min_p": float(np.exp(-30.0))},
        {}, {},
    ]  # fmt: skip
    slots = [make_slot(seed, 300, **kind) for seed, kind in enumerate(kinds)]
    uniform = [0.5, 0.4999, 0.2, 0.2, 0.50001, 0.4999]
    seen = draw(logits, slots, device, uniform)
    assert seen.is_decided.tolist() == [False, True, False, False, False, True]
    assert seen.tokens[[1, 5]].tolist() == [0, 0]


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest(device: torch.device) -> None:
    logits = make_logits(4, 4500, 1.0)
    logits[1, [4400, 20, 900]] = 50.0
    logits[2] = -1.0
    logits[2, [7, 4499]] = [-0.0, 0.0]
    slots = [make_slot(seed, 4500, temperature=0.0) for seed in range(4)]
    seen = draw(logits, slots, device)
    assert seen.is_decided.all()
    assert seen.tokens.tolist() == on_host(logits, slots)
    assert seen.tokens[1:3].tolist() == [20, 7]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_is_left_to_the_host(bad: float, device: torch.device) -> None:
    logits = make_logits(3, 4500, 3.0)
    logits[0, 4300] = logits[1, 5] = bad
    slots = [make_slot(seed, 4500, temperature=0.0) for seed in (0, 2)]
    slots.insert(1, make_slot(1, 4500, top_k=5))
    assert draw(logits, slots, device).is_decided.tolist() == [False, False, True]


def test_a_row_is_drawn_alike_alone_and_among_others(device: torch.device) -> None:
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 9}]
    slots = [make_slot(seed, 300, **kind) for seed, kind in enumerate(kinds)]
    logits = make_logits(4, 300, 3.0)
    together = draw(logits, slots, device)
    for row, slot in enumerate(slots):
        alone = draw(logits[row : row + 1], [slot], device)
        assert alone.tokens[0] == together.tokens[row]
        assert alone.is_decided[0] == together.is_decided[row]
