"""Guesses continue what the text said before, are bounded, and come from the text alone."""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from engine.speculation.choice import Guessing, for_prefill, text_proposer
from engine.speculation.ngram import NgramProposer
from engine.speculation.proposer import NaiveProposer, Proposer
from engine.speculation.suffix import SuffixAutomaton, SuffixProposer
from pdserve.config import SpeculationConfig

PROPOSERS: dict[str, Callable[[], Proposer]] = {
    "naive": NaiveProposer,
    "ngram": lambda: NgramProposer(4),
    "suffix": SuffixProposer,
}
TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def propose(proposer: Proposer, text: Sequence[int], count_max: int = 6) -> tuple[int, ...]:
    proposer.bind(0, text)
    return proposer.propose(0, count_max)


def test_nobody_guesses_by_default() -> None:
    assert Guessing.of(SpeculationConfig()) == Guessing()
    proposer = text_proposer(SpeculationConfig())
    assert propose(proposer, (1, 2, 1, 2, 1, 2)) == ()


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_what_followed_last_time_is_guessed_again(name: str) -> None:
    proposer = PROPOSERS[name]()
    assert propose(proposer, (5, 6, 7, 8, 9, 1, 5, 6, 7), 3) == (8, 9, 1)
    assert propose(proposer, (5, 6, 7, 8, 9, 1, 5, 6, 7), 1) == (8,)
    assert propose(proposer, (1, 2, 3, 4)) == ()
    assert propose(proposer, (1,)) == ()


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_a_text_that_repeats_itself_is_guessed_beyond_its_end(name: str) -> None:
    assert propose(PROPOSERS[name](), (1, 2, 3) * 5, 8) == (1, 2, 3, 1, 2, 3, 1, 2)
    assert propose(PROPOSERS[name](), (4,) * 9, 5) == (4,) * 5


def test_ngram_prefers_the_longest_match_and_of_equals_the_latest() -> None:
    longest = (1, 2, 3, 50, 2, 3, 60, 1, 2, 3)
    assert propose(NgramProposer(4), longest, 1) == (50,)
    assert propose(NgramProposer(2), longest, 1) == (60,)
    assert propose(NgramProposer(4), (9, 3, 50, 8, 3), 1) == (), "one token is no match"
    assert propose(NgramProposer(1), (9, 3, 50, 8, 3), 1) == (50,), "unless that is all it may be"


def test_suffix_follows_what_was_seen_most_often() -> None:
    often, last = (1, 2, 7), (1, 2, 8)
    text = (*often, 30, *often, 31, *often, 32, *last, 33, 1, 2)
    assert propose(SuffixProposer(), text, 1) == (7,)
    assert propose(NgramProposer(4), text, 1) == (8,)


def test_suffix_guesses_further_behind_a_longer_match() -> None:
    passage = tuple(range(100, 120))
    short = propose(SuffixProposer(), (*passage, 1, *passage[:1]), 20)
    long = propose(SuffixProposer(), (*passage, 1, *passage[:4]), 20)
    assert (len(short), len(long)) == (2, 8)


def test_suffix_stops_where_nothing_is_likely() -> None:
    dice = Random(3)
    text = [token for _ in range(40) for token in (1, 2, dice.randrange(10, 30))]
    assert propose(SuffixProposer(), (*text, 99, 1, 2), 4) == ()


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_the_automaton_counts_every_substring_and_finds_the_longest_tail(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    assert automaton.state_count <= 2 * len(text) + 1
    seen: Counter[tuple[int, ...]] = Counter()
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            seen[tuple(text[start:stop])] += 1
    tails = [n for n in range(1, len(text)) if seen[tuple(text[-n:])] > 1]
    assert automaton.match_tokens == max(tails, default=0)
    guess = automaton.continuation(1)
    if guess:
        tail = tuple(text[-automaton.match_tokens :])
        longest = max(
            (
                tail[at:]
                for at in range(len(tail))
                if any((*tail[at:], t) in seen for t in range(4))
            ),
            key=len,
        )
        counts = {token: seen[(*longest, token)] for token in range(4)}
        assert counts[guess[0]] == max(counts.values())


@pytest.mark.parametrize("name", PROPOSERS)
@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=8))
def test_a_slot_bound_to_the_whole_text_guesses_like_one_that_saw_it_grow(
    name: str, text: list[int], more: list[list[int]]
) -> None:
    grown, bound = PROPOSERS[name](), PROPOSERS[name]()
    grown.bind(3, text)
    for tokens in more:
        grown.extend(3, tokens)
        text = text + tokens
        bound.bind(3, text)
        guess = grown.propose(3, 5)
        assert guess == bound.propose(3, 5)
        assert set(guess) <= set(text)
        assert len(guess) <= 5


@pytest.mark.parametrize("name", PROPOSERS)
def test_slots_do_not_know_of_each_other(name: str) -> None:
    alone, among = PROPOSERS[name](), PROPOSERS[name]()
    alone.bind(0, (1, 2, 3, 1, 2))
    among.bind(1, (1, 2, 9, 1, 2))
    among.bind(0, (7, 7, 7, 7, 7))
    among.bind(0, (1, 2, 3, 1, 2))
    among.bind(2, (1, 2, 8, 1, 2))
    assert among.propose(0, 4) == alone.propose(0, 4)


def test_an_index_is_bounded_and_still_guesses_from_the_latest_text() -> None:
    proposer = SuffixProposer(text_tokens_max=100, portion_tokens=1000)
    dice = Random(1)
    proposer.bind(0, [dice.randrange(1000) for _ in range(500)])
    for _ in range(200):
        proposer.extend(0, [dice.randrange(1000) for _ in range(3)])
        text = proposer._texts[0]
        assert len(text.tokens) <= 100
        assert text.automaton.state_count <= 201
    proposer.extend(0, (1, 2, 3, 4, 1, 2, 3))
    assert proposer.propose(0, 1) == (4,)


def test_a_long_prompt_is_indexed_in_portions() -> None:
    proposer = SuffixProposer(portion_tokens=10)
    proposer.bind(0, (1, 2, 3, 4, 5) * 5)
    assert [proposer.propose(0, 2) for _ in range(3)] == [(), (), (1, 2)]


@pytest.mark.parametrize("proposer", ["naive", "ngram", "suffix", "draft"])
def test_prefill_guesses_nothing_but_fills_a_draft_models_kv(proposer: str) -> None:
    config = for_prefill(SpeculationConfig(proposer=proposer, draft_path="x"))
    assert Guessing.of(config) == Guessing()
    assert config.proposer == ("draft" if proposer == "draft" else "naive")
