"""What links hold, they give back, in order where order was promised."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any

from sim.clock import START_S, VirtualLoop
from sim.links import Links, Pipe

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine


def play(script: Callable[[Links], Coroutine[Any, Any, Any]], seed: int = 0) -> Any:
    rng = random.Random(seed)
    loop = VirtualLoop(rng)
    try:
        return loop.run_until_complete(script(Links(loop, rng, delay_s=0.1, jitter_s=0.4)))
    finally:
        loop.close()


def test_parcels_overtake_each_other_and_a_pipe_keeps_its_order() -> None:
    async def script(links: Links) -> None:
        link = links.link("a", "b")
        pipe = Pipe(links, link)
        loose: list[int] = []
        ordered: list[int] = []
        for number in range(30):
            links.carry(link, 1, loose.append, number)
            pipe.send(1, ordered.append, number)
        await asyncio.sleep(0.099)
        assert loose == ordered == []
        await asyncio.sleep(0.402)
        assert ordered == list(range(30))
        assert sorted(loose) == list(range(30))
        assert loose != ordered

    play(script)


def test_links_are_one_way_and_outlive_what_they_carry() -> None:
    async def script(links: Links) -> None:
        links.cut("a", "b")
        assert links.is_silent("a", "b")
        assert links.is_silent("b", "a")
        assert not links.is_silent("a", "c")
        arrived: list[str] = []
        links.carry(links.link("b", "a"), 0, arrived.append, "back")
        links.carry(links.link("a", "b"), 0, arrived.append, "there")
        await asyncio.sleep(1)
        assert arrived == ["back"]
        assert links.link("a", "b") is links.link("a", "b")

    play(script)


def test_what_meets_a_cut_sets_out_anew_when_it_is_healed() -> None:
    async def script(links: Links) -> None:
        link = links.link("a", "b")
        pipe = Pipe(links, link)
        arrived: list[tuple[str, float]] = []

        def arrive(what: str) -> None:
            arrived.append((what, links.loop.time() - START_S))

        pipe.send(1, arrive, "on its way")
        dropped = links.carry(link, 1, arrive, "dropped")
        links.carry(link, 1, arrive, "parcel")
        links.cut("a", "b")
        pipe.send(1, arrive, "sent into the cut")
        await asyncio.sleep(5)
        assert arrived == []
        dropped.drop()
        links.heal("a", "b")
        links.heal("a", "b")
        pipe.send(1, arrive, "sent after it")
        await asyncio.sleep(5)
        assert [what for what, _ in arrived if what != "parcel"] == [
            "on its way",
            "sent into the cut",
            "sent after it",
        ]
        assert {what for what, _ in arrived} > {"parcel"}
        assert len(arrived) == 4
        assert all(5.1 <= when_s <= 5.5 for _, when_s in arrived)

    for seed in range(10):
        play(script, seed)


def test_a_cut_that_is_healed_before_anything_meets_it_delays_nothing() -> None:
    async def script(links: Links) -> None:
        arrived: list[float] = []
        links.carry(links.link("a", "b"), 1, lambda: arrived.append(links.loop.time() - START_S))
        links.cut("a", "b")
        await asyncio.sleep(0.05)
        links.heal_all()
        await asyncio.sleep(1)
        assert len(arrived) == 1
        assert arrived[0] <= 0.5

    play(script)


def test_a_pipe_that_is_cut_off_keeps_the_oldest() -> None:
    async def script(links: Links) -> None:
        pipe = Pipe(links, links.link("a", "b"))
        arrived: list[int] = []
        for number in range(10):
            pipe.send(1, arrived.append, number)
        assert pipe.count == 10
        pipe.cut_off(4)
        pipe.send(1, arrived.append, 99)
        await asyncio.sleep(1)
        assert arrived == [0, 1, 2, 3, 99]
        pipe.cut_off(0)
        pipe.send(1, arrived.append, 100)
        await asyncio.sleep(1)
        assert arrived[-1] == 100
        assert links.counts["lost"] == 6

    play(script)


def test_watchers_hear_of_every_cut_and_its_end_and_so_does_the_log() -> None:
    async def script(links: Links) -> None:
        heard: list[bool] = []
        links.log = []
        links.watch(lambda: heard.append(links.is_silent("a", "b")))
        links.partition(["a"], ["b", "c"])
        links.heal_all()
        links.heal_all()
        assert heard == [True, True, True, True, False, False, False, False] or (
            heard.count(True) >= 4 and heard[-1] is False and len(heard) == 8
        )
        assert [text for _, text in links.log] == [
            *("cut a to b", "cut b to a", "cut a to c", "cut c to a"),
            *("healed a to b", "healed b to a", "healed a to c", "healed c to a"),
        ]

    play(script)
