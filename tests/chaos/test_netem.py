"""The bad line: which packets it strikes, and when the others come out."""

from tests.chaos.netem import Line, Queue

COUNT = 4000
GAP_S = 0.001


def carried(line: Line) -> tuple[Queue, list[tuple[float, int]]]:
    """Put numbered packets on a line, one each millisecond; return what comes out and when."""
    queue = Queue(line)
    out: list[tuple[float, int]] = []
    for tick in range(COUNT + 1000):
        now_s = tick * GAP_S
        if tick < COUNT:
            queue.take("there", tick.to_bytes(2, "big"), now_s)
        out += [(now_s, int.from_bytes(packet, "big")) for _, packet in queue.due(now_s)]
    return queue, out


def test_a_good_line_changes_nothing() -> None:
    queue, out = carried(Line())
    assert [number for _, number in out] == list(range(COUNT))
    assert all(abs(at_s - number * GAP_S) < GAP_S / 2 for at_s, number in out)
    assert (queue.counts.lost, queue.counts.doubled, queue.counts.overtaken) == (0, 0, 0)


def test_every_packet_waits_as_long_as_the_line_says() -> None:
    queue, out = carried(Line(delay_s=0.02, jitter_s=0.005))
    waits_s = [at_s - number * GAP_S for at_s, number in out]
    assert len(out) == COUNT
    assert min(waits_s) >= 0.015 - 1e-9
    assert max(waits_s) <= 0.025 + GAP_S + 1e-9
    assert queue.counts.overtaken > COUNT / 10


def test_losses_and_doubles_are_as_many_as_asked_for_and_are_counted() -> None:
    queue, out = carried(Line(loss=0.1, double=0.05))
    counts = queue.counts
    assert 0.08 * COUNT < counts.lost < 0.12 * COUNT
    assert 0.03 * COUNT < counts.doubled < 0.06 * COUNT
    assert counts.sent == len(out) == COUNT - counts.lost + counts.doubled
    assert len({number for _, number in out}) == COUNT - counts.lost


def test_a_seed_decides_everything() -> None:
    line = Line(delay_s=0.02, jitter_s=0.01, loss=0.1, double=0.1, seed=7)
    assert carried(line)[1] == carried(line)[1]
    assert carried(line)[1] != carried(Line(0.02, 0.01, 0.1, 0.1, seed=8))[1]


def test_nothing_is_due_before_its_time() -> None:
    queue = Queue(Line(delay_s=1.0))
    queue.take("there", b"x", 5.0)
    assert list(queue.due(5.9)) == []
    assert abs(queue.wait_s(5.9) - 0.1) < 1e-9
    assert list(queue.due(6.0)) == [("there", b"x")]
