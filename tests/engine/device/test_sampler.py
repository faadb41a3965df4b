"""What is drawn follows the filtered distribution, and depends on nothing but the row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.device import sampler
from engine.device.sampler import Trial, sample, verify
from engine.device.slots import Slot
from engine.step import Binding, SampledToken
from pdserve.request import Key, Request, SamplingParams

VOCAB_SIZE = 400


def make_slot(
    seed: int = 0,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    output: Sequence[int] = (),
    stop_tokens: frozenset[int] = frozenset(),
    minimum: int = 0,
    vocab_size: int = VOCAB_SIZE,
    **sampling: Any,
) -> Slot:
    request = Request(
        Key(f"{seed:032x}", 0),
        tuple(prompt),
        1000,
        output_tokens_min=minimum,
        stop_tokens=stop_tokens,
        sampling=SamplingParams(seed=seed, **sampling),
    )
    return Slot(Binding(0, request, tuple(output)), vocab_size)


def make_logits(row_count: int, spread: float = 2.0, seed: int = 0) -> Any:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((row_count, VOCAB_SIZE)) * spread).astype(np.float32)


def tokens_of(outcomes: Sequence[SampledToken | str]) -> list[int]:
    assert all(isinstance(outcome, SampledToken) for outcome in outcomes), outcomes
    return [outcome.token for outcome in outcomes if isinstance(outcome, SampledToken)]


def plain_distribution(logits: Any, params: SamplingParams) -> Any:
    """The filtered distribution, written as the definitions read."""
    scaled = logits.astype(np.float64) / params.temperature
    chances = np.exp(scaled - scaled.max())
    chances /= chances.sum()
    order = np.argsort(-chances, kind="stable")
    keep = np.ones(len(chances), bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    keep &= chances >= params.min_p * chances.max()
    chances = np.where(keep, chances, 0)
    chances /= chances.sum()
    before = np.cumsum(chances[order]) - chances[order]
    if params.top_p < 1:
        chances[order[before >= params.top_p]] = 0
    return chances / chances.sum()


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": 300},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.8, "temperature": 1.5},
    {"top_k": 12, "min_p": 0.1, "top_p": 0.7},
    {"top_p": 0.001},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.5])
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any], spread: float) -> None:
    row = make_logits(1, spread)[0]
    params = SamplingParams(**filters)
    wanted = plain_distribution(row, params)
    slots = [make_slot(seed, **filters) for seed in range(100)]
    counts = np.zeros(VOCAB_SIZE)
    draw_count = 1000
    for _ in range(draw_count // len(slots)):
        for token in tokens_of(sample(np.tile(row, (len(slots), 1)), slots)):
            counts[token] += 1
    assert counts[wanted == 0].sum() == 0, "a filtered token was drawn"
    common = wanted * draw_count >= 5
    rest = wanted[~common].sum() * draw_count
    seen = [*counts[common], counts[~common].sum()] if rest > 5 else counts[common]
    expected = [*(wanted[common] * draw_count), rest] if rest > 5 else wanted[common] * draw_count
    degrees = len(expected) - 1
    chi_square = ((np.array(seen) - expected) ** 2 / expected).sum()
    assert chi_square <= degrees + 4 * np.sqrt(2 * degrees) + 4  # beyond four sigma


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.5])
def test_few_candidates_give_the_same_tokens_as_a_full_sort(
    filters: dict[str, Any], spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = np.round(make_logits(50, spread, seed=3), 1)  # rounded: many ties
    drawn = []
    for candidates in (1, 7, 256, VOCAB_SIZE):
        monkeypatch.setattr(sampler, "_CANDIDATES", candidates)
        slots = [make_slot(seed, **filters) for seed in range(50)]
        drawn.append(tokens_of(sample(logits.copy(), slots)))
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    logits = make_logits(30)
    kinds: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"top_p": 0.5}, {"logprob_count": 3}]
    kinds += [{"repetition_penalty": 1.3, "presence_penalty": 0.5}, {"logit_bias": ((5, 4.0),)}]

    def slots() -> list[Slot]:
        return [make_slot(number, **kinds[number % len(kinds)]) for number in range(30)]

    together = sample(logits.copy(), slots())
    alone = [sample(logits[row : row + 1].copy(), [slot])[0] for row, slot in enumerate(slots())]
    backwards = sample(logits[::-1].copy(), slots()[::-1])[::-1]
    assert together == alone == backwards


def test_a_resumed_request_draws_what_the_first_attempt_would_have() -> None:
    logits = make_logits(40)
    sampling: dict[str, Any] = {"frequency_penalty": 1.0, "repetition_penalty": 1.2}
    slot = make_slot(9, **sampling)
    whole = [tokens_of(sample(row[None].copy(), [slot]))[0] for row in logits]
    resumed = make_slot(9, output=whole[:25], **sampling)
    rest = [tokens_of(sample(row[None].copy(), [resumed]))[0] for row in logits[25:]]
    assert rest == whole[25:]
    other = make_slot(10, **sampling)
    assert [tokens_of(sample(row[None].copy(), [other]))[0] for row in logits] != whole


def test_greedy_takes_the_likeliest_and_of_equals_the_lowest() -> None:
    logits = make_logits(3)
    logits[1, [300, 20]] = 50.0
    slots = [make_slot(number, temperature=0.0) for number in range(3)]
    assert tokens_of(sample(logits, slots)) == [
        int(logits[0].argmax()),
        20,
        int(logits[2].argmax()),
    ]


def test_a_tiny_temperature_is_greedy() -> None:
    logits = make_logits(1)
    best = int(logits[0].argmax())
    assert tokens_of(sample(logits, [make_slot(temperature=1e-300)])) == [best]


def test_stop_tokens_are_not_drawn_before_the_minimum() -> None:
    slot = make_slot(stop_tokens=frozenset({7, 8, 9999}), minimum=3, temperature=0.0)
    row = make_logits(1)
    row[0, 7], row[0, 8], row[0, 30] = 90.0, 80.0, 70.0
    drawn = [tokens_of(sample(row.copy(), [slot]))[0] for _ in range(5)]
    assert drawn == [30, 30, 30, 7, 7]


def test_penalties_change_the_logits_as_defined() -> None:
    slot = make_slot(
        prompt=(3, 3, 5),
        output=(5, 6, 6),
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
    )
    row = np.zeros(VOCAB_SIZE, np.float32)
    row[[3, 5, 6, 7]] = [4.0, -4.0, 4.0, 4.0]
    slot.edit(row)
    assert row[[3, 5, 6, 7]].tolist() == [2.0, -8.75, 1.0, 4.0]
    slot.push(7)
    row[:] = 4.0
    slot.edit(row)
    assert row[7] == 1.25
    assert row[8] == 4.0


def test_many_seen_tokens_are_all_penalised() -> None:
    slot = make_slot(prompt=range(100), presence_penalty=1.0)
    for token in range(50, 250):
        slot.push(token)
    row = np.zeros(VOCAB_SIZE, np.float32)
    slot.edit(row)
    assert np.flatnonzero(row == -1.0).tolist() == list(range(50, 250))


def test_bias_can_force_and_forbid_a_token() -> None:
    forced = make_slot(1, logit_bias=((17, 100.0), (17, 100.0)))
    forbidden = make_slot(2, temperature=0.0, logit_bias=((17, -1e300),))
    logits = make_logits(2)
    logits[1, 17] = 50.0
    drawn = tokens_of(sample(logits, [forced, forbidden]))
    assert drawn[0] == 17
    assert drawn[1] != 17


def test_logprobs_are_those_of_the_raw_logits() -> None:
    sampling: dict[str, Any] = {"presence_penalty": 2.0, "temperature": 0.3, "top_k": 5}
    sampling |= {"logit_bias": ((4, 3.0),), "logprob_count": 6}
    slots = [make_slot(number, output=(1, 2), **sampling) for number in range(4)]
    slots.append(make_slot(4, logprob_count=0))
    logits = make_logits(5)
    wanted = torch.log_softmax(torch.from_numpy(logits.copy()), -1)
    for row, outcome in enumerate(sample(logits, slots)):
        assert isinstance(outcome, SampledToken)
        assert outcome.logprob == pytest.approx(float(wanted[row, outcome.token]), abs=1e-5)
        best = wanted[row].topk(6 if row < 4 else 0)
        assert [token for token, _ in outcome.top] == best.indices.tolist()
        assert [value for _, value in outcome.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_its_own_fault(bad: float) -> None:
    logits = make_logits(3)
    clean = tokens_of(sample(logits.copy(), [make_slot(number) for number in range(3)]))
    logits[1, 200] = bad
    slots = [make_slot(number) for number in range(3)]
    outcomes = sample(logits, slots)
    assert isinstance(outcomes[1], str)
    assert "not finite" in outcomes[1]
    assert tokens_of([outcomes[0], outcomes[2]]) == [clean[0], clean[2]]
    assert slots[1].output_count == 0


def test_a_row_with_nothing_left_to_sample_is_a_fault() -> None:
    everything = frozenset(range(VOCAB_SIZE))
    slots = [
        make_slot(number, stop_tokens=everything, minimum=1, temperature=float(number))
        for number in range(2)
    ]
    outcomes = sample(make_logits(2), slots)
    assert outcomes == ["no token is left to sample"] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": (1, VOCAB_SIZE)}, "token 400 is outside the vocabulary of 400"),
        ({"prompt": (-1,)}, "token -1 is outside"),
        ({"output": (1 << 40,)}, "token 1099511627776 is outside"),
        ({"logit_bias": ((VOCAB_SIZE, 1.0),)}, "logit_bias token 400 is outside"),
    ],
)
def test_tokens_outside_the_vocabulary_are_the_requests_fault(
    changes: dict[str, Any], message: str
) -> None:
    slots = [make_slot(0), make_slot(1, **changes)]
    outcomes = sample(make_logits(2), slots)
    assert isinstance(outcomes[0], SampledToken)
    assert message in str(outcomes[1])


def test_a_seed_and_a_position_decide_the_draw_whatever_the_slot() -> None:
    first = make_slot(5, prompt=(1,), output=(2, 3))
    second = make_slot(5, prompt=(9, 9), output=(9,))
    assert first.uniform == second.uniform
    second.push(0)
    assert first.uniform != second.uniform


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.7, "temperature": 0.6},
    {"repetition_penalty": 2.0, "frequency_penalty": 1.5, "presence_penalty": 1.0},
    {"temperature": 0.0, "repetition_penalty": 3.0, "frequency_penalty": 2.0},
    {"logit_bias": ((5, 4.0), (9, -3.0)), "logprob_count": 2},
]


def one_by_one(rows: Any, slot: Slot) -> list[SampledToken]:
    """What a step without guesses gives, time after time, if ``rows`` are its logits."""
    found = [sample(row[None].copy(), [slot])[0] for row in rows]
    return [each for each in found if isinstance(each, SampledToken)]


@pytest.mark.parametrize("right_count", [0, 1, 2, 3, 4])
def test_guesses_bring_the_very_tokens_that_come_without_them(right_count: int) -> None:
    """Penalties count each token of the step before the next of it is chosen."""
    logits = make_logits(5 * len(KINDS), seed=right_count).reshape(len(KINDS), 5, VOCAB_SIZE)
    trials, wanted = [], []
    for number, kind in enumerate(KINDS):
        tokens = one_by_one(logits[number], make_slot(number, stop_tokens=STOPS, minimum=2, **kind))
        guesses = [each.token for each in tokens[:4]]
        guesses[right_count:] = [(token + 1) % VOCAB_SIZE for token in guesses[right_count:]]
        slot = make_slot(number, stop_tokens=STOPS, minimum=2, **kind)
        trials.append(Trial(slot, tuple(guesses)))
        wanted.append(tuple(tokens[: right_count + 1]))
    assert verify(logits.reshape(-1, VOCAB_SIZE).copy(), trials) == wanted
    for trial in trials:
        assert trial.slot.output_count == right_count + 1


STOPS = frozenset({int(make_logits(5, seed=1)[0].argmax())})


def test_a_right_guess_behind_a_wrong_one_is_not_taken() -> None:
    rows = make_logits(3)
    tokens = [each.token for each in one_by_one(rows, make_slot(temperature=0.0))]
    trial = Trial(make_slot(temperature=0.0), (tokens[0] + 1, tokens[1]))
    assert verify(rows.copy(), [trial]) == [(SampledToken(tokens[0]),)]


def test_trials_of_any_length_go_together() -> None:
    logits = make_logits(9)
    places = {0: [0], 1: [1, 2, 3, 4], 2: [5, 6, 7], 3: [8]}
    trials, wanted = [], []
    for number, rows in places.items():
        tokens = one_by_one(logits[rows], make_slot(number))
        trials.append(Trial(make_slot(number), tuple(each.token for each in tokens[:-1])))
        wanted.append(tuple(tokens))
    assert verify(logits.copy(), trials) == wanted


def test_a_fault_behind_a_right_guess_is_left_to_the_next_step() -> None:
    """As without guesses, the tokens before it are the user's, and neighbours go on."""
    logits = make_logits(6)
    good = one_by_one(logits[:3], make_slot(1))
    also = one_by_one(logits[3:], make_slot(2))
    logits[2] = np.nan
    trials = [
        Trial(make_slot(number), tuple(each.token for each in tokens[:2]))
        for number, tokens in ((1, good), (2, also))
    ]
    assert verify(logits.copy(), trials) == [tuple(good[:2]), tuple(also)]
    broken = verify(logits[2:3].copy(), [Trial(trials[0].slot, ())])
    assert broken == ["the model gave logits that are not finite"]
    logits[0] = np.nan
    at_once = verify(logits.copy(), [Trial(make_slot(n), trials[n - 1].guesses) for n in (1, 2)])
    assert at_once == ["the model gave logits that are not finite", tuple(also)]


