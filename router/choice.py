"""One choice of an answer: tokens come in, text that may be shown comes out.

Pure.  Owns the detokeniser, the stop strings and the place in the text of one sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.request import FinishReason
from router.api import OutputEnd, OutputToken
from router.text import StopMatcher, TextCodec


@dataclass(frozen=True, slots=True)
class Piece:
    """What one batch added.

    ``text`` may lag behind ``tokens`` (half a character, half a stop string).  ``offsets``
    says for each token where its text starts.  ``finish`` is set on the last piece, and
    ``error`` only with FinishReason.ERROR.
    """

    text: str
    tokens: tuple[OutputToken, ...]
    offsets: tuple[int, ...]
    finish: FinishReason | None = None
    error: Exception | None = None


class Choice:
    """Stop strings are looked for only behind the first ``min_tokens`` tokens."""

    def __init__(
        self, index: int, codec: TextCodec, *, stops: Sequence[str], min_tokens: int
    ) -> None:
        self.index = index
        self.token_count = 0
        self.is_done = False
        self._detokenizer = codec.detokenizer()
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._offset = 0

    def feed(self, batch: Sequence[OutputToken | OutputEnd]) -> Piece:
        """Take one batch; what follows a stop string or an end is not looked at."""
        assert not self.is_done, "the choice is finished"
        texts: list[str] = []
        tokens: list[OutputToken] = []
        offsets: list[int] = []
        finish: FinishReason | None = None
        error: Exception | None = None
        for item in batch:
            if isinstance(item, OutputEnd):
                finish, error = item.reason, item.error
                texts.append(self._rest())
            else:
                tokens.append(item)
                offsets.append(self._offset)
                texts.append(self._read(item.token))
            if self._matcher.has_matched:
                finish, error = FinishReason.STOP, None
            if finish is not None:
                break
        self.is_done = finish is not None
        return Piece("".join(texts), tuple(tokens), tuple(offsets), finish, error)

    def _read(self, token: int) -> str:
        self.token_count += 1
        text = self._detokenizer.push(token)
        self._offset += len(text)
        if not text or self.token_count <= self._min_tokens:
            return text
        return self._matcher.push(text)

    def _rest(self) -> str:
        shown = self._matcher.push(self._detokenizer.finish())
        return shown + self._matcher.finish()

    def __repr__(self) -> str:
        state = "done" if self.is_done else "open"
        return f"<Choice {self.index}, {self.token_count} tokens, {state}>"
