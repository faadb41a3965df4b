"""Guessing from an index of every substring: the continuation seen most often.

A suffix automaton over a sequence's prompt and output (Blumer et al., "The smallest automaton
recognizing the subwords of a text", 1985) finds the longest tail that occurs elsewhere in the
text, however long, in constant time per token.  From there the guess follows the likeliest
token at each place, by how often each was seen; it ends where no continuation is likely any
more, and is no longer than twice the match: a long match may be trusted further.
(Adaptive length after Oliaro et al., "SuffixDecoding", 2024.)
"""

from collections.abc import Sequence

_COUNTED_LINKS_MAX = 64
_LIKELY_MIN = 0.2
_GUESSES_PER_MATCHED = 2


class SuffixAutomaton:
    """Every substring of a text that grows; states are numbers, the root is 0.

    A state is a set of substrings that end at the same places; ``_counts`` says at how many.
    Counts are brought up to date along at most ``_COUNTED_LINKS_MAX`` suffix links: only texts
    that do little but repeat themselves have more, and those have one continuation anyway.
    """

    def __init__(self) -> None:
        self.token_count = 0
        self._next: list[dict[int, int]] = [{}]
        self._links = [-1]
        self._lengths = [0]
        self._counts = [0]
        self._last = 0

    def extend(self, token: int) -> None:
        """Add one token."""
        nexts, links, lengths, counts = self._next, self._links, self._lengths, self._counts
        state, place = len(nexts), self._last
        nexts.append({})
        lengths.append(self.token_count + 1)
        links.append(0)
        counts.append(0)
        while place != -1 and token not in nexts[place]:
            nexts[place][token] = state
            place = links[place]
        if place != -1:
            target = nexts[place][token]
            links[state] = target
            if lengths[target] != lengths[place] + 1:
                links[state] = self._split(place, token, target)
        self._last = state
        self.token_count += 1
        for _ in range(_COUNTED_LINKS_MAX):
            if state <= 0:
                break
            counts[state] += 1
            state = links[state]

    def _split(self, place: int, token: int, target: int) -> int:
        """Part ``target``'s shorter substrings from it: they end in one place more from now on."""
        clone = len(self._next)
        self._next.append(dict(self._next[target]))
        self._links.append(self._links[target])
        self._lengths.append(self._lengths[place] + 1)
        self._counts.append(self._counts[target])
        self._links[target] = clone
        while place != -1 and self._next[place].get(token) == target:
            self._next[place][token] = clone
            place = self._links[place]
        return clone

    @property
    def state_count(self) -> int:
        """At most twice the tokens."""
        return len(self._next)

    @property
    def match_tokens(self) -> int:
        """Length of the longest tail of the text that occurs elsewhere in it."""
        return self._lengths[max(self._links[self._last], 0)]

    def continuation(self, count_max: int) -> tuple[int, ...]:
        """Follow the likeliest tokens from the longest match, while they are likely enough."""
        count_max = min(count_max, _GUESSES_PER_MATCHED * self.match_tokens)
        guesses: list[int] = []
        state, likely = self._links[self._last], 1.0
        while len(guesses) < count_max:
            while state > 0 and not self._next[state]:  # the text's end: go on with a shorter tail
                state = self._links[state]
            if state <= 0:
                break
            choices = self._next[state]
            counts = [self._counts[after] for after in choices.values()]
            most = max(counts)
            likely *= most / max(1, sum(counts))
            if likely < _LIKELY_MIN:
                break
            token = list(choices)[counts.index(most)]
            guesses.append(token)
            state = choices[token]
        return tuple(guesses)

    def __repr__(self) -> str:
        return f"<SuffixAutomaton {self.token_count} tokens, {self.state_count} states>"


class _Text:
    """One sequence: what is indexed, and what is read but not indexed yet."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.automaton = SuffixAutomaton()
        self.tokens = list(tokens)
        self.indexed_count = 0

    def index(self, count_max: int) -> None:
        stop = min(len(self.tokens), self.indexed_count + count_max)
        for token in self.tokens[self.indexed_count : stop]:
            self.automaton.extend(token)
        self.indexed_count = stop


class SuffixProposer:
    """The most frequent continuation of the longest match.

    A slot's index holds the latest ``text_tokens_max`` tokens at most, and a quarter of them
    after it was full.  A long prompt is indexed in portions of ``portion_tokens``, one with each
    proposal (some 3 us per token), so that it does not hold up the step of the others.
    """

    def __init__(self, *, text_tokens_max: int = 8192, portion_tokens: int = 512) -> None:
        assert text_tokens_max >= 4, f"text_tokens_max is {text_tokens_max}"
        assert portion_tokens > 0, f"portion_tokens is {portion_tokens}"
        self._text_tokens_max = text_tokens_max
        self._portion_tokens = portion_tokens
        self._texts: dict[int, _Text] = {}

    def bind(self, slot: int, tokens: Sequence[int]) -> None:
        """Begin anew in ``slot``."""
        self._texts[slot] = _Text(tokens[-self._text_tokens_max :])

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Note the tokens that followed; forget the oldest three quarters of a full index."""
        text = self._texts[slot]
        text.tokens += tokens
        if len(text.tokens) > self._text_tokens_max:
            self._texts[slot] = _Text(text.tokens[-(self._text_tokens_max // 4) :])

    def propose(self, slot: int, count_max: int) -> tuple[int, ...]:
        """Guess, once everything is indexed."""
        text = self._texts[slot]
        text.index(self._portion_tokens)
        if text.indexed_count < len(text.tokens):
            return ()
        return text.automaton.continuation(count_max)

    def unbind(self) -> None:
        """Forget every slot."""
        self._texts.clear()

    def __repr__(self) -> str:
        return f"<SuffixProposer {len(self._texts)} texts>"
