"""Server-sent events: the chunks of a streamed answer, spelt into bytes.

The hot path of the router.  What is equal in all chunks of an answer is encoded once; a
chunk encodes its text and nothing else, unless more was asked for.
"""

from typing import Any, Literal

from msgspec import json

from router.choice import Piece
from router.openai_answers import chat_logprobs, completion_logprobs
from router.text import TextCodec

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # asks proxies not to collect the tokens
}

Kind = Literal["completion", "chat"]


def event(value: Any) -> bytes:
    """Spell one event."""
    return b"data: " + json.encode(value) + b"\n\n"


class Chunks:
    """Spells the chunks of one streamed answer, all choices of it."""

    def __init__(
        self,
        kind: Kind,
        *,
        answer_id: str,
        created: int,
        model: str,
        codec: TextCodec,
        wants_logprobs: bool,
        wants_token_ids: bool,
        wants_usage: bool,
    ) -> None:
        self._is_chat = kind == "chat"
        self._codec = codec
        self._wants_logprobs = wants_logprobs
        self._wants_token_ids = wants_token_ids
        self._head = {
            "id": answer_id,
            "object": "chat.completion.chunk" if self._is_chat else "text_completion",
            "created": created,
            "model": model,
        }
        # {...,"choices":[{"index": is common to all; the rest is appended chunk by chunk.
        self._prefix = b"data: " + json.encode(self._head)[:-1] + b',"choices":[{"index":'
        self._suffix = b',"usage":null}\n\n' if wants_usage else b"}\n\n"
        self._begun: set[int] = set()

    def chunk(self, index: int, piece: Piece, prompt: tuple[int, ...]) -> bytes:
        """Spell what a piece adds; empty where there is nothing to say yet.

        ``prompt`` goes out once per choice, where token ids were asked for.
        """
        is_first = index not in self._begun
        wants_tokens = self._wants_logprobs or self._wants_token_ids
        if not piece.text and not piece.finish and not (piece.tokens and wants_tokens):
            return b""
        if is_first:
            self._begun.add(index)
        text = json.encode(piece.text)
        if not self._is_chat:
            body = b',"text":' + text
        elif is_first:
            body = b',"delta":{"role":"assistant","content":' + text + b"}"
        elif piece.text:
            body = b',"delta":{"content":' + text + b"}"
        else:
            body = b',"delta":{}'
        if wants_tokens:
            body += self._extras(piece)
        # The endpoints differ: a chat has one prompt, which stands beside the choices.
        spelt = b""
        if self._wants_token_ids and is_first:
            spelt = b',"prompt_token_ids":' + json.encode(prompt)
            body, spelt = (body, spelt) if self._is_chat else (body + spelt, b"")
        finish = b'"%b"' % piece.finish.value.encode() if piece.finish else b"null"
        ending = b"}]" + spelt + self._suffix
        return b'%b%d%b,"finish_reason":%b%b' % (self._prefix, index, body, finish, ending)

    def _extras(self, piece: Piece) -> bytes:
        extras: dict[str, Any] = {}
        if self._wants_logprobs and piece.tokens:
            extras["logprobs"] = (
                chat_logprobs(self._codec, piece.tokens)
                if self._is_chat
                else completion_logprobs(self._codec, piece.tokens, piece.offsets)
            )
        if self._wants_token_ids:
            extras["token_ids"] = [token.token for token in piece.tokens]
        return b"," + json.encode(extras)[1:-1] if extras else b""

    def usage(self, counts: dict[str, int]) -> bytes:
        """Spell the last chunk, which has no choices."""
        return event({**self._head, "choices": [], "usage": counts})
