"""One token there and back: whether the cluster produces, which a live loop does not tell.

A probe goes the way of every request, through placement, prefill, hand-off and decode, and
leaves nothing behind: it is in no metric, no log and no list of what has ended, and it is too
short to fill a block, so that no prefix cache holds it.
"""

import asyncio
from dataclasses import replace
from typing import Any

from pdserve.errors import Expired
from pdserve.request import SamplingParams
from router.api import GenerationSpec, Generator, OutputEnd

PROBE_S = 5.0

# The first token comes from prefill, the second from decode.
_SPEC = GenerationSpec(
    prompt=(0,),
    output_tokens_max=2,
    output_tokens_min=0,
    stop_tokens=frozenset(),
    sampling=SamplingParams(temperature=0.0),
    is_probe=True,
)


async def probe(generator: Generator, timeout_s: float = PROBE_S) -> dict[str, Any]:
    """Run one probe; return how long it took.

    Raises:
        PdserveError: it was refused, or ended without its tokens; the reason says why.

    """
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    count = 0
    async for batch in generator.start(replace(_SPEC, deadline_s=timeout_s)).outputs():
        for item in batch:
            if not isinstance(item, OutputEnd):
                count += 1
            elif item.error is not None:
                raise item.error
    if count < _SPEC.output_tokens_max:
        raise Expired(f"the probe ended after {count} tokens; wanted {_SPEC.output_tokens_max}")
    return {"status": "productive", "latency_s": round(loop.time() - began_s, 6)}
