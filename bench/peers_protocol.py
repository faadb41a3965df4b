"""How an engine in a process of its own is asked to take a round: one line in, one line out.

Only the standard library is used: the driver of a peer runs in that peer's own environment.  A
driver answers one line when its model is loaded, then one for each load.  Loads are closed: a
request enters when another has ended, so ``concurrency`` are always under way.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts, ``concurrency`` at a time, each answered with exactly so many tokens, greedily."""

    prompts: list[list[int]]
    output_tokens: int
    concurrency: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What one request saw: seconds to its first token and between the later ones."""

    first_token_s: float
    between_s: list[float]
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Result:
    """One load, answered; answers are in the order of the prompts."""

    whole_s: float
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a driver loads; ``precision`` is float32, bfloat16 or int8.

    ``variant`` is the driver's own: a way of running that is not its default.
    """

    model: Path
    precision: str
    threads: int
    sequences_max: int
    context_max: int
    variant: str


class Engine(Protocol):
    """An engine with continuous batching, driven from one thread."""

    def add(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request; it is over by itself after so many tokens."""
        ...

    def step(self) -> list[tuple[int, list[int]]]:
        """Go on until something is produced; give the new tokens of each request."""
        ...


def run(engine: Engine, load: Load) -> Result:
    """Drive an engine through one load."""
    waiting = list(enumerate(load.prompts))[::-1]
    started: dict[int, float] = {}
    times: dict[int, list[float]] = {number: [] for number in range(len(load.prompts))}
    tokens: dict[int, list[int]] = {number: [] for number in times}
    under_way = 0
    start_s = perf_counter()
    while waiting or under_way:
        while waiting and under_way < load.concurrency:
            number, prompt = waiting.pop()
            started[number] = perf_counter()
            engine.add(number, prompt, load.output_tokens)
            under_way += 1
        produced = engine.step()
        now_s = perf_counter()
        for number, new in produced:
            times[number] += [now_s] * len(new)
            tokens[number] += new
            under_way -= len(new) > 0 and len(tokens[number]) >= load.output_tokens
    whole_s = perf_counter() - start_s
    for number, own in tokens.items():
        if len(own) != load.output_tokens:
            raise SystemExit(f"request {number} has {len(own)} of {load.output_tokens} tokens")
    answers = [
        Answer(
            first_token_s=own[0] - started[number],
            between_s=[after - before for before, after in itertools.pairwise(own)],
            tokens=tokens[number],
        )
        for number, own in times.items()
    ]
    return Result(whole_s, answers)


def serve(start: Callable[[Settings], Engine], packages: Sequence[str]) -> None:
    """Be a driver: load what the command line says, then answer loads until the input ends.

    What libraries print goes to the error output: the lines are for answers alone.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("settings", type=json.loads)
    given = parser.parse_args().settings
    settings = Settings(**given | {"model": Path(given["model"])})
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        start_s = perf_counter()
        engine = start(settings)
        ready = {"start_s": perf_counter() - start_s}
        print(
            json.dumps(ready | {"versions": {name: version(name) for name in packages}}),
            file=answers,
        )
        for line in sys.stdin:
            fields: dict[str, Any] = json.loads(line)
            print(json.dumps(asdict(run(engine, Load(**fields)))), file=answers)
    # A peer's background threads must not keep a process whose work is done.
    os._exit(0)
