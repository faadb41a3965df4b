"""Faults of the network between hosts: partitions, bad links, resets, blocked ports."""

from typing import cast

from tests.chaos.cluster import Setup
from tests.chaos.framework import Trial, pause, scenario
from tests.chaos.load import MIXED
from tests.chaos.network import Network, reason_to_skip
from tests.chaos.network_cluster import NetworkCluster

HOSTS = Setup("2P+2D hosts", settings=(("prefill.token_budget", 64),), make=NetworkCluster)


def network_of(trial: Trial) -> Network:
    """The network of a trial's cluster."""
    return cast("NetworkCluster", trial.cluster).network


@scenario(
    "net-pd-partition",
    ids="L1, N2",
    what="cut P0-D0 for 6 s, both ways",
    setup=HOSTS,
    skip=reason_to_skip,
)
async def pd_partition(trial: Trial) -> None:
    network = network_of(trial)
    answers = await trial.begin(MIXED)
    trial.fault()
    rules = network.cut("prefill-0", "decode-0")
    again = trial.client.start_all(MIXED[:8])
    await pause(6.0)
    network.heal()
    trial.fault()
    for rule in rules:
        trial.prove(f"{rule.packet_count} packets dropped: {rule.text}", rule.packet_count > 0)
    await trial.client.wait(answers + again)
    trial.measure_stall(answers)
