"""Text and tokens: encoding, incremental decoding, and looking out for stop strings.

Decoding is incremental and never shows half a character.  With a byte-level vocabulary each
token *is* a byte string, and the text is exactly those bytes read as UTF-8, so a table and
a streaming UTF-8 decoder give what a decode of the whole would.  Other vocabularies are
decoded in a sliding window.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from pdserve.errors import InvalidRequest

_WINDOW_TOKENS_MAX = 16  # a character has at most four bytes; more is no character at all


class Detokenizer(Protocol):
    """The text of one sequence, token by token."""

    def push(self, token: int) -> str:
        """Add a token; return what became readable."""
        ...

    def finish(self) -> str:
        """Return what was held back, unreadable bytes replaced."""
        ...


class _ByteDetokenizer:
    def __init__(self, table: Sequence[bytes]) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token: int) -> str:
        table = self._table
        return self._decode(table[token]) if token < len(table) else ""

    def finish(self) -> str:
        return self._decode(b"", True)


class _WindowDetokenizer:
    """Decodes the last few tokens with and without the new one; the difference is the text.

    ``_window[:_shown]`` is text the caller has; it stays because a token's text may depend
    on its left neighbour (leading spaces).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._new_text()
        is_stuck = len(self._window) - self._shown > _WINDOW_TOKENS_MAX
        if not text or (text.endswith("\ufffd") and not is_stuck):
            return ""
        del self._window[: self._shown]
        self._shown = len(self._window)
        return text

    def finish(self) -> str:
        text = self._new_text()
        self._window, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._window[: self._shown], skip_special_tokens=True)
        return decode(self._window, skip_special_tokens=True)[len(before) :]


class TextCodec:
    """One model's tokenizer: immutable, shared by all requests and threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._table = _byte_table(tokenizer)
        # No text of so many bytes can have fewer tokens than length / this.
        self._token_bytes_max = max(
            (len(text.encode()) for text in tokenizer.get_vocab()), default=1
        )

    @property
    def vocab_size(self) -> int:
        """Ids the tokenizer knows; the model's own count may be larger."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str, *, adds_special: bool, tokens_max: int) -> tuple[int, ...]:
        """Tokenise; ``adds_special`` adds what the tokenizer puts around a document.

        Raises:
            InvalidRequest: it must be longer than ``tokens_max``; told without trying.

        """
        if len(text) > tokens_max * self._token_bytes_max:
            raise InvalidRequest(
                f"the prompt has {len(text)} characters, more than {tokens_max} tokens can hold",
                param="prompt",
                reason="context_length_exceeded",
            )
        return tuple(self._tokenizer.encode(text, add_special_tokens=adds_special).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode a whole sequence, special tokens left out."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """Start a new sequence."""
        if self._table is not None:
            return _ByteDetokenizer(self._table)
        return _WindowDetokenizer(self._tokenizer)

    def token_bytes(self, token: int) -> bytes:
        """Give one token's own bytes; special tokens give their name."""
        if self._table is not None and token < len(self._table) and self._table[token]:
            return self._table[token]
        return (
            self._tokenizer.decode([token], skip_special_tokens=False)
            or self._tokenizer.id_to_token(token)
            or ""
        ).encode()


def _byte_table(tokenizer: Tokenizer) -> tuple[bytes, ...] | None:
    """Give each id's bytes where the vocabulary is byte-level, else None."""
    decoder = json.loads(tokenizer.to_str())["decoder"]
    if decoder is None or decoder["type"] != "ByteLevel":
        return None
    byte_of = _byte_alphabet()
    special = {
        token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
    }
    table: list[bytes] = []
    for token in range(max(tokenizer.get_vocab().values(), default=-1) + 1):
        text = tokenizer.id_to_token(token)
        if text is None or token in special:
            table.append(b"")
        elif all(letter in byte_of for letter in text):
            table.append(bytes(byte_of[letter] for letter in text))
        else:
            table.append(text.encode())  # an added token, written as it is
    return tuple(table)


def _byte_alphabet() -> dict[str, int]:
    """Map the letters of byte-level vocabularies to bytes.

    Printable bytes of Latin-1 stand for themselves, the rest for letters from U+0100 on.
    Source: the byte encoder of GPT-2 (Radford et al., 2019), shared by all such tokenizers.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + at): byte for at, byte in enumerate(others)})
    return alphabet


class StopMatcher:
    """Cuts text at the first stop string, wherever the pieces break.

    Held back is only the longest tail that may still become a stop string.  The first match
    is the one that starts first; of two that start together the result is the same.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string stops everything"
        self._stops = tuple(stops)
        self._first_letters = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""
        self.has_matched = False

    def push(self, text: str) -> str:
        """Add text; return what can be shown."""
        if not self._stops or self.has_matched:
            return "" if self.has_matched else text
        held = self._held + text
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        hold_from = self._first_candidate(held)
        # A match may still be beaten by a longer stop string that starts earlier.
        if found and min(found) <= hold_from:
            self.has_matched = True
            self._held = ""
            return held[: min(found)]
        self._held = held[hold_from:]
        return held[:hold_from]

    def finish(self) -> str:
        """Return what was held back: no more text comes."""
        held, self._held = self._held, ""
        found = [at for at in (held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.has_matched = True
            return held[: min(found)]
        return held

    def _first_candidate(self, text: str) -> int:
        """Find where the earliest unfinished stop string starts, or the end."""
        for at in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[at] in self._first_letters:
                tail = text[at:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return at
        return len(text)
