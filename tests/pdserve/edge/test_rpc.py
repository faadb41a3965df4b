import pytest

from pdserve.config import HeartbeatConfig
from pdserve.edge.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS


@pytest.mark.parametrize("options", [CHANNEL_OPTIONS, SERVER_OPTIONS])
def test_pings_are_more_patient_than_the_judgement_of_heartbeats(
    options: tuple[tuple[str, int], ...],
) -> None:
    patience_s = dict(options)["grpc.http2.ping_timeout_ms"] / 1000
    assert HeartbeatConfig().dead_s < patience_s < 10
