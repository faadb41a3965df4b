"""The router's two listeners: the public endpoint, and the operators' on its own address.

They share everything but their routes, so that no operator's route can be reached from
outside by mistake.  Every answer carries x-request-id: the client's label, or a new one.
"""

import asyncio
import logging
import random
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote

import prometheus_client
from msgspec import json
from prometheus_client import CollectorRegistry, Counter

from pdserve.config import RouterConfig
from pdserve.errors import NotFound, PdserveError
from router.admin import Admin
from router.api import Control, Generator
from router.connection import Bounds, ClientStalled, Connection, Exchange
from router.generate import JSON_HEADERS, Generate
from router.idempotency import Idempotency
from router.model_folder import ModelFolder
from router.openai_answers import error_body, error_object
from router.probe import probe
from router.sse import event

CONNECTIONS_MAX = 4096
SEND_BUFFER_BYTES = 64 << 10
BACKLOG = 1024

log = logging.getLogger(__name__)

_LABEL = re.compile(r"[\w.-]{1,128}", re.ASCII)
_METRICS_TYPE = {"content-type": prometheus_client.CONTENT_TYPE_LATEST}

Handler = Callable[[Exchange], Awaitable[None]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Path to method to handler; a path that ends with a slash takes all below it."""


class Listeners:
    """Both listeners and their connections.

    ``model`` is what the public endpoint serves; ``registry`` is shown under /metrics and
    gets the listeners' own counter.  ``client_lease_s`` is how long a call with an
    Idempotency-Key goes on without a client.
    """

    def __init__(
        self,
        generator: Generator,
        control: Control,
        config: RouterConfig,
        model: ModelFolder,
        registry: CollectorRegistry,
        *,
        client_lease_s: float = 5.0,
    ) -> None:
        self._generator = generator
        self._config = config
        self._model = model
        self._registry = registry
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenise")
        self._admin = Admin(control)
        self._connections: set[Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._answers = Counter(
            "pdserve_http_answers",
            "Answers by route and status; 499 is a client that left before it had one",
            ["listener", "route", "status"],
            registry=registry,
        )
        self._idempotency = Idempotency(
            client_s=client_lease_s, kept_s=config.idempotency_s, kept_max=config.idempotency_max
        )
        generate = Generate(
            generator,
            model,
            executor=self._executor,
            rng=random.Random(secrets.randbits(64)),
            idempotency=self._idempotency,
        )
        watched: Routes = {
            "/livez": {"GET": self._live},
            "/readyz": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
        }
        self._public: Routes = {
            "/v1/completions": {"POST": _json_only(generate.completions)},
            "/v1/chat/completions": {"POST": _json_only(generate.chat)},
            "/v1/models": {"GET": self._models},
            "/v1/models/": {"GET": self._one_model},
            "/model_info": {"GET": self._model_info},
            "/health": {"GET": self._ready},
            **watched,
        }
        self._operators: Routes = {
            **self._admin.routes(),
            "/health_generate": {"GET": self._generates},
            **watched,
        }

    async def start(self) -> tuple[int, int]:
        """Listen; return the public and the admin port."""
        config = self._config
        public = await self._listen("public", config.host, config.port, self._public)
        admin = await self._listen("admin", config.admin_host, config.admin_port, self._operators)
        return public, admin

    async def close(self, drain_s: float = 5.0) -> None:
        """Take no more connections, give answers ``drain_s`` to leave, then cut.  Idempotent."""
        for server in self._servers:
            server.close()
        self._servers.clear()
        running = [one.task for one in self._connections if one.task is not None]
        for connection in list(self._connections):
            if connection.task is None:
                connection.close()
        if running:
            await asyncio.wait(running, timeout=drain_s)
        left = [one.task for one in self._connections if one.task is not None]
        for connection in list(self._connections):
            connection.abort()
        if left:
            await asyncio.wait(left, timeout=drain_s + 1)
        await asyncio.sleep(0)  # a cut connection learns of it in the loop's next round
        await self._idempotency.close()
        await self._admin.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _listen(self, listener: str, host: str, port: int, routes: Routes) -> int:
        bounds = Bounds(
            body_bytes_max=self._config.body_bytes_max,
            client_stall_s=self._config.client_stall_s,
        )

        async def handle(exchange: Exchange) -> None:
            await self._handle(listener, routes, exchange)

        def connection() -> Connection:
            return Connection(handle, bounds, self._connections, CONNECTIONS_MAX)

        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            connection, sock=_bound_socket(host, port), backlog=BACKLOG
        )
        self._servers.append(server)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    # One request.

    async def _handle(self, listener: str, routes: Routes, exchange: Exchange) -> None:
        label = exchange.headers.get("x-request-id", "")
        exchange.request_id = label if _LABEL.fullmatch(label) else secrets.token_hex(16)
        route, methods = _find(routes, exchange.path)
        try:
            await self._route(exchange, route, methods)
        except ClientStalled:
            raise  # the connection's own end: nobody is left to tell, and nothing has failed
        except PdserveError as error:
            await _fail(exchange, error)
        except Exception as error:
            log.exception("%s: %s failed", exchange.request_id, route)
            await _fail(exchange, error)
        finally:
            # Left without an answer: the client is gone, or stalled.
            status = str(exchange.status or 499)
            self._answers.labels(listener, route, status).inc()

    async def _route(
        self, exchange: Exchange, route: str, methods: Mapping[str, Handler] | None
    ) -> None:
        refusal = exchange.refusal
        if refusal is not None:
            _refuse(exchange, refusal.status, refusal.reason, refusal.message)
            return
        if methods is None:
            _refuse(exchange, 404, "not_found", f"there is no {exchange.path[:128]!r} here")
            return
        handler = methods.get("GET" if exchange.method == "HEAD" else exchange.method)
        if handler is None:
            allowed = ", ".join(sorted(methods))
            _refuse(
                exchange,
                405,
                "method_not_allowed",
                f"{exchange.method} is not for {route}; use {allowed}",
                {"allow": allowed},
            )
            return
        await handler(exchange)

    # What is small enough to live here.

    async def _live(self, exchange: Exchange) -> None:
        # That this runs is the answer: it is the loop's own.
        answer_json(exchange, 200, {"status": "live"})

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._generator.is_ready
        if reason is None:
            answer_json(exchange, 200, {"status": "ready"})
        else:
            _refuse(exchange, 503, "not_ready", reason, {"retry-after": "1"})

    async def _generates(self, exchange: Exchange) -> None:
        answer_json(exchange, 200, await probe(self._generator))

    async def _metrics(self, exchange: Exchange) -> None:
        body = prometheus_client.generate_latest(self._registry)
        exchange.answer(200, body, {"x-request-id": exchange.request_id, **_METRICS_TYPE})

    async def _models(self, exchange: Exchange) -> None:
        answer_json(exchange, 200, {"object": "list", "data": [self._model_object()]})

    async def _one_model(self, exchange: Exchange) -> None:
        name = unquote(exchange.path.removeprefix("/v1/models/"))
        if name != self._model.name:
            raise NotFound(
                f"the model {name[:128]!r} does not exist", param="model", reason="model_not_found"
            )
        answer_json(exchange, 200, self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": 0,
            "owned_by": "pdserve",
            "max_model_len": self._model.context_tokens_max,
        }

    async def _model_info(self, exchange: Exchange) -> None:
        model = self._model
        info = {
            "name": model.name,
            "vocab_size": model.vocab_size,
            "context_tokens_max": model.context_tokens_max,
            "eos_token_ids": sorted(model.eos_tokens),
            "has_chat_template": model.chat_template is not None,
            "defaults": {
                name: getattr(model.defaults, name) for name in type(model.defaults).__slots__
            },
        }
        answer_json(exchange, 200, info)


def answer_json(exchange: Exchange, status: int, value: Any) -> None:
    """Answer with a JSON body."""
    exchange.answer(
        status, json.encode(value), {"x-request-id": exchange.request_id, **JSON_HEADERS}
    )


def _json_only(handler: Handler) -> Handler:
    async def checked(exchange: Exchange) -> None:
        kind = exchange.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            seen = f"content-type is {kind[:64]!r}" if kind else "content-type is missing"
            message = f"{seen}; wanted 'application/json'"
            _refuse(exchange, 415, "unsupported_media_type", message)
            return
        await handler(exchange)

    return checked


def _find(routes: Routes, path: str) -> tuple[str, Mapping[str, Handler] | None]:
    """Find a route by the path as it was sent: exact, or below one that ends with a slash."""
    methods = routes.get(path)
    if methods is not None and not path.endswith("/"):
        return path, methods
    for route, below in routes.items():
        if route.endswith("/") and path.startswith(route) and len(path) > len(route):
            return route, below
    return "unknown", None


def _refuse(
    exchange: Exchange,
    status: int,
    code: str,
    message: str,
    headers: Mapping[str, str] | None = None,
) -> None:
    body = error_object(
        message, status=status, code=code, param=None, request_id=exchange.request_id
    )
    exchange.answer(
        status,
        json.encode(body),
        {"x-request-id": exchange.request_id, **JSON_HEADERS, **(headers or {})},
    )


async def _fail(exchange: Exchange, error: Exception) -> None:
    """Answer with a fault, or end the stream with it: never as if nothing had happened (V11)."""
    body = error_body(error, exchange.request_id)
    if exchange.has_begun:
        await exchange.send(event(body))
        exchange.finish()
        return
    status = error.http_status if isinstance(error, PdserveError) else 500
    headers = {"x-request-id": exchange.request_id, **JSON_HEADERS}
    retry_s = getattr(error, "retry_after_s", None)
    if retry_s is None and status in (429, 503):
        retry_s = 1
    if retry_s is not None:
        headers["retry-after"] = str(retry_s)
    exchange.answer(status, json.encode(body), headers)


def _bound_socket(host: str, port: int) -> socket.socket:
    """Bind a socket whose connections hold little for readers that do not read."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by every accepted connection; must be set before it is made.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setblocking(False)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