COUPLED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 1.0, "min_p": 0.1},
]


@pytest.mark.parametrize("filters", COUPLED, ids=str)
def test_guessing_leaves_the_distribution_and_shares_the_draftsmans_luck(
    filters: dict[str, Any],
) -> None:
    """Chi-square over pairs of tokens that 3,000 seeds draw with guesses of another model.

    The other model samples at the same random number, so its guess is right far more often than
    one drawn apart (the sum of p q); the best that any guess can do is the sum of min(p, q).
    """
    seed_count, size = 3000, 8
    generator = np.random.default_rng(5)
    target = generator.standard_normal((size + 1, size)).astype(np.float32) * 1.2
    draft = target + 0.5 * generator.standard_normal(target.shape).astype(np.float32)
    slots = [make_slot(seed, vocab_size=size, **filters) for seed in range(seed_count)]
    marks = [slot.mark() for slot in slots]
    start = np.full(seed_count, size)  # the row of the first token
    guesses = tokens_of(sample(draft[start], slots, is_guess=True))
    for slot, mark, guess in zip(slots, marks, guesses, strict=True):
        slot.rewind(mark, (guess,))
    rows = np.stack([target[start], target[guesses]], 1).reshape(-1, size)
    trials = [Trial(slot, (guess,)) for slot, guess in zip(slots, guesses, strict=True)]
    firsts, pairs = np.zeros(size), np.zeros((size, size))
    right_count = 0
    for outcome in verify(rows, trials):
        assert not isinstance(outcome, str)
        firsts[outcome[0].token] += 1
        if len(outcome) == 2:
            right_count += 1
            pairs[outcome[0].token, outcome[1].token] += 1
    params = SamplingParams(**filters)
    chances = [plain_distribution(row, params) for row in target]
    assert chi_square_is_small(firsts, chances[size] * seed_count)
    for token in range(size):  # what follows a right guess depends on the token, not on the guess
        assert chi_square_is_small(pairs[token], chances[token] * pairs[token].sum())
    p, q = chances[size], plain_distribution(draft[size], params)
    share = right_count / seed_count
    assert (p * q).sum() + 0.1 < share <= np.minimum(p, q).sum() + 0.03


def chi_square_is_small(seen: Any, expected: Any) -> bool:
    assert seen[expected == 0].sum() == 0, "a filtered token was drawn"
    common = expected >= 5
    if common.sum() < 2:
        return True
    degrees = int(common.sum()) - 1
    total = ((seen[common] - expected[common]) ** 2 / expected[common]).sum()
    return bool(total <= degrees + 4 * np.sqrt(2 * degrees) + 4)  # beyond four sigma
