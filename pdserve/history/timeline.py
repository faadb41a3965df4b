"""Draws a history as one HTML page that needs nothing else: lanes, bars, marks, findings."""

import time
from collections.abc import Iterator, Sequence
from html import escape

from pdserve.history.bars import Bar, Lane, Phase, lane_of
from pdserve.history.checker import summary
from pdserve.history.events import Entry, Event, History
from pdserve.history.files import file_name
from pdserve.history.findings import Finding, Place
from pdserve.history.page import LAYOUT, SCRIPT, STYLE

REQUESTS_MAX = 400
FINDINGS_MAX = 200
ROW_PX = 15
HEAD_PX = 22
TICK_COUNT = 12


def render(
    histories: Sequence[History],
    found: Sequence[Finding] = (),
    *,
    requests_max: int = REQUESTS_MAX,
) -> str:
    """Return the page; of many requests those with findings are drawn, and the latest."""
    shown = _shown(histories, found, requests_max)
    start_s = min((each.entries[0].at_s for each in histories if each.entries), default=0.0)
    stop_s = max((each.end_s for each in histories if each.entries), default=0.0)
    scale = _Scale(start_s, max(stop_s - start_s, 1e-6))
    lanes = [lane_of(history, shown) for history in histories if history.entries]
    sheet = [_axis(scale), *(line for lane in lanes for line in _lane(lane, scale, found))]
    note = ""
    if shown is not None:
        text = f"drawn: requests with findings and the latest, {len(shown)} in all"
        note = f"<p>{text}</p>"
    began = _wall_clock(histories)
    return LAYOUT.format(
        title=escape(f"pdserve history{', ' + began if began else ''}"),
        summary=escape(summary(histories)),
        verdict=_verdict(found),
        legend=_legend(),
        note=note,
        style=STYLE,
        script=SCRIPT,
        sheet="\n".join(sheet),
    )


class _Scale:
    """From seconds to where they are drawn."""

    def __init__(self, start_s: float, span_s: float) -> None:
        self.start_s = start_s
        self.span_s = span_s

    def left(self, at_s: float) -> str:
        return f"{100 * (at_s - self.start_s) / self.span_s:.4f}%"

    def width(self, length_s: float) -> str:
        return f"{100 * length_s / self.span_s:.4f}%"

    def told(self, at_s: float) -> str:
        return f"{at_s - self.start_s:.6f} s"


def _shown(
    histories: Sequence[History], found: Sequence[Finding], requests_max: int
) -> frozenset[str] | None:
    """Choose the requests to draw; None for all."""
    latest: dict[str, None] = {}
    for history in histories:
        for entry in history.entries:
            if entry.key is not None:
                latest.pop(entry.key.request_id, None)
                latest[entry.key.request_id] = None
    if len(latest) <= requests_max:
        return None
    accused = {each.key.request_id for each in found if each.key is not None}
    return frozenset([*list(latest)[-requests_max:], *sorted(accused)[:requests_max]])


def _wall_clock(histories: Sequence[History]) -> str:
    for history in histories:
        wall_s = history.entries[0].fields.get("wall_s") if history.entries else None
        if isinstance(wall_s, int | float):
            return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(wall_s))
    return ""


def _verdict(found: Sequence[Finding]) -> str:
    if not found:
        return '<p class="good">Every rule holds.</p>'
    items = []
    for each in found[:FINDINGS_MAX]:
        request = escape(each.key.request_id if each.key else "", quote=True)
        where = f'href="#{_anchor(each.places[-1])}" data-of="{request}"'
        text = f"{each.message}{f' ({each.key!r})' if each.key else ''}"
        items.append(
            f"<li><a {where}>{escape(text)}</a> <code>{escape(str(each.places[-1]))}</code> "
            f"{escape(each.rule.name.lower())}: {escape(each.rule.value)}</li>"
        )
    more = len(found) - len(items)
    rest = f"<p>and {more} more</p>" if more else ""
    count = f'<p class="bad">{len(found)} finding{"s" if len(found) != 1 else ""}:</p>'
    return f'{count}<ol class="findings">{"".join(items)}</ol>{rest}'


