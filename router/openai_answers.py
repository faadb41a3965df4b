"""What clients get: the bodies and the parts of bodies both endpoints answer with.

Pure: plain data in, JSON-ready data out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.errors import PdserveError
from router.api import OutputToken
from router.text import TextCodec

LOGPROB_MIN = -9999.0  # JSON knows no infinity

_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


def error_body(error: Exception, request_id: str) -> dict[str, Any]:
    """Describe a fault; of ours only that it was ours."""
    if not isinstance(error, PdserveError):
        error = PdserveError("internal error")
    return error_object(
        error.message,
        status=error.http_status,
        code=error.reason,
        param=error.param,
        request_id=request_id,
    )


def error_object(
    message: str, *, status: int, code: str, param: str | None, request_id: str
) -> dict[str, Any]:
    """Build the one shape every error has."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {
        "error": {
            "message": message,
            "type": kind,
            "code": code,
            "param": param,
            "request_id": request_id,
        }
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Count what was read and written."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def completion_logprobs(
    codec: TextCodec, tokens: Sequence[OutputToken], offsets: Sequence[int]
) -> dict[str, Any]:
    """Build the logprobs of /v1/completions; the chosen token is always among the top ones."""
    tops: list[Mapping[str, float]] = []
    for token in tokens:
        top: dict[str, float] = {}
        for other, logprob in ((token.token, token.logprob), *token.top):
            # Different halves of characters look the same; the first is the likelier.
            top.setdefault(_text(codec, other), max(logprob, LOGPROB_MIN))
        tops.append(top)
    return {
        "tokens": [_text(codec, token.token) for token in tokens],
        "token_logprobs": [max(token.logprob, LOGPROB_MIN) for token in tokens],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def chat_logprobs(codec: TextCodec, tokens: Sequence[OutputToken]) -> dict[str, Any]:
    """Build the logprobs of /v1/chat/completions."""
    return {
        "content": [
            {
                **_chat_token(codec, token.token, token.logprob),
                "top_logprobs": [_chat_token(codec, other, value) for other, value in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def _chat_token(codec: TextCodec, token: int, logprob: float) -> dict[str, Any]:
    spelt = codec.token_bytes(token)
    return {
        "token": spelt.decode("utf-8", "replace"),
        "logprob": max(logprob, LOGPROB_MIN),
        "bytes": list(spelt),
    }


def _text(codec: TextCodec, token: int) -> str:
    return codec.token_bytes(token).decode("utf-8", "replace")
