"""Choosing tokens from logits.  Each row's outcome depends on its own slot and logits only.

A row is drawn by inverting the distribution function over its tokens, likeliest first (ties:
lower id first), at the slot's random number.  Filters, in order: temperature, min-p and top-k
on the whole distribution, then top-p on what they left, renormalised.

Sorting a whole vocabulary is slow, so rows are first tried on their ``_CANDIDATES`` likeliest
tokens, against the exact mass of all tokens.  A row whose filters or draw are not decided by
those alone is sorted in full: the answer is the same, only slower.

Log-probabilities are those of the model's raw logits, before penalties, bias, temperature and
filters.

Guesses are verified by matching (docs/adr/0012): each position is sampled as it would be without
them, and a guess is right if it is the token that was sampled.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.device.slots import Slot
from engine.step import SampledToken

_CANDIDATES = 256

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Trial:
    """A sequence's guesses: one row of logits before the first, and one behind each."""

    slot: Slot
    guesses: tuple[int, ...]


def verify(logits: Logits, trials: Sequence[Trial]) -> list[tuple[SampledToken, ...] | str]:
    """Choose tokens for each trial until a guess is not what was chosen; a string is a fault.

    logits: [row, vocab], C-contiguous, each trial's rows together and in order; changed in place.
    A row that cannot be sampled behind a right guess ends its trial there: the next step finds
    the same fault, and has it to itself.
    """
    if all(not trial.guesses for trial in trials):
        outcomes = sample(logits, [trial.slot for trial in trials])
        return [each if isinstance(each, str) else (each,) for each in outcomes]
    first_rows = np.cumsum([0, *(1 + len(trial.guesses) for trial in trials)])
    assert first_rows[-1] == len(logits), f"{len(logits)} rows for {first_rows[-1]}"
    chosen: list[list[SampledToken]] = [[] for _ in trials]
    faults: dict[int, str] = {}
    active = list(range(len(trials)))
    turn = 0
    while active:
        rows = logits[first_rows[active] + turn]
        outcomes = sample(rows, [trials[index].slot for index in active])
        matched: list[int] = []
        for index, outcome in zip(active, outcomes, strict=True):
            guesses = trials[index].guesses
            if isinstance(outcome, str):
                if not turn:
                    faults[index] = outcome
                continue
            chosen[index].append(outcome)
            if turn < len(guesses) and outcome.token == guesses[turn]:
                matched.append(index)
        active = matched
        turn += 1
    return [faults.get(index) or tuple(tokens) for index, tokens in enumerate(chosen)]


def sample(
    logits: Logits, slots: Sequence[Slot], *, is_guess: bool = False
) -> list[SampledToken | str]:
    """Choose a token for each row, and push it to its slot; a string is the row's fault.

    logits: [row, vocab], C-contiguous; changed in place.  A guess has no log-probabilities.
    """
    assert len(logits) == len(slots), f"{len(logits)} rows for {len(slots)} slots"
    faults = _find_faults(logits, slots)
    raw = {
        row: logits[row].copy()
        for row, slot in enumerate(slots)
        if slot.params.logprob_count is not None and row not in faults and not is_guess
    }
    for row, slot in enumerate(slots):
        if row not in faults and slot.is_edited:
            slot.edit(logits[row])
    tokens = logits.argmax(-1)
    drawn = [row for row, slot in enumerate(slots) if not slot.is_greedy and row not in faults]
    if drawn:
        rows = logits if len(drawn) == len(slots) else logits[drawn]
        with np.errstate(invalid="ignore"):  # a row of nothing but minus infinity
            tokens[drawn] = _draw(rows, [slots[row] for row in drawn])
    outcomes: list[SampledToken | str] = []
    for row, slot in enumerate(slots):
        token = int(tokens[row])
        if row not in faults and logits[row, token] == -np.inf:
            faults[row] = "no token is left to sample"
        if row in faults:
            outcomes.append(faults[row])
            continue
        slot.push(token)
        if row in raw:
            outcomes.append(_with_logprobs(raw[row], token, slot.params.logprob_count or 0))
        else:
            outcomes.append(SampledToken(token))
    return outcomes


