"""A stream is late, in order, and tells of faults at its events; on a thread as on a GPU."""

import threading
from collections.abc import Iterator

import pytest
import torch

from engine.device.cuda.streams import Device, Stream

PATIENCE_S = 30


@pytest.fixture
def streams(device: Device) -> Iterator[tuple[Stream, Stream]]:
    with device.entered():
        pair = device.stream("first"), device.stream("second")
        yield pair
        for stream in pair:
            stream.close()


def test_work_is_done_in_order_and_a_waiting_stream_comes_after(
    device: Device, streams: tuple[Stream, Stream]
) -> None:
    first, second = streams
    with device.entered():
        values = torch.zeros(1 << 20, device=device.place)
        copy = torch.zeros_like(values)
        device.settle()
        for _ in range(20):
            first.run(lambda: values.add_(1))
        second.wait_for(first.record())
        second.run(lambda: copy.copy_(values))
        second.record().wait()
        assert copy.eq(20).all()


def test_host_memory_is_read_when_the_copy_is_done_and_not_when_it_is_asked_for(
    device: Device, streams: tuple[Stream, Stream]
) -> None:
    first, _ = streams
    with device.entered():
        host = device.host_bytes(16)
        target = torch.ones(16, dtype=torch.uint8, device=device.place)
        assert not host.any()
        host += 5
        first.run(lambda: target.copy_(host, non_blocking=True))
        first.record().wait()
        assert target.eq(5).all()


def test_a_capture_reads_what_is_at_its_addresses_when_it_is_replayed(
    device: Device, streams: tuple[Stream, Stream]
) -> None:
    first, _ = streams
    with device.entered():
        into = torch.zeros(8, device=device.place)
        out = torch.zeros(8, device=device.place)
        device.settle()
        kept = []
        first.run(lambda: kept.append(device.capture().record(lambda: out.copy_(into * 2))))
        first.record().wait()
        for value in (1, 7):
            first.run(lambda value=value: into.fill_(value))  # type: ignore[misc]
            first.run(kept[0])
            first.record().wait()
            assert out.eq(2 * value).all()


def test_a_fault_is_raised_by_the_event_behind_it_and_by_no_later_one(
    cpu_device: Device,
) -> None:
    stream, other = cpu_device.stream("work"), cpu_device.stream("other")
    done: list[int] = []

    def fail(number: int) -> None:
        raise ValueError(f"fault {number}")

    before = stream.record()
    stream.run(lambda: fail(1))
    stream.run(lambda: fail(2))
    stream.run(lambda: done.append(3))
    bad, good = stream.record(), stream.record()
    other.wait_for(bad)
    other.run(lambda: done.append(4))
    last = other.record()
    before.wait()
    with pytest.raises(ValueError, match="fault 1"):
        bad.wait()
    good.wait()
    last.wait()
    assert done == [3, 4]
    stream.close()
    other.close()


def test_closing_finishes_what_is_queued_and_may_be_repeated(cpu_device: Device) -> None:
    stream = cpu_device.stream("work")
    gate, done = threading.Event(), []
    stream.run(lambda: gate.wait(PATIENCE_S))
    stream.run(lambda: done.append(torch.is_inference_mode_enabled()))
    assert not done
    gate.set()
    stream.close()
    stream.close()
    assert done == [True]
