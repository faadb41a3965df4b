"""A gRPC server of a simulated process; servicers are registered with it as with the real one."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import grpc
from grpc import StatusCode

from sim.connection import Broken, End, Stream
from sim.node import Node


class Ports:
    """Who listens where."""

    def __init__(self, first_port: int) -> None:
        self._next_port = first_port
        self._bound: dict[str, SimServer] = {}
        self._machines: dict[str, str] = {}

    def bind(self, address: str, server: "SimServer") -> int:
        """Give an address to a server; raises ``RuntimeError`` if somebody else has it."""
        host, _, port = address.rpartition(":")
        if port == "0":
            port = str(self._next_port)
            self._next_port += 1
        address = f"{host}:{port}"
        if address in self._bound:
            raise RuntimeError(f"Failed to bind to address {address}; it is in use")
        self._bound[address] = server
        self._machines[address] = server.node.name
        return int(port)

    def release(self, server: "SimServer") -> None:
        """Take back every address of a server."""
        self._bound = {key: bound for key, bound in self._bound.items() if bound is not server}

    def find(self, address: str) -> "SimServer | None":
        """Return who listens at an address."""
        server = self._bound.get(address)
        return server if server is not None and server.is_listening else None

    def machine(self, address: str) -> str:
        """Name the machine an address belongs to."""
        return self._machines.get(address, address)


class SimServer:
    """Stands in for ``grpc.aio.Server``."""

    def __init__(self, node: Node, ports: Ports) -> None:
        self.node = node
        self.is_listening = False
        self.ends: dict[End, None] = {}
        self._ports = ports
        self._handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[Any]) -> None:
        """Do nothing: generated code registers each method by name as well."""

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: dict[str, "grpc.RpcMethodHandler[Any, Any]"]
    ) -> None:
        """Serve these methods."""
        for name, handler in method_handlers.items():
            self._handlers[f"/{service_name}/{name}"] = handler

    def add_insecure_port(self, address: str) -> int:
        """Bind an address; return the port."""
        return self._ports.bind(address, self)

    async def start(self) -> None:
        """Listen."""
        self.is_listening = not self.node.is_dead

    async def stop(self, grace: float | None) -> None:
        """Listen no more, give calls ``grace`` seconds to end, and cancel those that have not."""
        if self.node.is_dead:
            return
        self.leave()
        if grace and self._tasks:
            await asyncio.wait(list(self._tasks), timeout=grace)
        for end in list(self.ends):
            end.lose("Cancelling all calls", told="Cancelling all calls")
        self.ends.clear()
        await asyncio.sleep(0)

    def leave(self) -> None:
        """Be no longer found; connections that stand go on."""
        self.is_listening = False
        self._ports.release(self)
        for end in self.ends:
            end.leave()

    def open(self, path: str, stream: Stream) -> None:
        """Take a call that has arrived: its handler runs when the process does."""
        self.node.post(self._begin, path, stream)

    def _begin(self, path: str, stream: Stream) -> None:
        if stream.is_over:
            return
        if not self.is_listening:
            stream.finish(StatusCode.UNAVAILABLE, "Server is shutting down", is_orderly=True)
            return
        handler = self._handlers.get(path)
        if handler is None:
            stream.finish(StatusCode.UNIMPLEMENTED, "Method not found!", is_orderly=True)
            return
        context = SimContext(stream, handler)
        task = self.node.loop.create_task(self._serve(path, handler, context), name=path)
        self._tasks[task] = None
        task.add_done_callback(self._forget)
        dice = stream.end_of.connection.links.rng

        def over(code: StatusCode, details: str) -> None:
            del code, details
            if not context.is_finished:
                # Whether the handler is cancelled or what it reads ends first is open.
                if dice.random() < 0.5:
                    self.node.post(task.cancel)
                else:
                    self.node.post(self.node.post, task.cancel)

        stream.on_over = over

    def _forget(self, task: "asyncio.Task[None]") -> None:
        self._tasks.pop(task, None)

    async def _serve(
        self, path: str, handler: "grpc.RpcMethodHandler[Any, Any]", context: "SimContext"
    ) -> None:
        try:
            await _run(handler, context)
            context.finish()
        except (asyncio.CancelledError, grpc.aio.AbortError, grpc.aio.InternalError):
            # A handler that is cancelled tells its client nothing: gRPC's own does not either.
            return
        except Exception as error:
            self.node.loop.call_exception_handler(
                {"message": f"the servicer of {path} failed", "exception": error}
            )
            context.set_code(StatusCode.UNKNOWN)
            context.set_details(f"Unexpected {type(error)}: {error}")
            context.finish()


async def _run(handler: Any, context: "SimContext") -> None:
    if handler.request_streaming != handler.response_streaming:
        raise TypeError("wanted a single call, or a stream both ways")
    if not handler.request_streaming:
        request = await context.read()
        if request is not grpc.aio.EOF:
            context.answer(await handler.unary_unary(request, context))
        return
    serve = handler.stream_stream
    if inspect.iscoroutinefunction(serve):
        await serve(context.messages(), context)
        return
    async for answer in serve(context.messages(), context):
        await context.write(answer)


class SimContext:
    """Stands in for ``grpc.aio.ServicerContext``."""

    def __init__(self, stream: Stream, handler: "grpc.RpcMethodHandler[Any, Any]") -> None:
        self.is_finished = False  # the status was sent
        self._stream = stream
        self._handler: Any = handler
        self._abort: grpc.aio.AbortError | None = None
        self._code = StatusCode.OK
        self._details = ""

    async def read(self) -> Any:
        """Wait for a message; ``grpc.aio.EOF`` when none will come."""
        self._require_open()
        data = await self._stream.receive()
        self._require_open()
        return grpc.aio.EOF if data is None else self._handler.request_deserializer(data)

    async def messages(self) -> AsyncIterator[Any]:
        """Iterate over what ``read`` returns."""
        while (message := await self.read()) is not grpc.aio.EOF:
            yield message

    async def write(self, message: Any) -> None:
        """Send a message, once the peer has room."""
        self._require_open()
        try:
            await self._stream.send(self._handler.response_serializer(message))
        except Broken:
            raise grpc.aio.InternalError("Failed: the client has closed the call") from None

    async def abort(self, code: StatusCode, details: str = "") -> NoReturn:
        """End the call with a status; raises, always."""
        if self._abort is not None:
            raise grpc.aio.UsageError("Abort already called!")
        self._abort = grpc.aio.AbortError("Locally aborted.")
        self._code, self._details = code, details
        self._finish()
        raise self._abort

    def set_code(self, code: StatusCode) -> None:
        """Set what the call ends with."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Set why it ends so."""
        self._details = details

    def code(self) -> StatusCode:
        """Return what the call ends with."""
        return self._code

    def details(self) -> str:
        """Return why it ends so."""
        return self._details

    def done(self) -> bool:
        """Whether the status was sent."""
        return self.is_finished

    def cancelled(self) -> bool:
        """Whether the client is gone."""
        return self._stream.is_over and not self.is_finished

    def peer(self) -> str:
        """Name who calls."""
        return f"sim:{self._stream.end_of.peer.node.name}"

    def answer(self, message: Any) -> None:
        """Send the answer of a single call; its status follows."""
        self._require_open()
        if self._code is StatusCode.OK:
            self._stream.post(self._handler.response_serializer(message))

    def finish(self) -> None:
        """Send the status, unless that was done."""
        if self._abort is not None:
            raise AssertionError("an abort was swallowed") from self._abort
        if not self.is_finished:
            self._finish()

    def _finish(self) -> None:
        self.is_finished = True
        # Whether a client still reads what lay before an error is gRPC's own affair.
        is_orderly = self._code is StatusCode.OK or (
            self._stream.end_of.connection.links.rng.random() < 0.5
        )
        self._stream.finish(self._code, self._details, is_orderly=is_orderly)

    def _require_open(self) -> None:
        if self._abort is not None:
            raise self._abort
        if self.is_finished:
            raise grpc.aio.UsageError("RPC already finished.")
