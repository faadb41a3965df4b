"""Detokenising and stop strings, against what the whole text says."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from pdserve.errors import InvalidRequest
from router.model_folder import ModelFolder
from router.text import StopMatcher, TextCodec

MODEL = ModelFolder.load("", "")
CODEC = MODEL.codec


def piecewise(codec: TextCodec, tokens: Sequence[int]) -> list[str]:
    detokenizer = codec.detokenizer()
    return [*[detokenizer.push(token) for token in tokens], detokenizer.finish()]


@settings(max_examples=300)
@given(st.lists(st.integers(0, MODEL.vocab_size + 20), max_size=60))
def test_any_tokens_decode_to_the_same_text_piece_by_piece(tokens: list[int]) -> None:
    assert "".join(piecewise(CODEC, tokens)) == CODEC.decode(tokens)


@settings(max_examples=300)
@given(st.lists(st.sampled_from([b for b in range(256) if b != 10]), max_size=30), st.randoms())
def test_any_bytes_decode_to_the_same_text_piece_by_piece(values: list[int], rng: object) -> None:
    del rng
    by_byte = {CODEC.token_bytes(token): token for token in range(4, MODEL.vocab_size)}
    tokens = [by_byte[bytes([value])] for value in values if bytes([value]) in by_byte]
    assert len(tokens) == len(values), "the vocabulary lacks a byte"
    assert "".join(piecewise(CODEC, tokens)) == bytes(values).decode("utf-8", "replace")


@given(st.text(max_size=40))
def test_text_survives_and_no_piece_is_half_a_character(text: str) -> None:
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return
    tokens = CODEC.encode(text, adds_special=False, tokens_max=1000)
    pieces = piecewise(CODEC, tokens)
    if not any(token in tokens for token in range(4)):  # no special token was spelt out
        assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def sentence_pieces() -> TextCodec:
    """Build a codec of the other kind: words with a leading mark, bytes as a fallback."""
    words = ["<unk>", "▁Hello", "▁world", "s", "▁a", "!", "狐"]
    vocab = {word: at for at, word in enumerate(words)}
    vocab.update({f"<0x{byte:02X}>": len(words) + byte for byte in range(256)})
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return TextCodec(tokenizer)


PIECES = sentence_pieces()


@settings(max_examples=200)
@given(st.lists(st.sampled_from([[1], [2], [3], [4], [5], [6], "🦊", "é", [263]]), max_size=20))
def test_other_vocabularies_decode_the_same_in_a_window(parts: list[list[int] | str]) -> None:
    assert PIECES._table is None, "not the other kind of vocabulary"
    tokens: list[int] = []
    for part in parts:
        tokens += [7 + byte for byte in part.encode()] if isinstance(part, str) else part
    pieces = piecewise(PIECES, tokens)
    assert "".join(pieces) == PIECES.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_window_gives_up_on_what_never_becomes_a_character() -> None:
    detokenizer = PIECES.detokenizer()
    shown = "".join(detokenizer.push(7 + 0xFF) for _ in range(100))
    assert len(shown) > 60
    assert set(shown) == {"\ufffd"}


def naive(text: str, stops: Sequence[str]) -> str:
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    return text[: min(found)] if found else text


@settings(max_examples=300)
@given(
    st.lists(st.text("ab", max_size=4), max_size=12),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_match_as_in_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown = ""
    text = "".join(pieces)
    for piece in pieces:
        shown += matcher.push(piece)
        assert naive(text, stops).startswith(shown), "shown and taken back"
    shown += matcher.finish()
    assert shown == naive(text, stops)
    assert matcher.has_matched == (shown != text)


def test_no_more_is_held_back_than_may_become_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("abc", "E", "N", "x", "EEN")] == [
        "abc", "", "", "ENx", "E",
    ]  # fmt: skip
    assert matcher.finish() == "EN"


def test_after_a_match_nothing_is_shown() -> None:
    matcher = StopMatcher(["b"])
    assert matcher.push("abc") == "a"
    assert matcher.push("more") + matcher.finish() == ""


def test_a_text_that_cannot_fit_is_not_even_tokenised() -> None:
    with pytest.raises(InvalidRequest) as caught:
        CODEC.encode("a" * 10_000_000, adds_special=True, tokens_max=1000)
    assert caught.value.reason == "context_length_exceeded"
