"""The operators' routes: abort, pause, flush, other weights, and looking inside.

An operation goes on when the operator who asked for it hangs up: half a pause is worse than
a whole one.  Browsers are turned away: nothing here is for a page to call.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import parse_qs

from msgspec import json

from pdserve.errors import InvalidRequest, NotFound, PdserveError
from router.api import Control
from router.connection import Exchange
from router.openai_fields import Fields, decode_object
from router.pause import Mode

IDS_MAX = 4096
FLUSH_S_MAX = 600.0
PAUSE_S_MAX = 3600.0
UPDATE_S = 120.0
UPDATE_S_MAX = 3600.0
PATH_MAX = 4096

Handler = Callable[[Exchange], Awaitable[None]]
Operation = Coroutine[Any, Any, Mapping[str, Any]]


class Forbidden(PdserveError):
    """Not for whoever asks."""

    code = "PERMISSION_DENIED"
    http_status = 403
    reason = "forbidden"


class Admin:
    """Serves the admin listener; owns the operations it started until they end."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._operations: set[asyncio.Task[Mapping[str, Any]]] = set()

    def routes(self) -> dict[str, dict[str, Handler]]:
        """Give every route with its method."""
        return {
            "/v1/abort_requests": {"POST": _not_from_pages(self._abort)},
            "/v1/pause": {"POST": _not_from_pages(self._pause)},
            "/v1/resume": {"POST": _not_from_pages(self._resume)},
            "/v1/is_paused": {"GET": self._is_paused},
            "/v1/update_weights": {"POST": _not_from_pages(self._update_weights)},
            "/flush_cache": {"POST": _not_from_pages(self._flush_cache)},
            "/admin/v1/workers": {"GET": self._workers},
            "/admin/v1/requests": {"GET": self._requests},
            "/admin/v1/requests/": {"GET": self._request},
            "/admin/v1/audit": {"GET": self._audit},
        }

    async def close(self) -> None:
        """Cancel what is still under way."""
        for operation in self._operations:
            operation.cancel()
        await asyncio.gather(*self._operations, return_exceptions=True)

    async def _abort(self, exchange: Exchange) -> None:
        fields = decode_object(exchange.body)
        is_all = fields.flag("all") or False
        ids = _request_ids(fields)
        if is_all == (ids is not None):
            raise InvalidRequest("wanted either request_ids or all: true", param="request_ids")
        outcome = self._control.abort(ids)
        if not outcome.aborted and ids is not None:
            unknown = ", ".join(outcome.unknown[:16])
            raise NotFound(f"no such requests: {unknown}", param="request_ids")
        _answer(exchange, {"aborted": outcome.aborted, "unknown": outcome.unknown})

    async def _pause(self, exchange: Exchange) -> None:
        fields = decode_object(exchange.body) if exchange.body else Fields({})
        timeout_s = fields.number("timeout_s", 0, PAUSE_S_MAX)
        await self._operate(exchange, self._control.pause(_mode(fields), timeout_s))

    async def _resume(self, exchange: Exchange) -> None:
        await self._operate(exchange, self._control.resume())

    async def _is_paused(self, exchange: Exchange) -> None:
        _answer(exchange, self._control.pause_state())

    async def _update_weights(self, exchange: Exchange) -> None:
        fields = decode_object(exchange.body)
        path = fields.text("path", PATH_MAX)
        if not path or "\0" in path:
            fields.fail("path", path, "a model folder, as the workers see it")
        timeout_s = fields.number("timeout_s", 1, UPDATE_S_MAX) or UPDATE_S
        await self._operate(exchange, self._control.update_weights(path, timeout_s))

    async def _flush_cache(self, exchange: Exchange) -> None:
        await self._operate(exchange, self._control.flush_cache(_timeout_s(exchange)))

    async def _workers(self, exchange: Exchange) -> None:
        _answer(exchange, {"workers": list(self._control.workers())})

    async def _requests(self, exchange: Exchange) -> None:
        _answer(exchange, {"requests": list(self._control.requests())})

    async def _request(self, exchange: Exchange) -> None:
        request_id = exchange.path.removeprefix("/admin/v1/requests/")
        found = self._control.request(request_id)
        if found is None:
            raise NotFound(f"no request {request_id[:64]!r}, live or recent", param="request_id")
        _answer(exchange, found)

    async def _audit(self, exchange: Exchange) -> None:
        await self._operate(exchange, self._control.audit())

    async def _operate(self, exchange: Exchange, operation: Operation) -> None:
        task = asyncio.get_running_loop().create_task(operation)
        self._operations.add(task)
        task.add_done_callback(self._settle)
        _answer(exchange, await asyncio.shield(task))

    def _settle(self, task: asyncio.Task[Mapping[str, Any]]) -> None:
        self._operations.discard(task)
        if not task.cancelled():
            task.exception()  # whoever still listens has it; nobody else needs to


def _not_from_pages(handler: Handler) -> Handler:
    async def checked(exchange: Exchange) -> None:
        if "origin" in exchange.headers:
            raise Forbidden("the admin listener is not for web pages")
        await handler(exchange)

    return checked


def _mode(fields: Fields) -> Mode:
    value = fields.get("mode")
    if value is None:
        return Mode.ABORT
    modes = {mode.value: mode for mode in Mode}
    if not isinstance(value, str) or value not in modes:
        fields.fail("mode", value, f"one of {', '.join(modes)}")
    return modes[value]


def _request_ids(fields: Fields) -> list[str] | None:
    ids = fields.entries("request_ids", IDS_MAX)
    if ids is None:
        return None
    if not ids or not all(isinstance(one, str) and one for one in ids):
        fields.fail("request_ids", ids, "a list of ids, none of them empty")
    return ids


def _timeout_s(exchange: Exchange) -> float:
    given = parse_qs(exchange.query, keep_blank_values=True).get("timeout_s")
    if given is None:
        return 0.0
    try:
        timeout_s = float(given[-1])
    except ValueError:
        timeout_s = -1.0
    if not 0 <= timeout_s <= FLUSH_S_MAX:
        message = f"timeout_s is {given[-1][:32]!r}; wanted a number from 0 to {FLUSH_S_MAX:g}"
        raise InvalidRequest(message, param="timeout_s")
    return timeout_s


def _answer(exchange: Exchange, value: Mapping[str, Any]) -> None:
    headers = {"x-request-id": exchange.request_id, "content-type": "application/json"}
    exchange.answer(200, json.encode(value), headers)
