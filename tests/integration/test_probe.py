"""The probe: productive or not, and no trace either way."""

import pytest

from pdserve.errors import Expired, Unavailable
from router.probe import probe

PROMPT = list(range(40, 90))


async def test_a_probe_goes_all_the_way_and_leaves_nothing(pair):
    wanted = await pair.tokens(pair.spec(PROMPT, 8))
    await pair.await_baseline()
    before = [worker.audit().blocks for worker in (pair.prefill.worker, pair.decode.worker)]
    ended = list(pair.core.table.ended)
    requests = pair.core.metrics.registry.get_sample_value(
        "pd_requests_total", {"outcome": "length"}
    )
    for _ in range(3):
        assert (await probe(pair.core))["status"] == "productive"
    await pair.await_baseline()
    assert [worker.audit().blocks for worker in (pair.prefill.worker, pair.decode.worker)] == before
    assert list(pair.core.table.ended) == ended
    assert requests == 1
    assert requests == pair.core.metrics.registry.get_sample_value(
        "pd_requests_total", {"outcome": "length"}
    )
    assert await pair.tokens(pair.spec(PROMPT, 8)) == wanted


async def test_a_live_loop_that_produces_nothing_fails_the_probe(pair):
    pair.hub.hold()  # every process lives and beats; the data plane delivers nothing
    with pytest.raises(Expired):
        await probe(pair.core, timeout_s=0.3)
    assert pair.core.is_ready is None
    pair.hub.release()
    await pair.await_baseline()


async def test_a_probe_is_refused_like_any_request(pair):
    await pair.core.pause()
    with pytest.raises(Unavailable):
        await probe(pair.core)
    await pair.core.resume()
    assert (await probe(pair.core))["status"] == "productive"
