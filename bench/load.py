"""A closed-loop streaming client: what it sees of an OpenAI endpoint."""

import asyncio
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import httpx
import msgspec


@dataclass(frozen=True, slots=True)
class Seen:
    """One streamed request: seconds to its first token, and between the later ones."""

    first_token_s: float
    between_s: tuple[float, ...]
    token_count: int


@dataclass(frozen=True, slots=True)
class Load:
    """``request_count`` requests of fixed size, ``concurrency`` at a time."""

    request_count: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    vocab: int
    seed: int


async def run(url: str, model: str, load: Load) -> tuple[list[Seen], float]:
    """Send the load; return what each request saw, and the whole time in seconds."""
    dice = random.Random(load.seed)
    prompts = [
        [dice.randrange(3, load.vocab) for _ in range(load.prompt_tokens)]
        for _ in range(load.request_count)
    ]
    gate = asyncio.Semaphore(load.concurrency)
    limits = httpx.Limits(max_connections=load.concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits, verify=False) as client:
        start_s = perf_counter()
        seen = await asyncio.gather(
            *(_one(client, gate, url, model, prompt, load.output_tokens) for prompt in prompts)
        )
        return list(seen), perf_counter() - start_s


async def _one(
    client: httpx.AsyncClient,
    gate: asyncio.Semaphore,
    url: str,
    model: str,
    prompt: Sequence[int],
    tokens: int,
) -> Seen:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    times: list[float] = []
    rest = b""
    async with gate:
        start_s = perf_counter()
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            answer.raise_for_status()
            # Raw: the client may share its processors with what it measures.
            async for piece in answer.aiter_raw():
                now_s = perf_counter()
                *events, rest = (rest + piece).split(b"\n\n")
                times += [now_s] * sum(count_tokens(event, url) for event in events)
    if len(times) != tokens:
        raise SystemExit(f"{url} sent {len(times)} tokens; wanted {tokens}")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Seen(times[0] - start_s, gaps, len(times))


def count_tokens(event: bytes, url: str) -> int:
    """Count the tokens of one event; an answer that is an error ends the benchmark."""
    if not event.startswith(b"data: {"):
        return 0
    fields = msgspec.json.decode(event[6:])
    if "error" in fields:
        raise SystemExit(f"{url} answered {fields['error']}")
    return sum(len(choice.get("token_ids") or ()) for choice in fields["choices"])


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least ``share`` of all values do not exceed."""
    assert values, "no values"
    # A share like 0.9 is a little more than itself in binary: do not count that as a value.
    rank = math.ceil(share * len(values) - 1e-9)
    return sorted(values)[max(0, rank - 1)]


def summary(seen: Sequence[Seen], whole_s: float) -> dict[str, float]:
    """Boil one round down to TTFT, TPOT, inter-token times and tokens/s.

    TPOT is a request's mean time between tokens; inter-token times are all of them, of all
    requests, so that one long pause shows.  Requests have two tokens or more.
    """
    firsts = [one.first_token_s for one in seen]
    per_token = [statistics.fmean(one.between_s) for one in seen]
    gaps = [gap for one in seen for gap in one.between_s]
    return {
        "ttft_ms_p50": 1000 * statistics.median(firsts),
        "ttft_ms_p90": 1000 * percentile(firsts, 0.9),
        "tpot_ms_mean": 1000 * statistics.fmean(per_token),
        "itl_ms_p50": 1000 * statistics.median(gaps),
        "itl_ms_p99": 1000 * percentile(gaps, 0.99),
        "itl_ms_max": 1000 * max(gaps),
        "tokens_per_s": sum(one.token_count for one in seen) / whole_s,
    }