def _legend() -> str:
    phases = "".join(f'<i class="key {phase.value}"></i>{phase.value}' for phase in Phase)
    return f"{phases} &nbsp; thin line: token; red: abort, fault, link down; black: last word"


def _axis(scale: _Scale) -> str:
    step_s = _nice(scale.span_s / TICK_COUNT)
    count = int(scale.span_s / step_s) + 1
    ticks = "".join(
        f'<span style="left:{scale.width(number * step_s)}">{number * step_s:g} s</span>'
        for number in range(count)
    )
    return f'<div class="axis">{ticks}</div>'


def _nice(step_s: float) -> float:
    """Round up to 1, 2 or 5 times a power of ten."""
    base = 1e-6
    while base * 10 < step_s:
        base *= 10
    return next(base * factor for factor in (1, 2, 5, 10) if base * factor >= step_s)


def _lane(lane: Lane, scale: _Scale, found: Sequence[Finding]) -> Iterator[str]:
    history = lane.history
    height_px = HEAD_PX + lane.row_count * ROW_PX + 6
    state = "" if history.is_complete else ", killed or still running"
    yield f'<div class="lane" style="height:{height_px}px">'
    yield f'<span class="name">{escape(history.name)}{state}</span>'
    for entry in lane.marks:
        label = escape(entry.event.value.replace("_", " "))
        yield (
            f'<div class="mark {entry.event.value}" style="left:{scale.left(entry.at_s)}" '
            f'title="{_told(history, entry, scale)}"><b>{label}</b></div>'
        )
    for bar in lane.bars:
        yield from _bar(history, bar, scale)
    yield from _spots(history, scale, found)
    yield "</div>"


def _bar(history: History, bar: Bar, scale: _Scale) -> Iterator[str]:
    top_px = HEAD_PX + bar.row * ROW_PX
    request = f'data-r="{escape(bar.key.request_id, quote=True)}"'
    for each in bar.segments:
        length_s = each.stop_s - each.start_s
        label = f"{bar.key!r} {each.phase.value}, {1000 * length_s:.3f} ms"
        yield (
            f'<div class="bar {each.phase.value}" {request} style="top:{top_px}px;'
            f'left:{scale.left(each.start_s)};width:{scale.width(length_s)}" '
            f'title="{escape(label, quote=True)}, from {scale.told(each.start_s)}"></div>'
        )
    for entry in bar.ticks:
        yield (
            f'<div class="tick {entry.event.value}" {request} style="top:{top_px}px;'
            f'left:{scale.left(entry.at_s)}" title="{_told(history, entry, scale)}"></div>'
        )


def _spots(history: History, scale: _Scale, found: Sequence[Finding]) -> Iterator[str]:
    """Mark where findings point to, so that links lead there."""
    entries = {entry.line: entry for entry in history.entries}
    anchors: set[str] = set()
    for each in found[:FINDINGS_MAX]:
        place = each.places[-1]
        entry = entries.get(place.line)
        is_here = (place.who, place.incarnation) == (history.who, history.incarnation)
        if entry is None or not is_here or _anchor(place) in anchors:
            continue
        anchors.add(_anchor(place))
        text = f"{escape(each.message, quote=True)}&#10;{_told(history, entry, scale)}"
        yield (
            f'<div class="spot" id="{_anchor(place)}" '
            f'style="left:{scale.left(entry.at_s)}" title="{text}"></div>'
        )


def _anchor(place: Place) -> str:
    return f"at-{place.incarnation:x}-{place.line}"


def _told(history: History, entry: Entry, scale: _Scale) -> str:
    """Tell an event in full, for whoever hovers over it."""
    key = f" {entry.key.request_id}#{entry.key.attempt}" if entry.key else ""
    fields = (
        f"{name}={value}"
        for name, value in entry.fields.items()
        if not (entry.event is Event.START and name == "format")
    )
    where = f"{file_name(history.who, history.incarnation)}:{entry.line}"
    text = f"{scale.told(entry.at_s)} {entry.event.value}{key} {' '.join(fields)} ({where})"
    return escape(text, quote=True)
