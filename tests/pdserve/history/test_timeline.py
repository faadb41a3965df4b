from html.parser import HTMLParser
from typing import Any

import pytest

from pdserve.history.bars import Phase, lane_of
from pdserve.history.checker import check
from pdserve.history.events import Event
from pdserve.history.timeline import render
from pdserve.request import Key

R0, R1 = "a" * 32, "b" * 32
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Parses strictly: every tag that opens is closed, in order; collects what tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[dict[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append({"tag": tag, **{name: value or "" for name, value in attrs}})
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, name: str) -> list[dict[str, str]]:
        """Elements of a class."""
        return [each for each in self.elements if name in each.get("class", "").split()]


def phases(worker: Any) -> list[list[Phase]]:
    return [[segment.phase for segment in bar.segments] for bar in lane_of(worker.history).bars]


def test_bars_show_what_each_process_did(script: Any) -> None:
    script.whole()
    assert phases(script.router) == [[Phase.QUEUE, Phase.SERVED] * 2]
    assert phases(script.prefill) == [[Phase.QUEUE, Phase.PREFILL, Phase.TRANSFER]] * 2
    assert phases(script.decode) == [[Phase.QUEUE, Phase.TRANSFER, Phase.DECODE]]


def test_what_is_over_but_not_safe_is_shown_until_its_fence(script: Any) -> None:
    key = Key(R0, 0)
    script.accept(R0)
    script.dispatch(key, script.decode)
    script.decode.record(Event.LEASE, key, ids=[], held_count=0, epoch=0, peer="")
    script.decode.record(Event.TERMINAL, key, reason="aborted", epoch=0)
    script.decode.record(Event.FENCE, key, epoch=0)
    assert phases(script.decode) == [[Phase.QUEUE, Phase.TRANSFER, Phase.FENCE]]


def test_what_has_not_ended_is_drawn_to_the_end(script: Any) -> None:
    script.accept(R0)
    script.router.record(Event.PAUSE, why="paused")
    (bar,) = lane_of(script.router.history).bars
    assert bar.stop_s == script.router.history.end_s > bar.start_s


def test_bars_that_overlap_get_rows_of_their_own(script: Any) -> None:
    script.accept(R0)
    script.accept(R1)
    script.end(Key(R0, 0), 0)
    script.accept("c" * 32)
    lane = lane_of(script.router.history)
    assert [bar.row for bar in lane.bars] == [0, 1, 0]
    assert lane.row_count == 2


def test_the_page_parses_and_needs_nothing_from_elsewhere(script: Any) -> None:
    script.whole()
    script.whole(R1)
    script.router.record(Event.LINK_DOWN, peer="decode-0", incarnation="3", why='<killed> & "lost"')
    script.stop()
    text = render(script.histories)
    page = Page(text)
    assert len(page.of("lane")) == 4
    assert len(page.of("bar")) == 2 * (4 + 3 + 3 + 3 + 3)
    assert "&lt;killed&gt; &amp;" in text
    assert "<killed>" not in text
    for element in page.elements:
        assert not {"src", "srcset"} & element.keys()
        assert element["tag"] not in {"link", "iframe", "img"}
        assert element.get("href", "#").startswith("#")
    assert "http" not in text
    assert "@import" not in text


def test_everything_is_drawn_within_the_sheet(script: Any) -> None:
    script.whole()
    page = Page(render(script.histories))
    placed = [*page.of("bar"), *page.of("tick"), *page.of("mark")]
    for element in placed:
        style = dict(part.split(":") for part in element["style"].split(";"))
        left = float(style["left"].rstrip("%"))
        width = float(style.get("width", "0%").rstrip("%"))
        assert 0 <= left <= left + width <= 100.001


def test_findings_are_listed_with_links_to_their_place(script: Any) -> None:
    script.whole()
    script.change(
        script.router,
        lambda each: each.event is Event.EMIT and each.fields["index"] == 1,
        tokens=[77],
    )
    script.block(script.decode, "take", [16], None, "used")
    found = check(script.histories)
    assert {each.rule.name for each in found} == {"SAID", "HELD"}
    page = Page(render(script.histories, found))
    links = [each["href"] for each in page.elements if each["tag"] == "a"]
    spots = [f"#{each['id']}" for each in page.of("spot")]
    assert sorted(links) == sorted(spots)
    assert len(spots) == 2
    assert "Every rule holds" not in render(script.histories, found)
    assert "Every rule holds" in render(script.histories)


def test_of_many_requests_the_latest_and_the_accused_are_drawn(script: Any) -> None:
    ids = [f"{number:032x}" for number in range(30)]
    for request_id in ids:
        script.accept(request_id)
        script.end(Key(request_id, 0), 0)
    script.router.entries[5] = script.router.entries[4]  # the first one's end is its second begin
    found = check(script.histories)
    page = Page(render(script.histories, found, requests_max=5))
    drawn = {each["data-r"] for each in page.of("bar")}
    assert drawn == {ids[0], *ids[-5:]}


@pytest.mark.parametrize("count", [0, 1])
def test_hardly_anything_can_be_drawn_too(script: Any, count: int) -> None:
    Page(render(script.histories[:count]))