def _find_faults(logits: Logits, slots: Sequence[Slot]) -> dict[int, str]:
    faults = {row: slot.fault for row, slot in enumerate(slots) if slot.fault is not None}
    with np.errstate(over="ignore", invalid="ignore"):
        totals = logits.sum(-1)
    for row in np.flatnonzero(~np.isfinite(totals)):
        if not np.isfinite(logits[row]).all():
            faults.setdefault(int(row), "the model gave logits that are not finite")
    return faults


def _draw(logits: Logits, slots: Sequence[Slot]) -> NDArray[np.int64]:
    vocab_size = logits.shape[1]
    count = min(_CANDIDATES, vocab_size)
    best = torch.from_numpy(logits).topk(count, -1)
    tokens, is_decided = _invert(logits, best.values.numpy(), best.indices.numpy(), slots)
    open_rows = np.flatnonzero(~is_decided)
    if len(open_rows):
        rows = logits[open_rows]
        everything = np.broadcast_to(np.arange(vocab_size), rows.shape)
        rest = [slots[row] for row in open_rows.tolist()]
        tokens[open_rows] = _invert(rows, rows, everything, rest)[0]
    return tokens


def _invert(
    logits: Logits, values: Logits, tokens: NDArray[np.int64], slots: Sequence[Slot]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Draw from candidates; also say which rows' draws the candidates alone decide.

    values, tokens: [row, candidate], in any order.
    """
    if not (values[:, :-1] > values[:, 1:]).all():  # ties, or not sorted yet
        order = np.lexsort((tokens, -values), axis=-1)
        values = np.take_along_axis(values, order, -1)
        tokens = np.take_along_axis(tokens, order, -1)
    row_count, count = values.shape
    vocab_size = logits.shape[1]
    params = [slot.params for slot in slots]
    temperature = np.array([p.temperature for p in params])[:, None]
    top_k = np.array([p.top_k or vocab_size for p in params])[:, None]
    top_p = np.array([p.top_p for p in params])[:, None]
    min_p = np.array([p.min_p for p in params])[:, None]
    point = np.array([slot.uniform for slot in slots])[:, None]

    weights = np.exp((values - values[:, :1]).astype(np.float64) / temperature)
    kept = (np.arange(count) < top_k) & (weights >= min_p)
    # Their mass is known if all are kept, or if the filters end within the candidates.
    is_whole = (top_k >= vocab_size) & (min_p == 0)
    is_known = (is_whole | ~kept[:, -1:])[:, 0]
    mass = np.where(kept, weights, 0.0)
    total = mass.sum(-1, keepdims=True)
    if count < vocab_size and is_whole.any():
        whole = np.flatnonzero(is_whole[:, 0])
        shifted = logits[whole] - values[whole, :1]
        shifted /= temperature[whole].astype(np.float32)
        total[whole] = np.exp(shifted, out=shifted).sum(-1, dtype=np.float64, keepdims=True)
    reached = mass.cumsum(-1)
    # The smallest set that reaches top_p: a token stays if those before it do not.
    stays = kept & (mass > 0) & ((reached - mass < top_p * total) | (top_p >= 1))
    total = np.where(top_p < 1, np.where(stays, mass, 0.0).sum(-1, keepdims=True), total)
    is_past = reached > point * total
    chosen = np.where(is_past.any(-1), is_past.argmax(-1), count)
    place = np.minimum(chosen, stays.sum(-1) - 1)
    at = np.arange(row_count)
    is_decided = np.full(row_count, True)
    if count < vocab_size:
        is_ended = ~stays[:, -1] | ((top_p[:, 0] >= 1) & (chosen < count))
        # Equals of the last candidate may be missing, and would be ordered by id.
        is_decided = is_known & is_ended & (values[at, place] > values[:, -1])
    return tokens[at, place], is_decided


def _with_logprobs(raw: Logits, token: int, count: int) -> SampledToken:
    top = raw.max()
    normaliser = float(top) + float(np.log(np.exp(raw - top).sum(dtype=np.float64)))
    best = torch.from_numpy(raw).topk(min(count, len(raw)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return SampledToken(
        token,
        float(raw[token]) - normaliser,
        tuple((candidate, value - normaliser) for candidate, value in pairs),
    )
