"""What the executor asks of a device: streams, events, copies, captures.

On a GPU these are CUDA's.  On the CPU a stream is a thread with a queue, so that work is as late
there as on a GPU: whoever forgets to wait for an event, or writes to a buffer that a queued copy
has yet to read, is wrong on both, and the tests need no GPU to see it.

A fault of queued work is raised by the first event recorded behind it.
"""

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], object]


class Event(Protocol):
    """A point in a stream."""

    def wait(self) -> None:
        """Block this thread until the stream has come here; its work is then visible to all.

        Raises whatever the work before it failed with.
        """
        ...


class Stream(Protocol):
    """Work in order."""

    def run(self, work: Work) -> None:
        """Queue what ``work`` does with tensors; host memory it reads must stay as it is.

        May raise what goes wrong already while queueing.
        """
        ...

    def record(self) -> Event:
        """Mark the point behind everything queued so far."""
        ...

    def wait_for(self, event: Event) -> None:
        """Let nothing queued from here on begin before ``event``."""
        ...

    def close(self) -> None:
        """Finish what is queued.  Idempotent."""
        ...


class Capture(Protocol):
    """Keeps work for being repeated."""

    def record(self, work: Work) -> Callable[[], None]:
        """Keep ``work``, and give what repeats it: on the very same memory, reading no host state.

        Called on a stream; so are the repetitions.  ``work`` may be run meanwhile.
        """
        ...


class Device(Protocol):
    """One GPU, or the CPU taken for one."""

    @property
    def place(self) -> torch.device:
        """Where tensors are allocated."""
        ...

    def stream(self, name: str) -> Stream:
        """Begin a stream; the caller closes it."""
        ...

    def capture(self) -> Capture:
        """Begin a family of captures that share memory, and are replayed one at a time."""
        ...

    def host_bytes(self, size_bytes: int) -> Tensor:
        """Allocate host memory, zeroed, that copies may read and write in the background."""
        ...

    def entered(self) -> AbstractContextManager[object]:
        """Make a thread one that may use the device."""
        ...

    def settle(self) -> None:
        """Wait for what this thread did outside any stream: allocations, zeroes, weights."""
        ...


def _entered(place: torch.device) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(torch.inference_mode())
    if place.type == "cuda":
        stack.enter_context(torch.cuda.device(place))
    return stack


class CudaEvent:
    """An event of the driver's."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        # Blocking: a thread that spins here would take a core from the transfer engine.
        self.event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self.event.record(stream)

    def wait(self) -> None:
        """Wait without holding the interpreter."""
        self.event.synchronize()


class CudaStream:
    """A stream of the driver's."""

    def __init__(self, place: torch.device) -> None:
        self._stream = torch.cuda.Stream(place)  # type: ignore[no-untyped-call]

    def run(self, work: Work) -> None:
        """Launch."""
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> CudaEvent:
        """Record."""
        return CudaEvent(self._stream)

    def wait_for(self, event: Event) -> None:
        """Wait on the device."""
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def close(self) -> None:
        """Wait for the stream's end."""
        self._stream.synchronize()


class CudaCapture:
    """CUDA graphs that share one pool of memory: right as long as one at a time is replayed."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Work) -> Callable[[], None]:
        """Run twice, so that kernels are compiled and workspaces there, then capture."""
        for _ in range(2):
            work()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        stream.synchronize()
        # Other threads of this process, the transfer engine's too, go on calling the driver.
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class CudaDevice:
    """One GPU."""

    def __init__(self, index: int = 0) -> None:
        self.place = torch.device("cuda", index)

    def stream(self, name: str) -> CudaStream:
        """Begin a stream beside the default one."""
        del name
        return CudaStream(self.place)

    def capture(self) -> CudaCapture:
        """Begin a pool of graphs."""
        return CudaCapture()

    def host_bytes(self, size_bytes: int) -> Tensor:
        """Allocate pinned memory."""
        return torch.zeros(size_bytes, dtype=torch.uint8, pin_memory=True)

    def entered(self) -> AbstractContextManager[object]:
        """Choose the GPU for this thread."""
        return _entered(self.place)

    def settle(self) -> None:
        """Wait for the whole GPU."""
        torch.cuda.synchronize(self.place)


class CpuEvent:
    """A point in a thread's queue."""

    def __init__(self) -> None:
        self._reached = threading.Event()
        self._fault: Exception | None = None

    def reach(self, fault: Exception | None) -> None:
        """Let waiters go on; with ``fault``, by raising it."""
        self._fault = fault
        self._reached.set()

    def wait_quietly(self) -> None:
        """Wait, and leave a fault to who asks for results."""
        self._reached.wait()

    def wait(self) -> None:
        """Wait."""
        self._reached.wait()
        if self._fault is not None:
            raise self._fault


class CpuStream:
    """A thread with a queue."""

    def __init__(self, name: str, thread_count: int) -> None:
        self._queue: deque[Work | CpuEvent] = deque()
        self._changed = threading.Condition()
        self._is_closing = False
        self._fault: Exception | None = None
        self._thread = threading.Thread(
            target=self._loop, args=(thread_count,), name=f"stream-{name}", daemon=True
        )
        self._thread.start()

    def run(self, work: Work) -> None:
        """Queue; a fault waits for the next event."""
        self._put(work)

    def record(self) -> CpuEvent:
        """Queue an event."""
        event = CpuEvent()
        self._put(event)
        return event

    def wait_for(self, event: Event) -> None:
        """Queue a wait."""
        assert isinstance(event, CpuEvent)
        self._put(event.wait_quietly)

    def close(self) -> None:
        """Stop the thread once its queue is empty."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _put(self, item: Work | CpuEvent) -> None:
        with self._changed:
            assert not self._is_closing, "work for a closed stream"
            self._queue.append(item)
            self._changed.notify()

    def _loop(self, thread_count: int) -> None:
        torch.set_num_threads(thread_count)
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not self._queue and not self._is_closing:
                        self._changed.wait()
                    if not self._queue:
                        return
                    item = self._queue.popleft()
                if isinstance(item, CpuEvent):
                    item.reach(self._fault)
                    self._fault = None
                    continue
                try:
                    item()
                except Exception as error:
                    self._fault = self._fault or error


class CpuCapture:
    """Keeps the work itself.  It holds the same tensors, so it reads and writes the same memory."""

    def record(self, work: Work) -> Callable[[], None]:
        """Keep."""

        def replay() -> None:
            work()

        return replay


class CpuDevice:
    """The CPU in a GPU's place: slow, and of use where there is no GPU to try things on."""

    def __init__(self, thread_count: int = 1) -> None:
        self.place = torch.device("cpu")
        self._thread_count = thread_count

    def stream(self, name: str) -> CpuStream:
        """Start a thread."""
        return CpuStream(name, self._thread_count)

    def capture(self) -> CpuCapture:
        """Keep work as it is."""
        return CpuCapture()

    def host_bytes(self, size_bytes: int) -> Tensor:
        """Allocate."""
        return torch.zeros(size_bytes, dtype=torch.uint8)

    def entered(self) -> AbstractContextManager[object]:
        """Switch gradients off for this thread."""
        return _entered(self.place)

    def settle(self) -> None:
        """Outside streams the CPU does everything at once."""
